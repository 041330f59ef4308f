"""Noising, the training objective and the samplers. No network is known here, only `denoise(z_t, t, c)` -> eps.

z_0: clean latent (B, C, T, F), eps: the noise added to it, z_t: their mixture at timestep t (B,) in 0 … steps - 1,
c: the condition. DDPM is Ho et al. 2020, DDIM Song et al. 2021, DPM-Solver++ Lu et al. 2022.
"""

from dataclasses import dataclass
from functools import partial

import torch

from refined_ldm.randomness import draw


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha_bar (steps,): the share of signal power left at each timestep."""

    alpha_bar: torch.Tensor

    @classmethod
    def ldm(cls, steps=1000, beta_start=0.0015, beta_end=0.0195):
        """Latent diffusion's "scaled linear" betas: sqrt(beta) is even (Rombach et al. 2022, AudioLDM's values)."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        return cls((1 - betas).cumprod(0).float())

    @property
    def steps(self):
        return len(self.alpha_bar)

    def at(self, t):
        """alpha_bar at timesteps t (B,), shaped (B, 1, 1, 1) to multiply latents."""
        return self.alpha_bar.to(t.device)[t][:, None, None, None]

    def timesteps(self, steps, spacing="trailing"):
        """`steps` timesteps from noise to sound, as integers from high to low.

        trailing: evenly spaced, starting at the last one, where the noise is (Lin et al. 2024);
        leading: AudioLDM's DDIM, multiples of 1000 // steps plus one; linspace: DPM-Solver's.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"sampling steps must be between 1 and {self.steps}, got {steps}")
        if spacing == "trailing":
            return [round(self.steps - k * self.steps / steps) - 1 for k in range(steps)]
        if spacing == "leading":
            return [min(k * (self.steps // steps) + 1, self.steps - 1) for k in reversed(range(steps))]
        if spacing == "linspace":
            return torch.linspace(0, self.steps - 1, steps + 1).round().long().flip(0)[:-1].tolist()
        raise ValueError(f"spacing must be trailing, leading or linspace, got {spacing!r}")


def add_noise(z_0, eps, t, schedule):
    """z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps  (Ho et al. 2020, eq. 4)."""
    alpha_bar = schedule.at(t)
    return alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * eps


def clean_latent(z_t, eps, t, schedule):
    """Equation 4 solved for z_0: what the clean latent would be if `eps` were the noise in z_t."""
    alpha_bar = schedule.at(t)
    return (z_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


def to_noise(prediction, z_t, t, schedule, parameterization):
    """What a network predicts -> the noise eps it implies.

    "eps": the noise itself (Ho et al. 2020); "v": sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0, which is as hard at
    every t (Salimans & Ho 2022, app. D); "x0": the clean latent.
    """
    alpha_bar = schedule.at(t)
    if parameterization == "eps":
        return prediction
    if parameterization == "v":
        return alpha_bar.sqrt() * prediction + (1 - alpha_bar).sqrt() * z_t
    if parameterization == "x0":
        return (z_t - alpha_bar.sqrt() * prediction) / (1 - alpha_bar).sqrt()
    raise ValueError(f"parameterization must be eps, v or x0, got {parameterization!r}")


def loss_weight(t, schedule, parameterization):
    """The factor (B,) that turns a squared error in eps into one in what the network predicts.

    v: 1 / alpha_bar; x0: (1 - alpha_bar) / alpha_bar, the inverse signal-to-noise ratio; eps: 1.
    """
    alpha_bar = schedule.at(t).flatten()
    return {"eps": torch.ones_like(alpha_bar), "v": 1 / alpha_bar, "x0": (1 - alpha_bar) / alpha_bar}[parameterization]


def stratified_timesteps(count, schedule, generator=None):
    """(count,) timesteps, one from each of `count` equal slices of the schedule: a batch sees all noise levels."""

    def one_from_each_slice(shape, generator):
        offsets, slices = torch.rand(shape, generator=generator), torch.randperm(*shape, generator=generator)
        return ((slices + offsets) / shape[0] * schedule.steps).long().clamp(max=schedule.steps - 1)

    return draw(one_from_each_slice, (count,), generator)


def noisy_timesteps(count, schedule, generator=None):
    """(count,) timesteps as `stratified_timesteps`, but ever more of them the more noise there is, linearly.

    What sounds when, how often and how high is decided where there is mostly noise; later the noisy latent shows it.
    """
    even = stratified_timesteps(count, schedule, generator)
    return ((even / schedule.steps).sqrt() * schedule.steps).long()


def uniform_timesteps(count, schedule, generator=None):
    """(count,) timesteps, each drawn by itself (Ho et al. 2020, algorithm 1)."""
    return draw(partial(torch.randint, schedule.steps), (count,), generator)


def diffusion_loss(denoise, z_0, c, t, eps, schedule, weight=None):
    """Mean squared error of the predicted noise  (Ho et al. 2020, eq. 14), times weight (B,) if given."""
    error = (denoise(add_noise(z_0, eps, t, schedule), t, c) - eps) ** 2
    per_clip = error.flatten(1).mean(1)  # (B,)
    return (per_clip if weight is None else weight * per_clip).mean()


def noise_like(z, generator=None):
    """Standard normal noise of the shape of z (B, C, T, F); a list of B generators gives every row its own."""
    if isinstance(generator, list):
        return torch.stack([torch.randn(z.shape[1:], generator=own) for own in generator]).to(z)
    return torch.randn(z.shape, generator=generator).to(z)


@torch.no_grad()
def ddim_sample(denoise, z_T, c, schedule, steps=200, eta=0.0, generator=None, spacing="leading", on_step=None):
    """Noise z_T (B, C, T, F) -> latent, by DDIM  (Song et al. 2021, eq. 12 and 16).

    eta = 0 is deterministic, eta = 1 is DDPM's noise; AudioLDM samples with 200 steps and eta = 1. `generator`: one, or
    one for each row.
    on_step(k, steps) is called after each step, for a progress bar.
    """
    z_t, timesteps = z_T, schedule.timesteps(steps, spacing)
    for k, now in enumerate(timesteps):
        t = torch.full((len(z_t),), now, device=z_t.device)
        following = timesteps[k + 1] if k + 1 < steps else 0  # the last step ends at alpha_bar_0, as published
        a, a_next = schedule.alpha_bar[now], schedule.alpha_bar[following]
        eps = denoise(z_t, t, c)
        z_0 = (z_t - (1 - a).sqrt() * eps) / a.sqrt()
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).clamp(min=0).sqrt()  # eq. 16
        z_t = a_next.sqrt() * z_0 + (1 - a_next - sigma**2).clamp(min=0).sqrt() * eps  # eq. 12
        if eta > 0:
            z_t = z_t + sigma * noise_like(z_t, generator)
        if on_step:
            on_step(k + 1, steps)
    return z_t


@torch.no_grad()
def dpmpp_sample(denoise, z_T, c, schedule, steps=25, spacing="trailing", on_step=None):
    """Noise z_T (B, C, T, F) -> latent, by DPM-Solver++(2M)  (Lu et al. 2022, algorithm 2).

    A second-order multistep solver in the log signal-to-noise ratio: 25 steps come as near the exact solution of the
    sampling equation as about 100 of DDIM. The first and the last step are of first order; the last ends at z_0.
    """
    z_t, timesteps = z_T, schedule.timesteps(steps, spacing)
    if len(set(timesteps)) < steps:
        raise ValueError(f"{steps} {spacing} steps come twice to a timestep, where the solver cannot move: take fewer")
    half_log_snr = 0.5 * (schedule.alpha_bar.double() / (1 - schedule.alpha_bar.double())).log()
    previous, h_previous = None, None
    for k, now in enumerate(timesteps):
        t = torch.full((len(z_t),), now, device=z_t.device)
        z_0 = clean_latent(z_t, denoise(z_t, t, c), t, schedule)
        if k + 1 == steps:
            z_t = z_0
        else:
            following = timesteps[k + 1]
            h = float(half_log_snr[following] - half_log_snr[now])
            if previous is None:
                data = z_0
            else:
                r = h_previous / h
                data = (1 + 1 / (2 * r)) * z_0 - 1 / (2 * r) * previous
            a, a_next = schedule.alpha_bar[now].double(), schedule.alpha_bar[following].double()
            z_t = (
                float(((1 - a_next) / (1 - a)).sqrt()) * z_t
                - float(a_next.sqrt()) * torch.expm1(torch.tensor(-h)).item() * data
            )
            previous, h_previous = z_0, h
        if on_step:
            on_step(k + 1, steps)
    return z_t
