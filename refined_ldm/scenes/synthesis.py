"""Building blocks of synthesis: band noise, tones, damped modes, resonances, rhythms and the placing of grains.

Notebook: 01
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.fft import irfft, next_fast_len, rfftfreq
from scipy.signal import lfilter

SAMPLE_RATE = 16_000  # Hz


@dataclass(frozen=True)
class Sound:
    """One rendered sound and its properties."""

    waveform: np.ndarray  # (N,) float32, any level
    count: int | None = None  # number of repetitions, None where counting makes no sense
    pitch: float | None = None  # Hz, geometric mean where there are several notes
    rate: float | None = None  # repetitions, revolutions or drops a second


def times(seconds: float) -> np.ndarray:
    """Return the sample times (N,) in s of a sound that lasts `seconds`."""
    return np.arange(max(2, round(seconds * SAMPLE_RATE))) / SAMPLE_RATE


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw uniformly on a logarithmic scale, on which pitches and rates are perceived."""
    return float(low * (high / low) ** rng.random())


def noise(rng: np.random.Generator, n: int, low: float, high: float, slope: float = 0.0) -> np.ndarray:
    """Return (n,) Gaussian noise between `low` and `high` Hz, tilted by `slope` dB an octave, of unit rms."""
    m = next_fast_len(n, real=True)
    f = rfftfreq(m, 1 / SAMPLE_RATE).astype(np.float32) + 1e-3
    gain = (f / 1000) ** (slope / 6.02) / np.sqrt((1 + (low / f) ** 4) * (1 + (f / high) ** 8))
    spectrum = rng.standard_normal((2, len(f)), dtype=np.float32) * gain
    waveform = irfft(spectrum[0] + 1j * spectrum[1], m)[:n]
    return waveform / (waveform.std() + 1e-9)


def tone(frequency: np.ndarray, amplitudes: Sequence[float] = (1.0,), phase: float = 0.0) -> np.ndarray:
    """Return a sum of harmonics of a gliding `frequency` (N,) in Hz, without those above 7.5 kHz."""
    cycles = np.cumsum(frequency) / SAMPLE_RATE + phase
    angle = (2 * np.pi * (cycles - np.floor(cycles))).astype(np.float32)
    twice_cos, before, now = 2 * np.cos(angle), np.zeros_like(angle), np.sin(angle)
    total = np.zeros_like(angle)
    for k, amplitude in enumerate(amplitudes, start=1):
        if k * frequency.max() > 7500:
            break
        total += amplitude * now
        before, now = now, twice_cos * now - before  # sin((k+1)x) = 2 cos(x) sin(kx) - sin((k-1)x)
    return total


def strike(
    rng: np.random.Generator, seconds: float, frequencies: ArrayLike, decays: ArrayLike, amplitudes: ArrayLike
) -> np.ndarray:
    """Return the sound of a struck body: modes at `frequencies` Hz that decay with time constants `decays` s."""
    t = times(seconds)
    total = np.zeros(len(t), np.float32)
    for frequency, decay, amplitude in zip(frequencies, decays, amplitudes, strict=True):
        if frequency < 7500:
            short = t[: int(7 * decay * SAMPLE_RATE) + 2]
            wave = tone(np.full(len(short), frequency), phase=rng.random())
            total[: len(short)] += amplitude * wave * np.exp((-short / decay).astype(np.float32))
    return total * np.minimum(1, t / 0.001)


def resonate(waveform: np.ndarray, frequency: float, bandwidth: float) -> np.ndarray:
    """Filter by one two-pole resonance at `frequency` Hz, `bandwidth` Hz wide, of about unit gain at its peak."""
    radius = np.exp(-np.pi * bandwidth / SAMPLE_RATE)
    angle = 2 * np.pi * min(frequency, 7500) / SAMPLE_RATE
    gain = (1 - radius) * np.sqrt(1 - 2 * radius * np.cos(2 * angle) + radius**2)
    return lfilter([gain], [1, -2 * radius * np.cos(angle), radius**2], waveform)


def swell(rng: np.random.Generator, n: int, rate: float, depth: float) -> np.ndarray:
    """Return a slow random loudness curve (n,) that changes about `rate` times a second, from 1 - depth to 1."""
    knots = rng.random(int(n / SAMPLE_RATE * rate) + 3)
    position = np.arange(n) / SAMPLE_RATE * rate + rng.random()
    i = position.astype(int)
    blend = 0.5 - 0.5 * np.cos(np.pi * (position - i))
    return 1 - depth * (knots[i] * (1 - blend) + knots[i + 1] * blend)


def pulse(t: np.ndarray, attack: float, decay: float) -> np.ndarray:
    """Return an envelope that rises in `attack` s and decays with time constant `decay` s."""
    return np.minimum(1, t / attack) * np.exp(-np.maximum(0, t - attack) / decay)


def held(t: np.ndarray, rise: float) -> np.ndarray:
    """Return an envelope that is flat over `t`, with a rise and a fall of `rise` s."""
    return np.clip(np.minimum(t, t[-1] - t) / rise, 0, 1)


def rhythm(
    rng: np.random.Generator, seconds: float, rate: float, length: float, least: int, most: int, jitter: float = 0.0
) -> np.ndarray:
    """Return onsets in s of `least` to `most` hits, `rate` a second, if they fit; the last has `length` s to ring."""
    fits = 1 + int(max(0.0, seconds - length) * rate / (1 + jitter))
    count = int(rng.integers(min(least, fits), min(most, fits) + 1))
    steps = (1 + jitter * rng.uniform(-1, 1, count)) / rate
    return np.cumsum(steps) - steps[0]


def place(grains: list[np.ndarray], onsets: np.ndarray, seconds: float) -> np.ndarray:
    """Return the sum (N,) of all grains, each at its onset in s, faded out and cut at `seconds`."""
    n = len(times(seconds))
    total = np.zeros(n, np.float32)
    for grain, onset in zip(grains, onsets, strict=True):
        start = int(onset * SAMPLE_RATE)
        part = grain[: n - start]
        total[start : start + len(part)] += part
    total[-400:] *= np.linspace(1, 0, len(total[-400:]))
    return total


def crackle(rng: np.random.Generator, n: int, per_second: float, spread: float) -> np.ndarray:
    """Return (n,) random impulses, `per_second` of them on average, log-normal in size by `spread`."""
    impulses = np.zeros(n)
    where = rng.integers(0, n, rng.poisson(per_second * n / SAMPLE_RATE) + 1)
    impulses[where] = np.exp(spread * rng.standard_normal(len(where))) * rng.choice((-1, 1), len(where))
    return impulses
