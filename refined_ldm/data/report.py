"""Report on a data set before anything is trained on it: lengths, rates, levels, captions, duplicates, faults."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from refined_ldm.audio import SILENT, audio_info, load_audio
from refined_ldm.data.captioned_audio import SAMPLE_RATE, CaptionedAudio, Recording

FULL_SCALE = 0.999  # of successive samples at or above it, CLIPPED are no coincidence
CLIPPED = 3
SHOWN = 5  # names in a line of the table


@dataclass(frozen=True)
class ClipFacts:
    """One recording, and the part of it that training uses."""

    id: str
    captions: tuple[str, ...]
    split: str
    seconds: float  # of the recording, or of its part between start and end
    rate: int  # Hz
    peak: float  # of the part used, 1 is full scale
    clipped: bool
    digest: str  # equal for equal sounds


@dataclass(frozen=True)
class DataReport:
    """Facts about all clips of a data set; `clip_seconds` is the length that training uses of each."""

    clips: tuple[ClipFacts, ...]
    skipped: tuple[str, ...]  # entries that cannot be used, and why
    clip_seconds: float

    def to_dict(self) -> dict:
        """The report in numbers and names, as `--json` prints it."""
        lengths = [clip.seconds for clip in self.clips]
        captions = [caption for clip in self.clips for caption in clip.captions]
        clips_of, sounds = Counter(text for clip in self.clips for text in clip.captions), defaultdict(list)
        for clip in self.clips:
            sounds[clip.digest].append(clip.id)
        return {
            "clips": len(self.clips),
            "splits": dict(sorted(Counter(clip.split for clip in self.clips if clip.split).items())),
            "hours": sum(lengths) / 3600,
            "hours_used": sum(min(length, self.clip_seconds) for length in lengths) / 3600,
            "clip_seconds": self.clip_seconds,
            "seconds": _range(lengths),
            "shorter": sum(length < self.clip_seconds for length in lengths),
            "longer": sum(length > self.clip_seconds for length in lengths),
            "rates": {str(rate): count for rate, count in sorted(Counter(clip.rate for clip in self.clips).items())},
            "silent": [clip.id for clip in self.clips if clip.peak < SILENT],
            "clipped": [clip.id for clip in self.clips if clip.clipped],
            "captions": len(captions),
            "captions_per_clip": _range([len(clip.captions) for clip in self.clips]),
            "words": _range([len(caption.split()) for caption in captions]),
            "repeated_captions": {text: count for text, count in clips_of.most_common() if count > 1},
            "same_sounds": [ids for ids in sounds.values() if len(ids) > 1],
            "skipped": list(self.skipped),
        }

    def table(self) -> str:
        """The report in lines of text."""
        d = self.to_dict()
        repeated = [f"{text!r} ({count} clips)" for text, count in d["repeated_captions"].items()]
        lines = {
            "clips": f"{d['clips']} in {d['hours']:.3g} h, of which training uses {d['hours_used']:.3g} h",
            "splits": ", ".join(f"{split} {count}" for split, count in d["splits"].items()),
            "lengths": f"{_words(d['seconds'])} s; {d['shorter']} are shorter than {self.clip_seconds:g} s and padded, "
            f"{d['longer']} are longer and cut",
            "sample rates": ", ".join(f"{rate} Hz: {count}" for rate, count in d["rates"].items()),
            "silent": _listed(d["silent"]),
            "clipped": _listed(d["clipped"]),
            "captions": f"{d['captions']}, {_words(d['captions_per_clip'])} a clip, of {_words(d['words'])} words",
            "repeated captions": _listed(repeated),
            "same sounds": _listed([" = ".join(ids) for ids in d["same_sounds"]]),
            "skipped": f"{len(self.skipped)}" + "".join(f"\n  {' '.join(fault.split())}" for fault in self.skipped),
        }
        return "\n".join(f"{name:18} {text}" for name, text in lines.items() if text)


def report_data(dataset: CaptionedAudio, on_clip: Callable[[int, int], None] = lambda done, total: None) -> DataReport:
    """Decode the part of every recording that training uses, and describe what was found.

    on_clip: called with (clips done, all clips). Raises as `load_audio` for a recording that cannot be read: open the
    data set with `skip_bad=True` first, and it is among the skipped ones.
    """
    clips = []
    for done, recording in enumerate(dataset.recordings, 1):
        clips.append(_facts(dataset, recording))
        on_clip(done, len(dataset))
    return DataReport(tuple(clips), dataset.left_out, dataset.samples / SAMPLE_RATE)


def _facts(dataset: CaptionedAudio, recording: Recording) -> ClipFacts:
    length, rate = audio_info(recording.path)
    waveform = load_audio(recording.path, rate, *dataset.part(recording))
    end = length if recording.end is None else min(length, recording.end)
    return ClipFacts(
        recording.id,
        recording.captions,
        recording.split,
        end - recording.start,
        rate,
        waveform.abs().max().item(),
        is_clipped(waveform),
        hashlib.sha256((waveform * 32_767).round().short().numpy().tobytes()).hexdigest(),
    )


def is_clipped(waveform: torch.Tensor) -> bool:
    """Whether CLIPPED successive samples of a waveform (N,) are at full scale, all at its top or all at its bottom."""
    if len(waveform) < CLIPPED:
        return False
    runs = waveform.unfold(0, CLIPPED, 1)
    return bool(((runs >= FULL_SCALE).all(1) | (runs <= -FULL_SCALE).all(1)).any())


def _range(values: Iterable[float]) -> dict[str, float]:
    values = np.asarray(list(values))
    return {"least": values.min().item(), "median": float(np.median(values)), "most": values.max().item()}


def _words(r: dict[str, float]) -> str:
    return f"{r['least']:.3g} to {r['most']:.3g} (median {r['median']:.3g})"


def _listed(names: list[str]) -> str:
    return f"{len(names)}" + (": " + ", ".join(names[:SHOWN]) + " …" * (len(names) > SHOWN) if names else "")
