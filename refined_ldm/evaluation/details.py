"""Are the details of a caption right in the sound? Captions that name details, and a classifier's answers.

The share of right answers on rendered clips is the upper bound of every table; chance is what the generated clips score
when they are compared with other captions.

Notebook: 05
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from refined_ldm.evaluation.detail_classifier import CLASS_NAMES, DetailClassifier
from refined_ldm.evaluation.metrics import share
from refined_ldm.scenes.captions import LOUDLY, Caption
from refined_ldm.scenes.classes import CLASSES
from refined_ldm.scenes.dataset import SoundScenes, captions_of

if TYPE_CHECKING:
    from refined_ldm.clap import Clap
    from refined_ldm.text_to_audio import RefinedAudioLDM

DETAILS = ("number", "pitch", "pace", "loudness", "distance", "order")
DETAILS_OF_KIND = {("event",): ("number", "pitch", "pace", "distance"), ("sequence",): ("loudness", "order")}
SOFT = -3.0  # dB below the other sound, halfway between captions that say loudly and those that say softly
SILENT = 0.01  # of full scale: sounds with a lower peak, 34 dB below that of a rendered clip, count as silent


@dataclass(frozen=True)
class CaptionedScene:
    """A rendered scene and one of its captions."""

    item: dict  # of SoundScenes
    caption: Caption


def select_scenes(count: int = 200, split: str = "test", seed: int = 5, seconds: float = 2.56) -> list[CaptionedScene]:
    """Select scenes whose captions name each detail `count` times, as far as 8 * `count` scenes of a kind do.

    Number, pitch, pace and distance come from scenes of one event, loudness and order from sequences. Of a scene's own
    three captions and three with more details, the one that names most of the missing details is taken.
    """
    missing, selected = dict.fromkeys(DETAILS, count), []
    for kinds, details in DETAILS_OF_KIND.items():
        scenes = SoundScenes(split, 8 * count, seconds, seed, kinds)
        for index in range(len(scenes)):
            still = {detail for detail in details if missing[detail] > 0}
            if not still:
                break
            item = scenes[index]
            captions = captions_of(item) + captions_of(item, 3, detailed=1.0)
            best = max(captions, key=lambda caption: len(named_details(caption).keys() & still))
            if named_details(best).keys() & still:
                selected.append(CaptionedScene(item, best))
                for detail in named_details(best):
                    missing[detail] -= 1
    return selected


def named_details(caption: Caption) -> dict[str, list[tuple[str, int]]]:
    """The details that a caption names: {detail: [(class, value), …]}.

    number: how many; pitch and pace: 0 low or slow, 1 high or fast; loudness: 0 soft, 1 loud; distance: 1 far; order:
    the position of the class.
    """
    named = {}
    for position, clause in enumerate(caption.clauses):
        sound = CLASSES[clause.name]
        for detail, word in clause.details().items():
            value = {
                "number": lambda word: word, "pitch": lambda word: sound.low_high.index(word),  # noqa: B023
                "pace": lambda word: sound.slow_fast.index(word.strip()),  # noqa: B023
                "loudness": lambda word: int(word == LOUDLY), "distance": lambda word: 1,
            }[detail](word)  # fmt: skip
            named.setdefault(detail, []).append((clause.name, value))
        if caption.kind == "sequence":
            named.setdefault("order", []).append((clause.name, position))
    return named


def _value(detail: str, answers: dict[str, torch.Tensor]) -> int:
    """The answer for one class in one sound, in the terms of `named_details`; the likelier of two words."""
    if detail == "number":
        return int(answers["count"].argmax()) + 1
    if detail in ("pitch", "pace"):
        return int(answers[detail][2] > answers[detail][0])
    if detail == "loudness":
        return int(answers["gain"] * 10 > SOFT)
    return int(answers["distant"] > 0)


@dataclass(frozen=True)
class DetailAnswers:
    """The classifier's answers for n sounds, each with one caption."""

    captions: list[Caption]
    logits: np.ndarray  # (n, K) of the classes
    by_class: list[dict[str, dict[str, int]]]  # n times {class that the caption names: {detail: value}}
    silent: np.ndarray  # (n,)

    def correct(self, chance: bool = False) -> dict[str, np.ndarray]:
        """1 or 0 for each caption, by question: "class", "nothing else" and each detail, whose captions name it.

        "number up to three" is "number" for the captions that count no further.

        A silent sound is wrong in every detail. chance: each answer is compared with the caption half the list further
        on that names the same detail; where all captions name the same value (distance), with captions that do not.
        """
        n, found = len(self.captions), {}
        names = [{clause.name for clause in caption.clauses} for caption in self.captions]
        shift = n // 2 if chance else 0
        classes, no_others = [], []
        for i, logits in enumerate(self.logits):
            captioned = names[(i + shift) % n]
            likeliest = {CLASS_NAMES[k] for k in np.argsort(-logits, kind="stable")[: len(captioned)]}
            others = [x for x, name in zip(logits, CLASS_NAMES, strict=True) if name not in captioned]
            classes.append(likeliest == captioned and not self.silent[i])
            no_others.append(classes[-1] and max(others) < 0)
        found["class"], found["nothing else"] = np.array(classes, float), np.array(no_others, float)
        named = [named_details(caption) for caption in self.captions]
        asked = {detail: (detail, [i for i in range(n) if detail in named[i]]) for detail in DETAILS}
        few = [i for i in asked["number"][1] if all(count <= 3 for _, count in named[i]["number"])]
        for question, (detail, rows) in {"number up to three": ("number", few), **asked}.items():
            if detail == "distance" and chance and rows:
                far = [any(of["distance"] for of in self.by_class[i].values()) for i in range(n) if i not in rows]
                found[question] = np.array(far, float)
                continue
            if detail == "order" and chance:  # of two sounds either comes first
                found[question] = np.full(len(rows), 0.5)
                continue
            half = len(rows) // 2 if chance else 0
            found[question] = np.array([
                not self.silent[i] and all(
                    self.by_class[i][name][detail] == value
                    for (name, _), (_, value) in zip(named[i][detail], named[other][detail], strict=False)
                ) for i, other in zip(rows, rows[half:] + rows[:half], strict=True)
            ], float)  # fmt: skip
        return found


@torch.no_grad()
def classify_details(
    classifier: DetailClassifier, waveforms: torch.Tensor, captions: Sequence[Caption]
) -> DetailAnswers:
    """Waveforms (n, N) at 16 kHz and the caption of each -> the classifier's answers for the classes in the captions.

    Raises ValueError for another number of captions.
    """
    if len(waveforms) != len(captions):
        raise ValueError(
            f"expected one caption for each sound, got {len(captions)} captions and {len(waveforms)} sounds"
        )
    logits, by_class = [], []
    for start in range(0, len(captions), 32):
        batch = captions[start : start + 32]
        row = torch.tensor([i for i, caption in enumerate(batch) for _ in caption.clauses])
        names = [clause.name for caption in batch for clause in caption.clauses]
        queries = torch.tensor([CLASS_NAMES.index(name) for name in names])
        sounds = waveforms[start : start + 32].to(classifier.device)
        classes, answers = classifier(classifier.mel(sounds), row.to(classifier.device), queries.to(classifier.device))
        answers = {k: v.cpu() for k, v in answers.items()}
        logits.append(classes.cpu().numpy())
        for i in range(len(batch)):
            own = {names[q]: {k: v[q] for k, v in answers.items()} for q in torch.nonzero(row == i)[:, 0].tolist()}
            ordered = sorted(own, key=lambda name: float(own[name]["onset"]))
            by_class.append({
                name: {detail: _value(detail, of) for detail in DETAILS[:-1]} | {"order": ordered.index(name)}
                for name, of in own.items()
            })  # fmt: skip
    silent = (waveforms.abs().amax(1) < SILENT).cpu().numpy()
    return DetailAnswers(list(captions), np.concatenate(logits), by_class, silent)


def detail_table(
    classifier: DetailClassifier,
    model: "RefinedAudioLDM",
    scenes: Sequence[CaptionedScene],
    seed: int = 0,
    on_clips: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate rendered, copied and generated sounds of the same captions -> rows of detail, sound and `share`.

    sound: "rendered", "copied" (through VAE and vocoder), "generated" at the model's defaults, "chance" (the generated
    ones compared with other captions). The detail "silent" is the share of silent sounds.
    """
    captions = [scene.caption for scene in scenes]
    rendered = torch.stack([scene.item["waveform"] for scene in scenes])
    copied, generated = [], []
    for start in range(0, len(scenes), 16):
        batch = rendered[start : start + 16].to(model.device)
        with torch.no_grad():
            copied.append(model.to_waveform(model.decode(model.encode(batch))).cpu())
        texts = [str(caption) for caption in captions[start : start + 16]]
        generated.append(model.generate(texts, batch.shape[1] / 16_000, seed=seed).cpu())
        if on_clips:
            on_clips(min(start + 16, len(scenes)), len(scenes))
    sounds = {"rendered": rendered, "copied": torch.cat(copied), "generated": torch.cat(generated)}
    return table_of({name: classify_details(classifier, waveforms, captions) for name, waveforms in sounds.items()})


def table_of(answers: dict[str, DetailAnswers]) -> list[dict[str, Any]]:
    """{sound: answers} -> the rows of `detail_table`, chance from "generated"."""
    columns = {name: of.correct() | {"silent": of.silent.astype(float)} for name, of in answers.items()}
    columns["chance"] = answers["generated"].correct(chance=True)
    return [
        {"detail": detail, "sound": sound, **share(correct)}
        for sound, by_detail in columns.items()
        for detail, correct in by_detail.items()
        if len(correct)
    ]


def show_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `detail_table` as text: a line for each detail, a column for each kind of sound."""
    sounds = list(dict.fromkeys(row["sound"] for row in rows))
    lines = [f"{'':14} {'clips':>5} " + " ".join(f"{sound:>16}" for sound in sounds)]
    for detail in dict.fromkeys(row["detail"] for row in rows):
        of = {row["sound"]: row for row in rows if row["detail"] == detail}
        cells = [f"{of[s]['value']:.2f} ({of[s]['low']:.2f}-{of[s]['high']:.2f})" if s in of else "" for s in sounds]
        lines.append(f"{detail:14} {of['generated']['clips']:5} " + " ".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


@torch.no_grad()
def twin_choices(clap: "Clap", scenes: Sequence[CaptionedScene], seed: int = 0) -> list[dict[str, Any]]:
    """Share of sounds that a conditioner places nearer to their caption than to a twin with one detail changed -> rows.

    One twin for each scene and detail; chance is .5. detail "other scene" takes the caption of another scene.
    """
    waveforms = torch.stack([scene.item["waveform"] for scene in scenes]).to(clap.mel_bank.device)
    audio = torch.cat([clap.embed_audio(part, 16_000) for part in waveforms.split(32)])
    own = (audio * clap.embed_text([str(scene.caption) for scene in scenes])).sum(1)
    rows = []
    for detail, twins in twins_of(scenes, seed).items():
        indices = [i for i, _ in twins]
        nearer = own[indices] > (audio[indices] * clap.embed_text([text for _, text in twins])).sum(1)
        rows.append({"detail": detail, **share(nearer.cpu().numpy().astype(float))})
    return rows


def twins_of(scenes: Sequence[CaptionedScene], seed: int = 0) -> dict[str, list[tuple[int, str]]]:
    """{detail: [(index in `scenes`, its caption with another value of the detail), …]}, and "other scene"."""
    source, pairs = random.Random(seed), {}
    for i, scene in enumerate(scenes):
        for detail, others in scene.caption.contrasts().items():
            pairs.setdefault(detail, []).append((i, str(source.choice(others))))
        other = scenes[(i + len(scenes) // 2) % len(scenes)]
        pairs.setdefault("other scene", []).append((i, str(other.caption)))
    return pairs
