"""A SoundFont 2 player in numpy, and the sounds of the data set that are played on it.

The format is public ("SoundFont Technical Specification 2.04", E-mu, 2006). Supported: presets, instruments, zones,
sample loops, tuning, volume envelope, attenuation and the filter's open state. Ignored: pan, LFOs and modulators.

Notebook: 01
"""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq
from scipy.signal import lfilter

from refined_ldm.scenes.synthesis import SAMPLE_RATE, Sound, log_uniform, place, rhythm

PAD = 256  # source samples of silence before and of loop after a sample, so that the band limit has no edges
OVERSAMPLING = 4  # of the source, so that linear interpolation is enough
GENERATOR = {  # the supported generators: number -> (name, default)
    2: ("start_loop", 0), 3: ("end_loop", 0), 8: ("filter", 13_500), 11: ("filter_sweep", 0),
    33: ("delay", -12_000), 34: ("attack", -12_000), 35: ("hold", -12_000), 36: ("decay", -12_000),
    37: ("sustain", 0), 38: ("release", -12_000), 43: ("keys", 127 << 8), 44: ("velocities", 127 << 8),
    48: ("attenuation", 0), 51: ("coarse", 0), 52: ("fine", 0), 53: ("sample", -1), 54: ("loops", 0),
    56: ("scale", 100), 58: ("root", -1),
}  # fmt: skip
GENERATOR_ITEM = np.dtype([("number", "<u2"), ("amount", "<i2")])
INSTRUMENT = 41  # generator of a preset zone that names its instrument
PRESET = np.dtype([("name", "S20"), ("program", "<u2"), ("bank", "<u2"), ("bag", "<u2"), ("unused", "<u4", 3)])
SAMPLE = np.dtype(
    [("name", "S20"), ("start", "<u4"), ("end", "<u4"), ("start_loop", "<u4"), ("end_loop", "<u4"), ("rate", "<u4"),
     ("root", "u1"), ("correction", "i1"), ("link", "<u2"), ("type", "<u2")]
)  # fmt: skip


def find_soundfont() -> Path:
    """Return the General MIDI SoundFont that the `pretty_midi` wheel carries, without importing it."""
    spec = importlib.util.find_spec("pretty_midi")
    path = Path(spec.origin).parent / "TimGM6mb.sf2" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            "no SoundFont: instruments need TimGM6mb.sf2 from the pretty_midi package (`pip install pretty_midi`), "
            'or use SoundScenes(sources="procedural"), which needs none'
        )
    return path


def seconds_of(timecents: int) -> float:
    """Return 2^(timecents / 1200), with the format's least value as zero."""
    return 0.0 if timecents <= -12_000 else 2.0 ** (timecents / 1200)


class SoundFont:
    """Notes of a SoundFont: `SoundFont(path).note(program, key, seconds)` -> (N,) float32 at 16 kHz."""

    def __init__(self, path: str | Path):
        data = Path(path).read_bytes()
        if data[:4] != b"RIFF" or data[8:12] != b"sfbk":
            raise ValueError(f"{path} is not a SoundFont 2 file: it starts with {data[:12]!r}, expected RIFF....sfbk")
        self._chunks = dict(_chunks(data, 12, len(data)))
        self._pcm = self._table("smpl", np.dtype("<i2"))
        self._samples = self._table("shdr", SAMPLE)
        self._bands: dict[tuple, tuple] = {}  # band-limited samples, made when first played
        self._presets = {}
        instruments = self._instruments()
        headers, bags = self._table("phdr", PRESET), self._table("pbag", "<u2,<u2")
        generators = self._table("pgen", GENERATOR_ITEM)
        for header, following in zip(headers, headers[1:], strict=False):
            zones = []
            for bag in range(header["bag"], following["bag"]):
                fields = dict(generators[bags[bag][0] : bags[bag + 1][0]].tolist())
                zones += instruments[fields[INSTRUMENT]] if INSTRUMENT in fields else []
            self._presets[int(header["bank"]), int(header["program"])] = zones

    def note(
        self, program: int, key: float, seconds: float, velocity: int = 100, bank: int = 0, vibrato: float = 0.0
    ) -> np.ndarray:
        """Play `key` (MIDI number, fractions allowed) held for `seconds`, and its release -> (N,) float32 at 16 kHz.

        `vibrato` is its depth in cents, at 5.5 Hz, growing over the first 0.3 s.
        """
        if (bank, program) not in self._presets:
            raise ValueError(f"this SoundFont has no program {program} in bank {bank}")
        layers = [
            self._play(zone, key, seconds, velocity, vibrato)
            for zone in self._presets[bank, program]
            if _inside(zone["keys"], round(key)) and _inside(zone["velocities"], velocity)
        ]
        total = np.zeros(max(map(len, layers), default=round(seconds * SAMPLE_RATE)), np.float32)
        for layer in layers:
            total[: len(layer)] += layer
        return total

    def _table(self, name: str, dtype) -> np.ndarray:
        return np.frombuffer(self._chunks[name], dtype)

    def _instruments(self) -> list[list[dict]]:
        """Return the zones of every instrument; a zone is a dict of the supported generators."""
        headers, bags = self._table("inst", np.dtype([("name", "S20"), ("bag", "<u2")])), self._table("ibag", "<u2,<u2")
        generators = self._table("igen", GENERATOR_ITEM)
        defaults = dict(GENERATOR.values())
        instruments = []
        for first, following in zip(headers["bag"], headers["bag"][1:], strict=False):
            zones, shared = [], {}
            for bag in range(first, following):
                fields = generators[bags[bag][0] : bags[bag + 1][0]].tolist()
                fields = {GENERATOR[number][0]: amount for number, amount in fields if number in GENERATOR}
                if "sample" in fields:
                    zones.append({**defaults, **shared, **fields})
                elif not zones:
                    shared = fields  # a first zone without a sample holds for all
            instruments.append(zones)
        return instruments

    def _band(self, zone: dict, step: float) -> tuple[np.ndarray, float, float]:
        """Return a sample, oversampled and low-passed against aliasing at this step, and its loop (start, length)."""
        third = max(0, int(np.ceil(3 * np.log2(step))))  # third-octaves by which the source band must shrink
        key = (zone["sample"], zone["start_loop"], zone["end_loop"], zone["loops"], third)
        if key not in self._bands:
            info = self._samples[zone["sample"]]
            start = int(info["start"])
            wave = self._pcm[start : int(info["end"])].astype(np.float32) / 32_768
            first = int(info["start_loop"]) - start + zone["start_loop"]
            last = int(info["end_loop"]) - start + zone["end_loop"]
            length = last - first if zone["loops"] & 1 and last - first > 1 else 0
            if length:  # play the attack, then at least one whole loop more, and take the loop from there
                loop = wave[first:last]
                wave = np.concatenate([wave[:last], np.resize(loop, length + 2 * PAD)])
                first = last + PAD
            padded = np.pad(wave, PAD)
            n = next_fast_len(len(padded), real=True)
            spectrum = rfft(padded, n)
            cutoff = 0.5 * 2 ** (-third / 3)
            spectrum *= np.clip((cutoff - rfftfreq(n)) / (0.08 * cutoff), 0, 1)
            wave = irfft(spectrum, n * OVERSAMPLING) * OVERSAMPLING
            end = (PAD + len(wave) // OVERSAMPLING) if not length else PAD + first + length + 1
            self._bands[key] = wave[PAD * OVERSAMPLING : end * OVERSAMPLING].astype(np.float32), first, length
        return self._bands[key]

    def _play(self, zone: dict, key: float, seconds: float, velocity: int, vibrato: float) -> np.ndarray:
        info = self._samples[zone["sample"]]
        root = zone["root"] if zone["root"] >= 0 else int(info["root"])
        cents = (key - root) * zone["scale"] + 100 * zone["coarse"] + zone["fine"] + int(info["correction"])
        step = 2 ** (cents / 1200) * float(info["rate"]) / SAMPLE_RATE  # source samples per output sample
        wave, first, length = self._band(zone, step)

        release = min(1.5, max(0.01, seconds_of(zone["release"])))
        n = int((seconds + release) * SAMPLE_RATE)
        if not length:
            n = min(n, int((len(wave) / OVERSAMPLING - 1) / step))
        position = np.arange(n) * step
        if vibrato:
            t = np.arange(n) / SAMPLE_RATE
            bend = vibrato / 1200 * np.minimum(1, t / 0.3) * np.sin(2 * np.pi * 5.5 * t)  # octaves
            position = step * np.cumsum(2**bend)
        if length:
            position = np.where(position < first, position, first + (position - first) % length)
        position *= OVERSAMPLING
        i = position.astype(np.int64)
        played = wave[i] + (position - i).astype(np.float32) * (wave[np.minimum(i + 1, len(wave) - 1)] - wave[i])

        open_filter = 8.176 * 2 ** ((zone["filter"] + max(0, zone["filter_sweep"])) / 1200)  # Hz
        if open_filter < 6000:
            pole = np.exp(-2 * np.pi * open_filter / SAMPLE_RATE)
            played = lfilter([(1 - pole) ** 2], [1, -2 * pole, pole**2], played)
        decibels = -zone["attenuation"] / 25 + 40 * np.log10(velocity / 127)  # 0.4 of the file's 0.1 dB, as players do
        return (10 ** (decibels / 20) * played * _envelope(zone, n, seconds, release)).astype(np.float32)


def _chunks(data: bytes, position: int, end: int):
    """Yield (name, contents) of every RIFF chunk, going into lists."""
    while position < end:
        name, size = data[position : position + 4].decode(), int.from_bytes(data[position + 4 : position + 8], "little")
        start = position + 8
        if name == "LIST":
            yield from _chunks(data, start + 4, start + size)
        else:
            yield name, memoryview(data)[start : start + size]
        position = start + size + size % 2


def _inside(limits: int, value: int) -> bool:
    """Return whether a value lies in a range that is stored as two bytes, lowest first."""
    return (limits & 255) <= value <= (limits >> 8 & 255)


def _envelope(zone: dict, n: int, seconds: float, release: float) -> np.ndarray:
    """Return the volume envelope (n,): delay, attack, hold, decay to sustain in dB, release from `seconds` on."""
    t = np.arange(n, dtype=np.float32) / SAMPLE_RATE
    attack, decay = max(0.002, seconds_of(zone["attack"])), max(0.001, seconds_of(zone["decay"]))
    late = t - seconds_of(zone["delay"])
    decaying = late - attack - seconds_of(zone["hold"])
    decibels = -np.minimum(np.maximum(decaying, 0) * (100 / decay), zone["sustain"] / 10)
    decibels -= np.maximum(t - seconds, 0) * (100 / release)
    return np.clip(late / attack, 0, 1) * 10 ** (decibels / 20)


@lru_cache(maxsize=1)
def soundfont() -> SoundFont:
    """Return the bundled SoundFont, read once per process."""
    return SoundFont(find_soundfont())


# ---------------------------------------------------------------- the sounds played on it


@dataclass(frozen=True)
class Instrument:
    """A player of one to six notes or chords: `instrument(rng, seconds) -> Sound`."""

    programs: tuple[int, ...]
    lowest: int  # MIDI keys
    highest: int
    rates: tuple[float, float] = (1.2, 5)  # notes a second
    least: int = 1  # notes, where they fit
    chord: tuple[int, ...] = (0,)  # keys above the lowest, struck together
    strum: float = 0.0  # s between the notes of a chord
    ring: float = 1.0  # how long a note is held, in parts of the time to the next one
    vibrato: float = 0.0  # cents

    def __call__(self, rng: np.random.Generator, seconds: float) -> Sound:
        rate = log_uniform(rng, *self.rates)
        onsets = rhythm(rng, seconds, rate, min(0.25, seconds / 2), self.least, 6, 0.05)
        program, center = int(rng.choice(self.programs)), rng.uniform(self.lowest, self.highest)
        steps = rng.choice((0, 2, 4, 5, 7, -3, -5), len(onsets))
        steps[0] = 0
        keys = np.clip(center + steps, self.lowest - 2, self.highest + 2)
        if len(onsets) == 1:
            lengths = [seconds * rng.uniform(0.4, 0.9)]
        else:
            lengths = np.append(np.diff(onsets), min(seconds - onsets[-1], rng.uniform(1, 2) / rate)) * self.ring
        velocity, vibrato = int(rng.integers(70, 127)), self.vibrato * rng.uniform(0.6, 1.2)
        strum, grains, starts = self.strum * rng.uniform(0.5, 1.5), [], []
        for onset, key, length in zip(onsets, keys, lengths, strict=True):
            for i, above in enumerate(self.chord):
                grains.append(soundfont().note(program, key + above, length, velocity, vibrato=vibrato))
                starts.append(min(onset + i * strum, seconds - 0.01))
        pitch = float(440 * 2 ** ((np.mean(keys) - 69) / 12))
        return Sound(place(grains, np.array(starts), seconds), len(onsets), pitch, rate)


piano = Instrument((0, 1, 2, 3), 45, 82, rates=(1.5, 4.5), least=2)
guitar = Instrument((24, 25), 40, 58, rates=(1.2, 3.5), chord=(0, 7, 12, 16, 19), strum=0.02, ring=1.2)
violin = Instrument((40, 110), 58, 88, rates=(1, 3), ring=1.05, vibrato=45)
flute = Instrument((73,), 72, 94, rates=(1.5, 5), ring=0.9, vibrato=12)
trumpet = Instrument((56,), 57, 78, rates=(1.5, 5), ring=0.8, vibrato=8)
organ = Instrument((19, 18), 38, 62, rates=(0.8, 2.2), chord=(0, 7, 12, 24))
xylophone = Instrument((13,), 65, 94, rates=(3, 9), least=3)
choir = Instrument((52,), 46, 74, rates=(0.8, 2.5))


def drums(rng: np.random.Generator, seconds: float) -> Sound:
    """A beat of bass drum, snare, hats and a few toms on one of six kits."""
    kit, rate = int(rng.choice((0, 8, 16, 24, 32, 40))), log_uniform(rng, 4, 9)  # eighths a second
    onsets, grains = np.arange(max(1, int((seconds - 0.1) * rate))) / rate, []
    for i in range(len(onsets)):
        bass, hat, snare = 36, 42, 38
        drum = (bass, hat, snare, hat)[i % 4] if rng.random() < 0.8 else int(rng.choice((bass, snare, 41, 45, 48)))
        grains.append(soundfont().note(kit, drum, 0.3, int(rng.integers(85, 127)), bank=128))
    return Sound(place(grains, onsets, seconds), rate=rate)


def cymbal(rng: np.random.Generator, seconds: float) -> Sound:
    """Crashes of a cymbal."""
    rate = rng.uniform(1, 3)
    onsets = rhythm(rng, seconds, rate, 0.4, 1, 3, 0.05)
    kit, key = int(rng.choice((0, 16, 24))), int(rng.choice((49, 57, 55, 52)))
    grains = [soundfont().note(kit, key, 1.8, int(rng.integers(90, 127)), bank=128) for _ in onsets]
    return Sound(place(grains, onsets, seconds), len(onsets), rate=rate)


def telephone(rng: np.random.Generator, seconds: float) -> Sound:
    """An old telephone: its clapper strikes the bell some twenty times a second, in bursts."""
    length = min(rng.uniform(0.35, 1.0), 0.9 * seconds)
    rate = 1 / (length * rng.uniform(1.25, 1.7))
    onsets = rhythm(rng, seconds, rate, length, 1, 3)
    key, clapper = rng.uniform(70, 84), rng.uniform(14, 26)  # strikes a second
    hit = soundfont().note(124, key, 0.3)
    strikes = np.concatenate([onset + np.arange(0, length, 1 / clapper) for onset in onsets])
    grains = [hit * rng.uniform(0.75, 1) for _ in strikes]
    return Sound(place(grains, strikes, seconds), len(onsets), rate=rate)
