"""Sound files in and out: any file becomes a mono float waveform of shape (N,), and back to 16-bit WAV."""

import os
import re
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F

STREAMED = 0x7F000000  # bytes; recorders that cannot know the length in advance announce this much or more
SILENCE = 1e-5  # a third of one 16-bit step: peaks below it are rounding noise, not sound


def load_audio(path: str | Path, sample_rate: int = 16_000) -> torch.Tensor:
    """Read a sound file as a mono waveform: (N,) float32 in [-1, 1] at `sample_rate` Hz.

    Channels are averaged; a peak above 1 (float files, resampling ripple) is scaled down to 1. Silence is allowed.
    A file that is no sound, holds no samples, NaN or infinity, or lacks over 1 % of the samples that it announces is
    a ValueError. Ogg announces no length, so a cut Ogg file is read up to the cut.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such sound file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")

    samples, file_rate = _decode(path)  # (N, channels)
    if len(samples) == 0:
        raise ValueError(f"{path}: the file holds no samples")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: {np.count_nonzero(~np.isfinite(samples))} samples are NaN or infinite")

    mono = samples.mean(axis=1)
    if file_rate != sample_rate:
        mono = soxr.resample(mono, file_rate, sample_rate)
        if len(mono) == 0:
            raise ValueError(f"{path}: {len(samples)} samples at {file_rate} Hz are none at {sample_rate} Hz")
    return torch.from_numpy(mono / max(1.0, np.abs(mono).max())).float()


def save_audio(path: str | Path, waveform: torch.Tensor | np.ndarray, sample_rate: int = 16_000) -> Path:
    """Write a waveform, (N,) in [-1, 1], as a mono 16-bit PCM WAV file.

    Values outside [-1, 1] are refused rather than clipped: scale them first, e.g. by `normalize`.
    """
    path = Path(path)
    waveform = torch.as_tensor(waveform).detach().cpu().double()
    if path.suffix.lower() != ".wav":
        raise ValueError(f"{path}: only WAV is written, so the name must end in .wav")
    if waveform.ndim != 1 or len(waveform) == 0:
        raise ValueError(f"waveform must be (N,) with N >= 1, got {tuple(waveform.shape)}; save a batch one by one")
    if not waveform.isfinite().all():
        raise ValueError(f"{path}: the waveform holds NaN or infinity; nothing was written")
    if (peak := waveform.abs().max().item()) > 1:
        raise ValueError(f"{path}: the waveform must lie in [-1, 1], its peak is {peak:.4g}; scale it first")

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        pcm = (waveform * 32_767).round().short().numpy()
        soundfile.write(partial, pcm, sample_rate, subtype="PCM_16", format="WAV")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def pad_or_trim(waveform: torch.Tensor, samples: int) -> torch.Tensor:
    """Cut the last axis to `samples`, or fill it up with zeros: (..., N) -> (..., samples)."""
    return F.pad(waveform, (0, samples - waveform.shape[-1]))  # a negative pad cuts


def normalize(waveform: torch.Tensor) -> torch.Tensor:
    """AudioLDM's level: zero mean and peak 0.5 over the last axis; silence stays silence. (..., N) -> (..., N)"""
    centred = waveform - waveform.mean(dim=-1, keepdim=True)
    peak = centred.abs().amax(dim=-1, keepdim=True)
    return 0.5 * centred / peak.clamp(min=SILENCE)


def _decode(path: Path) -> tuple[np.ndarray, int]:
    """Samples (N, channels) float32 and the file's own rate, by libsndfile or, for what it cannot open, audioread."""
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        return _decode_with_audioread(path, reason=error.error_string)
    with file:
        announced_bytes, found_bytes = _data_size(file.extra_info)
        if announced_bytes < STREAMED and found_bytes < 0.99 * announced_bytes:
            raise ValueError(f"{path}: truncated, it announces {announced_bytes} bytes of sound and has {found_bytes}")
        try:
            samples = file.read(dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{path}: damaged or truncated ({error.error_string})") from error
        if len(samples) < 0.99 * file.frames:
            raise ValueError(f"{path}: truncated, it announces {file.frames} samples and has {len(samples)}")
        return samples, file.samplerate


def _data_size(header_log: str) -> tuple[int, int]:
    """Bytes of sound (announced, found) where libsndfile's header log says that they differ, else (0, 0)."""
    found = re.search(r"^\s*(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)", header_log, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _decode_with_audioread(path: Path, reason: str) -> tuple[np.ndarray, int]:
    """M4A, WMA and other formats through ffmpeg or the system's decoder, when audioread (part of librosa) is there."""
    advice = "convert it to WAV or FLAC"
    try:
        import audioread
    except ImportError:
        raise ValueError(f"{path}: libsndfile cannot read it ({reason}); {advice}, or install librosa") from None
    try:
        with audioread.audio_open(str(path)) as file:
            pcm = np.frombuffer(b"".join(file), dtype="<i2")
            return pcm.reshape(-1, file.channels).astype(np.float32) / 32_768, file.samplerate
    except (audioread.DecodeError, OSError, EOFError) as error:
        raise ValueError(f"{path}: neither libsndfile ({reason}) nor audioread can read it; {advice}") from error
