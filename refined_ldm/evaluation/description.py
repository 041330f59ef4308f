"""Describe a sound without a caption by the detail classifier: classes, number, pitch, pace and time of its events.

The classifier knows the 32 classes of `SoundScenes` and scenes of 2.56 s; of other sounds it names the nearest classes.
"""

from dataclasses import dataclass

import torch

from refined_ldm.audio import normalize, pad_or_trim
from refined_ldm.evaluation.detail_classifier import CLASS_NAMES, DetailClassifier
from refined_ldm.evaluation.details import SILENT
from refined_ldm.scenes.classes import CLASSES

SECONDS = 2.56  # of the scenes that the classifier learned from; longer sounds are cut into such pieces
UNCOUNTED = {"crickets", "drums", "engine", "explosion", "fire", "glass", "rain", "siren", "thunder", "typing", "wind"}


@dataclass(frozen=True)
class DescribedSound:
    """One class in one piece of a sound, as the classifier describes it; "" where the class has no such detail."""

    second: float  # at which it begins
    name: str  # of the class
    probability: float
    number: str  # "1" to "7 or more"
    pitch: str  # one of the words that captions of the class use
    pace: str
    distant: bool


@torch.no_grad()
def describe(classifier: DetailClassifier, waveform: torch.Tensor) -> list[DescribedSound]:
    """Waveform (N,) at 16 kHz -> the classes more likely in it than not, in the order in which they begin.

    Raises ValueError for a waveform of another shape, an empty or a silent one.
    """
    if waveform.ndim != 1 or not len(waveform):
        raise ValueError(f"waveform must be (N,) with N >= 1, got {tuple(waveform.shape)}")
    if waveform.abs().max() < SILENT:
        raise ValueError("the sound is silent: there is nothing to describe")
    rate, found = classifier.mel.config.sample_rate, []
    samples = round(SECONDS * rate)
    for k, piece in enumerate(normalize(waveform).split(samples)):
        if piece.abs().max() < SILENT:
            continue
        mel = classifier.mel(pad_or_trim(piece, samples)[None])
        queries = torch.arange(len(CLASS_NAMES))
        logits, answers = classifier(mel, torch.zeros_like(queries), queries)
        for q in (logits[0] > 0).nonzero()[:, 0].tolist():
            onset = min(max(float(answers["onset"][q]), 0), SECONDS)
            of_class = {answer: value[q] for answer, value in answers.items()}
            found.append(_described(CLASS_NAMES[q], k * SECONDS + onset, float(logits[0, q].sigmoid()), of_class))
    return sorted(found, key=lambda one: one.second)


def _described(name: str, second: float, probability: float, answers: dict[str, torch.Tensor]) -> DescribedSound:
    sound, number = CLASSES[name], int(answers["count"].argmax()) + 1
    pitch, pace = (
        (words[0], "between", words[1])[int(answers[detail].argmax())] if words else ""
        for detail, words in (("pitch", sound.low_high), ("pace", sound.slow_fast))
    )
    counted = "" if name in UNCOUNTED else f"{number} or more" if number == len(answers["count"]) else str(number)
    return DescribedSound(second, name, probability, counted, pitch, pace, float(answers["distant"]) > 0)
