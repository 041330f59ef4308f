"""Everyday sounds synthesised from physically plausible random parameters.

Every function is `(rng: np.random.Generator, seconds: float) -> Sound`.

`seconds` is the longest that the sound may last. The models are the usual ones of sound design
(Farnell, *Designing Sound*, 2010): struck bodies are sums of damped modes, voices and horns are harmonics through
resonances, rain and fire are random grains over shaped noise.

Notebook: 01
"""

import numpy as np
from scipy.signal import lfilter

from refined_ldm.scenes.synthesis import (
    SAMPLE_RATE,
    Sound,
    crackle,
    held,
    log_uniform,
    noise,
    place,
    pulse,
    resonate,
    rhythm,
    strike,
    swell,
    times,
    tone,
)

# ---------------------------------------------------------------- weather and fire


def rain(rng: np.random.Generator, seconds: float) -> Sound:
    """Single near drops over the hiss of the distant ones; heavy rain is mostly hiss."""
    n, drops = len(times(seconds)), log_uniform(rng, 15, 600)
    hiss = noise(rng, n, rng.uniform(500, 1500), rng.uniform(5000, 8000), rng.uniform(-2, 2))
    hiss *= swell(rng, n, 2, 0.3)
    near = resonate(crackle(rng, n, drops, 0.9), log_uniform(rng, 1500, 4500), rng.uniform(500, 1500))
    share = 0.15 + 0.75 * np.log(drops / 15) / np.log(40)
    return Sound(share * hiss + (1 - share) * near / (near.std() + 1e-9), rate=drops)


def wind(rng: np.random.Generator, seconds: float) -> Sound:
    """Noise through three neighbouring resonances that gusts open in turn."""
    t = times(seconds)
    center, gusts = log_uniform(rng, 220, 900), rng.uniform(0.8, 2.5)
    gust = swell(rng, len(t), gusts, 0.9)
    total, sharp = 0.4 * noise(rng, len(t), 40, 250, -3) * gust, rng.uniform(0.5, 1.5)
    for k, at in enumerate((0.25, 0.55, 0.85)):
        band = center * rng.uniform(1.25, 1.5) ** k
        howl = noise(rng, len(t), 0.9 * band, 1.1 * band)
        total += sharp * howl * gust * np.exp(-(((gust - at) / 0.25) ** 2))
    return Sound(total)


def thunder(rng: np.random.Generator, seconds: float) -> Sound:
    """Rolling low rumble: overlapping claps arriving late and dull from along the bolt."""
    t = times(seconds * rng.uniform(0.8, 1))
    rumble = noise(rng, len(t), 30, log_uniform(rng, 90, 220), -3)
    grit = noise(rng, len(t), 60, log_uniform(rng, 300, 700), -6)
    roll = np.zeros(len(t))
    for _ in range(rng.integers(3, 8)):
        late = t - rng.uniform(0, 0.6) * t[-1]
        clap = pulse(np.maximum(0, late), rng.uniform(0.03, 0.2), rng.uniform(0.15, 0.6))
        roll += rng.uniform(0.3, 1) * np.where(late > 0, clap, 0)
    flutter = swell(rng, len(t), rng.uniform(8, 20), 0.8)
    return Sound((rumble + rng.uniform(0.1, 0.4) * grit * flutter) * roll * held(t, 0.05))


def fire(rng: np.random.Generator, seconds: float) -> Sound:
    """Crackling pops of very different sizes over a soft, fluttering roar."""
    n, pops = len(times(seconds)), log_uniform(rng, 8, 45)
    roar = noise(rng, n, 60, rng.uniform(200, 450), -3) * swell(rng, n, 9, 0.6)
    burst = np.exp(-np.arange(200) / rng.uniform(12, 40)) * rng.standard_normal(200)
    snaps = lfilter(burst, [1.0], crackle(rng, n, pops, 1.1))
    snaps = resonate(snaps, log_uniform(rng, 900, 3500), 1200)
    return Sound(rng.uniform(0.05, 0.25) * roar + snaps / (snaps.std() + 1e-9) * 0.8, rate=pops)


# ---------------------------------------------------------------- machines and signals


def siren(rng: np.random.Generator, seconds: float) -> Sound:
    """A wailing, yelping or two-tone siren."""
    t = times(seconds * rng.uniform(0.85, 1))
    low, rate = log_uniform(rng, 400, 800), None
    high, style = low * rng.uniform(1.6, 2.4), rng.choice(("wail", "yelp", "two-tone"))
    if style == "two-tone":
        rate, high = rng.uniform(1, 2.2), low * rng.uniform(1.25, 1.45)
        shape = ((t * rate + rng.random()) % 1 < 0.5).astype(float)
        shape = lfilter([0.01], [1, -0.99], shape)
    else:
        rate = rng.uniform(0.3, 0.7) if style == "wail" else rng.uniform(2, 4.5)
        cycle = (t * rate + rng.random()) % 1
        rise = rng.uniform(0.4, 0.7)
        shape = np.where(cycle < rise, cycle / rise, (1 - cycle) / (1 - rise))
    frequency = low * (high / low) ** shape
    colour = rng.uniform(0.3, 0.7) ** np.arange(8) * rng.uniform(0.4, 1, 8)
    return Sound(tone(frequency, colour) * held(t, 0.04), rate=rate)


def engine(rng: np.random.Generator, seconds: float) -> Sound:
    """Firing pulses of uneven cylinders through the exhaust's resonances."""
    t = times(seconds)
    firing = log_uniform(rng, 18, 110)
    frequency = firing * (1 + rng.uniform(0, 0.35) * np.sin(np.pi * t / t[-1] * rng.uniform(0.5, 2)) ** 2)
    frequency *= 1 + 0.04 * swell(rng, len(t), 12, 1)
    cycles = np.cumsum(frequency) / SAMPLE_RATE
    fires = np.flatnonzero(np.diff(np.floor(cycles))) + 1
    pulses = np.zeros(len(t))
    pulses[fires] = rng.uniform(0.5, 1, 4)[np.arange(len(fires)) % 4] * rng.uniform(0.85, 1, len(fires))
    puff = lfilter([1], [1, -0.9], pulses) * rng.standard_normal(len(t)) * rng.uniform(0.1, 0.4)
    total = 0
    for center, level in ((rng.uniform(70, 160), 1), (rng.uniform(250, 500), 0.5), (rng.uniform(700, 1800), 0.25)):
        total = total + level * resonate(pulses * 4 + puff, center, 0.4 * center) / (0.4 * center) * 200
    return Sound(total * held(t, 0.08), rate=firing)


def horn(rng: np.random.Generator, seconds: float) -> Sound:
    """A car horn: two notes a third apart, bright, honked a few times."""
    low, count_rate = log_uniform(rng, 300, 520), rng.uniform(1.2, 3)
    length = rng.uniform(0.45, 0.8) / count_rate
    onsets = rhythm(rng, seconds, count_rate, length, 1, 3)
    colour = np.arange(1, 24) ** -rng.uniform(0.3, 0.8) * rng.uniform(0.4, 1, 23)
    ratio, grains = rng.uniform(1.18, 1.27), []
    for _ in onsets:
        t = times(min(seconds, length * (rng.uniform(0.9, 1) if len(onsets) > 1 else rng.uniform(1, 2.5))))
        bend = low * (1 - 0.06 * np.exp(-t / 0.02))
        grains.append((tone(bend, colour) + tone(bend * ratio, colour[::-1].cumsum()[::-1] / 6)) * held(t, 0.015))
    return Sound(place(grains, onsets, seconds), len(onsets), low)


def alarm(rng: np.random.Generator, seconds: float) -> Sound:
    """Electronic beeps, square or pulse waves, in one or two pitches."""
    pitch, rate = log_uniform(rng, 700, 2600), log_uniform(rng, 2, 6)
    length = rng.uniform(0.5, 0.75) / rate
    onsets = rhythm(rng, seconds, rate, length, 4, 12)
    width = rng.uniform(0.2, 0.5)
    colour = np.sin(np.pi * width * np.arange(1, 9)) / np.arange(1, 9)  # of a pulse wave
    step, t = rng.choice((1, 1, 1.26, 1.5)), times(length)
    grains = [tone(np.full(len(t), pitch * step ** (i % 2)), colour) * held(t, 0.004) for i in range(len(onsets))]
    return Sound(place(grains, onsets, seconds), len(onsets), pitch, rate)


def whistle(rng: np.random.Generator, seconds: float) -> Sound:
    """A referee's whistle: two close high tones that the pea chops up."""
    pitch, rate = log_uniform(rng, 2100, 3600), rng.uniform(1.2, 3.2)
    length = rng.uniform(0.45, 0.8) / rate
    onsets, grains = rhythm(rng, seconds, rate, length, 1, 4), []
    for _ in onsets:
        t = times(length * rng.uniform(0.85, 1))
        trill = np.sin(2 * np.pi * rng.uniform(22, 45) * t + 6 * rng.random())
        frequency = pitch * (1 + rng.uniform(0.01, 0.03) * trill) * (1 - 0.08 * np.exp(-t / 0.03))
        blow = tone(frequency) + 0.6 * tone(frequency * rng.uniform(1.06, 1.12))
        breath = 0.15 * noise(rng, len(t), pitch * 0.8, pitch * 1.6)
        grains.append((blow * (1 + 0.7 * trill) + breath) * held(t, 0.02))
    return Sound(place(grains, onsets, seconds), len(onsets), pitch)


def clock(rng: np.random.Generator, seconds: float) -> Sound:
    """The dry tick and the slightly lower tock of a small mechanism."""
    rate, length = log_uniform(rng, 1.5, 5.5), 0.05
    onsets = np.arange(1 + int(max(0.0, seconds - length) * rate)) / rate
    high, body = log_uniform(rng, 2500, 5500), log_uniform(rng, 900, 1700)
    tock, ring = rng.uniform(0.75, 0.95), rng.uniform(0.003, 0.012)
    grains = []
    for i in range(len(onsets)):
        pitch = high * (tock if i % 2 else 1)
        tick = strike(rng, length, (pitch, pitch * 1.43, body), (ring, ring * 0.7, ring * 1.5), (1, 0.5, 0.5))
        echo = np.pad(tick, (int(rng.uniform(0.008, 0.012) * SAMPLE_RATE), 0))[: len(tick)]
        grains.append((tick + 0.4 * echo) * rng.uniform(0.9, 1))
    return Sound(place(grains, onsets, seconds), len(onsets), rate=rate)


def typing(rng: np.random.Generator, seconds: float) -> Sound:
    """Irregular key presses, each a plastic clack down and a lighter one up."""
    rate, n = log_uniform(rng, 4, 12), len(times(seconds))
    gaps = rng.gamma(3, 1 / (3 * rate), int(seconds * rate * 2) + 4)
    presses = np.cumsum(gaps) - gaps[0]
    presses = presses[presses < max(0.01, seconds - 0.15)]
    strikes = np.zeros(n)
    for onset in presses:
        level, up = rng.uniform(0.3, 1), onset + rng.uniform(0.05, 0.11)
        strikes[int(onset * SAMPLE_RATE)] += level
        strikes[min(n - 1, int(up * SAMPLE_RATE))] += 0.4 * level
    tail = np.arange(int(0.03 * SAMPLE_RATE)) / SAMPLE_RATE
    clack = rng.standard_normal(len(tail)) * np.exp(-tail / rng.uniform(0.002, 0.005))
    case = strike(rng, 0.03, rng.uniform((250, 600, 1500), (450, 1200, 3000)), (0.006, 0.004, 0.003), (1.5, 1, 0.8))
    return Sound(lfilter(clack + case, [1.0], strikes), rate=rate)


# ---------------------------------------------------------------- people, animals, things


def footsteps(rng: np.random.Generator, seconds: float) -> Sound:
    """Heel, then toe, on stone, wood or gravel."""
    rate, length = log_uniform(rng, 1.3, 3.2), 0.24
    onsets = rhythm(rng, seconds, rate, length, 2, 8, 0.08)
    floor, grains = rng.choice(("stone", "wood", "gravel")), []
    thump, click = rng.uniform(60, 110), rng.uniform(1200, 2600)
    for _ in onsets:
        t = times(length)
        step = np.zeros(len(t))
        for delay, level in ((0, 1), (rng.uniform(0.08, 0.13), 0.6)):  # heel, toe
            late = np.maximum(0, t - delay)
            low = noise(rng, len(t), thump, 2.5 * thump) * pulse(late, 0.003, 0.03)
            if floor == "stone":
                hard = noise(rng, len(t), click, 3 * click) * pulse(late, 0.001, 0.008)
            elif floor == "wood":
                hard = noise(rng, len(t), 100, 380) * pulse(late, 0.004, 0.03)
            else:
                hard = noise(rng, len(t), 1500, 7000) * pulse(late, 0.02, 0.04) * rng.gamma(0.3, 2, len(t))
            step += level * np.where(t >= delay, low + hard, 0)
        grains.append(step * rng.uniform(0.75, 1) * held(t, 0.001))
    return Sound(place(grains, onsets, seconds), len(onsets), rate=rate)


def knock(rng: np.random.Generator, seconds: float) -> Sound:
    """Knuckles on a wooden door."""
    rate, length = rng.uniform(3.5, 7), 0.12
    onsets = rhythm(rng, seconds, rate, length, 2, 6, 0.06)
    board = log_uniform(rng, 220, 560) * np.array((1, 1.58, 2.24, 2.92, 3.8)) * rng.uniform(0.93, 1.07, 5)
    ring, level = rng.uniform(0.012, 0.035), rng.uniform(0.3, 1, 5)
    grains = []
    for _ in onsets:
        tap = noise(rng, 200, 600, 3000) * np.exp(-np.arange(200) / 25)
        hit = strike(rng, length, board * rng.uniform(0.98, 1.02), ring / np.arange(1, 6) ** 0.4, level)
        hit[:200] += 0.4 * tap
        grains.append(hit * rng.uniform(0.7, 1))
    return Sound(place(grains, onsets, seconds), len(onsets), rate=rate)


def drip(rng: np.random.Generator, seconds: float) -> Sound:
    """Drops into water: each closes a bubble whose pitch rises as it shrinks (Minnaert)."""
    rate, length = log_uniform(rng, 1, 5), 0.2
    onsets = rhythm(rng, seconds, rate, length, 1, 7, 0.35)
    pitch, grains = log_uniform(rng, 500, 1600), []
    for _ in onsets:
        t, start = times(length), pitch * rng.uniform(0.8, 1.25)
        frequency = start * (1 + rng.uniform(4, 14) * t)
        bubble = tone(frequency) * pulse(t, 0.004, rng.uniform(0.015, 0.04))
        plip = tone(frequency * 2.3) * pulse(t, 0.001, 0.006)
        grains.append((bubble + 0.4 * plip) * rng.uniform(0.6, 1))
    return Sound(place(grains, onsets, seconds), len(onsets), rate=rate)


def glass(rng: np.random.Generator, seconds: float) -> Sound:
    """A crash, then shards that ring high and scatter."""
    length = min(seconds, rng.uniform(0.7, 1.6))
    t = times(length)
    total = (noise(rng, len(t), 1500, 7500, 2) * pulse(t, 0.002, rng.uniform(0.03, 0.09))).astype(np.float32)
    for onset in rng.exponential(0.22 * length, rng.integers(18, 45)):
        if onset < 0.85 * length:
            pitch, ring = log_uniform(rng, 2200, 7200), rng.uniform(0.01, 0.06)
            shard = strike(rng, min(0.25, length - onset), (pitch, pitch * 1.37), (ring, ring / 2), (1, 0.6))
            start = int(onset * SAMPLE_RATE)
            shard = shard[: len(total) - start]
            total[start : start + len(shard)] += rng.uniform(0.1, 0.9) * np.exp(-2 * onset / length) * shard
    return Sound(total * held(t, 0.002))


def heartbeat(rng: np.random.Generator, seconds: float) -> Sound:
    """Lub-dub: two soft thumps a beat, below 150 Hz."""
    rate, length = log_uniform(rng, 0.9, 2.6), 0.3
    gap, pitch = min(0.32, 0.35 / rate), rng.uniform(50, 95)
    beats = np.arange(1 + int(max(0.0, seconds - gap - 0.12) * rate)) / rate
    grains = []
    for _ in beats:
        t = times(length + gap)
        beat = np.zeros(len(t))
        for delay, level, scale in ((0, 1, 1), (gap, rng.uniform(0.5, 0.8), rng.uniform(1.1, 1.4))):
            late = np.maximum(0, t - delay)
            thump = tone(pitch * scale * (1 + np.exp(-late / 0.03)), (1, 0.6, 0.3, 0.1)) * pulse(late, 0.012, 0.035)
            beat += level * np.where(t >= delay, thump, 0)
        grains.append(beat * rng.uniform(0.9, 1))
    return Sound(place(grains, beats, seconds), len(beats), rate=rate)


def dog(rng: np.random.Generator, seconds: float) -> Sound:
    """Barks: a short rise and fall of a rough voice through an opening muzzle."""
    pitch, rate = log_uniform(rng, 180, 620), rng.uniform(1.5, 3.8)
    length = rng.uniform(0.12, 0.24) * (400 / pitch) ** 0.3
    onsets = rhythm(rng, seconds, rate, length + 0.05, 1, 5, 0.12)
    size, grains = (pitch / 400) ** 0.4, []
    mouth = (rng.uniform(650, 950) * size, rng.uniform(1500, 2200) * size)
    for _ in onsets:
        t = times(length * rng.uniform(0.85, 1.1))
        bend = 0.75 + 0.5 * np.sin(np.pi * (t / t[-1]) ** 0.7)
        voice = tone(pitch * rng.uniform(0.94, 1.06) * bend * (1 + 0.02 * rng.standard_normal(len(t))), np.ones(20))
        voice = voice / voice.std() + rng.uniform(0.3, 0.7) * noise(rng, len(t), 400, 5000)
        bark = resonate(voice, mouth[0], 250) + 0.7 * resonate(voice, mouth[1], 400) + 0.05 * voice
        grains.append(bark * np.sin(np.pi * (t / t[-1]) ** 0.45) ** 1.5 * rng.uniform(0.7, 1))
    return Sound(place(grains, onsets, seconds), len(onsets), pitch, rate)


def bird(rng: np.random.Generator, seconds: float) -> Sound:
    """A song of one syllable, a fast glide of a pure tone, repeated."""
    pitch, rate = log_uniform(rng, 2300, 5200), log_uniform(rng, 2.2, 8)
    length = rng.uniform(0.4, 0.75) / rate
    onsets = rhythm(rng, seconds, rate, length, 2, 9, 0.08)
    bend, wobble, depth = rng.uniform(-0.5, 0.5), rng.uniform(15, 60), rng.uniform(0, 0.12)
    arch, grains = rng.uniform(-0.35, 0.35), []
    for _ in onsets:
        t = times(length * rng.uniform(0.85, 1))
        x = t / t[-1]
        frequency = pitch * rng.uniform(0.95, 1.05) * (1 + bend * (x - 0.5) + arch * np.sin(np.pi * x))
        frequency = np.clip(frequency * (1 + depth * np.sin(2 * np.pi * wobble * t)), 800, 7400)
        grains.append(tone(frequency, (1, 0.15)) * np.sin(np.pi * x) ** 0.6 * rng.uniform(0.7, 1))
    return Sound(place(grains, onsets, seconds), len(onsets), pitch, rate)


def crickets(rng: np.random.Generator, seconds: float) -> Sound:
    """Several crickets: each chirps a few wing strokes of a nearly pure high tone, over and over."""
    t, total = times(seconds), 0
    rate = log_uniform(rng, 1.5, 5)
    for _ in range(rng.integers(2, 5)):
        carrier, strokes = rng.uniform(3900, 5200), rng.uniform(28, 60)
        chirp = ((t * rate * rng.uniform(0.9, 1.1) + rng.random()) % 1) < rng.uniform(0.35, 0.6)
        stroke = np.maximum(0, np.sin(2 * np.pi * strokes * t)) ** 1.5
        envelope = lfilter([0.02], [1, -0.98], chirp * stroke)
        total = total + rng.uniform(0.2, 1) * envelope * tone(np.full(len(t), carrier), (1,))
    return Sound(total + log_uniform(rng, 3e-4, 6e-3) * noise(rng, len(t), 1000, 7000), rate=rate)


def bell(rng: np.random.Generator, seconds: float) -> Sound:
    """A cast bell with its hum, prime, minor third, fifth and nominal (Rossing)."""
    pitch, rate = log_uniform(rng, 220, 1300), rng.uniform(0.9, 2.4)
    onsets = rhythm(rng, seconds, rate, min(0.5, 0.8 * seconds), 1, 4, 0.05)
    ratios = np.array((0.5, 1, 1.19, 1.5, 2, 2.51, 2.66, 3.01, 4.17, 5.43)) * rng.uniform(0.995, 1.005, 10)
    ring = rng.uniform(0.5, 1.6) * (500 / pitch) ** 0.3 / ratios**0.7
    levels, grains = rng.uniform(0.3, 1, 10) / ratios**0.3, []
    for onset in onsets:
        hit = levels * rng.uniform(0.8, 1.2, 10) * np.linspace(1, rng.uniform(0.4, 1.2), 10)
        grains.append(strike(rng, seconds - onset, pitch * ratios, ring, hit))
    return Sound(place(grains, onsets, seconds), len(onsets), pitch)


def explosion(rng: np.random.Generator, seconds: float) -> Sound:
    """A blast that starts at once over the whole spectrum, darkens, and rains debris."""
    t = times(min(seconds, rng.uniform(1.0, 2.4)))
    blast = noise(rng, len(t), 40, 7500, -1) * pulse(t, 0.002, rng.uniform(0.06, 0.16))
    body = noise(rng, len(t), 40, rng.uniform(500, 1200), -3) * pulse(t, 0.005, rng.uniform(0.2, 0.45))
    debris = resonate(crackle(rng, len(t), rng.uniform(60, 200), 0.8), rng.uniform(1200, 3000), 1200)
    debris *= pulse(t, 0.3, 0.4) / (debris.std() + 1e-9)
    return Sound((1.5 * blast + body + 0.12 * debris) * held(t, 0.002))
