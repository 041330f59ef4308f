"""Frogs: a kind of sound that is in no training data of this project, to teach to a trained model.

Notebook: 08
"""

import numpy as np
import torch

from refined_ldm.base.integers import whole
from refined_ldm.scenes.classes import Event
from refined_ldm.scenes.dataset import _acoustics, _generator, _loudness, _mix, _trim
from refined_ldm.scenes.synthesis import SAMPLE_RATE, Sound, log_uniform, place, resonate, rhythm, times

CAPTION = "a frog croaks"


def frog(rng: np.random.Generator, seconds: float) -> Sound:
    """Croaks: the pulses of a creaking voice, each ringing in two resonances of the vocal sac."""
    pitch, creak, rate = log_uniform(rng, 400, 1100), log_uniform(rng, 22, 60), rng.uniform(1.2, 2.8)
    length, grains = rng.uniform(0.5, 0.8) / rate, []
    onsets = rhythm(rng, seconds, rate, length, 1, 4, 0.1)
    for _ in onsets:
        t = times(length * rng.uniform(0.85, 1))
        x = t / t[-1]
        cycles = np.cumsum(creak * (1 + rng.uniform(0.2, 0.5) * x)) / SAMPLE_RATE
        pulses = np.append(np.diff(np.floor(cycles)), 0) * rng.uniform(0.8, 1.2, len(t))
        sac = pitch * rng.uniform(0.85, 1.15)
        croak = resonate(pulses, sac, 60) + 0.5 * resonate(pulses, 2.4 * sac, 150)
        grains.append(croak * np.sin(np.pi * x) ** 0.5 * rng.uniform(0.7, 1))
    return Sound(place(grains, onsets, seconds), len(onsets), pitch, rate)


def frogs(count: int, first: int = 0, seconds: float = 2.56) -> list[dict]:
    """Render recordings `first` to `first + count - 1` of frogs -> items with "waveform" (N,) at 16 kHz and "caption".

    Rooms, distances and levels vary as those of `SoundScenes`, and number i is always the same sound. Raises ValueError
    for a count below 1.
    """
    items = []
    for index in range(first, first + whole("count", count, 1)):
        rng = _generator("frog", str(index))
        sound = frog(rng, seconds * rng.uniform(0.75, 1))
        waveform, distant = _acoustics(rng, sound.waveform, seconds)
        waveform = _trim(waveform)
        event = Event("frog", 0.0, 0.0, sound.pitch, sound.count, 0.0, sound.rate, distant)
        mixed = _mix(rng, "event", [(waveform / _loudness(waveform), event)], seconds)[0]
        items.append({"waveform": torch.from_numpy(mixed), "caption": CAPTION})
    return items
