"""Caption conditioning of the denoiser: FiLM inside the U-Net, classifier-free guidance around it.

Notebook: 03
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refined_ldm.randomness import draw


class FiLM(nn.Module):
    """Scale and shift feature maps by a condition (Perez et al. 2018).

    h: (B, C, T, F) features, condition: (B, D)  ->  (B, C, T, F). With `scale=False` it only shifts, as AudioLDM does.

    Notebook: 03
    """

    def __init__(self, channels: int, condition_dim: int, scale: bool = True):
        super().__init__()
        self.scale = scale
        self.project = nn.Linear(condition_dim, 2 * channels if scale else channels)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        parameters = self.project(nn.functional.silu(condition))[:, :, None, None]
        if not self.scale:
            return h + parameters
        scale, shift = parameters.chunk(2, dim=1)  # each (B, C, 1, 1)
        return h * (1 + scale) + shift


def drop_condition(
    embedding: Tensor, unconditional: Tensor, probability: float, generator: torch.Generator | None = None
) -> Tensor:
    """Replace each embedding (B, D) by the `unconditional` one (D,) with a probability (Ho & Salimans 2022, alg. 1).

    `unconditional` must be the vector that guidance uses later. Raises ValueError for a probability outside [0, 1].

    Notebook: 03
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
    dropped = draw(torch.rand, (len(embedding),), generator).to(embedding.device, non_blocking=True) < probability
    return torch.where(dropped[:, None], unconditional.to(embedding), embedding)


def guided_noise(
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
    z_t: Tensor,
    t: Tensor,
    embedding: Tensor,
    unconditional: Tensor,
    guidance_scale: float,
    interval: tuple[int, int] | None = None,
) -> Tensor:
    """Classifier-free guidance: eps_u + g * (eps_c - eps_u)  (Ho & Salimans 2022, eq. 6, with g = 1 + w).

    z_t (B, C, T, F), t (B,), embedding (B, D) -> eps (B, C, T, F). Both halves run as one batch; g = 1 (the plain
    condition) and g = 0 (no caption) need one half only. unconditional (D,) or (B, D): the embedding of "" or of a
    negative caption. interval: the first and the last timestep with guidance; outside it g = 1. Kynkäänniemi et al.
    2024 find that guidance hurts at high noise levels and has no effect at low ones.

    Notebook: 03
    """
    unconditional = unconditional.to(embedding).expand_as(embedding)
    if guidance_scale == 1 or (interval is not None and not interval[0] <= int(t[0]) <= interval[1]):
        return denoise(z_t, t, embedding)
    if guidance_scale == 0:
        return denoise(z_t, t, unconditional)
    both = denoise(torch.cat([z_t, z_t]), torch.cat([t, t]), torch.cat([unconditional, embedding]))
    eps_u, eps_c = both.chunk(2)
    return eps_u + guidance_scale * (eps_c - eps_u)
