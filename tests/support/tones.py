"""Test tones."""

import torch


def sine(hz: float, seconds: float = 0.5, sample_rate: int = 16_000) -> torch.Tensor:
    """A sine wave (1, N) of amplitude 0.5."""
    return 0.5 * torch.sin(2 * torch.pi * hz * torch.arange(int(seconds * sample_rate)) / sample_rate)[None]
