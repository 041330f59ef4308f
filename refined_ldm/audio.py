"""Sound files in and out: any file becomes a mono float waveform of shape (N,), and back to 16-bit WAV."""

import math
import os
import re
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F

from refined_ldm.files import atomic_write
from refined_ldm.integers import HIGHEST_RATE, LOWEST_RATE, whole, whole_rate
from refined_ldm.lengths import Announced, check_ogg, parse_frame, walk_mpeg

STREAMED = 0x7F000000  # bytes; recorders that cannot know the length in advance announce this much or more
SILENCE = 1e-5  # a third of one 16-bit step: peaks below it are rounding noise, not sound
SILENT = 0.5 / 32_767  # peaks below it are zero in a 16-bit file
UNTOLD = 1 << 62  # samples; what libsndfile says of a stream whose header does not tell its length
BLOCK = 1 << 18  # values decoded at once: headers may promise more samples than there is memory
ADVICE = "convert it to WAV or FLAC"
TAIL = 0.1  # seconds read beyond a part, so that its end is resampled as in the whole


def load_audio(path, sample_rate: int = 16_000, seconds: float | None = None, start: float = 0.0) -> torch.Tensor:
    """Read a sound file as a mono waveform: (N,) float32 in [-1, 1] at `sample_rate` Hz.

    path: a file, or anything that opens like a Path (`shards.Member`). Of a long file only the `seconds` from `start`
    on are decoded and checked. Channels are averaged; a peak above 1 (float files, resampling ripple) is scaled down to
    1. Silence is allowed. A file that is no sound, holds no samples, NaN or infinity, or lacks over 1 % of the samples
    that it announces is a ValueError, as is an Ogg file that ends within a page, or whose length cannot be told. An MP3
    without a header about its length is read to its last frame.
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
            raise ValueError(f"{path}: too short, what it holds at {file_rate} Hz is no sample at {sample_rate} Hz")
    return torch.from_numpy(_within_one(mono[:samples])).float()


def audio_info(path) -> tuple[float, int]:
    """Length in seconds and sample rate in Hz of a sound file; ValueError or FileNotFoundError as of `load_audio`."""
    path = _checked(path)
    with _opened(path) as file:
        return file.duration if _is_audioread(file) else file.frames / file.samplerate, file.samplerate


def audio_seconds(path) -> float:
    """How long a sound file is; ValueError or FileNotFoundError as of `load_audio`."""
    return audio_info(path)[0]


def save_audio(
    path: str | Path, waveform: torch.Tensor | np.ndarray, sample_rate: int = 16_000, replace: bool = True
) -> Path:
    """Write a waveform, (N,) in [-1, 1], as a mono 16-bit PCM WAV file.

    Values outside [-1, 1] are refused rather than clipped: scale them first, e.g. by `normalize`. replace: whether an
    earlier file of this name gives way; if not, and there is one, FileExistsError.
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
    """AudioLDM's level: zero mean and peak 0.5 over the last axis; silence stays silence. (..., N) -> (..., N)"""
    centred = waveform - waveform.mean(dim=-1, keepdim=True)
    peak = centred.abs().amax(dim=-1, keepdim=True)
    return 0.5 * centred / peak.clamp(min=SILENCE)


def _checked(path):
    path = Path(path) if isinstance(path, str) else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such sound file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    return path


def _within_one(mono: np.ndarray) -> np.ndarray:
    return mono / max(1.0, np.abs(mono).max())


@contextmanager
def _opened(path):
    """A file opened by libsndfile or, where that cannot, by audioread; its length is known, its rate one of sound."""
    with ExitStack() as stack:
        mpeg = _mpeg(path)
        try:
            if mpeg is not None and mpeg.announced is not None and not mpeg.is_announced:  # of a part alone
                file = _announced(path, mpeg, stack)
            else:
                file = stack.enter_context(soundfile.SoundFile(_source(path, stack)))
                if file.format == "MP3" and not (mpeg and _is_told(file, mpeg)):
                    file = _announced(path, mpeg, stack)
        except soundfile.LibsndfileError as error:
            file = stack.enter_context(_open_with_audioread(path, reason=error.error_string))
        if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
            raise ValueError(f"{path}: a sample rate of {file.samplerate} Hz is none of sound; expected {LOWEST_RATE} "
                             f"to {HIGHEST_RATE} Hz")  # fmt: skip
        if not _is_audioread(file):
            if file.format == "OGG":
                check_ogg(path)
            if file.frames >= UNTOLD:
                raise ValueError(f"{path}: its length cannot be told, its header does not say it; {ADVICE}")
        yield file


def _source(path, stack: ExitStack):
    """What libsndfile opens."""
    if isinstance(path, Path):
        return os.fsencode(path) if os.name == "posix" else path  # its name may be no Unicode
    return stack.enter_context(path.open("rb"))


def _mpeg(path):
    """The frames of an MP3, counted; None for another kind of file."""
    with path.open("rb") as file:
        head = file.read(4)
    if head[:3] != b"ID3" and parse_frame(head) is None:
        return None
    stat = path.stat()
    return walk_mpeg(path, (stat.st_size, stat.st_mtime_ns))


def _is_told(file, mpeg) -> bool:
    """Whether libsndfile knows how long an MP3 is: by its header or, since its bit rate is constant, by its size."""
    return mpeg.is_announced or mpeg.alike and abs(file.frames - mpeg.samples) <= mpeg.first.samples


def _announced(path, mpeg, stack: ExitStack):
    """An MP3 opened behind a header that tells its length; ValueError if there can be none."""
    if mpeg is None or not mpeg.alike or mpeg.first.layer != 3:
        why = "its frames do not tell their size" if mpeg is None else "its frames differ, or are of layer 1 or 2"
        raise ValueError(f"{path}: its length cannot be told ({why}); {ADVICE}")
    source = stack.enter_context(path.open("rb"))
    return stack.enter_context(soundfile.SoundFile(Announced(source, mpeg)))


def _decode(path, start: float, seconds: float | None) -> tuple[np.ndarray, int]:
    """The mean of the channels, (N,) float32, of `seconds` (None: all) from `start` on, and the file's own rate."""
    with _opened(path) as file:
        rate = file.samplerate
        first, wanted = round(start * rate), None if seconds is None else math.ceil(seconds * rate)
        if _is_audioread(file):
            return _mono_of_audioread(file, first, wanted), rate
        announced_bytes, found_bytes = _data_size(file.extra_info)
        if announced_bytes < STREAMED and found_bytes < 0.99 * announced_bytes:
            raise ValueError(f"{path}: truncated, it announces {announced_bytes} bytes of sound and has {found_bytes}")
        due = max(0, file.frames - first)
        due = due if wanted is None else min(due, wanted)
        try:
            if first and file.seekable():
                file.seek(min(first, file.frames))
            elif first:  # GSM and the like can only be read from their beginning on
                _read(file, min(first, file.frames))
            mono = _read(file, due)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{path}: damaged or truncated ({error.error_string})") from error
        if len(mono) < 0.99 * due:
            raise ValueError(f"{path}: truncated, it announces {file.frames} samples and has {first + len(mono)}")
        return mono, rate


def _read(file, frames: int) -> np.ndarray:
    """Up to `frames` frames block by block, each the mean of its channels: (N,)."""
    parts = []
    while frames > 0:
        block = file.read(min(frames, max(1, BLOCK // file.channels)), dtype="float32", always_2d=True)
        if len(block) == 0:
            break
        with np.errstate(over="ignore", invalid="ignore"):  # infinity is told later
            parts.append(block.mean(axis=1))
        frames -= len(block)
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _data_size(header_log: str) -> tuple[int, int]:
    """Bytes of sound (announced, found) where libsndfile's header log says that they differ, else (0, 0)."""
    found = re.search(r"^\s*(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)", header_log, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@contextmanager
def _open_with_audioread(path, reason: str):
    """M4A, WMA and other formats through ffmpeg or the system's decoder, when audioread (part of librosa) is there."""
    if not isinstance(path, Path):
        raise ValueError(f"{path}: libsndfile cannot read it ({reason}); {ADVICE}")
    try:
        import audioread
    except ImportError:
        raise ValueError(f"{path}: libsndfile cannot read it ({reason}); {ADVICE}, or install librosa") from None
    try:
        with audioread.audio_open(str(path)) as file:
            yield file
    except (audioread.DecodeError, OSError, EOFError) as error:
        raise ValueError(f"{path}: neither libsndfile ({reason}) nor audioread can read it; {ADVICE}") from error


def _is_audioread(file) -> bool:
    return hasattr(file, "duration")


def _mono_of_audioread(file, first: int, wanted: int | None) -> np.ndarray:
    """Frames `first` to `first + wanted` of an audioread file, which cannot seek: (N,)."""
    frame, pcm = 2 * file.channels, bytearray()  # bytes
    for data in file:
        pcm += data
        if wanted is not None and len(pcm) >= (first + wanted) * frame:
            break
    samples = np.frombuffer(pcm[: len(pcm) // frame * frame], dtype="<i2").reshape(-1, file.channels)
    samples = samples[first : None if wanted is None else first + wanted]
    return samples.mean(axis=1, dtype=np.float32) / 32_768


def is_silent_waveform(waveform):
    """Which of the waveforms (B, N) would be all zeros in a 16-bit file -> (B,)."""
    return waveform.abs().amax(1) < SILENT
