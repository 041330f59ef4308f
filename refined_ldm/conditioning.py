"""Caption conditioning of the denoiser: FiLM and a map inside the U-Net, classifier-free guidance around it.

Notebook: 03
"""

import math
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


class CaptionMap(nn.Module):
    """Draw an embedding as a map in time and frequency, an additional input of the U-Net.

    FiLM treats all positions alike, so it can say which sounds there are, but not which comes first. Here the
    embedding gives the weights of TIME x FREQUENCY cosines in every channel, through two linear layers with `rank`
    numbers between them. `fit` makes it the best linear estimate of the clean latent, from which training goes on. The
    cosines stretch with the map, so it may have any size.

    Notebook: 03
    """

    TIME, FREQUENCY = 8, 16  # cosines along each axis, from slow to fast

    def __init__(self, embedding_dim: int, channels: int, rank: int):
        super().__init__()
        self.read = nn.Linear(embedding_dim, rank, bias=False)
        self.draw = nn.Linear(rank, self.TIME * self.FREQUENCY * channels)

    def forward(self, embedding: Tensor, frames: int, bins: int) -> Tensor:
        """Embedding (B, D) -> map (B, C, T, F) with T = frames and F = bins."""
        weights = self.draw(self.read(embedding)).unflatten(1, (self.TIME, self.FREQUENCY, -1))  # (B, K, J, C)
        time, frequency = cosines(frames, self.TIME, weights), cosines(bins, self.FREQUENCY, weights)
        return torch.einsum("tk,fj,bkjc->bctf", time, frequency, weights)

    @torch.no_grad()
    def fit(self, latents: Tensor, embeddings: Tensor, ridge: float = 0.3) -> "CaptionMap":
        """Fit to scaled latents (N, C, T, F) and embeddings (N, D) by least squares of reduced rank -> self.

        ridge: the penalty of the least squares. The rank is reduced to the directions that explain most of the fitted
        maps (Izenman 1975).
        """
        time = torch.linalg.pinv(cosines(latents.shape[2], self.TIME, latents))
        frequency = torch.linalg.pinv(cosines(latents.shape[3], self.FREQUENCY, latents))
        parts = zip(latents.split(256), embeddings.split(256), strict=True)
        D, size = embeddings.shape[1], self.draw.out_features
        gram, cross = torch.zeros(D, D, dtype=torch.double), torch.zeros(D, size, dtype=torch.double)
        centre, mean = embeddings.double().mean(0), torch.zeros(size, dtype=torch.double)
        for z, c in parts:
            target = torch.einsum("kt,jf,bctf->bkjc", time, frequency, z).flatten(1).double()
            centred = c.double() - centre
            gram += centred.T @ centred
            cross += centred.T @ target  # the mean of the targets cancels, as the embeddings are centred
            mean += target.sum(0) / len(latents)
        gram += ridge * torch.eye(D, dtype=torch.double)
        weight = torch.linalg.solve(gram, cross)  # (D, K * J * C)
        root = torch.linalg.cholesky(gram)
        directions = torch.linalg.svd(root.T @ weight, full_matrices=False)[2][: self.read.out_features]  # (rank, …)
        self.read.weight.copy_((weight @ directions.T).T)
        self.draw.weight.copy_(directions.T)
        self.draw.bias.copy_(mean - centre @ weight @ directions.T @ directions)
        return self


def cosines(size: int, count: int, like: Tensor) -> Tensor:
    """(size, count): columns are the `count` slowest cosines of the DCT-II over `size` positions, between -1 and 1."""
    position = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / size
    return torch.cos(math.pi * position[:, None] * torch.arange(count, device=like.device))


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
