"""The memory that generation and training take on a GPU at a preset's sizes, counted on fake tensors.

`python -m tests.benchmark.memory` writes figures/data/memory.csv, from which docs/gpu.md and the first cells of the
notebooks are written. In float32, without the workspace of a GPU's libraries and without what its driver takes.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refined_ldm.config import Config, preset
from refined_ldm.discriminators import Discriminators
from refined_ldm.display import save_table
from refined_ldm.hifigan import HiFiGAN
from refined_ldm.unet import UNet
from refined_ldm.vae import MelVAE
from tests.benchmark.training_costs import FLOAT, TRAINED, conditioner_parameters, fused_attention

PRESETS = ("colab", "paper")


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are alive at once: `peak` is their largest sum."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._storages, self._tensors = {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in self._tensors:
                storage = tensor.untyped_storage()
                if storage._cdata in self._storages or storage._cdata not in given:  # else a view of a weight
                    self._add(tensor, storage._cdata, storage.nbytes())
        return made

    def _add(self, tensor, key, bytes):
        self._tensors[id(tensor)] = key
        if key not in self._storages:
            self._storages[key] = [bytes, 0]
            self.now += bytes
            self.peak = max(self.peak, self.now)
        self._storages[key][1] += 1
        weakref.finalize(tensor, self._drop, id(tensor))

    def _drop(self, which):
        key = self._tensors.pop(which)
        self._storages[key][1] -= 1
        if not self._storages[key][1]:  # of its views, too, none is left
            self.now -= self._storages.pop(key)[0]


def peak_of(run: Callable[[], object], grad: bool = False) -> int:
    """Bytes that a call takes at its peak, beside its inputs and weights; with `grad` there and back."""
    with torch.set_grad_enabled(grad), fused_attention(), Alive() as alive:
        made = run()
        if grad:
            made.float().sum().backward()
    return alive.peak


def weights(*modules: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def counted(config: Config) -> dict[str, int]:
    """{work: bytes} on a GPU in float32, for a configuration."""
    frames, bins = config.samples // config.mel.hop_length, config.mel.n_mels
    latent = (config.vae.latent_channels, frames // config.vae.downsampling, bins // config.vae.downsampling)
    conditioner = conditioner_parameters(config)
    with FakeTensorMode():
        unet, vae, vocoder = UNet(config.unet), MelVAE(config.vae), HiFiGAN(config.hifigan, config.mel)
        whole = FLOAT * (conditioner + weights(unet, vae, vocoder))

        def denoise(batch: int) -> torch.Tensor:
            return unet(torch.randn(batch, *latent), torch.zeros(batch), torch.randn(batch, config.unet.condition_dim))

        found = {}
        for sounds in (1, 16):
            steps = (partial(denoise, 2 * sounds), lambda n=sounds: vae.decode(torch.randn(n, *latent)),
                     lambda n=sounds: vocoder(torch.randn(n, 1, frames, bins)))  # fmt: skip
            found[f"generating {sounds} sound{'s' * (sounds > 1)} at once"] = whole + max(map(peak_of, steps))
        for batch, checkpointing in ((2, False), (2, True), (4, False)):
            unet.zero_grad()
            unet.gradient_checkpointing = checkpointing
            kept = (TRAINED - 2) * FLOAT * weights(unet) + peak_of(partial(denoise, batch), grad=True)  # and gradients
            name = f"training the U-Net, batch {batch}" + ", with gradient checkpointing" * checkpointing
            found[name] = whole + kept
        discriminators, crop = Discriminators(config.discriminators), config.training["hifigan"].crop_frames or frames

        def adversarial() -> torch.Tensor:
            fake = vocoder(torch.randn(4, 1, crop, bins))
            scores = (tree_leaves(discriminators(waveform)) for waveform in (fake, fake.detach()))
            return sum(x.sum() for of in scores for x in of)

        kept = (TRAINED - 2) * FLOAT * weights(vocoder, discriminators) + FLOAT * weights(discriminators)
        name = "training the vocoder with its discriminators, batch 4"
        found[name] = whole + kept + peak_of(adversarial, grad=True)
    return found


def rows(presets: Sequence[str] = PRESETS) -> list[dict]:
    """The rows of figures/data/memory.csv: work, and GB for each preset."""
    found = {name: counted(preset(name)) for name in presets}
    return [
        {"work": work, **{name: f"{found[name][work] / 1e9:.1f}" for name in presets}} for work in found[presets[0]]
    ]


if __name__ == "__main__":
    save_table(rows(), "memory")
