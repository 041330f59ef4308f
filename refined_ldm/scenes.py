"""The embedded data set: captioned scenes of one or two sounds, rendered on the fly from a seed.

Every random choice is drawn from a hash of names (split, seed, index, class), never from an order, so a scene sounds
the same on any machine; a class added later changes only the scenes that choose it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
import torch
from scipy.signal import fftconvolve, lfilter
from torch.utils.data import Dataset

from refined_ldm import procedural, soundfont
from refined_ldm.synthesis import SAMPLE_RATE, Sound

RENDERING = 1  # raised by whoever changes what a seed sounds like or how it is captioned; a test sees to it
KINDS = ("event", "sequence", "overlap")
SPLIT_KINDS = {  # a pair needs two events, an order needs a sequence
    "train": KINDS, "val": KINDS, "test": KINDS, "test_pairs": ("sequence", "overlap"), "test_order": ("sequence",),
}  # fmt: skip


@dataclass(frozen=True)
class Event:
    """One sound of a scene; its caption never says more than stands here."""

    name: str
    onset: float  # s
    offset: float  # s, where it has faded 40 dB below its own peak
    pitch: float | None  # Hz, None for what has no pitch
    count: int | None  # times or notes, None for what cannot be counted
    gain: float  # dB, relative to the louder event of the scene
    rate: float | None  # times or drops a second
    distant: bool  # heard from afar: dull, faint and reverberant


@dataclass(frozen=True)
class SoundClass:
    """A kind of sound: how it is rendered and how English speaks of it."""

    render: Callable[[np.random.Generator, float], Sound]
    phrases: tuple[str, ...]  # "subject | finite verb | -ing form | rest"; a * takes an adjective, # the notes
    pitches: tuple[float, float] = (0, np.inf)  # Hz: below the first is low, above the second high
    low_high: tuple[str, str] | None = None  # adjectives for those
    rates: tuple[float, float] = (0, np.inf)
    slow_fast: tuple[str, str] | None = None  # adverbs for those
    noun: str | None = None  # what is counted, if it is not how many times


def _played(name: str, render, low: float, high: float, noun: str = "note") -> SoundClass:
    """Return the class of an instrument, whose notes are counted and high or low."""
    phrases = (f"a *{name}|plays|playing|", f"a *{name}|plays|playing| #", f"someone|plays|playing| # on a {name}")
    return SoundClass(render, phrases, (low, high), ("low", "high"), noun=noun)


CLASSES = {
    "alarm": SoundClass(procedural.alarm, ("a *alarm|beeps|beeping|", "a *electronic alarm|beeps|beeping|"),
                        (1100, 2000), ("low-pitched", "high-pitched"), (3, 5), ("slowly", "rapidly")),
    "bell": SoundClass(procedural.bell, ("a *bell|rings|ringing|", "a *bell|chimes|chiming|", "a *bell|tolls|tolling|"),
                       (400, 800), ("deep", "small")),
    "bird": SoundClass(procedural.bird, ("a *bird|chirps|chirping|", "a *bird|tweets|tweeting|"),
                       rates=(3, 5), slow_fast=("slowly", "rapidly")),
    "clock": SoundClass(procedural.clock, ("a *clock|ticks|ticking|", "a *watch|ticks|ticking|"),
                        rates=(2.2, 4), slow_fast=("slowly", "quickly")),
    "crickets": SoundClass(procedural.crickets, ("crickets|chirp|chirping|", "insects|chirp|chirping|"),
                           rates=(2.2, 3.7), slow_fast=("slowly", "rapidly")),
    "dog": SoundClass(procedural.dog, ("a *dog|barks|barking|", "a *dog|woofs|woofing|"),
                      (270, 420), ("big", "small")),
    "drip": SoundClass(procedural.drip, ("water|drips|dripping|", "a *tap|drips|dripping|"),
                       rates=(1.7, 3.2), slow_fast=("slowly", "quickly")),
    "engine": SoundClass(procedural.engine, ("a *engine|runs|running|", "a *motor|runs|running|"),
                         rates=(32, 65), slow_fast=("slowly", "at high speed")),
    "explosion": SoundClass(procedural.explosion, ("something|explodes|exploding|", "a *bomb|explodes|exploding|")),
    "fire": SoundClass(procedural.fire, ("a *fire|crackles|crackling|", "a *fire|burns|burning|")),
    "footsteps": SoundClass(procedural.footsteps,
                            ("someone|walks|walking|", "a person|walks|walking|", "someone|takes|taking| #"),
                            rates=(1.9, 2.7), slow_fast=("slowly", "quickly"), noun="step"),
    "glass": SoundClass(procedural.glass, ("glass|breaks|breaking|", "glass|shatters|shattering|")),
    "heartbeat": SoundClass(procedural.heartbeat, ("a heart|beats|beating|",),
                            rates=(1.3, 1.9), slow_fast=("slowly", "fast")),
    "horn": SoundClass(procedural.horn, ("a *car horn|honks|honking|", "a *car|honks|honking|")),
    "knock": SoundClass(procedural.knock, ("someone|knocks|knocking| on a door", "a person|knocks|knocking| on wood"),
                        rates=(4, 5.5), slow_fast=("slowly", "quickly")),
    "rain": SoundClass(procedural.rain, ("rain|falls|falling|", "raindrops|fall|falling|"),
                       rates=(50, 200), slow_fast=("lightly", "heavily")),
    "siren": SoundClass(procedural.siren, ("a *siren|wails|wailing|", "a *siren|sounds|sounding|")),
    "thunder": SoundClass(procedural.thunder, ("thunder|rumbles|rumbling|", "thunder|rolls|rolling|")),
    "typing": SoundClass(procedural.typing, ("someone|types|typing| on a keyboard", "a person|types|typing|"),
                         rates=(5.5, 9), slow_fast=("slowly", "quickly")),
    "whistle": SoundClass(procedural.whistle, ("a *whistle|blows|blowing|", "a *referee's whistle|blows|blowing|")),
    "wind": SoundClass(procedural.wind, ("wind|blows|blowing|", "the wind|howls|howling|")),
    "choir": SoundClass(soundfont.choir, ("a *choir|sings|singing|", "voices|sing|singing|"), noun="note"),
    "cymbal": SoundClass(soundfont.cymbal, ("a *cymbal|crashes|crashing|",)),
    "drums": SoundClass(soundfont.drums, ("someone|plays|playing| the drums", "drums|play|playing|")),
    "flute": _played("flute", soundfont.flute, 700, 1250),
    "guitar": SoundClass(soundfont.guitar, ("someone|strums|strumming| a guitar", "a *guitar|plays|playing| #",
                                            "someone|plays|playing| # on a guitar"), noun="chord"),
    "organ": _played("organ", soundfont.organ, 105, 165, "chord"),
    "piano": _played("piano", soundfont.piano, 190, 430),
    "telephone": SoundClass(soundfont.telephone, ("a *telephone|rings|ringing|", "a *phone|rings|ringing|")),
    "trumpet": _played("trumpet", soundfont.trumpet, 270, 460),
    "violin": _played("violin", soundfont.violin, 350, 850),
    "xylophone": _played("xylophone", soundfont.xylophone, 550, 1050),
}  # fmt: skip
FROM_FONT = {name for name, sound in CLASSES.items() if sound.render not in vars(procedural).values()}

TEMPLATES = {  # {a} a dog barks, {a_is} a dog is barking, {a_ing} a dog barking
    "event": ("{a}", "{a_is}", "{a_ing}", "the sound of {a_ing}"),
    "sequence": (
        "{a}, then {b}", "{a} and then {b}", "{b} after {a}", "{a} before {b}", "after {a}, {b}", "first {a}, then {b}",
        "{a} followed by {b_ing}", "{a_ing} followed by {b_ing}", "{a_ing} and then {b_ing}",
    ),
    "overlap": (
        "{a} while {b}", "{a} as {b}", "{a_is} while {b}", "{a_ing} while {b}", "{a_ing} and {b_ing} at the same time",
        "{a} with {b_ing}", "{a_ing} with {b_ing}",
    ),
}  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
SOFTLY, LOUDLY = (" softly", " quietly"), " loudly"
TIMES = ("", " once", " twice", " three times", " four times", " five times", " six times")


class SoundScenes(Dataset):
    """Captioned scenes of one event, of one after another, and of one over another.

    Items are dicts: `waveform` (N,) at 16 kHz with peak 0.5, `caption`, `captions` (three), `id`, `kind`, `events`
    (tuple of `Event`) and `labels` (the classes that the captions name).
    """

    def __init__(self, split="train", size=4000, seconds=2.56, seed=0, kinds=KINDS, sources="all"):
        if split not in SPLIT_KINDS:
            raise ValueError(f"split must be one of {', '.join(SPLIT_KINDS)}, got {split!r}")
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
        if sources not in ("all", "procedural"):
            raise ValueError(f'sources must be "all" or "procedural", got {sources!r}')
        if seconds < 1:
            raise ValueError(f"seconds must be at least 1, got {seconds}")
        self.kinds = tuple(kind for kind in KINDS if kind in kinds and kind in SPLIT_KINDS[split])
        if not self.kinds:
            raise ValueError(f"split {split!r} has scenes of kind {', '.join(SPLIT_KINDS[split])} only, got {kinds}")
        self.split, self.size, self.seconds, self.seed = split, size, float(seconds), seed
        if sources == "all":
            soundfont.find_soundfont()  # say at once if it is missing
        self.classes = tuple(sorted(name for name in CLASSES if sources == "all" or name not in FROM_FONT))
        held_out = split == "test_pairs"
        partners = {a: [b for b in self.classes if a != b and is_held_out(a, b) == held_out] for a in self.classes}
        self._partners = {a: others for a, others in partners.items() if others}

    def __len__(self) -> int:
        return self.size

    def fingerprint(self) -> str:
        """Name what the scenes are made of: the choices above, RENDERING, and the SoundFont."""
        choices = (RENDERING, self.split, self.size, self.seconds, self.seed, self.kinds, self.classes)
        made_of = blake2b(repr(choices).encode())
        if set(self.classes) & set(FROM_FONT):
            made_of.update(str(soundfont.find_soundfont().stat().st_size).encode())
        return made_of.hexdigest()[:32]

    def __getitem__(self, index: int) -> dict:
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
        waveform, events, heard = _mix(rng, kind, parts, self.seconds, swapped)
        told = [event for event, is_heard in zip(events, heard, strict=True) if is_heard]
        captions = tuple(map(str, _captions(_generator(identity, "captions"), kind, told)))
        return {
            "waveform": torch.from_numpy(waveform),
            "caption": captions[0],
            "captions": captions,
            "id": identity,
            "kind": kind,
            "events": tuple(events),
            "labels": tuple(event.name for event in told),
        }

    def _choose(self, scene: str, kind: str) -> tuple[str, ...]:
        """Choose classes by rendezvous hashing: the highest hash of scene and name wins, whoever else takes part."""

        def best(names, role):
            return max(names, key=lambda name: _hash(scene, role, name))

        if kind == "event":
            return (best(self.classes, "only"),)
        first = best(self._partners, "first")
        return first, best(self._partners[first], "second")

    def _render(self, scene: str, name: str, seconds: float) -> tuple[np.ndarray, Event]:
        """Render one event, trimmed to what is audible and of unit loudness."""
        rng = _generator(scene, name)
        sound = CLASSES[name].render(rng, seconds)
        waveform, distant = _acoustics(rng, sound.waveform, seconds)
        waveform = _trim(waveform)
        waveform = waveform / _loudness(waveform)
        event = Event(name, 0.0, len(waveform) / SAMPLE_RATE, sound.pitch, sound.count, 0.0, sound.rate, distant)
        return waveform, event


def is_held_out(a: str, b: str) -> bool:
    """Tell whether two classes, in either order, are a pair kept for `test_pairs` (one in seven)."""
    return _hash("pair", *sorted((a, b))) % 7 == 0


def _hash(*names: str) -> int:
    return int.from_bytes(blake2b("/".join(names).encode(), digest_size=8).digest(), "little")


def _generator(*names: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(_hash(*names)))


# ---------------------------------------------------------------- from rendered events to a scene


def _acoustics(rng, waveform: np.ndarray, seconds: float) -> tuple[np.ndarray, bool]:
    """Put a sound somewhere: a tone control, and in half the cases a room; one in eight is far away."""
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
    """Cut what is 40 dB below the loudest frame at both ends, and fade the cuts."""
    power = _frame_power(waveform)
    loud = np.flatnonzero(power > 1e-4 * power.max())
    start, end = max(0, loud[0] - 1) * 160, (loud[-1] + 1) * 160
    waveform = waveform[start:end].copy()
    waveform[:32] *= np.linspace(0, 1, 32)
    fade = min(320, len(waveform) // 4)
    waveform[-fade:] *= np.linspace(1, 0, fade)
    return waveform


def _loudness(waveform: np.ndarray) -> float:
    """Return the rms of the frames within 15 dB of the loudest, with the bass weighed down as the ear does."""
    power = _frame_power(lfilter([1, -0.85], [1.0], waveform) + 0.1 * waveform)
    return float(np.sqrt(power[power > 0.03 * power.max()].mean())) + 1e-9


def _mix(rng, kind: str, parts, seconds: float, swapped=False) -> tuple[np.ndarray, list[Event], list[bool]]:
    """Place the parts, set their levels so that each is heard, and normalise.

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
    heard = [True] * len(parts)
    if kind == "overlap":
        spectra = [_band_power(track) for track in tracks]
        for _ in range(4):  # bring up what is masked, 4 dB at a time
            heard = [_audible(spectra[i], gains[i], spectra[1 - i], gains[1 - i]) for i in (0, 1)]
            if sum(heard) != 1:
                break
            gains[heard.index(False)] += 4
    gains -= gains.max()
    total = (10 ** (gains / 20)) @ tracks
    total -= total.mean()
    total *= 0.5 / np.abs(total).max()
    events = [
        replace(event, onset=start / SAMPLE_RATE, offset=(start + length) / SAMPLE_RATE, gain=round(float(gain), 2))
        for (_, event), start, length, gain in zip(parts, starts, lengths, gains, strict=True)
    ]
    return total.astype(np.float32), events, heard


def _band_power(waveform: np.ndarray) -> np.ndarray:
    """Return the power in 32 ms frames and bands that widen with frequency, from 31 Hz -> (frames, bands)."""
    frames = waveform[: len(waveform) // 512 * 512].reshape(-1, 512) * np.hanning(512)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    edges = np.unique(np.geomspace(1, 256, 19).round().astype(int))
    return np.add.reduceat(power, edges[:-1], axis=1)


def _audible(own: np.ndarray, own_gain: float, other: np.ndarray, other_gain: float) -> bool:
    """Tell whether a sound is heard: a quarter of its energy stands clear of the other, in some band at some time."""
    own, other = own * 10 ** (own_gain / 10), other * 10 ** (other_gain / 10)
    weight = np.sqrt(own)
    return bool(weight[own > other].sum() > 0.25 * weight.sum())


# ---------------------------------------------------------------- from events to English


@dataclass(frozen=True)
class Clause:
    """What a caption says of one event: a phrase of its class, and the details that are named."""

    name: str  # class
    phrase: str  # of the class's
    count: int | None  # how often it is heard
    counted: bool = False  # is that number named
    adjective: str = ""  # of pitch or distance
    manner: str = ""  # of pace, loudness or distance
    several: str = ""  # what two notes or more are called where they are not counted

    def words(self) -> dict[str, str]:
        """Return the finite clause "", its progressive "_is" and its -ing form "_ing"."""
        subject, verb, ing, rest = self.phrase.split("|")
        noun, adjective, manner = CLASSES[self.name].noun, self.adjective, self.manner
        if adjective in ("low", "high"):  # of the notes, not of the instrument
            noun, adjective = f"{adjective} {noun}", ""
        if "#" in rest:
            rest = rest.replace("#", self._notes(noun))
        elif self.counted and noun is None:
            rest += TIMES[self.count]
        if adjective and "*" not in subject:
            adjective, manner = "", manner or (" in the distance" if adjective == "distant" else "")
        subject = subject.replace("*", adjective + " " if adjective else "")
        be = "is" if verb.endswith("s") else "are"
        return {
            "": f"{subject} {verb}{rest}{manner}",
            "_is": f"{subject} {be} {ing}{rest}{manner}",
            "_ing": f"{subject} {ing}{rest}{manner}",
        }

    def _notes(self, noun: str) -> str:
        """Return "a note", "a single low note", "three high notes", "some notes" and the like."""
        if self.count == 1:
            return f"a single {noun}" if self.counted else f"a {noun}"
        return f"{NUMBERS[self.count]} {noun}s" if self.counted else f"{self.several}{noun}s"

    def said(self) -> dict[str, str | int]:
        """Return the details that the words name: {"number": 2, "pitch": "low", "pace": " quickly", …}."""
        sound, rest = CLASSES[self.name], self.phrase.split("|")[3]
        pitched = sound.low_high and self.adjective in sound.low_high
        of_notes = self.adjective in ("low", "high")
        found = {
            "number": self.counted and ("#" in rest or sound.noun is None) and self.count,
            "pitch": pitched and ("#" in rest if of_notes else "*" in self.phrase) and self.adjective,
            "pace": sound.slow_fast and self.manner.strip() in sound.slow_fast and self.manner,
            "loudness": self.manner in (*SOFTLY, LOUDLY) and self.manner,
            "distance": "distan" in self.adjective + self.manner and "distant",
        }
        return {detail: word for detail, word in found.items() if word}

    def contrasts(self) -> dict[str, list["Clause"]]:
        """Return, for each detail that is named, the clauses that name another one: {"number": [Clause, …], …}."""
        said, sound, others = self.said(), CLASSES[self.name], {}
        if "number" in said:
            others["number"] = [replace(self, count=n) for n in range(1, len(TIMES)) if n != self.count]
        if "pitch" in said:
            others["pitch"] = [replace(self, adjective=word) for word in sound.low_high if word != self.adjective]
        if "pace" in said:
            manners = [f" {word}" for word in sound.slow_fast]
            others["pace"] = [replace(self, manner=manner) for manner in manners if manner != self.manner]
        if "loudness" in said:
            manners = SOFTLY if self.manner == LOUDLY else (LOUDLY,)
            others["loudness"] = [replace(self, manner=manner) for manner in manners]
        return others


@dataclass(frozen=True)
class Caption:
    """A template and what it says of one event or two, in the order of its letters."""

    kind: str  # of its template
    template: str
    clauses: tuple[Clause, ...]
    capital: bool = False  # the first letter

    def __str__(self) -> str:
        words = {letter + form: text for letter, clause in zip("ab", self.clauses, strict=False)
                 for form, text in clause.words().items()}  # fmt: skip
        text = re.sub(r"\ba (?=[aeiou])", "an ", self.template.format(**words))
        return text[0].upper() + text[1:] if self.capital else text

    def contrasts(self) -> dict[str, list["Caption"]]:
        """Return the captions that differ in one detail alone, by detail: number, pitch, pace, loudness or order."""
        others = {}
        for i, clause in enumerate(self.clauses):
            for detail, changed in clause.contrasts().items():
                others.setdefault(detail, []).extend(
                    replace(self, clauses=(*self.clauses[:i], other, *self.clauses[i + 1 :])) for other in changed
                )
        if self.kind == "sequence":
            others["order"] = [replace(self, clauses=self.clauses[::-1])]
        return others


def captions_of(item: dict, count: int | None = None, detailed: float = 0.6) -> list[Caption]:
    """Return the three captions of an item of `SoundScenes` (also from a cache), or `count` others, and their parts.

    detailed: how probably an event is described at all. The other captions are drawn from the item's id, as the three
    are, but may repeat one another.
    """
    events = [event if isinstance(event, Event) else Event(**event) for event in item["events"]]
    events = [event for event in events if event.name in item["labels"]]
    if count is None:
        return _captions(_generator(item["id"], "captions"), item["kind"], events, detailed)
    captions, draw = [], 0
    while len(captions) < count:
        captions += _captions(_generator(item["id"], "more captions", str(draw)), item["kind"], events, detailed)
        draw += 1
    return captions[:count]


def _captions(rng, kind: str, events: list[Event], detailed: float = 0.6) -> list[Caption]:
    """Write three different captions of the events that are heard."""
    kind = kind if len(events) == 2 else "event"
    captions, contrast = [], min(event.gain for event in events)
    for i in rng.permutation(len(TEMPLATES[kind]))[:3]:
        order = events[::-1] if kind == "overlap" and rng.random() < 0.5 else events
        clauses = tuple(_clause(rng, event, kind, contrast, detailed) for event in order)
        captions.append(Caption(kind, TEMPLATES[kind][i], clauses, bool(rng.random() < 0.5)))
    return captions


def _clause(rng, event: Event, kind: str, contrast: float, detailed: float) -> Clause:
    """Choose a phrase, and as many details as chance adds."""
    sound = CLASSES[event.name]
    phrase = str(rng.choice(sound.phrases))
    detailed = rng.random() < detailed
    adjective, manner = _details(rng, sound, event, kind, contrast) if detailed else ("", "")
    counted = detailed and rng.random() < 0.6 and event.count is not None and event.count < len(TIMES)
    several = ""
    if "#" in phrase and not counted and event.count != 1:
        several = str(rng.choice(("", "some ")))
    return Clause(event.name, phrase, event.count, counted, adjective, manner, several)


def _details(rng, sound: SoundClass, event: Event, kind: str, contrast: float) -> tuple[str, str]:
    """Choose one true adjective and one true adverb, either may be empty."""
    adjectives, manners = [""], [""]
    if sound.low_high and not sound.pitches[0] <= event.pitch <= sound.pitches[1]:
        adjectives += [sound.low_high[event.pitch > sound.pitches[1]]] * 2
    several = event.count is None or event.count > 2
    if sound.slow_fast and several and not sound.rates[0] <= event.rate <= sound.rates[1]:
        manners += [" " + sound.slow_fast[event.rate > sound.rates[1]]] * 2
    if event.distant:
        adjectives += ["distant"]
        manners += [" in the distance"] * 2
    elif kind != "event" and contrast < -6:  # dB, a difference that is plainly heard
        manners += SOFTLY if event.gain < -6 else [LOUDLY]
        manners += [" in the background"] * 2 * (kind == "overlap" and event.gain < -6)
    adjective, manner = rng.choice(adjectives), rng.choice(manners)
    return str(adjective), str("" if adjective == "distant" and "distance" in manner else manner)

