"""Sound files: any file -> a mono float waveform (N,), and a waveform -> a 16-bit WAV file.

Notebook: 01
"""

import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F

from refined_ldm.base.files import atomic_write
from refined_ldm.base.integers import HIGHEST_RATE, LOWEST_RATE, whole, whole_rate
from refined_ldm.base.lengths import Announced, Mpeg, check_ogg, holds_several, parse_frame, walk_mpeg

STREAMED = 0x7F000000  # bytes; headers written before the length was known announce this much or more
SILENCE = 1e-5  # a third of one 16-bit step: peaks below it are rounding noise, not sound
SILENT = 0.5 / 32_767  # peaks below it are zero in a 16-bit file
UNKNOWN_LENGTH = 1 << 62  # samples; libsndfile's value for a stream whose header has no length
BLOCK = 1 << 18  # values decoded at once: headers may promise more samples than there is memory
ADVICE = "convert it to WAV or FLAC"
PathLike = Any  # an object with the methods of a Path, as `shards.Member`
TAIL = 0.1  # seconds read beyond a part, so that its end is resampled as in the whole


def load_audio(
    path: str | Path | PathLike, sample_rate: int = 16_000, seconds: float | None = None, start: float = 0.0
) -> torch.Tensor:
    """Read a sound file as a mono waveform: (N,) float32 in [-1, 1] at `sample_rate` Hz.

    path: a file, or an object with the methods of a Path (`shards.Member`). Only the `seconds` from `start` on are
    decoded and checked. Channels are averaged; a peak above 1 (float files, resampling ripple) is scaled down to 1;
    silence is allowed. An MP3 without a header about its length is read to its last frame. Raises FileNotFoundError,
    or ValueError for a file that is no sound, has no samples, non-finite ones or an unknown length, or is truncated: it
    lacks over 1 % of the samples that it announces, or is an Ogg file that ends within a page; or holds several
    sounds one behind the other (Ogg, WAV, FLAC).

    Notebook: 01
    """
    path, sample_rate = _checked(path), whole_rate(sample_rate)
    if not 0 <= start < math.inf or seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive and start 0 or more, got {seconds} and {start}")
    samples = None if seconds is None else round(seconds * sample_rate)
    mono, file_rate = _decode(path, start, None if seconds is None else seconds + TAIL)
    if len(mono) == 0:
        raise ValueError(f"{path}: the file holds no samples" + (f" at {start:g} s" if start else ""))
    if not np.isfinite(mono).all():
        raise ValueError(f"{path}: {np.count_nonzero(~np.isfinite(mono))} samples are NaN or infinite")

    if file_rate != sample_rate:
        mono = soxr.resample(_within_one(mono), file_rate, sample_rate)
        if len(mono) == 0:
            raise ValueError(f"{path}: too short, its samples at {file_rate} Hz are less than one at {sample_rate} Hz")
    return torch.from_numpy(_within_one(mono[:samples])).float()


def audio_info(path: str | Path | PathLike) -> tuple[float, int]:
    """Length in seconds and sample rate in Hz of a sound file; raises as `load_audio` does."""
    path = _checked(path)
    with _opened(path) as file:
        return file.frames / file.samplerate, file.samplerate


def audio_seconds(path: str | Path | PathLike) -> float:
    """Length of a sound file in seconds; raises as `load_audio` does."""
    return audio_info(path)[0]


def save_audio(
    path: str | Path, waveform: torch.Tensor | np.ndarray, sample_rate: int = 16_000, replace: bool = True
) -> Path:
    """Write a waveform, (N,) in [-1, 1], as a mono 16-bit PCM WAV file -> its path.

    replace: whether an earlier file of this name is replaced; if not, and there is one, FileExistsError. Raises
    ValueError for another shape or file type, non-finite values, or values outside [-1, 1], which are not clipped:
    scale them first, e.g. by `normalize`.
    """
    path, sample_rate = Path(path), whole_rate(sample_rate)
    waveform = torch.as_tensor(waveform).detach().cpu().double()
    if path.suffix.lower() != ".wav":
        raise ValueError(f"{path}: only WAV is written, so the name must end in .wav")
    if waveform.ndim != 1 or len(waveform) == 0:
        raise ValueError(f"waveform must be (N,) with N >= 1, got {tuple(waveform.shape)}; save a batch one by one")
    if not waveform.isfinite().all():
        raise ValueError(f"{path}: the waveform holds NaN or infinity; nothing was written")
    if (peak := waveform.abs().max().item()) > 1:
        raise ValueError(f"{path}: the waveform must lie in [-1, 1], its peak is {peak:.4g}; scale it first")

    pcm = (waveform * 32_767).round().short().numpy()
    with atomic_write(path, replace=replace) as temporary:
        soundfile.write(temporary, pcm, sample_rate, subtype="PCM_16", format="WAV")
    return path


def pad_or_trim(waveform: torch.Tensor, samples: int) -> torch.Tensor:
    """Cut the last axis to `samples`, or fill it up with zeros: (..., N) -> (..., samples)."""
    return F.pad(waveform, (0, whole("samples", samples, 0) - waveform.shape[-1]))  # a negative pad cuts


def normalize(waveform: torch.Tensor) -> torch.Tensor:
    """Scale to AudioLDM's level, zero mean and peak 0.5 over the last axis; silence stays. (..., N) -> (..., N)"""
    centred = waveform - waveform.mean(dim=-1, keepdim=True)
    peak = centred.abs().amax(dim=-1, keepdim=True)
    return 0.5 * centred / peak.clamp(min=SILENCE)


def _checked(path: str | Path | PathLike) -> Path | PathLike:
    path = Path(path) if isinstance(path, str) else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'this is a folder' if path.is_dir() else 'no such sound file'}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    return path


def _within_one(mono: np.ndarray) -> np.ndarray:
    return mono / max(1.0, np.abs(mono).max())


@contextmanager
def _opened(path: Path | PathLike) -> Iterator[Any]:
    """Open a file with libsndfile, and check its length and its sample rate."""
    if holds_several(path, _size_and_time(path)):
        raise ValueError(
            f"{path}: several sounds one behind the other, of which the first alone would be read: save each by itself"
        )
    with ExitStack() as stack:
        mpeg = _mpeg(path)
        try:
            if mpeg and mpeg.announced is not None and not mpeg.is_announced:  # the header is about a part of the file
                file = _announced(path, mpeg, stack)
            else:
                file = stack.enter_context(soundfile.SoundFile(_source(path, stack)))
                if file.format == "MP3":
                    mpeg = mpeg or walk_mpeg(path, _size_and_time(path))  # bytes of another kind come before the frames
                    if not (mpeg and _length_is_known(file, mpeg)):
                        file = _announced(path, mpeg, stack)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{path}: libsndfile cannot read it ({error.error_string}); {ADVICE}") from error
        if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
            raise ValueError(
                f"{path}: the sample rate must be {LOWEST_RATE} to {HIGHEST_RATE} Hz, got {file.samplerate} Hz"
            )
        if file.format == "OGG":
            check_ogg(path)
        if file.frames >= UNKNOWN_LENGTH:
            raise ValueError(f"{path}: its length is unknown, its header does not have it; {ADVICE}")
        yield file


def _source(path: Path | PathLike, stack: ExitStack) -> Any:
    """The argument with which libsndfile opens a file."""
    if isinstance(path, Path):
        return os.fsencode(path) if os.name == "posix" else path  # names need not be Unicode
    return stack.enter_context(path.open("rb"))


def _mpeg(path: Path | PathLike) -> Mpeg | None:
    """Statistics of the frames of an MP3; None for another kind of file."""
    with path.open("rb") as file:
        head = file.read(4)
    if head[:3] != b"ID3" and parse_frame(head) is None:
        return None
    return walk_mpeg(path, _size_and_time(path))


def _size_and_time(path: Path | PathLike) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _length_is_known(file: soundfile.SoundFile, mpeg: Mpeg) -> bool:
    """Whether libsndfile has the right length of an MP3: from its header or, at a constant bit rate, from its size."""
    return mpeg.is_announced or mpeg.alike and abs(file.frames - mpeg.samples) <= mpeg.first.samples


def _announced(path: Path | PathLike, mpeg: Mpeg | None, stack: ExitStack) -> soundfile.SoundFile:
    """Open an MP3 behind a header with its length; raises ValueError if its frames allow no such header."""
    if mpeg is None or not mpeg.alike or mpeg.first.layer != 3:
        reason = "its frames have no size" if mpeg is None else "its frames differ, or are of layer 1 or 2"
        raise ValueError(f"{path}: its length is unknown ({reason}); {ADVICE}")
    source = stack.enter_context(path.open("rb"))
    return stack.enter_context(soundfile.SoundFile(Announced(source, mpeg)))


def _decode(path: Path | PathLike, start: float, seconds: float | None) -> tuple[np.ndarray, int]:
    """Read `seconds` (None: all) from `start` on -> the mean of the channels (N,) float32, the file's sample rate."""
    with _opened(path) as file:
        rate = file.samplerate
        first, wanted = round(start * rate), None if seconds is None else math.ceil(seconds * rate)
        announced_bytes, found_bytes = _data_size(file.extra_info)
        if announced_bytes < STREAMED and found_bytes < 0.99 * announced_bytes:
            raise ValueError(f"{path}: truncated, it announces {announced_bytes} bytes of sound and has {found_bytes}")
        due = max(0, file.frames - first)
        due = due if wanted is None else min(due, wanted)
        try:
            if first and file.seekable():
                file.seek(min(first, file.frames))
            elif first:  # GSM and similar formats can only be read from their beginning
                _read(file, min(first, file.frames))
            mono = _read(file, due)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{path}: damaged or truncated ({error.error_string})") from error
        if len(mono) < 0.99 * due:
            raise ValueError(f"{path}: truncated, it announces {file.frames} samples and has {first + len(mono)}")
        return mono, rate


def _read(file: soundfile.SoundFile, frames: int) -> np.ndarray:
    """Up to `frames` frames block by block, each the mean of its channels: (N,)."""
    parts = []
    while frames > 0:
        block = file.read(min(frames, max(1, BLOCK // file.channels)), dtype="float32", always_2d=True)
        if len(block) == 0:
            break
        with np.errstate(over="ignore", invalid="ignore"):  # `load_audio` refuses infinity
            parts.append(block.mean(axis=1))
        frames -= len(block)
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _data_size(header_log: str) -> tuple[int, int]:
    """Bytes of sound (announced, found) if they differ according to libsndfile's header log, else (0, 0)."""
    found = re.search(r"^\s*(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)", header_log, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def is_silent_waveform(waveform: torch.Tensor) -> torch.Tensor:
    """Waveforms (B, N) -> bool (B,): whether a 16-bit file of it would be all zeros."""
    return waveform.abs().amax(1) < SILENT


def is_constant(latent: torch.Tensor) -> torch.Tensor:
    """Return a mask (B,) of the latents (B, C, T, F) that hold one value throughout, as after an underflow."""
    flat = latent.flatten(1)
    return torch.eq(flat, flat[:, :1]).all(1)


def are_finite(batch: torch.Tensor) -> torch.Tensor:
    """Return a mask (B,) of the latents, mels or waveforms (B, …) without NaN and infinity."""
    return batch.isfinite().flatten(1).all(1)


def check_finite(stage: str, finite: torch.Tensor, captions: Sequence[str], dtype: torch.dtype) -> None:
    """Raise FloatingPointError, naming stage, captions and dtype, unless the sounds of all captions are finite (B,)."""
    if bad := [c for c, is_finite in zip(captions, finite.tolist(), strict=True) if not is_finite]:
        raise FloatingPointError(
            f"the {stage} of {_named(bad)} holds NaN or infinite numbers ({dtype}): try float32, or other weights"
        )


def warn_of_silence(stage: str, silent: torch.Tensor, captions: Sequence[str]) -> None:
    """Warn of the captions whose sound is silent (B,) at a stage."""
    if quiet := [c for c, is_silent in zip(captions, silent.tolist(), strict=True) if is_silent]:
        warnings.warn(f"the {stage} of {_named(quiet)} is silent: try another seed, or other weights", stacklevel=3)


def _named(captions):
    shown = ", ".join(repr(c[:60]) for c in captions[:3])
    return f"{shown} and {len(captions) - 3} more" if len(captions) > 3 else shown
