"""AudioLDM's inference: a list of captions, one a line, becomes one WAV file a line."""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch

from refined_ldm.base.integers import LARGEST_SEED, whole, whole_seed
from refined_ldm.config import MADE_BY, Config, load_config
from refined_ldm.data.names import caption_name, name_fault, numbered_name
from refined_ldm.data.tables import clean_caption
from refined_ldm.durable.run_state import load_scale
from refined_ldm.model_folder import part_path
from refined_ldm.published.warm_start import load_named_parts
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.weights import load_into, read_weights

SOUNDS_AT_ONCE = 8  # candidates included


@dataclass(frozen=True)
class Line:
    """One sound to make."""

    caption: str
    file: str  # name of its WAV file, different for every line
    repeat: int  # how many lines before it have the same caption


def read_list(path: str | Path, left_out: list[str] | None = None) -> list[Line]:
    """The lines `caption` or `filename|caption` of a text file -> a list of Line, in their order.

    Blank lines are passed over, ".wav" is added where it is missing, a name given twice is numbered, control characters
    in a caption count as spaces. Raises FileNotFoundError, or ValueError naming every line that is not UTF-8, has no
    caption, or whose name is no plain file name; given a list as `left_out`, these go there instead.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no list of captions at {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give a list of captions, a text file in UTF-8")
    raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is not a text in UTF-8: it begins as UTF-16, so save it again")
    lines, taken, repeats, faults = [], {}, {}, []
    for number, row in enumerate(raw.splitlines(), 1):
        try:
            name, caption = _name_and_caption(row.decode()) if row.strip() else (None, None)
        except ValueError as fault:
            faults.append(f"{path}, line {number}: {fault}")
            continue
        if caption is not None:
            repeat = repeats[caption] = repeats.get(caption, -1) + 1
            lines.append(Line(caption, f"{numbered_name(taken, name)}.wav", repeat))
    if faults and left_out is None:
        raise ValueError("\n  ".join([*faults, "--skip-bad leaves out such lines"] if faults[1:] else faults))
    if left_out is not None:
        left_out += faults
    if not lines:
        raise ValueError(f"{path} holds no caption: write one on each line")
    return lines


def _name_and_caption(row):
    """A line -> (stem or name of its file, caption); ValueError saying what is wrong with it."""
    name, bar, caption = (part.strip() for part in row.partition("|"))
    if not bar:
        caption = clean_caption(name)
        return caption_name(caption, "_", punctuation=True), caption  # as AudioLDM does
    name = re.sub(r"\.wav$", "", name, flags=re.IGNORECASE)
    fault = name_fault(name) if name else "there is no name"
    if not caption or fault:
        raise ValueError(
            "expected `caption` or `filename|caption`, the name without folders and no longer than 200 "
            f"bytes, got {row.strip()[:80]!r}: {fault or 'there is no caption'}"
        )
    return name, clean_caption(caption)


def open_model(config: Config, checkpoint: str | Path, device: str | torch.device = "cpu") -> RefinedAudioLDM:
    """A model of these settings with the weights of `checkpoint`, ready to generate.

    That is a published AudioLDM checkpoint, a run folder, or one of the folders run/checkpoints/ldm/step-NNNNNNN of a
    run that goes on. What it lacks comes from the files that the settings name; without a vocoder, Griffin-Lim makes
    the sounds. Raises FileNotFoundError or ValueError, saying what is missing or does not fit.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    _refuse_other_folder(path)
    if (path / "state.json").is_file():
        model = _open_run(config, path.absolute().parents[2], path)
    elif (path / "config.yaml").is_file():
        model = _open_run(config, path)
    else:
        model = _open_published(config, path)
    return model.to(device).eval()


def _refuse_other_folder(path):
    """Raise ValueError, saying which to give, for a folder that is no run, no step of one and no pipeline."""
    known = ("state.json", "config.yaml", "model_index.json", "unet/config.json")
    if path.is_dir() and not any((path / name).is_file() for name in known):
        steps = sorted(path.glob("**/step-*/unet.safetensors"))
        advice = f"give {steps[-1].parent}" if steps else "no U-Net was trained there yet"
        raise ValueError(
            f"{path} is no run's folder (which holds config.yaml), no step-… below its checkpoints/ldm, "
            f"no pipeline: {advice}"
        )


def _open_published(config, path):
    model = RefinedAudioLDM(replace(config, start_from=str(path)))
    read = load_named_parts(model)
    if "clap" not in read:
        model.load_part("clap", path.parent)
    if "ldm" not in read:
        raise ValueError(f"the U-Net of {path} was trained with another conditioner than {config.clap} of the settings")
    if "vae" not in read:
        raise ValueError(f"{path} holds no first stage, and the settings name no file for it")
    if "hifigan" not in read:
        model.config = replace(model.config, vocoder="griffin_lim")
    return model


def _open_run(config, run_dir, step=None):
    """The model of a run: its finished U-Net, or the one of a step, averaged if an average was kept."""
    trained = load_config(run_dir / "config.yaml")
    unet = replace(config.unet, embedding_gain=trained.unet.embedding_gain)  # neither is in AudioLDM's YAML
    config = replace(config, unet=unet, hifigan=trained.hifigan)
    _refuse_other(config, trained, run_dir)
    config = replace(
        config,
        clap_checkpoint=config.clap_checkpoint or trained.clap_checkpoint,
        tokenizer=config.tokenizer or trained.tokenizer,
    )
    model = RefinedAudioLDM(replace(config, vocoder=trained.vocoder))
    for part in ("vae", "clap", "hifigan"):
        if part != "hifigan" or part_path(run_dir, part, config).is_file():
            model.load_part(part, run_dir)
    if step is None:
        model.load_part("ldm", run_dir)
        return model
    averaged, plain = step / "unet-average.safetensors", step / "unet.safetensors"
    weights = averaged if averaged.is_file() else plain
    load_into(model.unet, read_weights(weights)[0], weights)
    if not load_scale(model, run_dir):
        raise FileNotFoundError(f"{run_dir} has no latent scale for its U-Net: resume the run for a step")
    return model


def _refuse_other(config, trained, run_dir):
    """Raise ValueError naming the settings of the networks in which these differ from those of a run."""
    if differences := config.differences(trained, MADE_BY["ldm"]):
        raise ValueError(f"the settings are not those {run_dir} was trained with: {', '.join(differences)}")


def sounds(
    model: RefinedAudioLDM,
    lines: list[Line],
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    candidates: int | None = None,
) -> Iterator[tuple[Line, torch.Tensor]]:
    """Generate the sound of every Line: yields (line, waveform (N,) in [-1, 1]); None: the configuration's value.

    A sound depends on `seed`, its caption and how often that came before, not on the other lines.
    """
    candidates, seed = None if candidates is None else whole("candidates", candidates, 1), whole_seed(seed)
    most = max(1, SOUNDS_AT_ONCE // (candidates or model.config.candidates))
    for repeat, alike in groupby(lines, key=lambda line: line.repeat):
        alike = list(alike)
        for batch in (alike[start : start + most] for start in range(0, len(alike), most)):
            waveforms = model.generate(
                [line.caption for line in batch],
                steps=steps,
                guidance_scale=guidance_scale,
                seed=(seed + repeat) % (LARGEST_SEED + 1),
                candidates=candidates,
            )
            yield from zip(batch, waveforms.cpu(), strict=True)
