"""Training of a conditioner on details: captions that differ in one detail are hard negatives, one tower at a time.

A caption and its twin with another number, pitch, pace, loudness or order share nearly every word, so a contrastive
loss over a batch of other scenes hardly separates them. T-CLAP (Yuan et al. 2024) and CompA (Ghosh et al. 2024) let
language models write such twins; the grammar of `SoundScenes` writes them exactly. First the text tower is trained
against frozen audio embeddings: a denoiser sees only captions, so captions with equal embeddings give equal sounds.
Then the audio tower is trained against frozen captions (locked tuning, after Zhai et al. 2022), in batches whose scenes
have the same kinds of sound: the choice between sounds for one caption needs sounds that differ in details alone.

Notebook: 02
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from refined_ldm.clap import Clap, contrastive_loss
from refined_ldm.config import StageConfig
from refined_ldm.data.batches import StepSampler, collate, loader
from refined_ldm.scenes.captions import TIMES, Caption
from refined_ldm.scenes.classes import CLASSES
from refined_ldm.scenes.dataset import KINDS, captions_of
from refined_ldm.training.loop import RunOptions, Step, optimise

DETAILS = ("number", "pitch", "pace", "loudness", "order")
MARGIN = 0.5  # largest cosine of a caption and its twin without a penalty
KINDRED = 4  # scenes in a batch that have the same kinds of sound

NAMES = tuple(sorted(CLASSES))
SLOTS = 2  # events of a caption, in the order in which they sound or, at the same time, are named
ANSWERS = {  # classes of the linear probe of a caption's embedding, for each event; index 0: the caption names none
    "class": ("", *NAMES), "number": range(len(TIMES)), "pitch": ("", "low", "high"), "pace": ("", "slow", "fast"),
    "loudness": ("", "soft", "loud"), "distance": ("", "distant"),
}  # fmt: skip
QUESTIONS = [len(KINDS)] + SLOTS * [len(answers) for answers in ANSWERS.values()]  # number of answers to each question


def answers_of(caption: Caption) -> list[int]:
    """Return the answers that a caption gives to QUESTIONS: its kind, then class and details of each event."""
    answers = [KINDS.index(caption.kind)]
    for clause in (*caption.clauses, None)[:SLOTS]:
        if clause is None:
            answers += len(ANSWERS) * [0]
            continue
        sound, named = CLASSES[clause.name], clause.details()
        answers += [
            1 + NAMES.index(clause.name),
            named.get("number", 0),
            1 + sound.low_high.index(named["pitch"]) if "pitch" in named else 0,
            1 + sound.slow_fast.index(named["pace"].strip()) if "pace" in named else 0,
            1 + (named["loudness"] == " loudly") if "loudness" in named else 0,
            int("distance" in named),
        ]
    return answers


class WrittenClips(Dataset):
    """The captions of scenes without the sounds: a scene's own, and `more` others that name every possible detail."""

    def __init__(self, clips: Dataset, more: int):
        self.rest, self.more = clips.rest, more
        self._captions: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return len(self.rest)

    def __getitem__(self, index: int) -> dict:
        item = self.rest[index]
        if index not in self._captions:
            others = captions_of(item, self.more, detailed=1.0)
            self._captions[index] = [*item["captions"], *map(str, others)]
        return {"id": item["id"], "captions": self._captions[index]}


class ContrastedClips(Dataset):
    """Scenes, each with one of many captions drawn anew in every epoch, and twins of it.

    contrasted[i] is clips[i] with "written", a list of (text, answers): a caption first, then up to `twins` others that
    differ from it in one detail. `waveforms=False` omits the waveform; `embeddings` (len(clips), D) adds the audio
    embedding.
    """

    def __init__(self, clips: Dataset, twins: int = 2, embeddings: torch.Tensor | None = None, waveforms: bool = True):
        self.clips, self.twins, self.embeddings, self.waveforms = clips, twins, embeddings, waveforms
        self._captions: dict[int, list[Caption]] = {}
        self._visits: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        item = self.clips.rest[index]
        if index not in self._captions:
            self._captions[index] = captions_of(item) + captions_of(item, 3, detailed=1.0)
        visit = self._visits[index] = self._visits.get(index, -1) + 1
        source = random.Random(f"{item['id']}/{visit}")
        caption = source.choice(self._captions[index])
        written = [(str(c), answers_of(c)) for c in (caption, *draw_twins(caption, source, self.twins))]
        found = {"id": item["id"], "written": written}
        if self.waveforms:
            found["waveform"] = self.clips[index]["waveform"]
        if self.embeddings is not None:
            found["audio_embedding"] = self.embeddings[index]
        return found


def draw_twins(caption: Caption, source: random.Random, count: int) -> list[Caption]:
    """Return up to `count` captions that differ from `caption` in a single detail, taken from each detail in turn."""
    waiting = [source.sample(others, len(others)) for _, others in sorted(caption.contrasts().items())]
    source.shuffle(waiting)
    chosen = []
    while len(chosen) < count and any(waiting):
        for others in waiting:
            if others and len(chosen) < count:
                chosen.append(others.pop())
    return chosen


class KindredSampler(StepSampler):
    """Endless batches of groups of KINDRED scenes that have the same kinds of sound, fewer where there are no more.

    labels: the classes of each scene. The k-th batch depends only on (seed, k).
    """

    def __init__(self, labels: Sequence[Sequence[str]], batch_size: int, seed: int = 0):
        super().__init__(len(labels), batch_size, seed)
        self.names = [tuple(sorted(of)) for of in labels]
        self.groups: dict[tuple[str, ...], list[int]] = {}
        for index, name in enumerate(self.names):
            self.groups.setdefault(name, []).append(index)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            source, batch = np.random.default_rng((self.seed, step)), []
            while len(batch) < self.batch_size:
                index = int(source.integers(self.size))
                group = self.groups[self.names[index]]
                others = source.permutation([i for i in group if i != index])[: KINDRED - 1]
                batch += [index, *others.tolist()]
            yield batch[: self.batch_size]
            step += 1


def twin_loss(
    audio: torch.Tensor, text: torch.Tensor, twins: torch.Tensor, row: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy of the right caption of a sound among its twins, the mean over sounds with twins.

    audio, text: (B, D) unit norm, pairs in the same row; twins: (M, D), of the rows `row` (M,), in ascending order;
    logit_scale as in `contrastive_loss`.
    """
    if not len(row):
        return text.new_zeros(())
    scale = logit_scale.clamp(max=math.log(100)).exp()
    place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)  # among the twins of its row
    others = text.new_full((len(text), int(place.max()) + 1), -torch.inf)
    others = others.index_put((row, place), scale * (audio[row] * twins).sum(1))
    logits = torch.cat([scale * (audio * text).sum(1, keepdim=True), others], dim=1)
    losses = F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long), reduction="sum")
    return losses / row.unique().numel()


def sorted_overlaps(answers: torch.Tensor) -> torch.Tensor:
    """Return answers (B, Q) with two sounds at the same time in the order of their names, whichever is named first."""
    kind, first, second = answers.split([1, len(ANSWERS), len(ANSWERS)], dim=1)
    swapped = (kind == KINDS.index("overlap")) & (first[:, :1] > second[:, :1])
    return torch.where(swapped, torch.cat([kind, second, first], 1), answers)


def may_agree(answers: torch.Tensor) -> torch.Tensor:
    """Return (B, B): whether two captions, with answers (B, Q) to QUESTIONS, may be true of one scene.

    They name the same kinds of sound, in the same order unless at the same time, and no detail contradicts another.
    """
    answers = sorted_overlaps(answers)
    equal = answers[:, None] == answers
    unnamed = (answers[:, None] == 0) | (answers == 0)
    unnamed[:, :, [0, 1, 1 + len(ANSWERS)]] = False  # the kind of scene and the classes
    return (equal | unnamed).all(2)


def nearness_loss(text: torch.Tensor, twins: torch.Tensor, row: torch.Tensor, margin: float = MARGIN) -> torch.Tensor:
    """Return the mean excess over `margin` of the cosine of captions and their twins.

    text: (B, D), twins: (M, D), both of unit norm; row: (M,), the caption of each twin.
    """
    if not len(row):
        return text.new_zeros(())
    return F.relu((text[row] * twins).sum(1) - margin).mean()


class DetailProbe(nn.Module):
    """A conditioner and a linear probe that predicts details from its embeddings; the probe is not saved."""

    def __init__(self, clap: Clap):
        super().__init__()
        self.clap, self.read = clap, nn.Linear(clap.embedding_dim, sum(QUESTIONS))

    def forward(self, given: list[str] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed B captions, or waveforms (B, N) at 16 kHz -> embeddings (B, D), logits (B, sum of QUESTIONS)."""
        sounds = isinstance(given, torch.Tensor)
        embedding = self.clap.embed_audio(given, 16_000) if sounds else self.clap.embed_text(given)
        return embedding, self.read(embedding * self.clap.embedding_dim**0.5)


def probe_loss(logits: torch.Tensor, answers: torch.Tensor, named: bool = False) -> torch.Tensor:
    """Return the mean cross-entropy of logits (B, sum of QUESTIONS) and answers (B, Q), summed over the Q questions.

    named: only the details that captions name count, each over the captions that do.
    """
    loss = logits.new_zeros((), dtype=torch.float32)
    for place, (part, answer) in enumerate(zip(logits.float().split(QUESTIONS, dim=1), answers.T, strict=True)):
        losses = F.cross_entropy(part, answer, reduction="none")
        counted = (answer > 0) | (not named or place == 0)  # the first question is the kind of scene
        loss = loss + (losses * counted).sum() / counted.sum().clamp(min=1)
    return loss


def _written(batch, device):
    """Return captions, twins, the row of each twin (M,), and the answers of both (B + M, len(QUESTIONS)) of a batch."""
    captions = [written[0][0] for written in batch["written"]]
    twins = [text for written in batch["written"] for text, _ in written[1:]]
    row = torch.tensor([i for i, written in enumerate(batch["written"]) for _ in written[1:]], dtype=torch.long)
    answers = [written[0][1] for written in batch["written"]] + [a for w in batch["written"] for _, a in w[1:]]
    return captions, twins, row.to(device), torch.tensor(answers, device=device)


def train_text_details(
    clap: Clap, clips: Dataset, settings: StageConfig, **options: Unpack[RunOptions]
) -> Iterator[Step]:
    """Train the text tower of `clap` to distinguish captions from their twins and yield every Step.

    The audio tower is frozen. clips: a cache of scenes (`cache_clips`), whose sounds are embedded once.
    Raises as `optimise` does.

    Notebook: 02
    """
    device = clap.mel_bank.device
    clap.eval()
    parts = [range(start, min(start + 64, len(clips))) for start in range(0, len(clips), 64)]
    embeddings = torch.cat([embed_clips(clap, clips, part) for part in parts])
    with torch.random.fork_rng():
        torch.manual_seed(options.get("seed", 0))
        probe = DetailProbe(clap).to(device)

    def losses(network, batch, generator, index):
        captions, twins, row, answers = _written(batch, device)
        text, logits = network(captions + twins)
        audio, scale = batch["audio_embedding"].to(text), clap.logit_scale.detach()
        own, others = text.split([len(captions), len(twins)])
        terms = {
            "pairs": contrastive_loss(audio, own, scale),
            "twins": twin_loss(audio, own, others, row, scale),
            "near": nearness_loss(own, others, row),
            "read": probe_loss(logits, answers),
        }
        return {"loss": terms["pairs"] + 0.5 * terms["twins"] + terms["near"] + terms["read"], **terms}

    batches = loader(
        ContrastedClips(clips, embeddings=embeddings, waveforms=False), settings.batch_size, options.get("seed", 0)
    )
    with _only(clap, "text"):
        networks = {"reader": (probe, losses)}
        yield from optimise("details-text", networks, batches, settings, device=device, **options)


def train_audio_details(
    clap: Clap, clips: Dataset, settings: StageConfig, **options: Unpack[RunOptions]
) -> Iterator[Step]:
    """Train the audio tower of `clap` to distinguish captions from their twins and yield every Step.

    The text tower is frozen. clips: a cache of scenes (`cache_clips`). Raises as `optimise` does.

    Notebook: 02
    """
    device = clap.mel_bank.device
    with torch.random.fork_rng():
        torch.manual_seed(options.get("seed", 0))
        probe = DetailProbe(clap).to(device)

    def losses(network, batch, generator, index):
        captions, twins, row, answers = _written(batch, device)
        with torch.no_grad():
            clap.text.eval(), clap.text_projection.eval()
            own, others = clap.embed_text(captions + twins).split([len(captions), len(twins)])
        audio, logits = network(batch["waveform"].to(device))
        answers = sorted_overlaps(answers[: len(own)])
        terms = {
            "pairs": contrastive_loss(audio, own, clap.logit_scale, may_agree(answers)),
            "twins": twin_loss(audio, own, others, row, clap.logit_scale),
            "read": probe_loss(logits, answers, named=True),
        }
        return {"loss": terms["pairs"] + terms["twins"] + 0.5 * terms["read"], **terms}

    contrasted, labels = ContrastedClips(clips), [item["labels"] for item in clips.rest]
    sampler = KindredSampler(labels, settings.batch_size, options.get("seed", 0))
    batches = DataLoader(contrasted, batch_sampler=sampler, collate_fn=collate)
    with _only(clap, "audio"):
        networks = {"reader": (probe, losses)}
        yield from optimise("details-audio", networks, batches, settings, device=device, **options)


@torch.no_grad()
def embed_clips(clap: Clap, clips: Dataset, indices: Iterable[int]) -> torch.Tensor:
    """Return the audio embeddings (B, D) of the clips at B indices, on the CPU."""
    return clap.embed_audio(torch.stack([clips[i]["waveform"] for i in indices]), 16_000).cpu()


@contextmanager
def _only(clap, tower):
    """Within the context, train one tower and its projection alone."""
    try:
        for name, parameter in clap.named_parameters():
            parameter.requires_grad_(name.startswith(tower) or (name == "logit_scale" and tower == "audio"))
        yield
    finally:
        clap.requires_grad_(True)
