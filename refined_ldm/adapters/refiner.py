"""The refiner: a second denoiser for low noise, which gives the finished latent its texture.

Which sounds there are and when is decided while there is much noise, their texture while there is little. An expert for
each (Balaji et al. 2022, eDiff-I) needs not do both: the U-Net of `tiny` looks at blocks of 2 x 2 positions, and the
refiner, a smaller U-Net, at each of them. It takes the latent of any sampler, adds a little noise and removes it again
(Podell et al. 2024, SDXL, sec. 2.5). Few steps leave a latent too smooth; somewhat more noise than they expect makes up
for it (S_noise of Karras et al. 2022, EDM, sec. 4). Only the latent that is kept of several candidates is refined.

What the few jumps of a student got wrong is mended in the same way, by its teacher and at more noise: Restart sampling
(Xu et al. 2023). The candidates that fit their caption best restart, before one of them is kept.

Notebook: 09
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from refined_ldm.base.integers import cast_numbers
from refined_ldm.devices import fitting_threads
from refined_ldm.diffusion import add_noise, dpmpp_sample, noise_like
from refined_ldm.unet import UNet, UNetConfig
from refined_ldm.weights import load_into, read_weights, save_weights

REFINER_FILE = "refiner.safetensors"


@dataclass(frozen=True)
class RefinerConfig:
    """Sizes of a refiner, and how it is used."""

    unet: UNetConfig = UNetConfig()
    learned: int = 500  # it learned the timesteps below
    first: int = 290  # to which a latent is noised before it is refined; from 400 on numbers change
    steps: int = 6  # of DPM-Solver++ from there, closer together where there is less noise
    noise: float = 1.1  # size of what is added: more than the steps expect, since they smooth (EDM's S_noise)
    restarts: int = 3  # of a student's sounds, those of the best fit: its teacher mends them first
    restart: int = 499  # the timestep to which they are noised for it

    def __post_init__(self):
        cast_numbers(self)
        if not 1 <= self.steps <= self.first < self.learned:
            raise ValueError(f"a refiner needs 1 <= steps <= first < learned, got {self}")
        if not 0.5 <= self.noise <= 2:
            raise ValueError(f"noise of a refiner must be between 0.5 and 2, got {self.noise}")
        if self.restarts < 0 or self.restart <= self.first:
            raise ValueError(f"a refiner needs restarts >= 0 and restart > first, got {self}")

    @property
    def timesteps(self) -> list[int]:
        """Those of its steps, from high to low."""
        return [round(self.first * (1 - k / self.steps) ** 1.5) for k in range(self.steps)]

    @property
    def restart_timesteps(self) -> list[int]:
        """Those of the teacher's three steps: the noise below the last is the refiner's."""
        return [self.restart, (self.restart + self.first) // 2, self.first]


def refiner_config(unet: UNetConfig) -> RefinerConfig:
    """Return the sizes of a refiner for a model with this U-Net: a quarter narrower, at full resolution."""
    width = max(unet.model_channels * 3 // 4 // unet.norm_groups, 1) * unet.norm_groups
    levels = (1, 2, 2)
    sizes = {"model_channels": width, "head_channels": width // 2, "attention_resolutions": (2 ** (len(levels) - 1),)}
    own = replace(
        unet, patch_size=1, channel_mult=levels, num_res_blocks=1, caption_map=0, tokens=0, token_width=0, **sizes
    )
    return RefinerConfig(own)


class Refiner(nn.Module):
    """The U-Net of a refiner, and its settings. Latent (B, C, T, F), timestep (B,), embedding (B, D) -> prediction."""

    def __init__(self, config: RefinerConfig):
        super().__init__()
        self.config, self.unet = config, UNet(config.unet)

    def forward(self, latent: Tensor, timestep: Tensor, embedding: Tensor) -> Tensor:
        return self.unet(latent, timestep, embedding)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write weights and settings as safetensors."""
        save_weights(path, self, self.config, dtype)

    @classmethod
    def load(cls, path: str | Path) -> "Refiner":
        """Read a file written by `save` -> the refiner in evaluation mode. Raises FileNotFoundError, ValueError."""
        state, metadata = read_weights(path)
        try:
            config = metadata["config"]
            config = RefinerConfig(**config | {"unet": UNetConfig(**config["unet"])})
        except (KeyError, TypeError, AttributeError) as fault:
            raise ValueError(f"{path} is no refiner of `refined-ldm train --refiner` ({fault})") from fault
        return load_into(cls(config), state, path).eval()


# Methods of `RefinedAudioLDM`


@torch.no_grad()
def refine(
    model: nn.Module, latent: Tensor, embedding: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None
) -> Tensor:
    """Refine scaled latents (B, C, T, F) of captions with embeddings (B, D); without a refiner they stay as they are.

    So they do beside LoRAs, which it does not know. generator: of the noise, one or one for each latent.

    Notebook: 09
    """
    refiner = model.refiner
    if refiner is None or model.loras is not None:
        return latent
    with fitting_threads(refiner.unet, latent.numel() // latent.shape[1], model.device):
        denoise = partial(model.denoise, unet=refiner)
        return _again(model, denoise, latent, embedding, generator, refiner.config.timesteps, refiner.config.noise)


def restarts(model: nn.Module, candidates: int) -> int:
    """Return how many of a student's candidates `restart`: of one, among which there is no choice, none."""
    return 0 if model.refiner is None or candidates == 1 else min(model.refiner.config.restarts, candidates)


@torch.no_grad()
def restart(
    model: nn.Module,
    latent: Tensor,
    embedding: Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    unconditional: Tensor | None = None,
) -> Tensor:
    """Let the U-Net mend latents (B, C, T, F) of a student, of captions with embeddings (B, D), in three guided steps.

    It does not remove the last of the noise well, which is the refiner's: the latents are for the matcher and for
    `refine`. generator: as there. unconditional: the embedding (D,) of "", computed here if None.

    Notebook: 09
    """
    timesteps = model.refiner.config.restart_timesteps
    return _again(model, model.guided(unconditional), latent, embedding, generator, timesteps)


def _again(model, denoise, latent, embedding, generator, timesteps, size=1.0):
    """Add noise to latents up to the first of the timesteps, `size` times as much, and remove it in steps from them."""
    at = torch.full((len(latent),), timesteps[0], device=latent.device)
    z_t = add_noise(latent, size * noise_like(latent, generator), at, model.schedule)
    return dpmpp_sample(denoise, z_t, embedding, model.schedule, timesteps=timesteps)
