"""The built-in data set: captioned scenes of one or two sounds, rendered on the fly from a seed.

Every random choice is drawn from a hash of names (split, seed, index, class), never from an order, so a scene sounds
the same on any machine; a class added later changes only the scenes that choose it.

Notebook: 01
"""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import torch
from scipy.signal import fftconvolve, lfilter
from torch.utils.data import Dataset

from refined_ldm.base.integers import whole, whole_seed
from refined_ldm.scenes import soundfont
from refined_ldm.scenes.captions import Caption, write_captions
from refined_ldm.scenes.classes import CLASSES, FROM_FONT, Event
from refined_ldm.scenes.synthesis import SAMPLE_RATE

RENDERING = "1"  # version of sounds and captions, raised whenever either changes (tests/scenes/test_rendering.py)
KINDS = ("event", "sequence", "overlap")
SPLIT_KINDS = {  # a pair needs two events, an order needs a sequence
    "train": KINDS, "val": KINDS, "test": KINDS, "test_pairs": ("sequence", "overlap"), "test_order": ("sequence",),
}  # fmt: skip


class SoundScenes(Dataset):
    """Captioned scenes of three kinds: a single event, two events in sequence, two events that overlap.

    Items are dicts: `waveform` (N,) at 16 kHz with peak 0.5, `caption`, `captions` (three), `id`, `kind`, `events`
    (tuple of `Event`) and `labels` (the classes that the captions name).

    Notebook: 01
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 4000,
        seconds: float = 2.56,
        seed: int = 0,
        kinds: Sequence[str] = KINDS,
        sources: str = "all",
    ):
        """Choose the scenes of a `split` (a key of SPLIT_KINDS); each lasts `seconds` s.

        sources: "all", or "procedural" for the classes that need no SoundFont.
        Raises ValueError for an impossible choice, FileNotFoundError if the SoundFont is missing.
        """
        if split not in SPLIT_KINDS:
            raise ValueError(f"split must be one of {', '.join(SPLIT_KINDS)}, got {split!r}")
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
        if sources not in ("all", "procedural"):
            raise ValueError(f'sources must be "all" or "procedural", got {sources!r}')
        size, seed = whole("size", size, 1), whole_seed(seed)
        if not 1 <= seconds < 3600:
            raise ValueError(f"seconds must be at least 1, got {seconds}")
        self.kinds = tuple(kind for kind in KINDS if kind in kinds and kind in SPLIT_KINDS[split])
        if not self.kinds:
            raise ValueError(f"split {split!r} has scenes of kind {', '.join(SPLIT_KINDS[split])} only, got {kinds}")
        self.split, self.size, self.seconds, self.seed = split, size, float(seconds), seed
        if sources == "all":
            soundfont.find_soundfont()  # raises before any work if it is missing
        self.classes = tuple(sorted(name for name in CLASSES if sources == "all" or name not in FROM_FONT))
        held_out = split == "test_pairs"
        partners = {a: [b for b in self.classes if a != b and is_held_out(a, b) == held_out] for a in self.classes}
        self._partners = {a: others for a, others in partners.items() if others}

    def __len__(self) -> int:
        return self.size

    def fingerprint(self) -> str:
        """Return a digest of the arguments, the version of the rendering and the size of the SoundFont."""
        made_of = blake2b(repr((self.split, self.size, self.seconds, self.seed, self.kinds, self.classes)).encode())
        made_of.update(RENDERING.encode())
        if set(self.classes) & set(FROM_FONT):
            made_of.update(str(soundfont.find_soundfont().stat().st_size).encode())
        return made_of.hexdigest()[:32]

    def __getitem__(self, index: int) -> dict:
        index = whole("index", index)
        if not 0 <= index < self.size:
            raise IndexError(f"scene {index} of {self.size}")
        kind = self.kinds[index % len(self.kinds)]
        identity = f"{self.split}-{self.seed}-{index}-{kind}"
        scene = identity
        if self.split == "test_order":  # two items share everything but the order
            scene = f"{self.split}-{self.seed}-{index // 2}-{kind}"
        names = self._choose(scene, kind)
        rng = _generator(scene, kind)
        if kind == "event":
            parts = [self._render(scene, names[0], self.seconds * rng.uniform(0.75, 1))]
        elif kind == "sequence":
            share = rng.uniform(0.42, 0.56)
            room = self.seconds * 0.95
            parts = [self._render(scene, names[0], room * share), self._render(scene, names[1], room * (1 - share))]
        else:
            parts = [self._render(scene, name, self.seconds * rng.uniform(0.85, 1)) for name in names]
        swapped = self.split == "test_order" and index % 2 == 1
        if swapped:
            parts.reverse()
        waveform, events, audible = _mix(rng, kind, parts, self.seconds, swapped)
        named = [event for event, is_audible in zip(events, audible, strict=True) if is_audible]
        captions = tuple(map(str, write_captions(_generator(identity, "captions"), kind, named)))
        return {
            "waveform": torch.from_numpy(waveform),
            "caption": captions[0],
            "captions": captions,
            "id": identity,
            "kind": kind,
            "events": tuple(events),
            "labels": tuple(event.name for event in named),
        }

    def exchange(self, index: int, place: int, name: str | None) -> tuple[dict, dict]:
        """Scene `index`, a sequence, as it is and with event `place` (0 or 1) exchanged for one of class `name`.

        Both are items, of which all but the exchanged event is the same, sample by sample: the right answer of an edit.
        The new event begins where the old one did and is as loud; None leaves a gap. The captions name no details.
        Raises ValueError for a scene of another kind, or one in which the new event does not fit.
        """
        item = self[index]
        if item["kind"] != "sequence" or place not in (0, 1) or self.split == "test_order":
            raise ValueError(f"an event of a sequence can be exchanged, got event {place} of {item['id']}")
        n, rng = round(self.seconds * SAMPLE_RATE), _generator(item["id"], "sequence")
        share = rng.uniform(0.42, 0.56)
        rooms = [self.seconds * 0.95 * share, self.seconds * 0.95 * (1 - share)]

        def placed(name: str, at: int) -> tuple[np.ndarray, Event]:
            old = item["events"][at]
            waveform, event = self._render(item["id"], name, rooms[at])
            track, start = np.zeros(n), round(old.onset * SAMPLE_RATE)
            waveform = waveform[: n - start] * 10 ** (old.gain / 20)
            track[start : start + len(waveform)] = waveform
            offset = old.onset + len(waveform) / SAMPLE_RATE
            return track, replace(event, onset=old.onset, offset=offset, gain=old.gain)

        tracks, events = zip(*(placed(event.name, at) for at, event in enumerate(item["events"])), strict=True)
        total = sum(tracks)
        mean, factor = total.mean(), 0.5 / np.abs(total - total.mean()).max()
        new, event = placed(name, place) if name else (np.zeros(n), None)
        exchanged = total - tracks[place] + new
        found = []
        for waveform, present in ((total, events), (exchanged, [*events[:place], event, *events[place + 1 :]])):
            present = [event for event in present if event]
            waveform = ((waveform - mean) * factor).astype(np.float32)
            if np.abs(waveform).max() > 1 or present != sorted(present, key=lambda event: event.onset):
                raise ValueError(f"{name} does not fit in {item['id']}")
            captions = tuple(map(str, write_captions(_generator(item["id"], "exchange"), "sequence", present, 0.0)))
            found.append(item | {
                "waveform": torch.from_numpy(waveform), "caption": captions[0], "captions": captions,
                "events": tuple(present), "labels": tuple(event.name for event in present),
            })  # fmt: skip
        return tuple(found)

    def _choose(self, scene: str, kind: str) -> tuple[str, ...]:
        """Choose classes by rendezvous hashing: each takes the name whose hash with the scene is highest."""

        def best(names, role):
            return max(names, key=lambda name: _hash(scene, role, name))

        if kind == "event":
            return (best(self.classes, "only"),)
        first = best(self._partners, "first")
        return first, best(self._partners[first], "second")

    def _render(self, scene: str, name: str, seconds: float) -> tuple[np.ndarray, Event]:
        """Render one event, trimmed to its audible part and scaled to unit loudness."""
        rng = _generator(scene, name)
        sound = CLASSES[name].render(rng, seconds)
        waveform, distant = _acoustics(rng, sound.waveform, seconds)
        waveform = _trim(waveform)
        waveform = waveform / _loudness(waveform)
        event = Event(name, 0.0, len(waveform) / SAMPLE_RATE, sound.pitch, sound.count, 0.0, sound.rate, distant)
        return waveform, event


def captions_of(item: dict, count: int | None = None, detailed: float = 0.6) -> list[Caption]:
    """Return the three captions of an item of `SoundScenes` (also from a cache), or `count` other captions of it.

    detailed: the probability that details of an event are named. The other captions are drawn from the item's id, as
    the three are, but may repeat one another.
    """
    events = [event if isinstance(event, Event) else Event(**event) for event in item["events"]]
    events = [event for event in events if event.name in item["labels"]]
    if count is None:
        return write_captions(_generator(item["id"], "captions"), item["kind"], events, detailed)
    captions, draw, count = [], 0, whole("count", count, 1)
    while len(captions) < count:
        captions += write_captions(_generator(item["id"], "more captions", str(draw)), item["kind"], events, detailed)
        draw += 1
    return captions[:count]


def is_held_out(a: str, b: str) -> bool:
    """Return whether two classes, in either order, are a pair held out for `test_pairs` (one pair in seven)."""
    return _hash("pair", *sorted((a, b))) % 7 == 0


def _hash(*names: str) -> int:
    return int.from_bytes(blake2b("/".join(names).encode(), digest_size=8).digest(), "little")


def _generator(*names: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(_hash(*names)))


# ---------------------------------------------------------------- from rendered events to a scene


def _acoustics(rng: np.random.Generator, waveform: np.ndarray, seconds: float) -> tuple[np.ndarray, bool]:
    """Apply a tone control and, in half the cases, a room; one sound in eight is distant -> (waveform, distant)."""
    distant = rng.random() < 0.125
    tilt = rng.uniform(-0.4, 0.4)
    waveform = lfilter([1, tilt - 1, -tilt], [1, -0.995], waveform)  # and no constant part
    if distant:
        pole = np.exp(-2 * np.pi * rng.uniform(900, 1800) / SAMPLE_RATE)
        waveform = lfilter([1 - pole], [1, -pole], waveform)
    if distant or rng.random() < 0.5:
        decay = rng.uniform(0.12, 0.3) if distant else rng.uniform(0.03, 0.2)
        t = np.arange(int(min(3 * decay, 0.4 * seconds) * SAMPLE_RATE)) / SAMPLE_RATE
        tail = rng.standard_normal(len(t)) * np.exp(-t / (decay / 2))
        tail = lfilter([0.5], [1, -0.5], tail)
        wet = rng.uniform(0.6, 1) if distant else rng.uniform(0.1, 0.5)
        tail *= wet / np.sqrt((tail**2).sum())
        tail[0] += 1
        waveform = fftconvolve(waveform, tail)[: round(seconds * SAMPLE_RATE)]
    return waveform, distant


def _frame_power(waveform: np.ndarray, frame: int = 160) -> np.ndarray:
    """Return the mean power of each 10 ms frame."""
    whole = len(waveform) // frame * frame
    return (waveform[:whole].reshape(-1, frame) ** 2).mean(axis=1)


def _trim(waveform: np.ndarray) -> np.ndarray:
    """Cut both ends where the power is 40 dB below the loudest frame, and fade the cuts."""
    power = _frame_power(waveform)
    loud = np.flatnonzero(power > 1e-4 * power.max())
    start, end = max(0, loud[0] - 1) * 160, (loud[-1] + 1) * 160
    waveform = waveform[start:end].copy()
    waveform[:32] *= np.linspace(0, 1, 32)
    fade = min(320, len(waveform) // 4)
    waveform[-fade:] *= np.linspace(1, 0, fade)
    return waveform


def _loudness(waveform: np.ndarray) -> float:
    """Return the rms of the frames within 15 dB of the loudest, with the bass attenuated, roughly as the ear does."""
    power = _frame_power(lfilter([1, -0.85], [1.0], waveform) + 0.1 * waveform)
    return float(np.sqrt(power[power > 0.03 * power.max()].mean())) + 1e-9


def _mix(
    rng: np.random.Generator, kind: str, parts, seconds: float, swapped=False
) -> tuple[np.ndarray, list[Event], list[bool]]:
    """Place the parts, set their levels so that each is audible, and normalise -> waveform, events, audibility of each.

    Swapped parts keep the levels that they have in the other order.
    """
    n = round(seconds * SAMPLE_RATE)
    lengths = [len(waveform) for waveform, _ in parts]
    if kind == "event":
        starts = [rng.integers(0, max(1, n - lengths[0]))]
    elif kind == "sequence":
        gap = int(min(rng.uniform(0.04, 0.25) * SAMPLE_RATE, n - sum(lengths)))
        first = rng.integers(0, max(1, n - sum(lengths) - gap))
        starts = [first, first + lengths[0] + gap]
    else:  # the shorter lies within the longer
        long = int(np.argmax(lengths))
        at = rng.integers(0, max(1, n - lengths[long]))
        starts = [at, at]
        starts[1 - long] = at + rng.integers(0, max(1, lengths[long] - lengths[1 - long]))
    tracks = np.zeros((len(parts), n))
    for track, (waveform, _), start in zip(tracks, parts, starts, strict=True):
        track[start : start + len(waveform)] = waveform

    gains = np.zeros(len(parts))  # dB
    if len(parts) == 2:
        softer = int(rng.integers(2)) ^ swapped
        gains[softer] = -rng.uniform(0, 10)
        for i, (_, event) in enumerate(parts):
            gains[i] -= 4 * event.distant
    audible = [True] * len(parts)
    if kind == "overlap":
        spectra = [_band_power(track) for track in tracks]
        for _ in range(4):  # raise a masked part, 4 dB at a time
            audible = [_audible(spectra[i], gains[i], spectra[1 - i], gains[1 - i]) for i in (0, 1)]
            if sum(audible) != 1:
                break
            gains[audible.index(False)] += 4
    gains -= gains.max()
    total = (10 ** (gains / 20)) @ tracks
    total -= total.mean()
    total *= 0.5 / np.abs(total).max()
    events = [
        replace(event, onset=start / SAMPLE_RATE, offset=(start + length) / SAMPLE_RATE, gain=round(float(gain), 2))
        for (_, event), start, length, gain in zip(parts, starts, lengths, gains, strict=True)
    ]
    return total.astype(np.float32), events, audible


def _band_power(waveform: np.ndarray) -> np.ndarray:
    """Return the power in 32 ms frames and bands that widen with frequency, from 31 Hz -> (frames, bands)."""
    frames = waveform[: len(waveform) // 512 * 512].reshape(-1, 512) * np.hanning(512)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    edges = np.unique(np.geomspace(1, 256, 19).round().astype(int))
    return np.add.reduceat(power, edges[:-1], axis=1)


def _audible(own: np.ndarray, own_gain: float, other: np.ndarray, other_gain: float) -> bool:
    """Return whether a sound is audible: a quarter of its energy exceeds the other sound, in its band and frame."""
    own, other = own * 10 ** (own_gain / 10), other * 10 ** (other_gain / 10)
    weight = np.sqrt(own)
    return bool(weight[own > other].sum() > 0.25 * weight.sum())
