"""Published checkpoints: read without executing them, inspected, and converted to ours."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from refined_ldm.base.files import atomic_write, check_place, check_writable, errors_at, sha256
from refined_ldm.config import Config
from refined_ldm.hifigan import HiFiGAN
from refined_ldm.published.audioldm_weights import (
    PIPELINE_PARTS,
    audioldm_config,
    audioldm_parts,
    hifigan_config,
    pipeline_config,
    pipeline_parts,
    single_component,
    vae_config,
)
from refined_ldm.published.clap_weights import NO_FUSION, clap_kind
from refined_ldm.published.unpickling import file_format, forbidden, unpickle
from refined_ldm.vae import MelVAE
from refined_ldm.weights import is_ours, load_into, save_weights

WRAPPERS = (  # where published files keep their tensors
    "state_dict",
    "model",
    "generator",
    "model_state_dict",
    "module",
    "ema_state_dict",
    "model_ema",
    "ema",
)
WRAPPED = (  # what torch.compile and parallel training put into names, before them or in their midst
    r"_orig_mod\.?|(?:^|(?<=\.))(?:module|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
VARIANTS = ("", ".fp32", ".fp16", ".bf16", ".ema", ".non_ema")  # of diffusers' files of weights, the best first
WRITTEN = r"config\.yaml|tokenizer|(vae|ldm|hifigan|clap-[\w-]+)\.safetensors"  # what `RefinedAudioLDM.save` writes


# --- published files ---


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a .ckpt, .pth, .pt or .safetensors file by their published names, without their wrapper.

    Floating-point tensors are converted to float32. A file `...index.json` stands for all the shards that it lists.
    Raises FileNotFoundError, or ValueError for a file that is damaged, no checkpoint or unsafe.
    """
    held, tensors = _tensors(path)[1], {}
    for written, tensor in held.items():
        name = re.sub(WRAPPED, "", written)
        if name in tensors:
            raise ValueError(f"{path} was refused: it holds {name} twice, once as {written}")
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def _tensors(path):
    """-> (the wrapper's key or None, tensors as they are named in the file)."""
    form = file_format(path)
    if form == "index":
        return None, _sharded(Path(path))
    if form == "safetensors":
        with _opened(path) as file:
            return None, {name: file.get_tensor(name) for name in file.keys()}
    held, keys = unpickle(path), []
    while isinstance(held, dict) and not (keys and any(isinstance(v, torch.Tensor) for v in held.values())):
        key = next((key for key in WRAPPERS if isinstance(held.get(key), dict) and held[key]), None)
        if key is None:
            break
        held, keys = held[key], [*keys, key]
    key = ".".join(keys) or None
    tensors = {str(k): v for k, v in held.items() if isinstance(v, torch.Tensor)} if isinstance(held, dict) else {}
    if not tensors:
        names = ", ".join(map(str, list(held)[:5])) if isinstance(held, dict) else ""
        what = f"a dict of {names or 'nothing'}" if isinstance(held, dict) else type(held).__name__
        raise ValueError(f"{path} was refused: it holds {what} where tensors by name were expected")
    return key, tensors


def _sharded(index):
    """The tensors of the files that an `...index.json` lists, which lie beside it."""
    listed = _json(index).get("weight_map")
    shards = sorted(set(listed.values())) if isinstance(listed, dict) and _all_text(listed.values()) else []
    if not shards or any(name != Path(name).name for name in shards):
        raise ValueError(f"{index} was refused: it has no weight_map of tensors and the files beside it that hold them")
    tensors = {}
    for name in shards:
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not beside it: fetch that too")
        tensors |= _tensors(index.parent / name)[1]
    if missing := sorted(listed.keys() - tensors.keys()):
        raise ValueError(f"{index} names {missing[0]}, which {listed[missing[0]]} does not hold: fetch it again")
    return tensors


def _all_text(values):
    return all(isinstance(value, str) for value in values)


def _json(path):
    """The object that a JSON file holds."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise ValueError(f"{path} is no JSON ({fault}): fetch it again") from fault
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds {type(held).__name__} where an object of settings was expected")
    return held


def _opened(path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as fault:
        raise ValueError(f"{path} was refused: it is cut or damaged safetensors ({fault}): fetch it again") from fault


def detect_checkpoint_type(tensors: Iterable[str]) -> str:
    """The type of a checkpoint by the names of its tensors.

    "audioldm" (a whole checkpoint), "unet", "vae", "hifigan", "ms-clap-2023", "laion-clap", "laion-clap fusion"; of our
    own files "ldm", "clap" and "lora"; or "unknown".
    """
    kinds = (
        ("lora", r".+\.lora_[AB]\.weight$"),
        ("audioldm", r"model\.diffusion_model\.|model_ema\.|first_stage_model\."),
        ("ldm", r"unet\.film_embed\."),
        ("clap", r"token_(rows|index)$"),
        ("unet", r"(film_emb|film_embed|class_embedding|time_embed|time_embedding)\."),
        ("vae", r"(encoder|decoder)\.conv_(in|out)\."),
        ("hifigan", r"(conv_pre|conv_post|ups|upsampler)\."),
    )
    names = list(tensors)
    own = next((kind for kind, pattern in kinds if any(re.match(pattern, name) for name in names)), None)
    return own or clap_kind(tensors) or "unknown"


def read_parts(path: str | Path, average: bool = True) -> dict[str, dict[str, torch.Tensor]]:
    """The parts that a published file or pipeline directory holds, by the names of our networks.

    -> {"unet", "vae", "hifigan", "clap", "scale"}, those that the file holds, each a dict by name as in
    `audioldm_parts`; the file may hold a single component. average: take the U-Net's running average if there is one.
    Raises FileNotFoundError, or ValueError for a file without a known part.
    """
    if Path(path).is_dir():
        return read_audioldm(path)[1]
    tensors = read_tensors(path)
    kind = detect_checkpoint_type(tensors)
    with errors_at(path):
        if kind == "audioldm":
            return audioldm_parts(tensors, average)
        if kind in ("ms-clap-2023", "laion-clap"):
            return {"clap": tensors}
        if kind in ("unet", "vae", "hifigan"):
            return single_component(kind, tensors)
    raise ValueError(f"{path} holds no part of AudioLDM that can be read: it is {kind}")


def read_audioldm(path: str | Path, average: bool = True) -> tuple[Config, dict[str, dict[str, torch.Tensor]]]:
    """A whole AudioLDM, a checkpoint or the directory of a pipeline -> (its Config, its parts as `read_parts`).

    Raises FileNotFoundError, or ValueError naming what is missing or unlike AudioLDM.
    """
    path = Path(path)
    if path.is_dir():
        settings, tensors = {}, {}
        for part in PIPELINE_PARTS:
            settings[part] = _settings(path / part)
            if part != "scheduler":
                tensors[part] = read_tensors(_weights(path / part))
        with errors_at(path):
            return pipeline_config(settings, tensors), pipeline_parts(settings, tensors)
    tensors = read_tensors(path)
    if detect_checkpoint_type(tensors) != "audioldm":
        raise ValueError(f"{path} is no whole AudioLDM checkpoint but {detect_checkpoint_type(tensors)}")
    with errors_at(path):
        parts = audioldm_parts(tensors, average)
        if missing := [part for part in ("unet", "vae", "hifigan") if part not in parts]:
            raise ValueError(f"it holds no {' and no '.join(missing)}")
        if "scale" not in parts:
            raise ValueError("it lacks the tensor scale_factor, which latents are multiplied by")
        if "betas" not in tensors and "alphas_cumprod" in tensors:
            raise ValueError("it lacks the tensor betas, of the noise schedule")
        return audioldm_config(parts, tensors.get("betas")), parts


def _settings(folder):
    names = ("config.json", "scheduler_config.json")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no config.json in {folder}: give the directory of an AudioLDMPipeline of diffusers")
    return _json(path)


def _weights(folder):
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    names = [name for end in ("safetensors", "bin") for variant in VARIANTS for stem in stems
             for name in (f"{stem}{variant}.{end}", f"{stem}.{end}.index{variant}.json")]  # fmt: skip
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no weights in {folder}: it must hold {names[0]} or {stems[1]}.safetensors")
    return path


# --- what a file holds ---

READ_BY = {  # kind -> (Python, shell)
    "audioldm": ('RefinedAudioLDM.from_audioldm("{path}")', "refined-ldm convert {path} FOLDER"),
    "pipeline": ('RefinedAudioLDM.from_audioldm("{path}")', "refined-ldm convert {path} FOLDER"),
    "run": ('RefinedAudioLDM.load("{path}")', "refined-ldm generate CAPTION --checkpoint {path} --out FOLDER"),
    "ms-clap-2023": ('Clap.load("ms-clap-2023", "{path}")', "refined-ldm convert {path} clap.safetensors"),
    "laion-clap": ('Clap.load("laion-clap", "{path}")', "refined-ldm convert {path} clap.safetensors"),
    "laion-clap fusion": (f"none: {NO_FUSION}", ""),
    "unet": ('checkpoints.read_parts("{path}")', ""),
    "vae": ('checkpoints.read_parts("{path}")', "refined-ldm convert {path} vae.safetensors"),
    "hifigan": ('checkpoints.read_parts("{path}")', "refined-ldm convert {path} hifigan.safetensors"),
    "ldm": ("RefinedAudioLDM.load(FOLDER), with the other parts beside it", ""),
    "clap": ('Clap.load(NAME, "{path}")', ""),
    "lora": ('model.load_lora("{path}")', "refined-ldm generate CAPTION --lora {path} --out FOLDER"),
}


@dataclass(frozen=True)
class Group:
    """The tensors below one prefix."""

    prefix: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """The contents of a file or a directory of files, read without executing them."""

    path: str
    kind: str  # as `detect_checkpoint_type` says; "pipeline", "run" (a folder of ours), or "refused"
    bytes: int
    sha256: str = ""  # of a file
    wrapper: str | None = None  # the key its tensors are under
    groups: tuple[Group, ...] = ()
    forbidden: tuple[str, ...] = ()  # what a refused file asks to run
    python: str = ""  # the call that reads it
    command: str = ""
    files: tuple["Inspection", ...] = ()  # of a directory


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Inspect a checkpoint, a pipeline's directory or a run folder without executing anything in it.

    Tensors stay on disk: their names, shapes and types are enough. Raises FileNotFoundError, or ValueError for
    a file that is no checkpoint. A file that asks to run something has the kind "refused" and those names.
    """
    path = Path(path)
    if path.is_dir():
        return _inspect_directory(path)
    size, names = path.stat().st_size if path.is_file() else 0, ()
    if file_format(path) == "pickle":
        names = tuple(forbidden(path))
    if names:
        return Inspection(str(path), "refused", size, sha256(path), forbidden=names)
    wrapper, tensors = _tensors(path)
    kind = detect_checkpoint_type([re.sub(WRAPPED, "", name) for name in tensors])
    found = Inspection(str(path), kind, size, sha256(path), wrapper, _groups(tensors))
    return _with_calls(found, "ldm" if kind in ("vae", "hifigan") and is_ours(path) else kind)


def _inspect_directory(path):
    kind = "run" if (path / "config.yaml").is_file() else "pipeline"
    folders = [path] if kind == "run" else [path / part for part in PIPELINE_PARTS if (path / part).is_dir()]
    found = [file for folder in folders for end in ("safetensors", "bin") for file in sorted(folder.glob(f"*.{end}"))]
    if not found:
        raise ValueError(f"{path} holds no weights: give a checkpoint, the directory of an AudioLDMPipeline, or a run")
    files = tuple(inspect_checkpoint(file) for file in found)
    return _with_calls(Inspection(str(path), kind, sum(file.bytes for file in files), files=files), kind)


def _with_calls(inspection, kind):
    python, command = READ_BY.get(kind, ("none", ""))
    return replace(inspection, python=python.format(path=inspection.path), command=command.format(path=inspection.path))


def _groups(tensors):
    """Tensors by the first one or two words of their names, numbers apart."""
    groups = {}
    for name, tensor in tensors.items():
        *words, _ = name.split(".")
        prefix = ".".join(word for word in words[:2] if not word.isdigit()) or "(alone)"
        groups.setdefault(prefix, []).append(tensor)
    return tuple(
        Group(
            prefix,
            len(held),
            sum(t.numel() for t in held),
            sum(t.numel() * t.element_size() for t in held),
            tuple(sorted({str(t.dtype).removeprefix("torch.") for t in held})),
        )
        for prefix, held in groups.items()
    )


# --- published files to ours ---


def convert_checkpoint(
    path: str | Path, out: str | Path, force: bool = False, tokenizer: str | Path | None = None
) -> Path:
    """Write a published file as safetensors of ours in float32 -> the path written.

    A whole AudioLDM (a checkpoint or a pipeline's directory) becomes the folder `out`, for `RefinedAudioLDM.load`; a
    conditioner, a first stage or a vocoder the file `out`, for `Clap.load` and `RefinedAudioLDM.load_part`. tokenizer:
    the directory of roberta-base's vocabulary, to be put beside LAION-CLAP. The output is written
    whole or not at all, and replaces an earlier one only with `force`. Raises FileExistsError, FileNotFoundError, or
    ValueError for a file that cannot be converted.
    """
    from refined_ldm.clap import Clap  # these two are made of files that are read here
    from refined_ldm.text_to_audio import RefinedAudioLDM

    path, out = Path(path), Path(out)
    check_writable(out.absolute().parent, [out.name])
    if out.exists() and path.exists() and out.samefile(path):
        raise FileExistsError(f"{out} is what is to be converted: give another name")
    if out.exists() and not force:
        raise FileExistsError(f"{out} is there already: give another name, or --force (force=True) to replace it")
    whole = path.is_dir() or detect_checkpoint_type(tensors := read_tensors(path)) == "audioldm"
    check_place(out, WRITTEN if whole else None)
    if whole:
        model = RefinedAudioLDM.from_audioldm(path, tokenizer=tokenizer)
        with atomic_write(out, WRITTEN) as temporary:
            model.save(temporary)
        return out
    kind = detect_checkpoint_type(tensors)
    if out.suffix != ".safetensors":
        raise ValueError(f"{path} is {kind}, which becomes one file: give a name that ends in .safetensors, got {out}")
    if kind in ("ms-clap-2023", "laion-clap", "laion-clap fusion"):
        Clap.load(kind.removesuffix(" fusion"), path).save(out)
    elif kind in ("vae", "hifigan"):
        with errors_at(path):
            state = single_component(kind, tensors)[kind]
            module = MelVAE(vae_config(state)) if kind == "vae" else HiFiGAN(hifigan_config(state))
        save_weights(out, load_into(module, state, path), module.config)
    else:
        raise ValueError(
            f"{path} is {kind}: what is converted is a whole AudioLDM, a conditioner, a first stage (vae) "
            "or a vocoder (hifigan)"
        )
    return out
