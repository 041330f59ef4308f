"""What training at the size of real data sets takes: bytes and operations counted from the networks themselves.

The networks of a preset are built and differentiated on fake tensors, which have a shape and a type and no numbers: so
a laptop counts what a GPU would hold. `python -m tests.benchmark.training_costs` writes the tables
figures/data/training_costs_*.csv, from which the tables of docs/scale.md are written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from refined_ldm import unet
from refined_ldm.clap import CLAP_PRESETS, Clap
from refined_ldm.config import preset
from refined_ldm.data.caches import encoded_at_once
from refined_ldm.display import save_table
from refined_ldm.durable.run_state import KEPT
from refined_ldm.hifigan import HiFiGAN
from refined_ldm.mel import mel_filterbank
from refined_ldm.unet import UNet
from refined_ldm.vae import MelVAE
from tests.support.pretended_device import cuda_autocast

FLOAT, HALF = 4, 2  # bytes
TRAINED = 5  # numbers per weight while training: itself, its gradient, two moments of AdamW, its running average
SAVED = 4  # the same without the gradient
STEPS = 100_000


@dataclass(frozen=True)
class DataSet:
    """A public data set, as its authors state it."""

    name: str
    clips: int
    hours: float
    stated_by: str


DATA_SETS = (
    DataSet("AudioCaps, train", 49_838, 138.4, "Kim et al. 2019; 10 s each"),
    DataSet("WavCaps", 403_050, 7_568, "Mei et al. 2023"),
    DataSet("AudioSet", 2_084_320, 5_790, "Gemmeke et al. 2017; 10 s each"),
)


@dataclass(frozen=True)
class Gpu:
    """What is assumed of the machine; nothing of it was measured here."""

    name: str = "H100 SXM"
    flops: float = 989e12  # a second, bfloat16 without sparsity, as its maker states
    used: float = 0.3  # of them by training
    launch: float = 10e-6  # seconds that PyTorch takes to start one operation, below which no small batch comes
    dollars: float = 3.0  # an hour

    def hours(self, times, flops, launches):
        """So many times `flops` operations on numbers, which are started by `launches`."""
        return times * max(flops / (self.flops * self.used), launches * self.launch) / 3600


@dataclass(frozen=True)
class Counted:
    """What one clip takes in a network."""

    parameters: int
    activations: float  # bytes kept for the way back, in float32
    half_activations: float  # the same under CUDA's autocast to bfloat16, without its copies of the weights
    forward: float  # operations
    both: float  # operations there and back
    launches: int  # calls of the GPU there and back in bfloat16, of any batch


def count(make: Callable, run: Callable) -> Counted:
    """Count what `run(network, batch)`, a tensor, takes for each clip; `make()` builds the network."""
    with FakeTensorMode():
        network = make()
        kept, forward, both, _ = _kept(network, run, 1, False)
        one, two = (_kept(network, run, batch, True) for batch in (1, 2))  # both keep the half copy of the weights
        return Counted(sum(p.numel() for p in network.parameters()), kept, two[0] - one[0], forward, both, one[3])


def fused_attention():
    """Within this context attention is the fused kernel's everywhere, as on a GPU."""
    return patch.object(unet, "FEW", 0)


class _Launches(TorchDispatchMode):
    """Counts the operations inside that compute: no views, and not the questions that fake tensors ask."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace == "aten" and not function.is_view
        return function(*args, **(kwargs or {}))


def _kept(network, run, batch, half):
    """-> (bytes kept for the way back, operations there, operations there and back, launches)."""
    kept, weights = {}, {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # the same one counts once
        return tensor

    operations, launches = FlopCounterMode(display=False), _Launches()
    with operations, launches, cuda_autocast(), fused_attention():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = run(network, batch).float().sum()
        forward = operations.get_total_flops()
        loss.backward()
    held = sum(storage.nbytes() for storage in kept.values())
    return held, forward, operations.get_total_flops(), launches.count


def parts_of(config):
    """{part: Counted} of a Config: U-Net and VAE on whole clips, the vocoder on the crops that it learns from.

    Discriminators are not counted.
    """
    frames, bins = config.samples // config.mel.hop_length, config.mel.n_mels
    latent = (config.vae.latent_channels, frames // config.vae.downsampling, bins // config.vae.downsampling)
    mel, crop = (1, frames, bins), config.training["hifigan"].crop_frames or frames

    def denoise(unet, batch):
        return unet(torch.randn(batch, *latent), torch.zeros(batch), torch.randn(batch, config.unet.embedding_dim))

    return {
        "U-Net": count(lambda: UNet(config.unet), denoise),
        "VAE": count(lambda: MelVAE(config.vae), lambda vae, batch: vae(torch.randn(batch, *mel))[0]),
        "encoder": count(lambda: MelVAE(config.vae).encoder, lambda encoder, batch: encoder(torch.randn(batch, *mel))),
        "vocoder": count(lambda: HiFiGAN(config.hifigan, config.mel),
                         lambda vocoder, batch: vocoder(torch.randn(batch, 1, crop, bins))),
    }  # fmt: skip


def conditioner_parameters(config) -> int:
    """How many numbers the conditioner of a Config has."""
    settings = CLAP_PRESETS[config.clap]
    mel_filterbank(settings.mel_rate, settings.n_fft, settings.n_mels, settings.fmin, settings.fmax)  # kept
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Clap(settings).parameters())


def clip_bytes(config) -> int:
    """Of one clip in the cache of `cache_clips`: 16-bit samples."""
    return 2 * config.samples


def latent_bytes(config, captions=1) -> int:
    """Of one clip in the cache of `cache_latents`: its latent and its captions' embeddings, in half precision."""
    frames, places = config.samples // config.mel.hop_length, config.mel.n_mels
    latent = config.vae.latent_channels * frames * places // config.vae.downsampling**2
    return HALF * (latent + captions * config.unet.embedding_dim)


def checkpoint_bytes(parameters: int) -> int:
    """Of the checkpoints that a run keeps of a network with a running average, trained by AdamW."""
    return KEPT * SAVED * FLOAT * parameters


def data_rows(config, gpu=None) -> list[dict]:
    """What the caches of each public data set take on disk, and how long encoding it takes."""
    gpu, encoder = gpu or Gpu(), parts_of(config)["encoder"]
    launches = encoder.launches / encoded_at_once(config.samples)
    return [
        {
            "data set": f"{d.name} ({d.stated_by})",
            "clips": f"{d.clips:,}",
            "hours": f"{d.hours:,.0f}",
            "16-bit mono, 16 kHz": _size(d.hours * 3600 * 32_000),
            "`clips-train`": _size(d.clips * clip_bytes(config)),
            "`latents-train`": _size(d.clips * latent_bytes(config)),
            "encoding once, GPU hours": _three(gpu.hours(d.clips, encoder.forward, launches)),
        }
        for d in DATA_SETS
    ]


def network_rows(config) -> list[dict]:
    """What each network that is trained takes."""
    return [
        {
            "trained": part,
            "parameters": f"{counted.parameters:,}",
            "state": _size(TRAINED * FLOAT * counted.parameters),
            "two checkpoints": _size(checkpoint_bytes(counted.parameters)),
            "activations a clip, float32": _size(counted.activations),
            "activations a clip, bfloat16": _size(counted.half_activations),
            "GFLOP a clip": _three(counted.both / 1e9),
            "kernel launches a step": f"{counted.launches:,}",
        }
        for part, counted in parts_of(config).items()
        if part != "encoder"
    ]


def unet_rows(config, gpu=None, batches=(2, 16, 64)) -> list[dict]:
    """GPU memory, hours and dollars of `STEPS` steps of the U-Net, and how many epochs they are."""
    gpu, parts = gpu or Gpu(), parts_of(config)
    unet, rows = parts["U-Net"], []
    idle = FLOAT * (conditioner_parameters(config) + parts["VAE"].parameters + parts["vocoder"].parameters)
    state = TRAINED * FLOAT * unet.parameters + idle
    for batch in batches:
        hours = gpu.hours(STEPS, batch * unet.both, unet.launches)
        half = state + HALF * unet.parameters + batch * unet.half_activations
        row = {
            "batch": str(batch),
            "GPU memory, float32": _size(state + batch * unet.activations),
            "GPU memory, bfloat16": _size(half),
            "GPU hours": _three(hours),
            "dollars": _three(hours * gpu.dollars),
        }
        rows.append(row | {f"epochs of {d.name.split(',')[0]}": _three(STEPS * batch / d.clips) for d in DATA_SETS})
    return rows


def tables(name="paper") -> dict[str, list[dict]]:
    """The tables of docs/scale.md for a preset, by the name of their CSV file."""
    config = preset(name)
    return {
        "training_costs_data": data_rows(config),
        "training_costs_networks": network_rows(config),
        "training_costs_unet": unet_rows(config),
    }


def _three(x: float) -> str:
    """Three digits that count: 0.0123, 1.23, 12.3, 1,230."""
    return f"{float(f'{x:.3g}'):,.10g}" if x < 1e3 else f"{round(float(f'{x:.3g}')):,}"


def _size(bytes: float) -> str:
    unit = next(u for u in (1e12, 1e9, 1e6, 1e3, 1) if bytes >= u or u == 1)
    return f"{_three(bytes / unit)} {({1e12: 'TB', 1e9: 'GB', 1e6: 'MB', 1e3: 'kB', 1: 'bytes'})[unit]}"


if __name__ == "__main__":
    for table, rows in tables().items():
        save_table(rows, table)
