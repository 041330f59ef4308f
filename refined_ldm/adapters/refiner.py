"""The refiner: a second denoiser for low noise, which gives the finished latent its texture.

Which sounds there are and when is decided while there is much noise, their texture while there is little. An expert for
each (Balaji et al. 2022, eDiff-I) needs not do both: the U-Net of `tiny` looks at blocks of 2 x 2 positions, and the
refiner, a smaller U-Net, at each of them. It takes the latent of any sampler, adds a little noise and removes it again
(Podell et al. 2024, SDXL, sec. 2.5). Only the latent that is kept of several candidates is refined.

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

    def __post_init__(self):
        cast_numbers(self)
        if not 1 <= self.steps <= self.first < self.learned:
            raise ValueError(f"a refiner needs 1 <= steps <= first < learned, got {self}")

    @property
    def timesteps(self) -> list[int]:
        """Those of its steps, from high to low."""
        return [round(self.first * (1 - k / self.steps) ** 1.5) for k in range(self.steps)]


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


# Method of `RefinedAudioLDM`


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
    at = torch.full((len(latent),), refiner.config.first, device=latent.device)
    z_t = add_noise(latent, noise_like(latent, generator), at, model.schedule)
    denoise = partial(model.denoise, unet=refiner)
    with fitting_threads(refiner.unet, z_t.numel() // z_t.shape[1], model.device):
        return dpmpp_sample(denoise, z_t, embedding, model.schedule, timesteps=refiner.config.timesteps)
