"""Waveform <-> log-mel spectrogram, exactly as AudioLDM and HiFi-GAN frame it.

A mel spectrogram keeps what the ear keeps: magnitudes, not phases, on a frequency axis that is fine below 1 kHz
and logarithmic above. `griffin_lim` is the inverse that needs no training, and the baseline of every vocoder.

Notebook: 01
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refined_ldm.base.integers import cast_numbers, whole, whole_rate


@dataclass(frozen=True)
class MelConfig:
    """Frames of a waveform and mel bands of its spectrum."""

    sample_rate: int = 16_000  # Hz
    n_fft: int = 1024  # samples, 64 ms: window and Fourier transform have the same length
    hop_length: int = 160  # samples, 10 ms
    n_mels: int = 64  # bands
    fmin: float = 0.0  # Hz
    fmax: float = 8000.0  # Hz
    floor: float = 1e-5  # magnitudes below this are silence: log(1e-5) = -11.5

    def __post_init__(self):
        cast_numbers(self)
        whole_rate(self.sample_rate)
        if self.hop_length < 1 or self.hop_length > self.n_fft or (self.n_fft - self.hop_length) % 2:
            raise ValueError(
                f"hop_length must be 1 or more, n_fft larger by an even number, got {self.hop_length} and {self.n_fft}"
            )
        if not 0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            raise ValueError(f"0 <= fmin < fmax <= {self.sample_rate / 2} Hz, got {self.fmin} and {self.fmax}")


LDM_MEL = MelConfig()
IN_CACHE = 2**18  # samples transformed together on a CPU, so that their spectra fit into its cache


def hz_to_mel(hz: float | Tensor) -> Tensor:
    """Frequencies in Hz -> Slaney's mel scale, float64, of the same shape.

    It is linear below 1 kHz (3 mel per 200 Hz) and logarithmic above (27 steps per factor 6.4).

    Notebook: 01
    """
    hz = torch.as_tensor(hz, dtype=torch.float64)
    log_part = 15 + 27 * torch.log(hz.clamp(min=1e-10) / 1000) / torch.log(torch.tensor(6.4, dtype=torch.float64))
    return torch.where(hz < 1000, hz * 3 / 200, log_part)


def mel_to_hz(mel: float | Tensor) -> Tensor:
    """Slaney's mel scale -> frequencies in Hz, float64: the inverse of `hz_to_mel`."""
    mel = torch.as_tensor(mel, dtype=torch.float64)
    return torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


@lru_cache(maxsize=16)
def mel_filterbank(sample_rate: int, n_fft: int, n_mels: int, fmin: float, fmax: float) -> Tensor:
    """Triangular filters (n_mels, n_fft // 2 + 1), evenly spaced in mel, each of area 1 over Hz (Slaney's norm).

    Notebook: 01
    """
    edges = mel_to_hz(torch.linspace(hz_to_mel(fmin).item(), hz_to_mel(fmax).item(), n_mels + 2, dtype=torch.float64))
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    triangles = torch.minimum((hz - low) / (centre - low), (high - hz) / (high - centre)).clamp(min=0)
    return (triangles * 2 / (high - low)).float()


def _filterbank(config: MelConfig) -> Tensor:
    return mel_filterbank(config.sample_rate, config.n_fft, config.n_mels, config.fmin, config.fmax)


@lru_cache(maxsize=16)
def _blocks(config: MelConfig, count: int = 4) -> list[tuple[slice, slice]]:
    """Return the filterbank as blocks (bands, bins), without most of its zeros: filters are narrow."""
    size, blocks = -(-config.n_mels // count), []
    for rows in (slice(start, start + size) for start in range(0, config.n_mels, size)):
        bins = _filterbank(config)[rows].any(0).nonzero()[:, 0].tolist() or [0]
        blocks.append((rows, slice(bins[0], bins[-1] + 1)))
    return blocks


class MelSpectrogram(nn.Module):
    """Waveform (B, N) -> natural-log magnitude mel (B, 1, T, F), T = N / hop_length.

    Raises ValueError for another shape, a length that is no multiple of hop_length, or one too short to be reflected.

    Notebook: 01
    """

    def __init__(self, config: MelConfig = LDM_MEL):
        super().__init__()
        self.config = config
        self.register_buffer("filterbank", _filterbank(config), persistent=False)
        self.register_buffer("window", torch.hann_window(config.n_fft), persistent=False)

    def frames(self, samples: int) -> int:
        """Number of frames of a waveform of `samples`; raises ValueError if hop_length does not divide it exactly."""
        if samples % self.config.hop_length:
            nearest = max(1, round(samples / self.config.hop_length)) * self.config.hop_length
            raise ValueError(
                f"{samples} samples are not a whole number of hops of {self.config.hop_length}: "
                f"pad or trim the waveform to {nearest} (audio.pad_or_trim)"
            )
        return samples // self.config.hop_length

    def magnitude(self, waveform: Tensor) -> Tensor:
        """Waveform (B, N) -> STFT magnitude (B, n_fft // 2 + 1, T)."""
        if waveform.ndim != 2:
            raise ValueError(f"waveform must be (B, N), got {tuple(waveform.shape)}")
        self.frames(waveform.shape[1])
        pad = (self.config.n_fft - self.config.hop_length) // 2  # so that frame k is centred on hop k + 1/2
        if waveform.shape[1] <= pad:
            raise ValueError(f"waveform must be longer than {pad} samples to be reflected, got {waveform.shape[1]}")
        padded = F.pad(waveform[:, None], (pad, pad), mode="reflect")[:, 0]
        frames = padded.unfold(1, self.config.n_fft, self.config.hop_length)  # (B, T, n_fft)
        spectrum = torch.fft.rfft(frames * self.window).mT
        if spectrum.requires_grad:
            return spectrum.abs()  # whose gradient at 0 is 0, so silence is harmless
        return (spectrum.real**2 + spectrum.imag**2).sqrt()  # the same in half the time

    def forward(self, waveform: Tensor) -> Tensor:
        few = max(1, IN_CACHE // max(1, waveform.shape[-1])) if waveform.device.type == "cpu" else len(waveform)
        with torch.autocast(waveform.device.type, enabled=False):  # half precision would lose quiet sounds
            mel = torch.cat([self._bands(self.magnitude(clips)) for clips in waveform.float().split(few)])
        return mel.clamp(min=self.config.floor).log()[:, None]  # (B, 1, T, F)

    def _bands(self, magnitude):
        """filterbank @ magnitude: (B, n_fft // 2 + 1, T) -> (B, T, F)"""
        parts = [F.linear(magnitude.mT[..., bins], self.filterbank[rows, bins]) for rows, bins in _blocks(self.config)]
        return torch.cat(parts, dim=2)


def griffin_lim(
    mel: Tensor,
    config: MelConfig = LDM_MEL,
    iterations: int = 32,
    momentum: float = 0.99,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Log-mel (B, 1, T, F) -> waveform (B, T * hop_length), phases found by alternating projections.

    The magnitudes are the non-negative least-squares fit to the mel; then the fast Griffin-Lim iteration
    (Perraudin et al. 2013, eq. 9) looks for phases whose STFT is consistent. `generator`: of the phases it starts from;
    None seeds one with 0. Raises ValueError for a mel of another shape.

    Notebook: 01
    """
    target = _magnitudes(mel, config)  # (B, F, T)
    with torch.autocast(mel.device.type, enabled=False):
        magnitude = _unmel(target, config)  # (B, n_fft // 2 + 1, T)
    iterations = whole("iterations", iterations, 0)
    generator = generator or torch.Generator().manual_seed(0)
    angle = 2 * torch.pi * torch.rand(magnitude.shape[1:], generator=generator)  # of every clip
    angle = angle.to(mel.device, non_blocking=True)
    estimate, previous = torch.polar(magnitude, angle.expand_as(magnitude)), 0
    for _ in range(iterations):
        consistent = _stft(_inverse_stft(estimate, config), config)
        pushed = consistent + momentum * (consistent - previous)
        estimate, previous = magnitude * pushed / pushed.abs().clamp(min=1e-8), consistent
    return _without_margin(_inverse_stft(estimate, config), config)


def match_mel(waveform: Tensor, mel: Tensor, config: MelConfig = LDM_MEL, iterations: int = 4) -> Tensor:
    """Waveform (B, N) whose mel is nearly `mel` (B, 1, T, F) -> waveform (B, N) whose mel is nearer to it.

    Griffin-Lim keeps the magnitudes and corrects the phases; this keeps the phases and corrects the magnitudes. Every
    STFT magnitude m becomes m * exp(W' log(target / W m)), with the columns of the filterbank W scaled to sum 1, and
    the inverse STFT turns the result into a waveform. A waveform too short for a mel (`MelSpectrogram.magnitude`) is
    returned unchanged. Raises ValueError unless N = T * hop_length.

    Notebook: 04
    """
    iterations = whole("iterations", iterations, 0)
    target = _magnitudes(mel, config).clamp(min=config.floor)  # (B, F, T)
    if waveform.shape[1] != target.shape[2] * config.hop_length:
        raise ValueError(
            f"a mel of {target.shape[2]} frames belongs to {target.shape[2] * config.hop_length} samples, "
            f"got waveform {tuple(waveform.shape)}"
        )
    bank = _filterbank(config).to(waveform.device, non_blocking=True)
    share = (bank / bank.sum(0).clamp(min=1e-12)).T  # (n_fft // 2 + 1, F); the bin at 0 Hz is in no band and stays
    margin = (config.n_fft - config.hop_length) // 2
    if waveform.shape[1] <= margin:
        return waveform
    with torch.autocast(waveform.device.type, enabled=False):
        for _ in range(iterations):
            padded = F.pad(waveform.float()[:, None], (margin, margin), mode="reflect")[:, 0]
            spectrum = _stft(padded, config)
            ratio = target / (bank @ spectrum.abs()).clamp(min=config.floor)
            corrected = spectrum * (share @ ratio.log()).exp()
            waveform = _without_margin(_inverse_stft(corrected, config), config)
    return waveform


def _magnitudes(mel: Tensor, config: MelConfig) -> Tensor:
    """Log-mel (B, 1, T, F) -> mel magnitudes (B, F, T)."""
    if mel.ndim != 4 or mel.shape[1] != 1 or mel.shape[3] != config.n_mels:
        raise ValueError(f"mel must be (B, 1, T, {config.n_mels}), got {tuple(mel.shape)}")
    return mel[:, 0].float().exp().transpose(1, 2)


def _stft(padded: Tensor, config: MelConfig) -> Tensor:
    """(B, N + n_fft - hop) -> (B, n_fft // 2 + 1, T), framed as `MelSpectrogram` does."""
    window = torch.hann_window(config.n_fft, device=padded.device)
    return torch.stft(padded, config.n_fft, config.hop_length, window=window, center=False, return_complex=True)


def _inverse_stft(spectrum: Tensor, config: MelConfig) -> Tensor:
    """(B, n_fft // 2 + 1, T) -> (B, N + n_fft - hop): the windowed frames added up, over the sum of squared windows.

    That is the signal whose STFT is nearest to `spectrum` (Griffin & Lim 1984, eq. 6).
    """
    window = torch.hann_window(config.n_fft, device=spectrum.device)
    size = (1, (spectrum.shape[2] - 1) * config.hop_length + config.n_fft)

    def overlap_add(frames: Tensor) -> Tensor:  # (B, n_fft, T) -> (B, N + n_fft - hop)
        return F.fold(frames, size, (1, config.n_fft), stride=(1, config.hop_length))[:, 0, 0]

    norm = overlap_add((window**2)[None, :, None].expand(1, -1, spectrum.shape[2])).clamp(min=1e-8)
    return overlap_add(torch.fft.irfft(spectrum, config.n_fft, dim=1) * window[:, None]) / norm


def _without_margin(padded: Tensor, config: MelConfig) -> Tensor:
    margin = (config.n_fft - config.hop_length) // 2
    return padded[:, margin : padded.shape[1] - margin]


def _unmel(mel: Tensor, config: MelConfig, iterations: int = 30) -> Tensor:
    """Mel magnitudes (B, F, T) -> STFT magnitudes (B, n_fft // 2 + 1, T): non-negative, by multiplicative updates.

    Lee & Seung 2001, eq. 4 with the filterbank W fixed: m <- m * (W' mel) / (W' W m).
    """
    bank = _filterbank(config).to(mel.device, non_blocking=True)
    target = bank.T @ mel
    magnitude = target / (bank.T @ bank.sum(1)).clamp(min=1e-12)[:, None]  # a flat first guess within each band
    for _ in range(iterations):
        magnitude = magnitude * target / (bank.T @ (bank @ magnitude)).clamp(min=1e-12)
    return magnitude


def is_silent_mel(mel: Tensor, floor: float) -> Tensor:
    """Log-mels (B, 1, T, F) -> bool (B,): whether every magnitude is below ten times `floor`."""
    return mel.flatten(1).amax(1) < math.log(10 * floor)
