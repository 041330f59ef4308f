"""Numbers that go wrong are told at once: losses that are none, losses that jump, sounds that are silent."""

import math
import warnings
from collections import deque
from statistics import median

import torch

SILENT = 0.5 / 32_767  # peaks below it are zero in a 16-bit file


class SpikeWatch:
    """How far a loss stands out from those of the last 100 steps, told once until it has come back."""

    def __init__(self, factor=3.0, least=20):
        self.factor, self.least, self.seen, self.out = factor, least, deque(maxlen=100), False

    def __call__(self, loss):
        """-> loss / median of the earlier ones if that has come above `factor` and there were enough, else None."""
        usual = median(self.seen) if len(self.seen) >= self.least else math.inf
        before, self.out = self.out, loss > self.factor * usual > 0
        self.seen.append(loss)
        return loss / usual if self.out and not before else None


def check_sound(stage, batch, captions, silent=None):
    """Refuse latents, mels or waveforms (B, …) that hold NaN or infinity; warn of captions that are `silent` (B,).

    Raises FloatingPointError naming stage, captions and type of number.
    """
    bad = [c for c, item in zip(captions, batch, strict=True) if not item.isfinite().all()]
    if bad:
        raise FloatingPointError(f"the {stage} of {_named(bad)} holds NaN or infinite numbers ({batch.dtype}): "
                                 "try float32, or other weights")  # fmt: skip
    if silent is not None and silent.any():
        quiet = [c for c, is_silent in zip(captions, silent.tolist(), strict=True) if is_silent]
        warnings.warn(f"the {stage} of {_named(quiet)} is silent: try another seed, or other weights", stacklevel=3)


def _named(captions):
    shown = ", ".join(repr(c[:60]) for c in captions[:3])
    return f"{shown} and {len(captions) - 3} more" if len(captions) > 3 else shown


def is_silent_mel(mel, floor):
    """Which of the log-mels (B, 1, T, F) lie nowhere above ten times the magnitude `floor` -> (B,)."""
    return mel.flatten(1).amax(1) < math.log(10 * floor)


def is_silent_waveform(waveform):
    """Which of the waveforms (B, N) would be all zeros in a 16-bit file -> (B,)."""
    return waveform.abs().amax(1) < SILENT


def is_constant(latent):
    """Which of the latents (B, C, T, F) hold one number throughout, as after an underflow -> (B,)."""
    flat = latent.flatten(1)
    return torch.eq(flat, flat[:, :1]).all(1)
