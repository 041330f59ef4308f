"""The 32 sound classes: how each is rendered, and the phrases that describe it.

Notebook: 01
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refined_ldm.scenes import procedural, soundfont
from refined_ldm.scenes.synthesis import Sound


@dataclass(frozen=True)
class Event:
    """One sound of a scene, with every property that a caption may state."""

    name: str
    onset: float  # s
    offset: float  # s, the time at which it has faded to 40 dB below its own peak
    pitch: float | None  # Hz, None for an unpitched sound
    count: int | None  # times or notes, None for a sound that cannot be counted
    gain: float  # dB, relative to the louder event of the scene
    rate: float | None  # times or drops a second
    distant: bool  # far away: low-passed, quiet and reverberant


@dataclass(frozen=True)
class SoundClass:
    """One sound class: how it is rendered, and the phrases that describe it."""

    render: Callable[[np.random.Generator, float], Sound]
    phrases: tuple[str, ...]  # "subject | finite verb | -ing form | rest"; a * takes an adjective, # the notes
    pitches: tuple[float, float] = (0, np.inf)  # Hz: below the first is low, above the second high
    low_high: tuple[str, str] | None = None  # adjectives for those
    rates: tuple[float, float] = (0, np.inf)
    slow_fast: tuple[str, str] | None = None  # adverbs for those
    noun: str | None = None  # the noun that is counted ("note"), None where repetitions are counted


def _played(name: str, render: Callable, low: float, high: float, noun: str = "note") -> SoundClass:
    """Return the class of an instrument; captions count its notes and call them low or high."""
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
