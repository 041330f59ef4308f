"""A whole AudioLDM as published becomes a `RefinedAudioLDM`, with its own conditioner or with another one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from refined_ldm.clap import Clap
from refined_ldm.published.checkpoints import read_audioldm
from refined_ldm.published.clap_weights import clap_kind
from refined_ldm.published.conditioner import conditioner_from_tensors
from refined_ldm.published.swap import fit_film
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.weights import load_into

AUDIOLDM_TOKENS = 512  # longest caption in AudioLDM; LAION-CLAP was trained with 77


def model_from_audioldm(
    cls: type[RefinedAudioLDM],
    path: str | Path,
    conditioner: str | None = None,
    clap_checkpoint: str | Path | None = None,
    tokenizer: str | Path | None = None,
    fit_on: Sequence[str] | None = None,
    average: bool = True,
    device: str | torch.device = "cpu",
    **changes,
) -> RefinedAudioLDM:
    """A published AudioLDM as a model; the arguments are those of `RefinedAudioLDM.from_audioldm`."""
    config, parts = read_audioldm(path, average)
    if tokenizer is None and (Path(path) / "tokenizer").is_dir():
        tokenizer = Path(path) / "tokenizer"
    trained_with = (clap_kind(parts.get("clap", ())) or config.clap).removesuffix(" fusion")
    name = conditioner or trained_with
    swapped, held = name != trained_with, "clap" in parts
    if fit_on is not None and not (swapped and held):
        raise ValueError(
            f"fit_on asks for another conditioner than {trained_with}, and for a file that holds that "
            f"one too: got {name}, and {path}{'' if held else ', which holds none'}"
        )
    if not swapped and clap_checkpoint is None and not held:
        raise ValueError(f"{path} holds no conditioner: give the file of {trained_with} as clap_checkpoint=")

    old = clap = None
    if held and (fit_on is not None or not swapped and clap_checkpoint is None):
        old = clap = conditioner_from_tensors(trained_with, parts["clap"], path, tokenizer, AUDIOLDM_TOKENS)
    if swapped or clap_checkpoint is not None:
        clap = Clap.load(name, clap_checkpoint, None if swapped else tokenizer)
    settings = {"name": "paper" if swapped else "baseline", "clap": name,
                "unet": replace(config.unet, embedding_dim=clap.embedding_dim)}  # fmt: skip
    model = cls(config.changed(**settings | changes), clap=clap)

    film = nn.Linear(config.unet.embedding_dim, len(parts["unet"]["film_embed.bias"]))
    load_into(film, {key: parts["unet"].pop(f"film_embed.{key}") for key in ("weight", "bias")}, path)
    if swapped:
        film = _fitted_film(model, old, film, fit_on) if fit_on is not None else model.unet.film_embed
    load_into(model.unet, parts["unet"] | {f"film_embed.{k}": v for k, v in film.state_dict().items()}, path)
    load_into(model.vae, parts["vae"], path)
    load_into(model.vocoder, parts["hifigan"], path)
    model.scale.copy_(parts["scale"][""])
    return model.to(device).eval()


@torch.no_grad()
def _fitted_film(model, old, film, captions):
    """A film layer for the model's conditioner under which `captions` and "" keep the film vectors of the old one."""
    captions = ["", *captions]  # guidance moves away from ""
    gain = model.config.unet.embedding_gain
    fit = model.film_fit = fit_film(model.clap.embed_text(captions) * gain, film(old.embed_text(captions)))
    fitted = nn.Linear(model.clap.embedding_dim, film.out_features)
    return load_into(fitted, {"weight": fit.weight, "bias": fit.bias}, "the fitted layer")
