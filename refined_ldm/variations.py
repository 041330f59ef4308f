"""Variations of a sound, and the way from one sound or caption to another in small steps.

The functions are methods of `RefinedAudioLDM`: `model.variations(waveform)`,
`model.interpolate("rain falls", "wind blows")`.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refined_ldm.base.integers import number, whole
from refined_ldm.editing import Sound, from_noise, padded_mel, read_sound, render
from refined_ldm.long_sounds import Settings, decode, encode, prepare, trained_frames, vocode
from refined_ldm.tokenizer import one_line


@torch.no_grad()
def variations(
    model: nn.Module,
    waveform: Tensor,
    caption: str = "",
    count: int = 4,
    strength: float = 0.5,
    sample_rate: int | None = None,
    **settings: Unpack[Settings],
) -> Tensor:
    """`count` sounds near a given one (N,) -> waveforms (count, N'). As `edit`, with as many different noises."""
    sound = read_sound(model, waveform, sample_rate)
    strength = number("strength", strength, 0, 1)
    mel = padded_mel(model, sound)
    frames = mel.shape[2] // model.config.vae.downsampling
    sampling = prepare(model, one_line(caption), frames, candidates=whole("count", count, 1), **settings)
    latent = from_noise(model, encode(model, mel).expand_as(sampling.noise), sampling, strength)
    return render(model, latent, sampling, sound)


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Between a and b (…) along the arc, which keeps the norm of noise and of embeddings; weight (W,) -> (W, …).

    sin((1 - w) x) / sin(x) a + sin(w x) / sin(x) b, with x the angle between them (Shoemake 1985).
    """
    angle = torch.arccos(F.cosine_similarity(a.flatten(), b.flatten(), 0).clamp(-1, 1))
    weight = weight.to(a).view(-1, *[1] * a.ndim)
    if angle.sin() < 1e-4:  # nearly the same direction
        return (1 - weight) * a + weight * b
    return (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / angle.sin()


@torch.no_grad()
def interpolate(
    model: nn.Module,
    one: Tensor | str,
    other: Tensor | str,
    count: int = 5,
    caption: str = "",
    strength: float = 0.5,
    sample_rate: int | None = None,
    **settings: Unpack[Settings],
) -> Tensor:
    """`count` steps from one caption to another, or from one sound to another -> waveforms (count, N).

    Captions: embedding and noise go along the arc between them (`slerp`), so the ends are what `generate` makes.
    Sounds: their latents do, and each step is edited by `strength` under `caption`; the longer one is cut.
    """
    if isinstance(one, str) != isinstance(other, str):
        raise ValueError("one and other must be two captions or two sounds, got one of each")
    count = whole("count", count, 2)
    weight = torch.linspace(0, 1, count)
    down = model.config.vae.downsampling
    if isinstance(one, str):
        frames = trained_frames(model)
        begin, end = (prepare(model, text, frames, **settings) for text in (one, other))
        begin.embedding = slerp(begin.embedding[0], end.embedding[0], weight)
        begin.noise = slerp(begin.noise[0], end.noise[0], weight)
        begin.captions = [f"{one}\n{other}"] * count
        latent = from_noise(model, begin.noise, begin, 1.0)
        waveforms = vocode(model, decode(model, latent, begin.captions), begin.captions)
        return waveforms[:, : model.config.samples]
    strength = number("strength", strength, 0, 1)
    sounds = [read_sound(model, sound, sample_rate, name) for sound, name in ((one, "one"), (other, "other"))]
    shorter = min(len(sound.waveform) for sound in sounds)
    mels = [padded_mel(model, Sound(sound.waveform[:shorter], sound.level)) for sound in sounds]
    sampling = prepare(model, one_line(caption), mels[0].shape[2] // down, **settings)
    z_0 = slerp(*(encode(model, mel)[0] for mel in mels), weight)
    sampling.noise, sampling.embedding = sampling.noise[:1].expand_as(z_0), sampling.embedding[:1].expand(count, -1, -1)
    sampling.captions = sampling.captions[:1] * count
    level = torch.lerp(*(torch.tensor(sound.level) for sound in sounds), weight)[:, None]
    latent = from_noise(model, z_0, sampling, strength)
    return render(model, latent, sampling, Sound(sounds[0].waveform[:shorter], level))
