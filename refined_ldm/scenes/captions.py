"""From events to English: captions that never say more than can be heard."""

import re

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
TIMES = ("", " once", " twice", " three times", " four times", " five times", " six times")


def write_captions(rng, kind: str, events: list[Event]) -> tuple[str, ...]:
    """Write three different captions of the events that are heard."""
    kind = kind if len(events) == 2 else "event"
    captions, contrast = [], min(event.gain for event in events)
    for i in rng.permutation(len(TEMPLATES[kind]))[:3]:
        order = events[::-1] if kind == "overlap" and rng.random() < 0.5 else events
        words = {}
        for letter, event in zip("ab", order, strict=False):
            words |= _clauses(rng, letter, event, kind, contrast)
        caption = TEMPLATES[kind][i].format(**words)
        caption = re.sub(r"\ba (?=[aeiou])", "an ", caption)
        captions.append(caption[0].upper() + caption[1:] if rng.random() < 0.5 else caption)
    return tuple(captions)


def _clauses(rng, letter: str, event: Event, kind: str, contrast: float) -> dict[str, str]:
    """Return the finite clause, its progressive and its -ing form, with as many details as chance adds."""
    sound = CLASSES[event.name]
    subject, verb, ing, rest = rng.choice(sound.phrases).split("|")
    detailed = rng.random() < 0.6
    adjective, manner = _details(rng, sound, event, kind, contrast) if detailed else ("", "")
    counted = detailed and rng.random() < 0.6 and event.count is not None and event.count < len(TIMES)
    noun = sound.noun
    if adjective in ("low", "high"):  # of the notes, not of the instrument
        noun, adjective = f"{adjective} {noun}", ""
    if "#" in rest:
        rest = rest.replace("#", _notes(rng, event.count, noun, counted))
    elif counted and noun is None:
        rest += TIMES[event.count]
    if adjective and "*" not in subject:
        adjective, manner = "", manner or (" in the distance" if adjective == "distant" else "")
    subject = subject.replace("*", adjective + " " if adjective else "")
    be = "is" if verb.endswith("s") else "are"
    return {
        letter: f"{subject} {verb}{rest}{manner}",
        letter + "_is": f"{subject} {be} {ing}{rest}{manner}",
        letter + "_ing": f"{subject} {ing}{rest}{manner}",
    }


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
        manners += [" softly", " quietly"] if event.gain < -6 else [" loudly"]
        manners += [" in the background"] * 2 * (kind == "overlap" and event.gain < -6)
    adjective, manner = rng.choice(adjectives), rng.choice(manners)
    return str(adjective), str("" if adjective == "distant" and "distance" in manner else manner)


def _notes(rng, count: int, noun: str, counted: bool) -> str:
    """Return "a note", "a single low note", "three high notes", "some notes" and the like."""
    if count == 1:
        return f"a single {noun}" if counted else f"a {noun}"
    return f"{NUMBERS[count]} {noun}s" if counted else str(rng.choice((f"{noun}s", f"some {noun}s")))
