"""How a caption steers the denoiser: FiLM inside the U-Net, classifier-free guidance around it."""

import torch
from torch import nn

from refined_ldm.randomness import draw


class FiLM(nn.Module):
    """Scale and shift feature maps by a condition (Perez et al. 2018).

    h: (B, C, T, F) features, condition: (B, D)  ->  (B, C, T, F). With `scale=False` it only shifts, as AudioLDM does.
    """

    def __init__(self, channels, condition_dim, scale=True):
        super().__init__()
        self.scale = scale
        self.project = nn.Linear(condition_dim, 2 * channels if scale else channels)

    def forward(self, h, condition):
        parameters = self.project(nn.functional.silu(condition))[:, :, None, None]
        if not self.scale:
            return h + parameters
        scale, shift = parameters.chunk(2, dim=1)  # each (B, C, 1, 1)
        return h * (1 + scale) + shift


def drop_condition(embedding, unconditional, probability, generator=None):
    """Replace each embedding (B, D) by the `unconditional` one (D,) with a probability (Ho & Salimans 2022, alg. 1).

    What the network sees for a dropped caption is what it will see at guidance time; it must be the same vector.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
    dropped = draw(torch.rand, (len(embedding),), generator).to(embedding.device) < probability
    return torch.where(dropped[:, None], unconditional.to(embedding), embedding)


def guided_noise(denoise, z_t, t, embedding, unconditional, guidance_scale, interval=None):
    """Classifier-free guidance: eps_u + g * (eps_c - eps_u)  (Ho & Salimans 2022, eq. 6, with g = 1 + w).

    Both halves run as one batch. g = 1 is the plain condition, g = 0 ignores the caption; each then costs one half.
    `unconditional` (D,) or (B, D): the embedding of "" or, for a negative caption, of what to move away from.
    interval: the first and the last timestep that are guided; at others g = 1, which costs one half (Kynkäänniemi et
    al. 2024: where there is nearly only noise guidance hurts, where there is hardly any it does nothing).
    """
    unconditional = unconditional.to(embedding).expand_as(embedding)
    if guidance_scale == 1 or (interval is not None and not interval[0] <= int(t[0]) <= interval[1]):
        return denoise(z_t, t, embedding)
    if guidance_scale == 0:
        return denoise(z_t, t, unconditional)
    both = denoise(torch.cat([z_t, z_t]), torch.cat([t, t]), torch.cat([unconditional, embedding]))
    eps_u, eps_c = both.chunk(2)
    return eps_u + guidance_scale * (eps_c - eps_u)
