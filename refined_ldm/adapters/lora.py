"""LoRA: a small change of the U-Net, learned from few clips and kept in a file of its own (Hu et al. 2021).

A layer W x becomes W x + weight * B (A x): A maps to `rank` numbers, B back from them. B starts at zero, so that a new
LoRA changes nothing. `peft`, of the extra `lora`, holds the matrices beside the layers, those of several LoRAs at once.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refined_ldm.base.integers import cast_numbers, number
from refined_ldm.weights import read_weights, save_weights

GUIDANCE = 2.0  # of a model with LoRAs, at most: more exaggerates what they learned from few clips
# layers without LoRA: timestep, modulation, first and last
UNCHANGED = ("time_embed", "film", "caption_map", "map_in", "conv_in", "conv_out")


@dataclass(frozen=True)
class LoraConfig:
    """Settings of a LoRA. Its update has the scale alpha / rank of Hu et al. with alpha = rank: 1."""

    rank: int = 8  # 8: a file of 1 MB for the preset tiny, in half precision

    def __post_init__(self):
        cast_numbers(self)
        if not 1 <= self.rank <= 256:
            raise ValueError(f"rank of a LoRA must be from 1 to 256, got {self.rank}")


def lora_layers(unet: nn.Module) -> list[str]:
    """Return the names of the layers that a LoRA changes: linear and convolutional ones, without UNCHANGED."""
    return [
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not set(UNCHANGED) & set(name.split("."))
    ]


def layer_sizes(unet: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of the weights of all linear and convolutional layers, by name."""
    layers = unet.named_modules()
    return {name: layer.weight.shape for name, layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)}


def check_fit(matrices: dict[str, Tensor], sizes: dict[str, torch.Size], rank: int, source: str | Path) -> list[str]:
    """Return the names of the layers that a LoRA changes. Raises ValueError if they do not have these `sizes`."""
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in matrices})
    expected = {}
    for layer in layers:
        out, into, *kernel = sizes.get(layer, (0, 0))
        expected[f"{layer}.lora_A.weight"] = (rank, into, *kernel)
        expected[f"{layer}.lora_B.weight"] = (out, rank, *(1 for _ in kernel))
    if expected != {name: tuple(matrix.shape) for name, matrix in matrices.items()}:
        raise ValueError(f"{source} does not fit the U-Net: its matrices are not those of rank {rank}")
    return layers


@torch.no_grad()
def add_to_weights(unet: nn.Module, matrices: dict[str, Tensor], rank: int, source: str | Path) -> None:
    """Add a LoRA to the weights of a U-Net for good, W + B A, without peft. Raises ValueError as `check_fit` does."""
    for layer in check_fit(matrices, layer_sizes(unet), rank, source):
        weight = unet.get_submodule(layer).weight
        A, B = (matrices[f"{layer}.lora_{side}.weight"].to(weight) for side in "AB")
        weight += (B.flatten(1) @ A.flatten(1)).view_as(weight)


class Loras:
    """The LoRAs beside the layers of a U-Net, in place. `base`, `config`: digest and settings of the model without."""

    def __init__(self, unet: nn.Module, base: str, config: Any = None):
        self.unet, self.base, self.config = unet, base, config
        self._tuner, self._count = None, 0
        self._sizes = layer_sizes(unet)

    def __len__(self) -> int:
        return self._count

    def add(self, rank: int, weight: float = 1.0, layers: Collection[str] | None = None) -> dict[str, nn.Parameter]:
        """Add a LoRA to `layers`, None: all of `lora_layers` -> its matrices by name.

        A is random, from torch's global generator, and B zero. Raises ModuleNotFoundError without peft.
        """
        peft = _peft()
        layers = lora_layers(self.unet) if layers is None else layers
        name, self._count = f"lora{self._count}", self._count + 1
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
        if self._tuner is None:
            self._tuner = peft.LoraModel(self.unet, config, name)
        else:
            self._tuner.peft_config[name] = config
            self._tuner.inject_adapter(self.unet, name)
        self._tuner.set_adapter([f"lora{number}" for number in range(self._count)])
        for layer in layers:
            self.unet.get_submodule(layer).set_scale(name, weight)
        matrices = self.unet.named_parameters()
        return {key.replace(f".{name}.", "."): matrix for key, matrix in matrices if f".{name}." in key}

    def load(self, path: str | Path, weight: float = 1.0) -> None:
        """Add the LoRA in a file of `save_lora`, multiplied by `weight`; 0 changes nothing.

        Raises FileNotFoundError; ValueError for another file, a LoRA of another model, or a weight that is not finite.
        """
        weight = number(f"the weight of {path}", weight)
        state, metadata = read_lora(path)
        if metadata["base"] != self.base:
            raise ValueError(
                f"{path} is a LoRA of another model: of {metadata['name']} with the digest {metadata['base']}; "
                f"this one has {self.base}. Load the model that it was trained on"
            )
        rank = metadata["config"].rank
        layers = check_fit(state, self._sizes, rank, path)
        matrices = self.add(rank, weight, layers)
        with torch.no_grad():
            for name, matrix in state.items():
                matrices[name].copy_(matrix)

    def merge(self) -> None:
        """Add all LoRAs, with their weights, to the weights of the layers, which then stand alone again."""
        self._end("merge_and_unload")

    def remove(self) -> None:
        """Remove all LoRAs: the U-Net is what it was before them."""
        self._end("unload")

    def _end(self, how):
        if self._tuner is not None:
            getattr(self._tuner, how)()
            vars(self.unet).pop("peft_config", None)  # peft leaves it in some versions
            self.unet.requires_grad_(True)
            self._tuner, self._count = None, 0


class LoraUNet(nn.Module):
    """A U-Net with a LoRA under training: the matrices alone are parameters and state of this module."""

    def __init__(self, unet: nn.Module, matrices: dict[str, nn.Parameter]):
        super().__init__()
        self.matrices = nn.ParameterList(matrices.values())
        self._whole = (unet,)  # in a tuple, so that its weights are not registered

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._whole[0](*inputs)


# Methods of `RefinedAudioLDM`


def load_lora(model: nn.Module, path: str | Path, weight: float = 1.0) -> None:
    """Add a LoRA to the U-Net, beside those already there; `weight` scales it, 0 changes nothing.

    By default the model then generates with at most GUIDANCE, until the LoRAs are removed.
    Raises FileNotFoundError; ValueError for a LoRA of another model, a weight that is not finite, or a U-Net in
    half precision; ModuleNotFoundError without peft.
    """
    with_loras(model).load(path, weight)
    if weight:
        model.config = replace(model.config, guidance_scale=min(model.config.guidance_scale, GUIDANCE))


def merge_loras(model: nn.Module) -> None:
    """Add the LoRAs to the weights of the U-Net: equal sounds, faster. Afterwards the model can be saved.

    Student and refiner belong to the weights before, so the model then has none.
    """
    if model.loras is not None:
        model.loras.merge()
        model.loras = model.student = model.student_file = model.refiner = None


def remove_loras(model: nn.Module) -> None:
    """Remove the LoRAs of the U-Net."""
    if model.loras is not None:
        model.loras.remove()
        model.config, model.loras = model.loras.config, None


def with_loras(model: nn.Module) -> Loras:
    """Return the LoRAs of a model, none at first. Raises ValueError for a U-Net in half precision."""
    if model.loras is None:
        if any(p.dtype != torch.float32 for p in model.unet.parameters()):
            raise ValueError("the U-Net is not in float32: load LoRAs before optimize_for_inference")
        model.loras = Loras(model.unet, model.digest(), model.config)
    return model.loras


# Files


def save_lora(
    path: str | Path, matrices: dict[str, nn.Parameter], config: LoraConfig, base: str, name: str, **metadata: Any
) -> None:
    """Write a LoRA to a safetensors file in half precision. base, name: digest and name of the model it belongs to."""
    save_weights(path, matrices, config, torch.float16, kind="lora", base=base, name=name, **metadata)


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_lora` -> (matrices by name, metadata). Raises FileNotFoundError, ValueError."""
    return read_adapter(path, "lora", "LoRA", "train --lora")


def read_adapter(path: str | Path, kind: str, called: str, command: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of what stands beside a U-Net -> (tensors by name, metadata), whose "config" is a `LoraConfig`.

    kind: "lora" or "student"; called, command: its name and the command that trains it, for messages. Raises
    FileNotFoundError, or ValueError for another file and for settings that are not those of a LoRA.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder: give the file of a {called}, as its {kind}.safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"no {called} at {path}: train one (`refined-ldm {command}`)")
    tensors, metadata = read_weights(path)
    if metadata.get("kind") != kind or not {"base", "name", "config"} <= metadata.keys():
        raise ValueError(f"{path} is no {called} of `refined-ldm {command}`")
    try:
        return tensors, metadata | {"config": LoraConfig(**metadata["config"])}
    except (TypeError, ValueError) as fault:
        raise ValueError(f"{path}: no settings of a {called} of this version ({fault})") from fault


def _peft():
    try:
        import peft
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("LoRA needs peft: pip install 'refined-audio-ldm[lora]'") from missing
    return peft
