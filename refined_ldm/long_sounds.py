"""Long sounds and loops: captions that change along time, and latents whose ends are joined.

A model is trained on sounds of one length. A longer latent is covered with overlapping windows of that length: each is
denoised, and where windows overlap their predictions are averaged, so that they agree in every step (MultiDiffusion).
VAE and vocoder go through long sounds in stretches, so that these fit into the memory of one window.

The functions are methods of `RefinedAudioLDM`: `model.generate_long([(0, "rain falls"), (20, "a dog barks")], 30)`.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refined_ldm.adapters.candidates import nearest
from refined_ldm.audio import are_finite, check_finite, is_silent_waveform, warn_of_silence
from refined_ldm.base.integers import number, whole, whole_seed
from refined_ldm.diffusion import Denoiser, dpmpp_sample, noise_like
from refined_ldm.randomness import caption_generators
from refined_ldm.tokenizer import one_line

LONGEST = 3600  # s
VOCODED = 1024  # mel frames, about 10 s, that are turned into a waveform at once
JOINED = 16  # mel frames over which such stretches are cross-faded
FADE = 0.02  # s, the cross-fade at the edges of what is redrawn, inside it, and at the seam of a loop
Captions = str | Sequence[tuple[float, str]]  # one for the whole sound, or several, each with the second it begins at


# Windows


def raised_cosine(x: Tensor) -> Tensor:
    """A smooth step: 0 up to x = 0, 1 from x = 1 on."""
    return 0.5 - 0.5 * torch.cos(math.pi * x.clamp(0, 1))


def in_windows(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    window: int,
    overlap: int,
    scale: int = 1,
    circular: bool = False,
    needed: Tensor | None = None,
) -> Tensor:
    """Apply `function` to windows of x (B, C, T, F) and cross-fade what it returns: (B, C', scale * T, F').

    The windows have `window` frames and overlap by `overlap` or more; circular: they go on from the last frame to the
    first. needed: (T,) the frames whose result is used; a window without any is left out, and its result is 0. One
    window over everything is `function(x)`.
    """
    frames = x.shape[2]
    if frames <= window and not circular:
        return function(x)
    if circular:
        count = max(2, math.ceil(frames / (window - overlap)))
        starts = [k * frames // count for k in range(count)]
    else:
        count = math.ceil((frames - overlap) / (window - overlap))
        starts = [k * (frames - window) // (count - 1) for k in range(count)]
    places = [(start + torch.arange(window)) % frames for start in starts]
    if needed is not None:
        places = [place for place in places if needed[place].any()]
    wide = [(scale * place[:, None] + torch.arange(scale)).flatten() for place in places]
    rising = torch.arange(1.0, scale * window + 1)
    fade = torch.minimum(rising, rising.flip(0)).clamp(max=scale * overlap)
    total = torch.zeros(scale * frames)
    for where in wide:
        total[where] += fade
    result = None
    for place, where in zip(places, wide, strict=True):
        part = function(x[:, :, place.to(x.device)])
        if result is None:
            result = part.new_zeros(len(part), part.shape[1], scale * frames, part.shape[3])
        result[:, :, where.to(part.device)] += (fade / total[where]).to(part)[:, None] * part
    return result


def multidiffusion(
    denoise: Denoiser, window: int, regions: Tensor | None = None, circular: bool = False, needed: Tensor | None = None
) -> Denoiser:
    """A denoiser of latents of any length: windows that overlap by half, their predictions averaged (MultiDiffusion).

    `denoise` takes windows and embeddings (B, D); the result takes latents (B, C, T, F) and embeddings (B, K, D) of
    K captions. regions: (K, T) the frames of each, which predictions for it alone are used in. Bar-Tal et al. 2023,
    eq. 5. circular and needed as in `in_windows`.
    """

    def averaged(z_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        eps = torch.zeros_like(z_t)
        everywhere = torch.ones(1, z_t.shape[2], dtype=torch.bool)
        for k, region in enumerate(everywhere if regions is None else regions):
            used = region if needed is None else region & needed
            if not used.any():
                continue
            own = in_windows(lambda z, k=k: denoise(z, t, c[:, k]), z_t, window, window // 2, 1, circular, used)
            eps = torch.where(region[:, None].to(z_t.device), own, eps)
        return eps

    return averaged


def trained_frames(model: nn.Module) -> int:
    """Frames of the latents that the model is trained on."""
    return model.latent_shape(model.config.seconds)[1]


def encode(model: nn.Module, mel: Tensor) -> Tensor:
    """Log-mel (1, 1, T, F) -> scaled latent (1, C, T / 4, F / 4)."""
    window, down = trained_frames(model), model.config.vae.downsampling
    blocks = mel[:, 0].unflatten(1, (-1, down)).transpose(1, 2)  # (1, 4, T / 4, F), so that frames count latent frames

    def mean(part: Tensor) -> Tensor:
        return model.latent_scale * model.vae.encode(part.transpose(1, 2).flatten(1, 2)[:, None]).mean

    return in_windows(mean, blocks, window, window // 4)


def decode(model: nn.Module, latent: Tensor, captions: Sequence[str]) -> Tensor:
    """Scaled latents (B, C, T / 4, F / 4) -> log-mels (B, 1, T, F), checked."""
    check_finite("latent", are_finite(latent), captions, latent.dtype)
    window = trained_frames(model)
    mel = in_windows(model.decode, latent, window, window // 4, model.config.vae.downsampling)
    check_finite("mel", are_finite(mel), captions, mel.dtype)
    return mel


def vocode(model: nn.Module, mel: Tensor, captions: Sequence[str]) -> Tensor:
    """Log-mels (B, 1, T, F) -> waveforms (B, T * hop), checked; those longer than VOCODED frames in equal stretches."""
    frames = mel.shape[2]
    stretch = -(-frames // -(-frames // VOCODED)) + JOINED
    vocoded = in_windows(
        lambda part: model.to_waveform(part)[:, None, :, None], mel, stretch, JOINED, model.config.mel.hop_length
    )[:, 0, :, 0]
    check_finite("waveform", are_finite(vocoded), captions, vocoded.dtype)
    warn_of_silence("waveform", is_silent_waveform(vocoded), captions)
    return vocoded.cpu()


# Captions and settings


class Settings(TypedDict, total=False):
    """Settings of every function here; all as in `RefinedAudioLDM.generate`."""

    steps: int | None
    guidance_scale: float | None
    guidance_interval: tuple[int, int] | None
    seed: int
    negative_caption: str
    candidates: int
    on_step: Callable[[int, int], None] | None
    on_note: Callable[[str], None] | None


@dataclass
class Sampling:
    """The prepared captions and settings of R candidates, from `prepare`."""

    captions: list[str]  # R
    embedding: Tensor  # (R, K, D)
    regions: Tensor  # (K, T)
    noise: Tensor  # (R, C, T, F)
    generators: list[torch.Generator]
    unconditional: Tensor  # (D,)
    denoise: Denoiser  # of one window, guided
    steps: int
    on_step: Callable[[int, int], None] | None


def prepare(
    model: nn.Module,
    captions: Captions,
    frames: int,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[int, int] | None = None,
    seed: int = 0,
    negative_caption: str = "",
    candidates: int = 1,
    on_step: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Sampling:
    """Check the settings, embed the captions and draw the noise of a latent of `frames` frames. Raises ValueError."""
    config = model.config
    hop = config.mel.hop_length * config.vae.downsampling / config.mel.sample_rate  # s per latent frame
    begins, texts = zip(*_along_time(captions, frames * hop), strict=True)
    candidates, seed = whole("candidates", candidates, 1), whole_seed(seed)
    steps = config.steps if steps is None else whole("steps", steps, 1, config.diffusion_steps)
    for message in model.unfamiliar(texts):
        (on_note or (lambda message: warnings.warn(message, stacklevel=4)))(message)
    unconditional = model.clap.embed_text([one_line(negative_caption)])[0]
    denoise = model.guided(unconditional, guidance_scale, guidance_interval)
    embedding = model.clap.embed_text(list(texts)).expand(candidates, -1, -1)
    first = torch.tensor([round(begin / hop) for begin in (*begins, frames * hop)])[:, None]
    regions = (torch.arange(frames) >= first[:-1]) & (torch.arange(frames) < first[1:])
    names = ["\n".join(texts)] * candidates
    generators, (channels, _, bins) = caption_generators(names, seed), model.latent_shape(config.seconds)
    noise = noise_like(embedding.new_empty(candidates, channels, frames, bins), generators)
    return Sampling(names, embedding, regions, noise, generators, unconditional, denoise, steps, on_step)


def _along_time(captions: Captions, seconds: float) -> list[tuple[float, str]]:
    """One caption, or [(second, caption), …], checked -> [(second, caption), …]."""
    along = [(0.0, captions)] if isinstance(captions, str) else list(captions)
    for part in along:
        if not isinstance(part, tuple | list) or len(part) != 2 or not isinstance(part[1], str):
            raise ValueError(f"captions must be a string or [(second, caption), …], got {part!r:.80} in it")
    begins = [begin for begin, _ in along]
    if not along or begins[0] != 0 or any(not a < b for a, b in zip(begins, [*begins[1:], seconds], strict=True)):
        raise ValueError(
            f"captions along time must begin at 0 s, one after the other, before the end at {seconds:g} s, "
            f"got {', '.join(map(str, begins)) or 'none'}"
        )
    return [(begin, one_line(text)) for begin, text in along]


def choose(model: nn.Module, waveforms: Tensor, sampling: Sampling) -> Tensor:
    """The candidate (N,) of waveforms (R, N) that is nearest to the mean of its captions."""
    if len(waveforms) == 1:
        return waveforms[0]
    embedding = F.normalize(sampling.embedding.mean(1), dim=1)
    return nearest(model, waveforms.to(model.device), embedding, len(waveforms))[0].cpu()


@torch.no_grad()
def generate_long(model: nn.Module, captions: Captions, seconds: float, **settings: Unpack[Settings]) -> Tensor:
    """Generate a sound of any length -> waveform (N,); captions may change: [(0, "rain falls"), (20, "a dog barks")].

    The latent is denoised in overlapping windows of the training's length, so that memory hardly grows with `seconds`.
    One caption and one window give the sound of `generate`.
    """
    seconds = number("seconds", seconds, 0.01, LONGEST)
    _along_time(captions, seconds)
    sampling = prepare(model, captions, model.latent_shape(seconds)[1], **settings)
    denoise = multidiffusion(sampling.denoise, trained_frames(model), sampling.regions)
    latent = dpmpp_sample(
        denoise, sampling.noise, sampling.embedding, model.schedule, sampling.steps, on_step=sampling.on_step
    )
    waveforms = vocode(model, decode(model, latent, sampling.captions), sampling.captions)
    return choose(model, waveforms[:, : round(seconds * model.config.mel.sample_rate)], sampling)


@torch.no_grad()
def generate_loop(model: nn.Module, caption: str, seconds: float | None = None, **settings: Unpack[Settings]) -> Tensor:
    """Generate a sound that repeats without a seam -> waveform (N,).

    The latent is a ring, around which the windows of `multidiffusion` go. seconds (None: the training's): rounded to
    latent frames, 40 ms.
    """
    config, mel = model.config, model.config.mel
    seconds, hop = config.seconds if seconds is None else seconds, mel.hop_length * config.vae.downsampling
    unit = config.unet.downsampling
    least = unit * hop / mel.sample_rate
    seconds = number("seconds", seconds, least, LONGEST)
    frames = round(seconds * mel.sample_rate / hop)
    sampling = prepare(model, one_line(caption), frames, **settings)
    window = min(trained_frames(model), frames // unit * unit)
    ring = multidiffusion(sampling.denoise, window, circular=True)
    latent = dpmpp_sample(
        ring, sampling.noise, sampling.embedding, model.schedule, sampling.steps, on_step=sampling.on_step
    )
    margin = max(8, window // 4)  # latent frames decoded beyond each end, where the ring goes on
    turned = latent[:, :, torch.arange(-margin, frames + margin) % frames]
    drawn = vocode(model, decode(model, turned, sampling.captions), sampling.captions)[:, margin * hop :]
    samples, fade = frames * hop, round(FADE * mel.sample_rate)
    rise = raised_cosine(torch.arange(fade).add(0.5) / fade)
    drawn[:, :fade] = rise * drawn[:, :fade] + (1 - rise) * drawn[:, samples : samples + fade]
    return choose(model, drawn[:, :samples], sampling)
