"""Noising, the training objective and the samplers. A network is only a function `denoise(z_t, t, c)` -> eps here.

z_0: clean latent (B, C, T, F), eps: the noise added to it, z_t: their mixture at timestep t (B,) in 0 … steps - 1,
c: the condition. DDPM is Ho et al. 2020, DDIM Song et al. 2021, DPM-Solver++ Lu et al. 2022.

Notebook: 03
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from refined_ldm.base.integers import number, whole
from refined_ldm.randomness import draw

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # z_t (B, C, T, F), t (B,), c (B, D) -> eps (B, C, T, F)
Jumper = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # z_t, t, s (B,), c -> eps of the jump from t to s
CLEAN = -1  # in place of a timestep: the clean latent, where alpha_bar is 1


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha_bar (steps,): the share of signal power left at each timestep.

    Notebook: 03
    """

    alpha_bar: Tensor
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def ldm(cls, steps: int = 1000, beta_start: float = 0.0015, beta_end: float = 0.0195) -> "NoiseSchedule":
        """Latent diffusion's "scaled linear" betas: sqrt(beta) is even (Rombach et al. 2022, AudioLDM's values)."""
        steps = whole("steps", steps, 1)
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        return cls((1 - betas).cumprod(0).float())

    @property
    def steps(self) -> int:
        """Number of timesteps."""
        return len(self.alpha_bar)

    def at(self, t: Tensor) -> Tensor:
        """alpha_bar at timesteps t (B,), shaped (B, 1, 1, 1) to multiply latents."""
        if t.device not in self._copies:  # copied once: the CPU would wait for the device at every step
            self._copies[t.device] = self.alpha_bar.to(t.device)
        return self._copies[t.device][t][:, None, None, None]

    def ends(self, s: Tensor) -> Tensor:
        """alpha_bar (B, 1, 1, 1) where jumps end: at timesteps s (B,), or 1 where s is CLEAN."""
        clean = (s == CLEAN)[:, None, None, None]
        return torch.where(clean, torch.ones_like(clean, dtype=self.alpha_bar.dtype), self.at(s.clamp(min=0)))

    def timesteps(self, steps: int, spacing: str = "trailing") -> list[int]:
        """`steps` different timesteps from noise to sound, as integers from high to low.

        trailing: evenly spaced from the last one, which is nearest to pure noise (Lin et al. 2024);
        leading: multiples of 1000 / steps, rounded down, plus one. This equals AudioLDM's DDIM if steps divide 1000;
        otherwise AudioLDM takes more steps than requested, or leaves the schedule;
        linspace: DPM-Solver's. With every spacing one step is the last timestep and 1000 steps are all of them. Raises
        ValueError for another spacing or number of steps.
        """
        steps = whole("sampling steps", steps, 1, self.steps)
        if spacing not in ("trailing", "leading", "linspace"):
            raise ValueError(f"spacing must be trailing, leading or linspace, got {spacing!r}")
        if spacing == "trailing" or steps in (1, self.steps):
            return [round(self.steps - k * self.steps / steps) - 1 for k in range(steps)]
        if spacing == "leading":
            return [k * self.steps // steps + 1 for k in reversed(range(steps))]
        return [round(k * (self.steps - 1) / steps) for k in range(steps, 0, -1)]


def add_noise(z_0: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps  (Ho et al. 2020, eq. 4).

    Notebook: 03
    """
    alpha_bar = schedule.at(t)
    return alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * eps


def clean_latent(z_t: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Equation 4 solved for z_0: the clean latent if `eps` is the noise in z_t.

    Notebook: 03
    """
    alpha_bar = schedule.at(t)
    return (z_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


def to_noise(prediction: Tensor, z_t: Tensor, t: Tensor, schedule: NoiseSchedule, parameterization: str) -> Tensor:
    """The prediction of a network -> the noise eps that it implies.

    "eps": the noise itself (Ho et al. 2020); "v": sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0, which is as hard at
    every t (Salimans & Ho 2022, app. D); "x0": the clean latent.

    Notebook: 03
    """
    alpha_bar = schedule.at(t)
    if parameterization == "eps":
        return prediction
    if parameterization == "v":
        return alpha_bar.sqrt() * prediction + (1 - alpha_bar).sqrt() * z_t
    if parameterization == "x0":
        return (z_t - alpha_bar.sqrt() * prediction) / (1 - alpha_bar).sqrt()
    raise ValueError(f"parameterization must be eps, v or x0, got {parameterization!r}")


def loss_weight(t: Tensor, schedule: NoiseSchedule, parameterization: str) -> Tensor:
    """The factor (B,) from a squared error in eps to a squared error in the prediction of the network.

    v: 1 / alpha_bar; x0: (1 - alpha_bar) / alpha_bar, the inverse signal-to-noise ratio; eps: 1.
    """
    alpha_bar = schedule.at(t).flatten()
    return {"eps": torch.ones_like(alpha_bar), "v": 1 / alpha_bar, "x0": (1 - alpha_bar) / alpha_bar}[parameterization]


def stratified_timesteps(count: int, schedule: NoiseSchedule, generator: torch.Generator | None = None) -> Tensor:
    """(count,) timesteps, one from each of `count` equal slices of the schedule: a batch covers all noise levels."""
    count = whole("count", count, 1)

    def one_from_each_slice(shape: tuple[int], generator: torch.Generator | None) -> Tensor:
        offsets, slices = torch.rand(shape, generator=generator), torch.randperm(*shape, generator=generator)
        return ((slices + offsets) / shape[0] * schedule.steps).long().clamp(max=schedule.steps - 1)

    return draw(one_from_each_slice, (count,), generator)


def noisy_timesteps(count: int, schedule: NoiseSchedule, generator: torch.Generator | None = None) -> Tensor:
    """(count,) timesteps with a density that grows linearly with the timestep, stratified.

    Which sounds there are and when is decided at high noise levels, their texture at low ones.
    """
    even = stratified_timesteps(count, schedule, generator)
    return ((even / schedule.steps).sqrt() * schedule.steps).long()


def uniform_timesteps(count: int, schedule: NoiseSchedule, generator: torch.Generator | None = None) -> Tensor:
    """(count,) independent uniform timesteps (Ho et al. 2020, algorithm 1)."""
    count = whole("count", count, 1)
    return draw(partial(torch.randint, schedule.steps), (count,), generator)


def diffusion_loss(
    denoise: Denoiser,
    z_0: Tensor,
    c: Tensor,
    t: Tensor,
    eps: Tensor,
    schedule: NoiseSchedule,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the predicted noise, a scalar  (Ho et al. 2020, eq. 14), times weight (B,) if given.

    Notebook: 03
    """
    error = (denoise(add_noise(z_0, eps, t, schedule), t, c) - eps) ** 2
    per_clip = error.flatten(1).mean(1)  # (B,)
    return (per_clip if weight is None else weight * per_clip).mean()


def noise_like(z: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
    """Standard normal noise of the shape of z (B, C, T, F); with a list of B generators, row i comes from the i-th."""
    if isinstance(generator, list):
        noise = torch.stack([torch.randn(z.shape[1:], generator=own) for own in generator])
    else:
        noise = torch.randn(z.shape, generator=generator)
    return noise.to(z, non_blocking=True)


def ddim_step(z_t: Tensor, eps: Tensor, now: int, following: int, schedule: NoiseSchedule, eta: float) -> tuple:
    """One step of DDIM from timestep `now` to `following` -> mean (B, C, T, F), standard deviation of its noise.

    Song et al. 2021, eq. 12 and 16; eta = 1 is the posterior of DDPM.
    """
    a, a_next = schedule.alpha_bar[now], schedule.alpha_bar[following]
    z_0 = (z_t - (1 - a).sqrt() * eps) / a.sqrt()
    sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).clamp(min=0).sqrt()  # eq. 16
    return a_next.sqrt() * z_0 + (1 - a_next - sigma**2).clamp(min=0).sqrt() * eps, sigma  # eq. 12


@torch.no_grad()
def ddim_sample(
    denoise: Denoiser,
    z_T: Tensor,
    c: Tensor,
    schedule: NoiseSchedule,
    steps: int = 200,
    eta: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    spacing: str = "leading",
    on_step: Callable[[int, int], None] | None = None,
    start: int = 0,
    noises: Sequence[Tensor] | None = None,
) -> Tensor:
    """Noise z_T (B, C, T, F) -> latent, by DDIM  (Song et al. 2021, eq. 12 and 16).

    eta = 0 is deterministic, eta = 1 is DDPM's noise; AudioLDM samples with 200 steps and eta = 1. generator: one, or
    a list with one for each row. on_step(k, steps) is called after each step, for a progress bar. start: the number of
    steps left out; z_T is then the latent at the timestep of the first step that is taken. noises: that of each step,
    in place of a generator's (`ddpm_inversion`).

    Notebook: 03
    """
    z_t, timesteps, steps = z_T, schedule.timesteps(steps, spacing), whole("steps", steps)
    eta = number("eta", eta, 0, 1)
    for k in range(whole("start", start, 0, steps), steps):
        t = torch.full((len(z_t),), timesteps[k], device=z_t.device)
        following = timesteps[k + 1] if k + 1 < steps else 0  # the last step ends at alpha_bar_0, as published
        z_t, sigma = ddim_step(z_t, denoise(z_t, t, c), timesteps[k], following, schedule, eta)
        if eta > 0:
            z_t = z_t + sigma * (noise_like(z_t, generator) if noises is None else noises[k])
        if on_step:
            on_step(k + 1, steps)
    return z_t


@torch.no_grad()
def ddpm_inversion(
    denoise: Denoiser,
    z_0: Tensor,
    c: Tensor,
    schedule: NoiseSchedule,
    steps: int = 50,
    generator: torch.Generator | list[torch.Generator] | None = None,
    spacing: str = "trailing",
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Latent z_0 (B, C, T, F) -> a noisy latent and the noise for each step of DDPM, with which it ends at z_0 again.

    Every noisy latent is z_0 with noise of its own, not the one before with more; the noise of a step is what then
    leads from one to the next (Huberman-Spiegelglas et al. 2024, algorithm 1; Manor & Michaeli 2024, for sounds). From
    the k-th latent, `ddim_sample(..., eta=1, start=k, noises=noises)` with the same c returns z_0; with another c, an
    edited z_0.
    """
    timesteps, noises = schedule.timesteps(steps, spacing), []
    at = [torch.full((len(z_0),), t, device=z_0.device) for t in timesteps]
    latents = [add_noise(z_0, noise_like(z_0, generator), t, schedule) for t in at] + [z_0]
    for k, (now, following) in enumerate(pairwise([*timesteps, 0])):
        eps = denoise(latents[k], at[k], c)
        mean, sigma = ddim_step(latents[k], eps, now, following, schedule, eta=1)
        noises.append((latents[k + 1] - mean) / sigma)
        if on_step:
            on_step(k + 1, steps)
    return latents, noises


@torch.no_grad()
def dpmpp_sample(
    denoise: Denoiser,
    z_T: Tensor,
    c: Tensor,
    schedule: NoiseSchedule,
    steps: int = 25,
    spacing: str = "trailing",
    on_step: Callable[[int, int], None] | None = None,
    start: int = 0,
    after_step: Callable[[Tensor, int | None], Tensor] | None = None,
    timesteps: Sequence[int] | None = None,
) -> Tensor:
    """Noise z_T (B, C, T, F) -> latent, by DPM-Solver++(2M)  (Lu et al. 2022, algorithm 2).

    A second-order multistep solver in the log signal-to-noise ratio: 25 steps are as near to the exact solution of the
    sampling equation as about 100 of DDIM. The first and the last step are of first order; the last ends at z_0.
    start: the number of steps left out, as in `ddim_sample`. after_step: called with the latent after each step and its
    timestep, None after the last; what it returns replaces the latent. timesteps: those of the steps, from high to low,
    in place of `steps` and `spacing`.

    Notebook: 03
    """
    z_t, timesteps = z_T, schedule.timesteps(steps, spacing) if timesteps is None else timesteps
    steps = len(timesteps)
    half_log_snr = 0.5 * (schedule.alpha_bar.double() / (1 - schedule.alpha_bar.double())).log()
    previous, h_previous = None, None
    for k in range(whole("start", start, 0, steps), steps):
        now = timesteps[k]
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
        if after_step:
            z_t = after_step(z_t, timesteps[k + 1] if k + 1 < steps else None)
        if on_step:
            on_step(k + 1, steps)
    return z_t


def jump_coefficients(t: Tensor, s: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """c_skip and c_out (B, 1, 1, 1) of the jump z_s = c_skip z_t + c_out eps from timesteps t (B,) to s (B,).

    It is one step of DDIM without noise. With a^2 = alpha_bar and b^2 = 1 - alpha_bar, c_skip = a_s / a_t and
    c_out = b_s - b_t a_s / a_t. A jump from t to t stays where it is, whatever eps is: c_skip = 1, c_out = 0, the
    boundary condition of consistency models (Song et al. 2023, eq. 5).

    Notebook: 09
    """
    now, end = schedule.at(t), schedule.ends(s)
    c_skip = end.sqrt() / now.sqrt()
    return c_skip, (1 - end).sqrt() - (1 - now).sqrt() * c_skip


def jump(z_t: Tensor, eps: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """z_s = c_skip z_t + c_out eps, all latents (B, C, T, F); t and s (B,) timesteps, s may be CLEAN.

    Notebook: 09
    """
    c_skip, c_out = jump_coefficients(t, s, schedule)
    return c_skip * z_t + c_out * eps


def jump_noise(z_t: Tensor, z_s: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The eps with which the jump from z_t ends at z_s: `jump` solved for eps. s must be below t.

    Notebook: 09
    """
    c_skip, c_out = jump_coefficients(t, s, schedule)
    return (z_s - c_skip * z_t) / c_out


@torch.no_grad()
def jump_sample(
    jumper: Jumper,
    z_T: Tensor,
    c: Tensor,
    schedule: NoiseSchedule,
    steps: int = 4,
    on_step: Callable[[int, int], None] | None = None,
    lowest: int = 0,
) -> Tensor:
    """Noise z_T (B, C, T, F) -> latent, in `steps` jumps of equal length in the timestep, the last to z_0.

    `jumper` says where each ends, by its eps; one call a jump. on_step(k, steps) is called after each. lowest: jumps
    that would start below this timestep are left out, and the one before goes to z_0.

    Notebook: 09
    """
    z_t, timesteps = z_T, [*(t for t in schedule.timesteps(steps) if t >= lowest), CLEAN]
    for k, (now, following) in enumerate(pairwise(timesteps)):
        t, s = (torch.full((len(z_t),), n, device=z_t.device) for n in (now, following))
        z_t = jump(z_t, jumper(z_t, t, s, c), t, s, schedule)
        if on_step:
            on_step(k + 1, len(timesteps) - 1)
    return z_t
