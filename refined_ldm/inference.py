"""Faster generation: `optimize_for_inference` picks what a device computes fastest, and returns what it picked.

- **Half precision**, bfloat16 or float16, where the device multiplies it faster than float32
  (`devices.pick_precision`): weights of convolutions and linear layers. Norms, the first and the last layer and the
  layers of timestep and caption stay in float32; autocast decides the rest.
- **Channels last**: the channels of one position are adjacent in memory, as matrix products need them. Convolutions in
  time run as convolutions of images one pixel high, for which libraries have that layout.
- **Winograd** on a CPU in float32: 3 x 3 convolutions of large maps by the minimal filtering of Lavin & Gray (2016), by
  NNPACK, which is part of torch. It needs a quarter of the multiplications.
- **DeepCache**, on request: deep levels of the U-Net are computed at every few sampling steps (`unet.DeepFeatures`).
- **torch.compile** of the U-Net, on request: minutes at the first call, then cached.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refined_ldm.base.integers import whole
from refined_ldm.devices import HALF, allow_tf32, pick_precision

LARGE_MAP = 4096  # positions (T x F) from which Winograd is faster, measured on a CPU without bfloat16
WIDE = 64  # channels, likewise
EXACT = ("conv_in", "conv_out", "time_embed", "end_embed", "film_embed", "film")  # in float32: a third of the error


@dataclass(frozen=True)
class Optimizations:
    """The optimizations that `optimize_for_inference` applied."""

    precision: str  # "bf16", "fp16" or "no" (float32)
    winograd: int  # layers
    compiled: bool
    cache_interval: int  # steps for each complete evaluation of the U-Net


def optimize_for_inference(
    model: nn.Module, precision: str | None = None, compile: bool = False, cache_interval: int = 1
) -> Optimizations:
    """Speed up generation by a `RefinedAudioLDM`, in place; it cannot be trained afterwards.

    precision: "bf16", "fp16" or "no"; None takes the device's fastest. Outputs change by rounding: in float32 by about
    1e-5 of their size (TF32 on a GPU from Ampere on: 1e-3), in bfloat16 by about 1 % (`python -m tests.benchmark
    --accuracy` measures both). cache_interval: `generate` computes the deep levels of the U-Net at every so many steps
    only; 3 halves the time of the published U-Net, and changes the sound (docs/speed.md). Raises ValueError for another
    precision or interval.
    """
    if precision not in (None, *HALF, "no"):
        raise ValueError(f'precision must be "bf16", "fp16", "no" or None, got {precision!r}')
    if whole("cache_interval", cache_interval, 1) > 1 and compile:
        raise ValueError("compile and cache_interval do not go together: leave one out")
    model.cache_interval = int(cache_interval)
    device = model.device.type
    allow_tf32(device)
    precision = precision or pick_precision(device)
    half, winograd = HALF.get(precision), 0
    decoder = nn.ModuleList([model.vae.decoder, model.vae.post_quant_conv])
    unets = [unet for unet in (model.unet, model.student, model.refiner and model.refiner.unet) if unet is not None]
    for unet in unets:
        unet.to(memory_format=torch.channels_last)
    if half:
        for name, layer in (named for unet in unets for named in unet.named_modules()):
            if isinstance(layer, nn.Conv2d | nn.Linear) and any(part in EXACT for part in name.split(".")):
                layer.forward = _in_float32(layer.forward, device)
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                layer.to(half)
        for layer in _layers(decoder, model.vocoder):
            layer.to(half)
        decoder.to(memory_format=torch.channels_last)
    elif device == "cpu" and torch.backends.nnpack.is_available():
        for layer in _layers(decoder):
            if _suits_winograd(layer):
                layer.forward = partial(_by_winograd, layer)
                winograd += 1
    if device == "cpu":
        for layer in _layers(model.vocoder):
            if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
                layer.forward = _as_image(layer)
    if compile:
        for unet in unets:
            unet.compile()
    if half:
        for part in (*unets, model.vae.decoder, model.vae.post_quant_conv, model.vocoder):
            part.forward = _autocast(part.forward, device, half)
    return Optimizations(precision, winograd, compile, model.cache_interval)


def _layers(*parts: nn.Module) -> list[nn.Module]:
    kinds = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.Linear
    return [layer for part in parts for layer in part.modules() if isinstance(layer, kinds)]


def _in_float32(forward: Callable[[Tensor], Tensor], device: str) -> Callable[[Tensor], Tensor]:
    def exact(x: Tensor) -> Tensor:
        with torch.autocast(device, enabled=False):
            return forward(x.float())

    return exact


def _autocast(forward: Callable[..., Tensor], device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    def mixed(*inputs: Tensor, **more: Any) -> Tensor:
        with torch.autocast(device, dtype):
            return forward(*inputs, **more).float()

    return mixed


def _suits_winograd(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d):
        return False
    geometry = layer.kernel_size, layer.stride, layer.padding
    return geometry == ((3, 3), (1, 1), (1, 1)) and min(layer.in_channels, layer.out_channels) >= WIDE


def _by_winograd(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A 3 x 3 convolution (B, C, T, F) -> (B, C', T, F), by NNPACK where the map is large."""
    if x.shape[2] * x.shape[3] < LARGE_MAP or torch.is_grad_enabled():
        return F.conv2d(x, layer.weight, layer.bias, padding=1)
    return torch._nnpack_spatial_convolution(x.contiguous(), layer.weight, layer.bias, [1, 1], [1, 1])


def _as_image(layer: nn.Conv1d | nn.ConvTranspose1d) -> Callable[[Tensor], Tensor]:
    """The forward of a convolution in time, (B, C, T) -> (B, C', T'), as one of (B, C, 1, T) with channels last."""
    operation = F.conv_transpose2d if isinstance(layer, nn.ConvTranspose1d) else F.conv2d
    weight = layer.weight.detach()[:, :, None].to(memory_format=torch.channels_last)
    settings = dict(stride=(1, *layer.stride), padding=(0, *layer.padding), dilation=(1, *layer.dilation))

    def forward(x: Tensor) -> Tensor:
        image = x[:, :, None].contiguous(memory_format=torch.channels_last)
        return operation(image, weight, layer.bias, **settings)[:, :, 0]

    return forward
