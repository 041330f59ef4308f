"""Latents of any length in the memory of one window: MultiDiffusion, and VAE and vocoder by stretches.

A model is trained on sounds of one length. A longer latent is covered with overlapping windows of that length: each is
denoised, and where windows overlap their predictions are averaged, so that they agree in every step.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from refined_ldm.audio import are_finite, check_finite, is_silent_waveform, warn_of_silence
from refined_ldm.diffusion import Denoiser

VOCODED = 1024  # mel frames, about 10 s, that are turned into a waveform at once
JOINED = 16  # mel frames over which such stretches are cross-faded
FADE = 0.02  # s, the cross-fade at the edges of what is redrawn, inside it, and at the seam of a loop


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
