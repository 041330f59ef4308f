"""What a sound costs against its length, how many are made at once, and the width of the U-Net: seconds and memory."""

from dataclasses import replace

import numpy as np
import torch

from refined_ldm.conditioning import guided_noise
from refined_ldm.devices import synchronize
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.unet import UNet
from tests.benchmark.bench import best_of, peak_memory

LENGTHS = (2.56, 5.12, 10.24, 20.48, 40.96, 81.92)  # s
BATCHES = (1, 2, 4, 8, 16)
WIDTHS = (32, 64, 128, 256)  # channels of the U-Net's first level


def cost_against_size(on_row=print, lengths=LENGTHS, batches=BATCHES, widths=WIDTHS, model=None):
    """Measure the parts of preset `tiny` -> rows: against (length, batch, width), size, part, seconds, memory_gb.

    The parts: a guided step of the U-Net (two halves in one batch), the VAE's decoder, and the vocoder. The width is
    the U-Net's alone.
    """
    model, rows = model or RefinedAudioLDM.from_preset("tiny"), []

    def measure(against, size, seconds, batch, unet=model.unet, parts=("U-Net step", "VAE decode", "vocoder")):
        place = model.device
        z_t = torch.randn(batch, *model.latent_shape(seconds), device=place)
        t, c = torch.full((batch,), 500, device=place), torch.randn(batch, unet.config.embedding_dim, device=place)
        with torch.no_grad():
            mel = model.decode(z_t)
        works = {
            "U-Net step": lambda: guided_noise(unet, z_t, t, c, c[0], 3.0),
            "VAE decode": lambda: model.decode(z_t), "vocoder": lambda: model.to_waveform(mel),
        }  # fmt: skip
        for part in parts:
            work = _finished(torch.no_grad()(works[part]), place)
            memory = (peak_gpu_memory if place.type == "cuda" else peak_memory)(work)  # which warms up too
            row = {"against": against, "size": size, "part": part, "seconds": round(best_of(work), 5),
                   "memory_gb": memory}  # fmt: skip
            rows.append(row)
            on_row(f"{against:<8}{size:>8g}  {part:<12}{row['seconds']:9.4f} s"
                   + ("" if memory is None else f"{memory:8.3f} GB"))  # fmt: skip

    for seconds in lengths:
        measure("length", seconds, seconds, 1)
    for batch in batches:
        measure("batch", batch, lengths[0], batch)
    for width in widths:
        sizes = replace(model.config.unet, model_channels=width, norm_groups=8, head_channels=min(width, 32))
        measure("width", width, lengths[0], 4, UNet(sizes).to(model.device).eval(), ("U-Net step",))
    return rows


def _finished(work, device):
    """The call, which returns when the device has finished it."""

    def call():
        work()
        synchronize(device)

    return call


def peak_gpu_memory(work):
    """GB that a call takes on the GPU at its peak on top of what was held there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)


def exponent(sizes, costs):
    """k of cost = a * size^k, least squares on logarithms over the larger half of the sizes; NaN for a single one.

    The smaller half is left out: there what costs the same at any size still counts.
    """
    if len(sizes) < 2:
        return float("nan")
    order = np.argsort(sizes)[len(sizes) // 2 - (len(sizes) < 4) :]
    size, cost = np.log(np.asarray(sizes, float)[order]), np.log(np.maximum(np.asarray(costs, float)[order], 1e-9))
    return float(np.polyfit(size, cost, 1)[0])
