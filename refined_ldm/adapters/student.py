"""The student: a U-Net that takes four steps, or one, where its teacher takes many with guidance.

It is the teacher's U-Net with a LoRA (Luo et al. 2023, LCM-LoRA) and one more input, the timestep at which a jump ends
(Kim et al. 2024, consistency trajectory models; Saito et al. 2025, SoundCTM). Guidance is learned with the jumps, so
that a jump is a single evaluation. The file holds the LoRA and the layer of that input; the teacher stays as it is.

Notebook: 09
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refined_ldm.adapters.lora import LoraConfig, Loras, LoraUNet, add_to_weights, read_adapter
from refined_ldm.base.integers import whole
from refined_ldm.config import SAMPLERS
from refined_ldm.devices import fitting_threads
from refined_ldm.unet import UNet
from refined_ldm.weights import load_into, save_weights

STEPS = (1, 2, 4)  # numbers of jumps that a student learns
STUDENT_FILE = "student.safetensors"
END = "end_embed."  # prefix of the tensors of the additional layer


def student_unet(teacher: UNet) -> UNet:
    """Return a copy of a U-Net with an input for the end of a jump, which changes nothing at first."""
    unet = copy.deepcopy(teacher)
    width, inner = teacher.config.model_channels, teacher.time_embed[-1].out_features
    unet.end_embed = nn.Linear(width, inner).to(next(teacher.parameters()))
    nn.init.zeros_(unet.end_embed.weight), nn.init.zeros_(unet.end_embed.bias)
    return unet


class Student(LoraUNet):
    """A student under training: the LoRA's matrices and the layer of the end are its parameters and its state."""

    def __init__(self, teacher: UNet, rank: int):
        unet = student_unet(teacher)
        layers = [n for n, m in teacher.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        named = Loras(unet, "").add(rank, layers=layers)
        super().__init__(unet, named)
        unet.end_embed.requires_grad_(True)
        self.end_embed, self.names = unet.end_embed, tuple(named)

    def tensors(self) -> dict[str, Tensor]:
        """Return what `save_student` stores: the matrices and the layer of the end, by name."""
        end = {f"{END}{name}": value for name, value in self.end_embed.state_dict().items()}
        return dict(zip(self.names, self.matrices, strict=True)) | end


def save_student(
    path: str | Path,
    tensors: dict[str, Tensor],
    config: LoraConfig,
    base: str,
    name: str,
    dtype: torch.dtype = torch.float16,
    **metadata: Any,
) -> None:
    """Write a student, in half precision unless `dtype` says otherwise. base, name: digest and name of its teacher."""
    save_weights(path, tensors, config, dtype, kind="student", base=base, name=name, **metadata)


def save_again(file: Path, to: Path, base: str) -> None:
    """Copy the student in a file beside its teacher's weights, whose digest is `base` where they are stored now."""
    tensors, metadata = read_student(file)
    save_student(to, tensors, **{name: metadata[name] for name in metadata if name != "kind"} | {"base": base})


def read_student(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_student` -> (tensors by name, metadata). Raises FileNotFoundError, ValueError."""
    return read_adapter(path, "student", "student", "train --distill")


# Methods of `RefinedAudioLDM`, and what they check


def load_student(model: nn.Module, path: str | Path) -> None:
    """Take the student in a file of `refined-ldm train --distill`, for `generate(..., sampler="student")`.

    Its LoRA is added to a copy of the weights of the U-Net.
    Raises FileNotFoundError; ValueError for another file, a student of another model, or a U-Net in half precision.
    """
    if any(p.dtype != torch.float32 for p in model.unet.parameters()):
        raise ValueError("the U-Net is not in float32: load the student before optimize_for_inference")
    tensors, metadata = read_student(path)
    if metadata["base"] != (digest := model.digest()):
        raise ValueError(
            f"{path} is a student of another model: of {metadata['name']} with the digest {metadata['base']}; this one "
            f"has {digest}. Load its teacher, or distill this model (`refined-ldm train --distill`)"
        )
    unet = student_unet(model.unet)
    end = {name.removeprefix(END): tensor for name, tensor in tensors.items() if name.startswith(END)}
    load_into(unet.end_embed, end, path)
    matrices = {name: tensor for name, tensor in tensors.items() if not name.startswith(END)}
    add_to_weights(unet, matrices, metadata["config"].rank, path)
    model.student, model.student_file = unet.eval(), Path(path)


def student_noise(model: nn.Module, z_t: Tensor, t: Tensor, end: Tensor, c: Tensor) -> Tensor:
    """Return the eps (B, C, T, F) with which the student's jump from timesteps t to `end` (B,) ends.

    Notebook: 09
    """
    with fitting_threads(model.unet, z_t.numel() // z_t.shape[1], model.device):
        return model.denoise(z_t, t, c, model.student, end)


def pick_sampler(model: nn.Module, sampler: str | None, steps: int | None, given: dict[str, Any]) -> str:
    """Return the sampler that is asked for, or the configuration's, if the student knows what is `given`."""
    if sampler is None and model.config.sampler == "student":
        known = model.student is not None and model.loras is None and steps in (None, *STEPS)
        return "student" if known and all(value is None for value in given.values()) else "dpmpp"
    sampler = model.config.sampler if sampler is None else sampler
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be dpmpp, ddim or student, got {sampler!r}")
    if sampler == "student":
        check(model, steps, given)
    return sampler


def check(model: nn.Module, steps: int | None, given: dict[str, Any] | None = None) -> int:
    """Return the number of steps of the student. Raises ValueError without one, or for what only a teacher does."""
    if model.student is None:
        raise ValueError(
            "this model has no student: train one (`refined-ldm train --distill`) and load it with load_student"
        )
    if model.loras is not None:
        raise ValueError('the student was taught without LoRAs: remove_loras() before, or take sampler="dpmpp"')
    for name in (name for name, value in (given or {}).items() if value is not None):
        raise ValueError(f'{name} does not go with the student, whose guidance is fixed: take sampler="dpmpp"')
    steps = max(STEPS) if steps is None else whole("steps", steps)
    if steps not in STEPS:
        raise ValueError(f'steps of a student must be one of {STEPS}, got {steps}: take sampler="dpmpp" for others')
    return steps
