"""Sound in, sound out: edit, inpaint, extend, loop and vary sounds, with the model as it is.

Nothing here is trained. A sound is encoded, a part of its latent is noised, and the sampler denoises that part again
under a caption. The functions are methods of `RefinedAudioLDM`: `model.edit(waveform, "a bird chirps", 0.6)`. They take
the settings of `generate`: steps, guidance_scale, seed, negative_caption, candidates (`long_sounds.Settings`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refined_ldm.audio import SILENT
from refined_ldm.base.integers import number, whole_rate
from refined_ldm.diffusion import add_noise, ddim_sample, ddpm_inversion, dpmpp_sample, noise_like
from refined_ldm.long_sounds import (
    FADE,
    LONGEST,
    Sampling,
    Settings,
    choose,
    decode,
    encode,
    generate_loop,
    multidiffusion,
    prepare,
    raised_cosine,
    trained_frames,
    vocode,
)  # fmt: skip
from refined_ldm.mel import MelConfig, hz_to_mel, mel_to_hz
from refined_ldm.randomness import caption_generators
from refined_ldm.tokenizer import one_line

LEVEL = 0.5  # peak of the sounds that models are trained on; others are scaled to it, and the result back
METHODS = ("sdedit", "inversion", "diffedit")
INVERSION_STEPS = 50
PROBES = 6  # noises with which the predictions under two captions are compared
PROBED = 0.5  # of the timesteps, at which they are
WIDENED = 2  # latent frames that a stretch that was found is widened by: those beside a sound hold some of it too


@dataclass
class Sound:
    """A sound as it was given: `waveform` (N,) at the model's rate, and the factor that takes LEVEL to its peak."""

    waveform: Tensor
    level: float


def read_sound(model: nn.Module, waveform: Any, sample_rate: int | None, name: str = "waveform") -> Sound:
    """Check a waveform (N,) or (channels, N), mix it down and resample it. Raises ValueError."""
    waveform, rate = torch.as_tensor(waveform).detach().cpu().float(), model.config.mel.sample_rate
    if waveform.ndim == 2 and 1 <= len(waveform) <= 32:
        waveform = waveform.mean(0)
    if waveform.ndim != 1:
        raise ValueError(f"{name} must be (N,), or (channels, N) with 1 to 32 channels, got {tuple(waveform.shape)}")
    if len(waveform) == 0:
        raise ValueError(f"{name} is empty: give a sound of at least one sample")
    if not waveform.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite samples")
    if (peak := waveform.abs().max().item()) > 1:
        raise ValueError(f"{name} must lie in [-1, 1], its peak is {peak:.4g}: scale it first (audio.normalize)")
    if peak < SILENT:
        raise ValueError(f"{name} is silent: there is nothing to work from; `generate` makes sounds from captions")
    if sample_rate is not None and whole_rate(sample_rate) != rate:
        waveform = torch.from_numpy(soxr.resample(waveform.numpy(), sample_rate, rate)).clamp(-1, 1)
    if not 1 <= len(waveform) <= LONGEST * rate:
        raise ValueError(f"{name} must last one sample to {LONGEST} s at {rate} Hz, got {len(waveform) / rate:.4g} s")
    return Sound(waveform, max(waveform.abs().max().item(), SILENT) / LEVEL)


def _mirrored(waveform: Tensor, samples: int) -> Tensor:
    """Continue a waveform (N,) by its own reflections -> (samples,)."""
    both = torch.cat([waveform, waveform.flip(0)])
    return both.repeat(-(-samples // len(both)))[:samples]


def padded_mel(model: nn.Module, sound: Sound) -> Tensor:
    """The log-mel (1, 1, T, F) of a sound at the model's level, up to the end of its last latent frame."""
    config, samples = model.config, len(sound.waveform)
    frames = model.latent_shape(samples / config.mel.sample_rate)[1] * config.vae.downsampling
    waveform = _mirrored(sound.waveform, frames * config.mel.hop_length) / sound.level
    return model.mel(waveform[None].to(model.device))


def from_noise(
    model: nn.Module,
    z_0: Tensor,
    sampling: Sampling,
    strength: float,
    needed: Tensor | None = None,
    keep: Callable[[Tensor, int | None], Tensor] | None = None,
) -> Tensor:
    """SDEdit: noise the latents z_0 (R, C, T, F) as far as `strength` says, and denoise them under the captions.

    Of n steps the last strength * n are taken (Meng et al. 2022, algorithm 1). At 1 z_0 leaves no trace. needed: (T,)
    the frames whose result is used. keep(z_t, timestep): what replaces the latents, None after the last step.
    """
    start, schedule = round(sampling.steps * (1 - strength)), model.schedule
    if start == sampling.steps:
        return z_0
    timestep = schedule.timesteps(sampling.steps, "trailing")[start]
    t = torch.full((len(z_0),), timestep, device=z_0.device)
    z_t = add_noise(z_0, sampling.noise, t, schedule) if start else sampling.noise
    return dpmpp_sample(
        multidiffusion(sampling.denoise, trained_frames(model), needed=needed), keep(z_t, timestep) if keep else z_t,
        sampling.embedding, schedule, sampling.steps, on_step=sampling.on_step, start=start, after_step=keep,
    )  # fmt: skip


@torch.no_grad()
def edit(
    model: nn.Module,
    waveform: Tensor,
    caption: str,
    strength: float = 0.5,
    method: str = "sdedit",
    source_caption: str = "",
    sample_rate: int | None = None,
    **settings: Unpack[Settings],
) -> Tensor:
    """Change a sound (N,) into one of a caption -> waveform (N',) at the model's rate, of the level of the sound.

    strength: 0 is the sound through VAE and vocoder, 1 with "sdedit" the sound that `generate` makes. method: "sdedit"
    noises the sound; "inversion" looks for the noise of every step that DDPM makes this very sound of (Manor &
    Michaeli 2024), which keeps more of it; "diffedit" does so in one stretch alone, that in which the two captions
    differ (`differing_stretch`), and keeps the rest as `inpaint` does. source_caption: what the sound is; for inversion
    and diffedit. sample_rate: of `waveform`, None: the model's. settings: as in `generate`. Raises ValueError for an
    impossible argument.

    Notebook: 07
    """
    sound = read_sound(model, waveform, sample_rate)
    strength = number("strength", strength, 0, 1)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    source = one_line(source_caption)
    if method == "sdedit" and source:
        raise ValueError(f"source_caption goes with inversion and diffedit, got {source!r:.80} with sdedit")
    if method != "sdedit" and settings.get("steps") is None:
        settings["steps"] = INVERSION_STEPS
    if method == "diffedit":
        first, last = differing_stretch(model, sound, one_line(caption), source)

        def inverted(z_0: Tensor, sampling: Sampling) -> Tensor:
            return _by_inversion(model, z_0, sampling, strength, source)

        return _redraw(model, sound, caption, first, last, None, settings, inverted)
    mel = padded_mel(model, sound)
    sampling = prepare(model, one_line(caption), mel.shape[2] // model.config.vae.downsampling, **settings)
    z_0 = encode(model, mel).expand_as(sampling.noise)
    if method == "sdedit":
        latent = from_noise(model, z_0, sampling, strength)
    else:
        latent = _by_inversion(model, z_0, sampling, strength, source)
    return choose(model, render(model, latent, sampling, sound), sampling)


def _by_inversion(model: nn.Module, z_0: Tensor, sampling: Sampling, strength: float, source: str) -> Tensor:
    """Invert z_0 under the source caption without guidance, and replay the last steps under the new one."""
    start = round(sampling.steps * (1 - strength))
    if start == sampling.steps:
        return z_0
    window, schedule, steps = trained_frames(model), model.schedule, sampling.steps
    plain = multidiffusion(model.guided(sampling.unconditional, 1.0), window)
    c = model.clap.embed_text([source]).expand(len(z_0), 1, -1)
    latents, noises = ddpm_inversion(plain, z_0, c, schedule, steps, sampling.generators, "trailing", sampling.on_step)
    guided = multidiffusion(sampling.denoise, window)
    return ddim_sample(
        guided, latents[start], sampling.embedding, schedule, steps, 1.0, None, "trailing", sampling.on_step, start,
        noises,
    )  # fmt: skip


@torch.no_grad()
def differing_stretch(model: nn.Module, sound: Sound, caption: str, source: str) -> tuple[int, int]:
    """The stretch of a sound, first sample and last + 1, in which two captions ask for different sounds.

    The sound is noised, and the noise predicted under both captions: the predictions differ where the sound is to
    change (DiffEdit, Couairon et al. 2023). Of all stretches this is the one with the largest sum of differences above
    the mean.

    Notebook: 07
    """
    if source == caption:
        raise ValueError(f"caption and source_caption must differ, got {caption!r:.80} twice: what is to change?")
    config, mel = model.config, padded_mel(model, sound)
    z_0 = encode(model, mel)
    noise = noise_like(z_0.expand(PROBES, -1, -1, -1), caption_generators([source] * PROBES, 0))
    t = torch.full((PROBES,), round(PROBED * model.schedule.steps), device=z_0.device)
    z_t = add_noise(z_0, noise, t, model.schedule)
    plain = multidiffusion(model.guided(guidance_scale=1.0), trained_frames(model))
    one, other = (plain(z_t, t, c.expand(PROBES, 1, -1)) for c in model.clap.embed_text([caption, source]))
    hop, samples = config.vae.downsampling * config.mel.hop_length, len(sound.waveform)
    differs = (one - other).square().mean((0, 1, 3)).sqrt()[: -(-samples // hop)].cpu()  # (T,)
    above = F.pad((differs - differs.mean()).cumsum(0), (1, 0))
    lowest, where = above.cummin(0)  # up to each frame
    last = int((above - lowest).argmax())
    return max(0, int(where[last]) - WIDENED) * hop, min((last + WIDENED) * hop, samples)


def render(model: nn.Module, latent: Tensor, sampling: Sampling, sound: Sound) -> Tensor:
    """Latents (R, C, T, F) -> waveforms (R, N) of the sound's length and level; scaled down above 1, not clipped."""
    waveforms = vocode(model, decode(model, latent, sampling.captions), sampling.captions)
    waveforms = waveforms[:, : len(sound.waveform)] * sound.level
    return waveforms / waveforms.abs().amax(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def inpaint(
    model: nn.Module,
    waveform: Tensor,
    caption: str,
    start: float | None = None,
    end: float | None = None,
    band: tuple[float, float] | None = None,
    sample_rate: int | None = None,
    **settings: Unpack[Settings],
) -> Tensor:
    """Redraw a sound (N,) from `start` to `end` s, in a band (low, high) in Hz, or both -> waveform (N',).

    caption: of the whole sound. Outside the stretch the result is the sound, sample by sample; inside it is
    cross-faded over 20 ms at either edge. Outside the band the spectrum is the sound's. The others as in `edit`.
    """
    sound = read_sound(model, waveform, sample_rate)
    rate, top = model.config.mel.sample_rate, model.config.mel.fmax
    seconds = len(sound.waveform) / rate
    if start is None and end is None and band is None:
        raise ValueError("say what to redraw: start and end in s, a band (low, high) in Hz, or both")
    start = number("start and end (s)", 0.0 if start is None else start)
    end = number("start and end (s)", seconds if end is None else end)
    if not 0 <= start < end <= seconds or round(start * rate) == round(end * rate):
        raise ValueError(
            f"start and end must lie within the sound, 0 to {seconds:g} s, start first, a sample or more apart: "
            f"got {start}, {end}"
        )
    band = None if band is None else tuple(number("band (Hz)", hz) for hz in band)
    if band is not None and not (len(band) == 2 and 0 <= band[0] < band[1] <= top):
        raise ValueError(f"band must be (low, high) within 0 to {top:g} Hz, got {band}")
    return _redraw(model, sound, caption, round(start * rate), round(end * rate), band, settings)


def _redraw(
    model: nn.Module, sound: Sound, caption: str, first: int, last: int, band: tuple | None, settings: Settings,
    draw: Callable[[Tensor, Sampling], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Redraw samples `first` to `last` of a sound, in a band in Hz if there is one -> (N,).

    draw: makes other latents of latents (R, C, T, F); None: noise, in which what is kept is replaced after every step.
    """
    config, x = model.config, sound.waveform
    down, hop = config.vae.downsampling, config.mel.hop_length
    mel = padded_mel(model, sound)
    sampling = prepare(model, one_line(caption), mel.shape[2] // down, **settings)
    z_0 = encode(model, mel).expand_as(sampling.noise)
    begins = torch.arange(z_0.shape[2]) * down * hop  # first sample of each latent frame
    frames, bins = (begins < last) & (begins + down * hop > first), _bins(config.mel, down, band)
    mask = (frames[:, None] & bins).to(z_0.device)  # (T, F), what is redrawn

    def keep(z: Tensor, timestep: int | None) -> Tensor:
        """The latents with what is kept replaced by the sound's own, as noisy as they are (Lugmayr et al. 2022)."""
        t = torch.full((len(z),), timestep or 0, device=z.device)
        return torch.where(mask, z, z_0 if timestep is None else add_noise(z_0, sampling.noise, t, model.schedule))

    latent = draw(z_0, sampling) if draw else from_noise(model, z_0, sampling, 1.0, frames, keep)
    redrawn = mask.repeat_interleave(down, 0).repeat_interleave(down, 1)
    decoded = torch.where(redrawn, decode(model, latent, sampling.captions), mel)  # what is kept needs no VAE
    drawn = vocode(model, decoded, sampling.captions)[:, : len(x)] * sound.level
    drawn = drawn / drawn.abs().amax(1, keepdim=True).clamp(min=1)
    change = drawn - x
    if band is not None:
        change = torch.fft.irfft(torch.fft.rfft(change) * _passed(len(x), config.mel.sample_rate, band), len(x))
    mixed = (x + _faded(len(x), first, last, round(FADE * config.mel.sample_rate)) * change).clamp(-1, 1)
    return choose(model, mixed, sampling)


def _bins(mel: MelConfig, down: int, band: tuple | None) -> Tensor:
    """(F,) the latent bins with a mel band that reaches into a band in Hz."""
    edges = mel_to_hz(torch.linspace(float(hz_to_mel(mel.fmin)), float(hz_to_mel(mel.fmax)), mel.n_mels + 2))
    low, high = edges[:-2].unflatten(0, (-1, down)).amin(1), edges[2:].unflatten(0, (-1, down)).amax(1)
    return torch.ones_like(low, dtype=torch.bool) if band is None else (low < band[1]) & (high > band[0])


def _faded(samples: int, first: int, last: int, fade: int) -> Tensor:
    """(samples,) 0 outside `first` to `last`, 1 inside, with raised cosines between, except at the sound's own ends."""
    weight = torch.zeros(samples)
    weight[first:last] = 1
    fade = max(1, min(fade, (last - first) // 2))
    rise = raised_cosine(torch.arange(fade).add(0.5) / fade)
    if first > 0:
        weight[first : first + fade] = rise
    if last < samples:
        weight[last - fade : last] = rise.flip(0)
    return weight


def _passed(samples: int, rate: int, band: tuple[float, float]) -> Tensor:
    """Gains of the frequencies of `rfft`: 1 in a band in Hz, 0 outside, faded inside over a tenth of its width."""
    hz, width = torch.fft.rfftfreq(samples, 1 / rate), (band[1] - band[0]) / 10
    low = (hz - band[0]) / width if band[0] > 0 else torch.ones_like(hz)
    high = (band[1] - hz) / width if band[1] < rate / 2 else torch.ones_like(hz)
    return raised_cosine(torch.minimum(low, high))


@torch.no_grad()
def extend(
    model: nn.Module,
    waveform: Tensor,
    caption: str,
    seconds: float,
    sample_rate: int | None = None,
    **settings: Unpack[Settings],
) -> Tensor:
    """Continue a sound (N,) by `seconds` -> waveform, of which the first N' samples are the sound. See `inpaint`."""
    sound = read_sound(model, waveform, sample_rate)
    samples, rate = len(sound.waveform), model.config.mel.sample_rate
    if not 1 / rate <= number("seconds", seconds) <= LONGEST - samples / rate:
        raise ValueError(f"seconds, by which the sound is continued, must be above 0, up to {LONGEST} s in all, "
                         f"got {seconds}")  # fmt: skip
    more = samples + round(seconds * rate)
    longer = Sound(_mirrored(sound.waveform, more), sound.level)
    return _redraw(model, longer, caption, samples, more, None, settings)


@torch.no_grad()
def super_resolve(
    model: nn.Module,
    waveform: Tensor,
    caption: str = "",
    cutoff: float | None = None,
    sample_rate: int | None = None,
    **settings: Unpack[Settings],
) -> Tensor:
    """Redraw all above `cutoff` Hz of a sound (N,), which lacks it -> waveform (N',). See `inpaint`.

    cutoff: None takes .45 of `sample_rate`, if the model's is higher. Raises ValueError if there is nothing to add.
    """
    top, rate = model.config.mel.fmax, model.config.mel.sample_rate
    if cutoff is None and (sample_rate is None or whole_rate(sample_rate) >= rate):
        raise ValueError(f"a sound of {rate} Hz or more may have every frequency that the model makes: give the cutoff "
                         "in Hz above which it has none")  # fmt: skip
    cutoff = 0.45 * sample_rate if cutoff is None else cutoff
    if not 0 < number("cutoff", cutoff) < top:
        raise ValueError(f"cutoff must be between 0 and {top:g} Hz, got {cutoff}")
    return inpaint(model, waveform, caption, band=(cutoff, top), sample_rate=sample_rate, **settings)


@torch.no_grad()
def loop(
    model: nn.Module,
    caption: str,
    seconds: float | None = None,
    waveform: Tensor | None = None,
    sample_rate: int | None = None,
    **settings: Unpack[Settings],
) -> Tensor:
    """Make a sound that repeats without a seam -> waveform (N,).

    From a caption: the latent is a ring, around which the windows of `multidiffusion` go; `seconds` (None: the
    training's) is rounded to latent frames, 40 ms. From a waveform: its ends are joined and a quarter of it, around
    the join, is redrawn; the rest is kept sample by sample.
    """
    if waveform is None:
        return generate_loop(model, caption, seconds, **settings)
    if seconds is not None:
        raise ValueError("give seconds or a waveform, not both: a loop of a sound is as long as the sound")
    sound = read_sound(model, waveform, sample_rate)
    half, part = len(sound.waveform) // 2, max(1, len(sound.waveform) // 8)
    rolled = Sound(sound.waveform.roll(half), sound.level)
    return _redraw(model, rolled, caption, max(0, half - part), half + part, None, settings).roll(-half)
