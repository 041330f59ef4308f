"""The student: a U-Net that takes four steps, or one, where its teacher takes many with guidance.

It is the teacher's U-Net with a LoRA (Luo et al. 2023, LCM-LoRA) and one more input, the timestep at which a jump ends
(Kim et al. 2024, consistency trajectory models; Saito et al. 2025, SoundCTM). Guidance is learned with the jumps, so
that a jump is a single evaluation. The file holds the LoRA and the layer of that input; the teacher stays as it is.

Notebook: 09
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refined_ldm.lora import LoraConfig, Loras, LoraUNet, add_to_weights
from refined_ldm.unet import UNet
from refined_ldm.weights import load_into, read_weights, save_weights

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
    path: str | Path, tensors: dict[str, Tensor], config: LoraConfig, base: str, name: str, **metadata: Any
) -> None:
    """Write a student in half precision. base, name: digest and name of its teacher."""
    save_weights(path, tensors, config, torch.float16, kind="student", base=base, name=name, **metadata)


def save_again(file: Path, to: Path, base: str) -> None:
    """Copy the student in a file beside its teacher's weights, whose digest is `base` where they are stored now."""
    tensors, metadata = read_student(file)
    config = LoraConfig(**metadata.pop("config"))
    save_student(to, tensors, config, **{name: metadata[name] for name in metadata if name != "kind"} | {"base": base})


def read_student(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_student` -> (tensors by name, metadata). Raises FileNotFoundError, ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no student at {path}: train one (`refined-ldm train --distill`)")
    tensors, metadata = read_weights(path)
    if metadata.get("kind") != "student":
        raise ValueError(f"{path} is no student of `refined-ldm train --distill`")
    return tensors, metadata


def load_student(path: str | Path, teacher: UNet, base: Callable[[], str]) -> UNet:
    """Return the student in a file, its LoRA added to a copy of the weights of its teacher (`base`: their digest).

    Raises FileNotFoundError; ValueError for another file, or a student of another model.
    """
    tensors, metadata = read_student(path)
    if metadata["base"] != (digest := base()):
        raise ValueError(
            f"{path} is a student of another model: of {metadata['name']} with the digest {metadata['base']}; this one "
            f"has {digest}. Load its teacher, or distill this model (`refined-ldm train --distill`)"
        )
    unet = student_unet(teacher)
    end = {name.removeprefix(END): tensor for name, tensor in tensors.items() if name.startswith(END)}
    load_into(unet.end_embed, end, path)
    matrices = {name: tensor for name, tensor in tensors.items() if not name.startswith(END)}
    add_to_weights(unet, matrices, LoraConfig(**metadata["config"]).rank, path)
    return unet.eval()
