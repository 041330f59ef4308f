"""AudioLDM's inference: a list of captions, one a line, becomes one WAV file a line."""

import codecs
import re
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

from refined_ldm.config import load_config
from refined_ldm.data.tables import clean_caption
from refined_ldm.durable.run_state import load_scale
from refined_ldm.published.warm_start import load_named_parts
from refined_ldm.text_to_audio import RefinedAudioLDM, part_path
from refined_ldm.weights import load_into, read_weights

SOUNDS_AT_ONCE = 8  # candidates included
NOT_IN_NAMES = r'[\x00-\x1f\x7f/\\:*?"<>|]'  # characters that some system forbids in a file name


@dataclass(frozen=True)
class Line:
    """One sound to make."""

    caption: str
    file: str  # name of its WAV file, unlike that of any other line
    repeat: int  # how many lines before it have the same caption


def read_list(path, left_out=None):
    """The lines `caption` or `filename|caption` of a text file -> a list of Line, in their order.

    Blank lines are passed over, ".wav" is added where it is missing, a name given twice is numbered, control characters
    in a caption count as spaces. Raises FileNotFoundError, or ValueError naming every line that is not UTF-8, has no
    caption, or whose name is no plain file name; given a list as `left_out`, these go there instead.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no list of captions at {path}")
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
            lines.append(Line(caption, _unlike(taken, re.sub(r"\.wav$", "", name, flags=re.IGNORECASE)), repeat))
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
        return _name_of(caption), caption
    if not caption or re.search(NOT_IN_NAMES, name) or name.strip(". ") == "" or len(name.encode()) > 200:
        raise ValueError("expected `caption` or `filename|caption`, the name without folders and no longer than 200 "
                         f"bytes, got {row.strip()[:80]!r}")  # fmt: skip
    return name, clean_caption(caption)


def _name_of(caption):
    """The caption as a file name, spaces as underscores, as AudioLDM does; long ones are cut."""
    name = re.sub(rf"{NOT_IN_NAMES}|[\s'.]", "_", caption)
    return re.sub("_+", "_", name).encode()[:150].decode(errors="ignore").strip("_") or "untitled"


def _unlike(taken, stem):
    """stem.wav, numbered if it is `taken`, where upper and lower case are the same; taken: {stem: last number}."""
    name, number = stem, taken.get(stem.casefold(), 1)
    while name.casefold() in taken:
        number += 1
        name = f"{stem}-{number}"
    taken[name.casefold()] = 1
    taken[stem.casefold()] = number
    return f"{name}.wav"


def open_model(config, checkpoint, device="cpu"):
    """A model of these settings with the weights of `checkpoint`, ready to generate.

    That is a published AudioLDM checkpoint, a run folder, or one of the folders run/checkpoints/ldm/step-NNNNNNN of a
    run that goes on. What it lacks comes from the files that the settings name; without a vocoder, Griffin-Lim makes
    the sounds. Raises FileNotFoundError or ValueError, saying what is missing or does not fit.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if (path / "state.json").is_file():
        model = _open_run(config, path.absolute().parents[2], path)
    elif (path / "config.yaml").is_file():
        model = _open_run(config, path)
    else:
        model = _open_published(config, path)
    return model.to(device).eval()


def _open_published(config, path):
    model = RefinedAudioLDM(replace(config, start_from=str(path)))
    read = load_named_parts(model)
    if "clap" not in read:
        model.load_part("clap", path.parent)
    if "ldm" not in read:
        raise ValueError(f"the U-Net of {path} listens to another conditioner than {config.clap} of the settings")
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
    config = replace(config, clap_checkpoint=config.clap_checkpoint or trained.clap_checkpoint,
                     tokenizer=config.tokenizer or trained.tokenizer)  # fmt: skip
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
        raise FileNotFoundError(f"{run_dir} does not tell the latent scale of its U-Net: resume the run for a step")
    return model


def _refuse_other(config, trained, run_dir):
    """Raise ValueError naming the settings of the networks in which these differ from those of a run."""
    names = ("clap", "mel", "vae", "unet", "diffusion_steps", "beta_start", "beta_end", "parameterization")
    ours, theirs = (dict(_leaves({name: asdict(c)[name] for name in names})) for c in (config, trained))
    unlike = [f"{name} {ours[name]} (the run: {theirs[name]})" for name in ours if ours[name] != theirs[name]]
    if unlike:
        raise ValueError(f"the settings are not those {run_dir} was trained with: {', '.join(unlike)}")


def _leaves(tree, above=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def sounds(model, lines, seed=0, steps=None, guidance_scale=None, candidates=None):
    """Generate the sound of every Line, in their order: yields (line, waveform (N,) in [-1, 1]).

    A sound depends on `seed`, its caption and how often that came before, not on the other lines.
    """
    candidates = model.config.candidates if candidates is None else candidates
    most = max(1, SOUNDS_AT_ONCE // max(1, candidates))
    for repeat, alike in groupby(lines, key=lambda line: line.repeat):
        alike = list(alike)
        for batch in (alike[start : start + most] for start in range(0, len(alike), most)):
            waveforms = model.generate([line.caption for line in batch], steps=steps, guidance_scale=guidance_scale,
                                       seed=seed + repeat, candidates=candidates)  # fmt: skip
            yield from zip(batch, waveforms.cpu(), strict=True)
