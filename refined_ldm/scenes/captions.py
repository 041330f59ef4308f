"""English captions of events: a caption states only what is audible in the scene.

Notebook: 01
"""

import re
from dataclasses import dataclass, replace

import numpy as np

from refined_ldm.scenes.classes import CLASSES, Event, SoundClass

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


@dataclass(frozen=True)
class Clause:
    """One event as a caption describes it: a phrase of its class, and the details that are named."""

    name: str  # class
    phrase: str  # of the class's
    count: int | None  # times or notes that are audible
    counted: bool = False  # whether the caption names that number
    adjective: str = ""  # of pitch or distance
    manner: str = ""  # of pace, loudness or distance
    several: str = ""  # word before two or more notes that are not counted: "" or "some "

    def words(self) -> dict[str, str]:
        """Return the finite clause "", its progressive "_is" and its -ing form "_ing"."""
        subject, verb, ing, rest = self.phrase.split("|")
        noun, adjective, manner = CLASSES[self.name].noun, self.adjective, self.manner
        if adjective in ("low", "high"):  # describes the notes, not the instrument
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

    def details(self) -> dict[str, str | int]:
        """Return the details that the clause names: {"number": 2, "pitch": "low", "pace": " quickly", …}."""
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
        named, sound, others = self.details(), CLASSES[self.name], {}
        if "number" in named:
            others["number"] = [replace(self, count=n) for n in range(1, len(TIMES)) if n != self.count]
        if "pitch" in named:
            others["pitch"] = [replace(self, adjective=word) for word in sound.low_high if word != self.adjective]
        if "pace" in named:
            manners = [f" {word}" for word in sound.slow_fast]
            others["pace"] = [replace(self, manner=manner) for manner in manners if manner != self.manner]
        if "loudness" in named:
            manners = SOFTLY if self.manner == LOUDLY else (LOUDLY,)
            others["loudness"] = [replace(self, manner=manner) for manner in manners]
        return others


@dataclass(frozen=True)
class Caption:
    """A template and the clauses of its one or two events, in the order of the template's letters."""

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


def write_captions(rng: np.random.Generator, kind: str, events: list[Event], detailed: float = 0.6) -> list[Caption]:
    """Write three different captions of the audible events; `detailed` is the probability that details are named."""
    kind = kind if len(events) == 2 else "event"
    captions, contrast = [], min(event.gain for event in events)
    for i in rng.permutation(len(TEMPLATES[kind]))[:3]:
        order = events[::-1] if kind == "overlap" and rng.random() < 0.5 else events
        clauses = tuple(_clause(rng, event, kind, contrast, detailed) for event in order)
        captions.append(Caption(kind, TEMPLATES[kind][i], clauses, bool(rng.random() < 0.5)))
    return captions


def _clause(rng: np.random.Generator, event: Event, kind: str, contrast: float, detailed: float) -> Clause:
    """Draw a phrase of the class, and the details that the caption names."""
    sound = CLASSES[event.name]
    phrase = str(rng.choice(sound.phrases))
    detailed = rng.random() < detailed
    adjective, manner = _details(rng, sound, event, kind, contrast) if detailed else ("", "")
    counted = detailed and rng.random() < 0.6 and event.count is not None and event.count < len(TIMES)
    several = ""
    if "#" in phrase and not counted and event.count != 1:
        several = str(rng.choice(("", "some ")))
    return Clause(event.name, phrase, event.count, counted, adjective, manner, several)


def _details(rng: np.random.Generator, sound: SoundClass, event: Event, kind: str, contrast: float) -> tuple[str, str]:
    """Draw one true adjective and one true adverb; either may be empty."""
    adjectives, manners = [""], [""]
    if sound.low_high and not sound.pitches[0] <= event.pitch <= sound.pitches[1]:
        adjectives += [sound.low_high[event.pitch > sound.pitches[1]]] * 2
    several = event.count is None or event.count > 2
    if sound.slow_fast and several and not sound.rates[0] <= event.rate <= sound.rates[1]:
        manners += [" " + sound.slow_fast[event.rate > sound.rates[1]]] * 2
    if event.distant:
        adjectives += ["distant"]
        manners += [" in the distance"] * 2
    elif kind != "event" and contrast < -6:  # dB, a clearly audible difference
        manners += SOFTLY if event.gain < -6 else [LOUDLY]
        manners += [" in the background"] * 2 * (kind == "overlap" and event.gain < -6)
    adjective, manner = rng.choice(adjectives), rng.choice(manners)
    return str(adjective), str("" if adjective == "distant" and "distance" in manner else manner)
