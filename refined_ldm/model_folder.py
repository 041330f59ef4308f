"""A whole model on disk: a folder with config.yaml and one safetensors file for each part.

The functions are methods of `RefinedAudioLDM`: `RefinedAudioLDM.load(folder)`, `model.save(folder)`.
"""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from refined_ldm.adapters.matcher import MATCHER_FILE, Matcher
from refined_ldm.adapters.refiner import REFINER_FILE, Refiner
from refined_ldm.adapters.student import STUDENT_FILE, save_again
from refined_ldm.base.files import atomic_write, check_folder
from refined_ldm.clap import SHIPPED, Clap
from refined_ldm.config import Config, load_config
from refined_ldm.weights import SkipInit, load_into, read_weights, rounded, save_weights, weights_digest

WEIGHTS = Path(__file__).parent / "weights"  # shipped with the package: weights/tiny
PARTS = ("vae", "ldm", "hifigan", "clap")  # ldm: U-Net, latent scale and linear denoiser
VOCABULARY = ("vocab.json", "merges.txt", "tokenizer.json")  # files copied from a tokenizer's directory
Model = TypeVar("Model", bound=nn.Module)


def shipped_folder(name: str) -> Path | None:
    """Return the folder of the trained weights that the package contains for a preset; None if it has none."""
    return WEIGHTS / name if (WEIGHTS / name / "config.yaml").is_file() else None


def part_path(folder: str | Path, part: str, config: Config) -> Path:
    """Return the path of a part of a model in a folder."""
    return Path(folder) / (f"clap-{config.clap}.safetensors" if part == "clap" else f"{part}.safetensors")


def save(model: nn.Module, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.yaml and one safetensors file for each part, and for student, matcher and refiner, into `folder`."""
    folder = Path(folder)
    parts = [part_path(folder, part, model.config).name for part in PARTS]
    check_folder(folder, [*parts, "config.yaml", STUDENT_FILE, MATCHER_FILE, REFINER_FILE])
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        save_part(model, part, folder, dtype)
    if model.student_file:
        save_again(model.student_file, folder / STUDENT_FILE, weights_digest(rounded(_ldm_state(model), dtype)))
    if model.matcher is not None:
        model.matcher.save(folder / MATCHER_FILE, dtype)
    if model.refiner is not None:
        model.refiner.save(folder / REFINER_FILE, dtype)
    model.config.save(folder / "config.yaml")


def save_part(model: nn.Module, part: str, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write one part: vae, ldm (U-Net, latent scale and linear denoiser), hifigan or clap."""
    path = part_path(folder, part, model.config)
    if part == "clap":
        model.clap.save(path, dtype)
        _save_vocabulary(model.clap, path.parent / "tokenizer")
    elif part == "ldm":
        save_weights(path, _ldm_state(model), model.config.unet, dtype)
    else:
        module = _module(model, part)
        save_weights(path, module, module.config, dtype)


def _save_vocabulary(clap, folder):
    """Copy the vocabulary that was given to the conditioner; those of installed packages are not copied."""
    if clap.vocabulary is None or Path(clap.vocabulary).resolve() == folder.resolve():
        return
    for given in (Path(clap.vocabulary) / name for name in VOCABULARY):
        if given.is_file():
            with atomic_write(folder / given.name) as temporary:
                shutil.copyfile(given, temporary)


def load(cls: type[Model], folder: str | Path, device: torch.device | str = "cpu", **changes) -> Model:
    """Load a folder written by `save`, in evaluation mode; `changes` as in `preset`.

    Raises FileNotFoundError for a missing file, ValueError for one that does not fit.

    Notebook: 05
    """
    folder = Path(folder)
    for lora in (folder, folder / "lora.safetensors"):
        if lora.name == "lora.safetensors" and lora.is_file() and not (folder / "config.yaml").is_file():
            raise ValueError(
                f"{lora} is a LoRA: load the model that it was trained on, and this beside it (--lora, load_lora)"
            )
    if folder.is_file() or (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} is no folder written by RefinedAudioLDM.save: convert it first (`refined-ldm "
            f"convert {folder} FOLDER`) and give that folder"
        )
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"no config.yaml in {folder}: give a folder written by RefinedAudioLDM.save")
    config = load_config(folder / "config.yaml").changed(**changes)
    parts = ["vae", "ldm"]
    if config.vocoder == "hifigan" or part_path(folder, "hifigan", config).is_file():
        parts.append("hifigan")  # a run has no vocoder until it is trained
    clap = _load_clap(config, folder)
    with SkipInit() if "hifigan" in parts else nullcontext():
        model = cls(config, clap=clap)
    for part in parts:
        model.load_part(part, folder)
    if (folder / STUDENT_FILE).is_file():
        model.load_student(folder / STUDENT_FILE)
    if (folder / MATCHER_FILE).is_file():
        model.matcher = Matcher.load(folder / MATCHER_FILE)
    if (folder / REFINER_FILE).is_file():
        model.refiner = Refiner.load(folder / REFINER_FILE)
    return model.to(device, non_blocking=True).eval()


def load_part(model: nn.Module, part: str, folder: str | Path, optional: tuple[str, ...] = ()) -> None:
    """Load one part written by `save_part`.

    A conditioner that is not in `folder` comes from the file that the configuration names, or from its hub.
    optional: modules of the U-Net that stay as they are if the file has none of their tensors.
    Raises FileNotFoundError, or ValueError naming the tensors that do not fit.
    """
    path = part_path(folder, part, model.config)
    if part == "clap":
        model.clap = _load_clap(model.config, folder).to(model.device)
        model.matcher = model.refiner = None  # they know the embeddings of another
        return
    state, _ = read_weights(path)
    if part != "ldm":
        load_into(_module(model, part), state, path)
        return
    wanted, held = ({name.split(".")[0] for name in names} for names in (_ldm_state(model), state))
    if wanted != held:
        raise ValueError(
            f"{path} does not fit the parameterization {model.config.parameterization!r}: it holds "
            f"{', '.join(sorted(held))} where {', '.join(sorted(wanted))} were expected"
        )
    if state["scale"].numel() != 1:
        raise ValueError(f"{path}: scale is of shape {tuple(state['scale'].shape)}: one number was expected")
    unet = {k[5:]: v for k, v in state.items() if k.startswith("unet.")}
    for module in {name.split(".")[0] for name in model.unet.state_dict()} & set(optional):
        if not any(name.startswith(f"{module}.") for name in unet):
            unet |= {f"{module}.{k}": v for k, v in getattr(model.unet, module).state_dict().items()}
    load_into(model.unet, unet, path)
    if model.gaussian is not None:
        load_into(model.gaussian, {k[9:]: v for k, v in state.items() if k.startswith("gaussian.")}, path)
    model.scale.copy_(state["scale"].reshape(()))


def digest(model: nn.Module) -> str:
    """Return the digest of the weights that LoRAs and students belong to: U-Net, latent scale, linear denoiser."""
    return weights_digest(_ldm_state(model))


def _load_clap(config, folder):
    """Load the conditioner in a folder, with the vocabulary beside it; else from the configured file or its hub."""
    path, tokenizer = part_path(folder, "clap", config), Path(folder) / "tokenizer"
    if not path.is_file():
        path = config.clap_checkpoint or (path if config.clap in SHIPPED else None)
    return Clap.load(config.clap, path, tokenizer if tokenizer.is_dir() else config.tokenizer or None)


def _module(model, part):
    return {"vae": model.vae, "hifigan": model.vocoder}[part]


def _ldm_state(model):
    if model.loras is not None:
        raise ValueError("the U-Net has LoRAs beside its weights: call merge_loras() or remove_loras() before")
    state = {f"unet.{k}": v for k, v in model.unet.state_dict().items()} | {"scale": model.scale}
    if model.gaussian is not None:
        state |= {f"gaussian.{k}": v for k, v in model.gaussian.state_dict().items()}
    return state
