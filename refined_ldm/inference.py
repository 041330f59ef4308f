"""The same model sooner: `optimize_for_inference` picks what a device computes fastest, and says what it picked.

- **bfloat16** where the device multiplies it clearly faster than float32 (measured, `devices.pick_precision`):
  convolutions and linear layers hold their weights in it; norms, the first and the last layer and those that bring in
  timestep and caption stay in float32; autocast decides the rest.
- **Channels last**: the numbers of one place of a map lie side by side, as matrix products want them. Convolutions in
  time are done as those of pictures one pixel high, for which libraries have that layout.
- **Winograd** on a CPU in float32: 3 x 3 convolutions of large maps by the minimal filtering of Lavin & Gray (2016),
  which multiplies a quarter as often; NNPACK has it, which torch carries.
- **torch.compile** of the U-Net, on request: it takes minutes once, and keeps its work in a cache of its own.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from refined_ldm.devices import pick_precision

LARGE_MAP = 4096  # places (T x F) from which on Winograd wins: measured on one CPU without bfloat16
WIDE = 64  # channels, likewise
EXACT = ("conv_in", "conv_out", "time_embed", "film_embed", "film")  # a third of bfloat16's error, hardly any time


@dataclass(frozen=True)
class Optimizations:
    """What `optimize_for_inference` did: precision "bf16" or "no" (float32), how many layers by Winograd, whether compiled."""

    precision: str
    winograd: int
    compiled: bool


def optimize_for_inference(model, precision=None, compile=False):
    """Make a `RefinedAudioLDM` quick at generating, in place -> Optimizations. For inference: training wants its weights.

    precision: "bf16" or "no"; None measures. Outputs change by rounding: in float32 by about 1e-5 of their size, in
    bfloat16 by about 1 % (`python -m tests.benchmark --accuracy` measures both). Raises ValueError for another precision.
    """
    if precision not in (None, "bf16", "no"):
        raise ValueError(f'precision must be "bf16", "no" or None, got {precision!r}')
    device = model.device.type
    precision = precision or pick_precision(device)
    half, winograd = precision == "bf16", 0
    decoder = nn.ModuleList([model.vae.decoder, model.vae.post_quant_conv])
    model.unet.to(memory_format=torch.channels_last)
    if half:
        for name, layer in model.unet.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and any(part in EXACT for part in name.split(".")):
                layer.forward = _in_float32(layer.forward, device)
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                layer.to(torch.bfloat16)
        for layer in _layers(decoder, model.vocoder):
            layer.to(torch.bfloat16)
        decoder.to(memory_format=torch.channels_last)
    elif device == "cpu" and torch.backends.nnpack.is_available():
        for layer in _layers(decoder):
            if _suits_winograd(layer):
                layer.forward = partial(_by_winograd, layer)
                winograd += 1
    if device == "cpu":
        for layer in _layers(model.vocoder):
            if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
                layer.forward = _as_picture(layer)
    if compile:
        model.unet.compile()
    if half:
        for part in (model.unet, model.vae.decoder, model.vae.post_quant_conv, model.vocoder):
            part.forward = _autocast(part.forward, device)
    return Optimizations(precision, winograd, compile)


def _layers(*parts):
    kinds = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.Linear
    return [layer for part in parts for layer in part.modules() if isinstance(layer, kinds)]


def _in_float32(forward, device):
    def exact(x):
        with torch.autocast(device, enabled=False):
            return forward(x.float())

    return exact


def _autocast(forward, device):
    def quick(*inputs):
        with torch.autocast(device, torch.bfloat16):
            return forward(*inputs).float()

    return quick


def _suits_winograd(layer):
    return (isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer.stride == (1, 1)
            and layer.padding == (1, 1) and min(layer.in_channels, layer.out_channels) >= WIDE)  # fmt: skip


def _by_winograd(layer, x):
    """A 3 x 3 convolution (B, C, T, F) -> (B, C', T, F), by NNPACK where the map is large."""
    if x.shape[2] * x.shape[3] < LARGE_MAP or torch.is_grad_enabled():
        return F.conv2d(x, layer.weight, layer.bias, padding=1)
    return torch._nnpack_spatial_convolution(x.contiguous(), layer.weight, layer.bias, [1, 1], [1, 1])


def _as_picture(layer):
    """The forward of a convolution in time, (B, C, T) -> (B, C', T'), as one of (B, C, 1, T) with channels last."""
    operation = F.conv_transpose2d if isinstance(layer, nn.ConvTranspose1d) else F.conv2d
    weight = layer.weight.detach()[:, :, None].to(memory_format=torch.channels_last)
    settings = dict(stride=(1, *layer.stride), padding=(0, *layer.padding), dilation=(1, *layer.dilation))

    def forward(x):
        picture = x[:, :, None].contiguous(memory_format=torch.channels_last)
        return operation(picture, weight, layer.bias, **settings)[:, :, 0]

    return forward
