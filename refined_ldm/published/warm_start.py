"""Parts of a model from published files: the ones that a configuration names, as AudioLDM's YAML does."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from refined_ldm.clap import Clap
from refined_ldm.config import Config
from refined_ldm.model_folder import PARTS, part_path
from refined_ldm.published.audioldm import AUDIOLDM_TOKENS
from refined_ldm.published.checkpoints import read_parts
from refined_ldm.published.clap_weights import clap_kind
from refined_ldm.published.conditioner import conditioner_from_tensors
from refined_ldm.published.hub import PUBLISHED
from refined_ldm.published.swap import FilmFit, fit_film
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.weights import load_into

VOCODER_FILE = "hifigan_16k_64bins.ckpt"  # AudioLDM looks for it by this name, in the folder of its first stage
SETTINGS = {  # setting -> the key of AudioLDM's YAML, and what to do if the file is not there
    "start_from": ("reload_from_ckpt", "name it where it is, or write null to start the U-Net from nothing"),
    "vae_checkpoint": ("first_stage_config.params.reload_from_ckpt",
                       "name it where it is, or write null and train a first stage (`--stage vae ldm`)"),
    "vocoder_checkpoint": ("no key", "name it where it is"),
    "clap_checkpoint": ("pretrained_path of the conditioner", "name it where it is, with --clap-checkpoint"),
}  # fmt: skip
RUN_INSTEAD = {  # what to give where a run's folder was given
    "vae_checkpoint": "the vae.safetensors in it",
    "vocoder_checkpoint": "the hifigan.safetensors in it",
    "clap_checkpoint": "the clap-….safetensors in it",
}


def names_files(config: Config) -> bool:
    """Whether a configuration names a file of trained parts."""
    return any(getattr(config, setting) for setting in SETTINGS)


def find_named_files(config: Config, parts: Collection[str] = PARTS) -> None:
    """Raise FileNotFoundError if a file that `load_named_parts` would read is missing."""
    own = is_model(config.start_from)  # a folder of ours holds all parts
    for setting, part in (("start_from", "ldm"), ("vae_checkpoint", "vae"), ("clap_checkpoint", "clap")):
        if own and setting == "start_from":
            continue
        if part in parts and getattr(config, setting) and not (part == "vae" and config.start_from):
            _named(config, setting)


def load_named_parts(model: RefinedAudioLDM, parts: Collection[str] = PARTS) -> set[str]:
    """Load those of `parts` that the files named in the configuration hold into the model -> the parts loaded.

    `start_from`, an AudioLDM checkpoint, comes before the others: its U-Net works with its own first stage, vocoder and
    latent scale ("scale" in the set), and its conditioner if that is the configuration's and no file is named for it.
    If the U-Net was trained with another one, the layer that captions enter by stays as it is, and "ldm" is not in the
    set. It may also be a folder written by `RefinedAudioLDM.save`, which gives all parts. The vocoder is looked for in
    the file of the first stage and beside it, too. Raises FileNotFoundError for a file that is named and not there,
    ValueError for one without the part, or with one of other sizes.
    """
    config, wanted, read = model.config, set(parts), set()
    if is_model(config.start_from):
        return _take_ours(model, Path(config.start_from), wanted)
    of_it = wanted - ({"clap"} if config.clap_checkpoint else set())
    if config.start_from and of_it:
        scale = {"scale"} if "vae" in wanted else set()  # it belongs to the first stage
        read |= _take(model, _named(config, "start_from"), of_it | scale, must="unet")
    if config.vae_checkpoint and wanted - read & {"vae", "hifigan"}:
        first_stage = Path(config.vae_checkpoint)
        if "vae" in wanted - read or first_stage.is_file():
            read |= _take(model, _named(config, "vae_checkpoint"), wanted - read - {"ldm", "clap"}, must="vae")
        beside = first_stage.with_name(VOCODER_FILE)
        if "hifigan" in wanted - read and not config.vocoder_checkpoint and beside.is_file():
            read |= _take(model, beside, {"hifigan"}, must="hifigan")
    if config.vocoder_checkpoint and "hifigan" in wanted - read:
        read |= _take(model, _named(config, "vocoder_checkpoint"), {"hifigan"}, must="hifigan")
    if config.clap_checkpoint and "clap" in wanted:
        path = _named(config, "clap_checkpoint")
        model.clap = Clap.load(config.clap, path, config.tokenizer or None).to(model.device)
        read.add("clap")
    return read


def is_model(path: str | Path | None) -> bool:
    """Whether `path` is a folder written by `RefinedAudioLDM.save`."""
    return bool(path) and (Path(path) / "config.yaml").is_file()


def _take_ours(model, folder, wanted):
    """Load parts from a folder of ours -> the set of them; with the U-Net come its linear denoiser and its scale.

    A U-Net without a caption map starts one that has it; the map is new.
    """
    taken = set()
    for part in sorted(wanted):
        if part_path(folder, part, model.config).is_file():
            model.load_part(part, folder, optional=("caption_map", "map_in"))
            taken |= {"ldm", "scale"} if part == "ldm" else {part}
    return taken


@torch.no_grad()
def keep_captions(model: RefinedAudioLDM, folder: str | Path, captions: Sequence[str]) -> FilmFit:
    """Fit the model's film layer so that `captions` and "" keep the film vectors of the model in `folder`.

    The U-Net is the one in `folder`, the conditioner another.
    """
    before = RefinedAudioLDM.load(folder).to(model.device)
    captions = ["", *captions]
    film = before.unet.film_embed(before.clap.embed_text(captions) * before.config.unet.embedding_gain)
    fit = fit_film(model.clap.embed_text(captions) * model.config.unet.embedding_gain, film)
    load_into(model.unet.film_embed, {"weight": fit.weight, "bias": fit.bias}, folder)
    return fit


def _named(config, setting):
    path = Path(getattr(config, setting))
    if (path / "config.yaml").is_file():
        raise ValueError(f"{setting} is {path}, the folder of a run: give {RUN_INSTEAD[setting]}")
    if path.exists():
        return path
    key, advice = SETTINGS[setting]
    published = PUBLISHED.get(path.name)
    page = published and (published.page or f"https://huggingface.co/{published.repository}")
    raise FileNotFoundError(
        f"{setting} ({key} in AudioLDM's YAML) is {path}, which is not there: {advice}"
        + (f"; it is published at {page}" if page else "")
    )


def _take(model, path, wanted, must):
    """Load what a published file holds of `wanted` into the model -> the set of it."""
    held, taken = read_parts(path), set()
    if must not in held:
        raise ValueError(f"{path} holds no {must}, only {', '.join(held)}")
    for part in wanted & {"ldm" if part == "unet" else part for part in held}:
        if part == "ldm":
            if not _load_unet(model.unet, held["unet"], path):
                continue
        elif part == "scale":
            model.scale.copy_(held["scale"][""])
        elif part == "clap":
            if clap_kind(held["clap"]) != model.config.clap:
                continue
            vocabulary = model.config.tokenizer or None
            clap = conditioner_from_tensors(model.config.clap, held["clap"], path, vocabulary, AUDIOLDM_TOKENS)
            model.clap = clap.to(model.device)
        else:
            load_into(model.vae if part == "vae" else model.vocoder, held[part], path)
        taken.add(part)
    return taken


def _load_unet(unet, state, path):
    """Load the U-Net, without its film layer if that is another conditioner's -> whether all was loaded."""
    film = {name: tensor for name, tensor in unet.state_dict().items() if name.startswith("film_embed.")}
    fits = all(name in state and state[name].shape == tensor.shape for name, tensor in film.items())
    load_into(unet, state if fits else state | film, path)
    return fits
