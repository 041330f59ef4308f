"""Pretraining of the two towers of a conditioner before the contrastive stage, as the published encoders had it.

MS-CLAP's HTS-AT was first trained on 22 audio tasks and its GPT-2 on the next token (Elizalde et al. 2023); LAION-
CLAP's HTS-AT on the classes of AudioSet and its RoBERTa on masked tokens (Wu et al. 2023). Here the tasks come from the
metadata of the scenes, and the texts are the captions. Both get the same clips and as many updates, so that the effect
of pretraining can be measured apart from that of the architecture. Notebook: 06
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset

from refined_ldm.clap import Clap
from refined_ldm.config import StageConfig
from refined_ldm.data.batches import loader
from refined_ldm.randomness import draw
from refined_ldm.scenes.classes import CLASSES
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.loop import Step, optimise
from refined_ldm.training.stages import one_caption_each, train_clap

NAMES = tuple(sorted(CLASSES))
TASKS = {  # name: width of its output; a binary label for every class, or one number
    "class": len(NAMES), "order": len(NAMES), "pitch": 1, "count": 1, "density": 1, "loudness": 1, "distance": 1,
}  # fmt: skip
BINARY = ("class", "order", "distance")
MASKED = 0.15  # share of the tokens that are predicted (Liu et al. 2019)
MASK_ID = 3  # <unk>, which no caption holds, serves as the mask


@dataclass(frozen=True)
class Pretraining:
    """The objectives of both towers before the contrastive stage."""

    tasks: tuple[str, ...]  # of the audio tower, names in TASKS
    text: str  # "next token" or "masked token", of the text tower


PRETRAINING = {
    "tiny-gpt2": Pretraining(tuple(TASKS), "next token"),
    "tiny-roberta": Pretraining(("class",), "masked token"),
}
AUDIO_MULTITASK = StageConfig(500, 32, 1e-3, weight_decay=0.05)  # the same for both conditioners
TEXT_LM = StageConfig(500, 64, 1e-3, weight_decay=0.05)
STAGES = ("hearing", "reading", "clap")  # names of the stages in run folders: audio tower, text tower, both


def task_targets(scenes: list[dict]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Scenes ("kind", "labels", "events") -> {task: (values (B, n), known (B, n) bool)}.

    class: present or not; order: the first class of a sequence; pitch: octaves above 400 Hz, count: log2 of the number,
    density: log2 of a quarter of the rate in Hz, distance: far or not, all of the louder event; loudness: level of the
    softer of two events, in tens of dB.
    """
    values = {name: torch.zeros(len(scenes), n) for name, n in TASKS.items()}
    known = {name: torch.zeros(len(scenes), n, dtype=torch.bool) for name, n in TASKS.items()}
    for row, scene in enumerate(scenes):
        events = scene["events"]
        loudest = max(events, key=lambda event: event["gain"])
        values["class"][row, [NAMES.index(name) for name in scene["labels"]]] = 1
        known["class"][row] = True
        if scene["kind"] == "sequence":
            first = min(events, key=lambda event: event["onset"])
            values["order"][row, NAMES.index(first["name"])] = 1
            known["order"][row] = True
        numbers = {
            "pitch": loudest["pitch"] and loudest["pitch"] / 400, "count": loudest["count"],
            "density": loudest["rate"] and loudest["rate"] / 4,
        }  # fmt: skip
        for task, number in numbers.items():
            if number:
                values[task][row], known[task][row] = torch.tensor(float(number)).log2(), True
        values["distance"][row], known["distance"][row] = float(loudest["distant"]), True
        if len(events) == 2:
            values["loudness"][row] = (min(event["gain"] for event in events)) / 10
            known["loudness"][row] = True
    return {name: (values[name], known[name]) for name in TASKS}


class AudioMultitask(nn.Module):
    """An audio tower with a linear head on its pooled output for every task. Raises ValueError for an unknown task."""

    def __init__(self, clap: Clap, tasks: tuple[str, ...]):
        super().__init__()
        if unknown := set(tasks) - set(TASKS):
            raise ValueError(f"no task {', '.join(sorted(unknown))}: there are {', '.join(TASKS)}")
        self.audio, self.heads = clap.audio, nn.ModuleDict(
            {name: nn.Linear(clap.config.audio_channels, TASKS[name]) for name in tasks}
        )  # fmt: skip

    def forward(self, decibels: torch.Tensor) -> dict[str, torch.Tensor]:
        """decibels (B, 1, T, F) of `Clap.log_mel` -> {task: prediction (B, n)}"""
        pooled = self.audio(decibels)
        return {name: head(pooled) for name, head in self.heads.items()}


def multitask_loss(predictions: dict[str, torch.Tensor], targets: dict) -> dict[str, torch.Tensor]:
    """{task: (B, n)}, `task_targets` -> {"loss": mean over tasks, task: its own}; unknown targets do not count."""
    losses = {}
    for name, prediction in predictions.items():
        value, known = (x.to(prediction.device) for x in targets[name])
        distance = F.binary_cross_entropy_with_logits if name in BINARY else F.mse_loss
        error = distance(prediction.float(), value, reduction="none")
        losses[name] = (error * known).sum() / known.sum().clamp(min=1)
    return {"loss": torch.stack(list(losses.values())).mean(), **losses}


def train_audio_multitask(clap: Clap, loader: DataLoader, tasks: tuple[str, ...],
                          settings: StageConfig = AUDIO_MULTITASK, sample_rate: int = 16_000, seed: int = 0,
                          run_dir: str | Path | None = None, resume: bool = False,
                          accelerator: Accelerator | None = None) -> Iterator[Step]:  # fmt: skip
    """Train the audio tower of `clap` on tasks, with batches of "waveform" (B, N), "events", "labels", "kind"."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tower = AudioMultitask(clap, tasks).to(clap.mel_bank.device)

    def losses(network, batch, generator, index):
        keys = ("events", "labels", "kind")
        scenes = [dict(zip(keys, values, strict=True)) for values in zip(*(batch[k] for k in keys), strict=True)]
        return multitask_loss(network(clap.log_mel(batch["waveform"], sample_rate)), task_targets(scenes))

    networks = {STAGES[0]: (tower, losses)}
    yield from optimise(STAGES[0], networks, loader, settings, seed, run_dir, resume, accelerator, clap.mel_bank.device)


class TextLM(nn.Module):
    """A text tower that predicts tokens with its own token table (tied weights, Press & Wolf 2017)."""

    def __init__(self, clap: Clap, vocabulary: torch.Tensor):
        super().__init__()
        self.text = clap.text
        self.register_buffer("vocabulary", vocabulary, persistent=False)  # (V,) ids that captions hold, ascending

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """ids (B, L), mask (B, L) -> logits (B, L, V) over the vocabulary"""
        states = self.text(ids, mask)
        table = self.text.token_table.weight[self.vocabulary]  # (V, W)
        return states @ table.T / table.shape[1] ** 0.5


def vocabulary_of(clap: Clap, captions: list[str]) -> torch.Tensor:
    """The token ids that captions hold, ascending (V,)."""
    return torch.cat([clap.tokenizer([c], clap.config.max_tokens)[0].flatten() for c in set(captions)]).unique()


def train_text_lm(clap: Clap, loader: DataLoader, objective: str, captions: list[str], settings: StageConfig = TEXT_LM,
                  seed: int = 0, run_dir: str | Path | None = None, resume: bool = False,
                  accelerator: Accelerator | None = None) -> Iterator[Step]:  # fmt: skip
    """Train the text tower of `clap` to predict the next or the masked tokens of captions, with batches of "captions".

    captions: all captions of the data set, whose tokens are the vocabulary. Raises ValueError for another objective.
    """
    if objective not in ("next token", "masked token"):
        raise ValueError(f'objective must be "next token" or "masked token", got {objective!r}')
    device = clap.mel_bank.device
    vocabulary = vocabulary_of(clap, captions).to(device)

    def losses(network, batch, generator, index):
        chosen = one_caption_each(batch["captions"], generator)
        ids, mask = (x.to(device) for x in clap.tokenizer(chosen, clap.config.max_tokens))
        wanted = torch.searchsorted(vocabulary, ids)  # (B, L) places in the vocabulary
        if objective == "next token":
            logits, wanted, predicted = network(ids, mask)[:, :-1], wanted[:, 1:], mask[:, 1:].bool()
        else:
            hidden = draw(torch.rand, ids.shape, generator).to(device) < MASKED
            predicted = hidden & mask.bool()
            logits = network(ids.masked_fill(predicted, MASK_ID), mask)
        errors = F.cross_entropy(logits[predicted].float(), wanted[predicted], reduction="sum")
        return {"loss": errors / predicted.sum().clamp(min=1)}

    networks = {STAGES[1]: (TextLM(clap, vocabulary), losses)}
    yield from optimise(STAGES[1], networks, loader, settings, seed, run_dir, resume, accelerator, device)


def train_conditioner(model: RefinedAudioLDM, clips: Dataset, pretraining: Pretraining | None = None, seed: int = 0,
                      run_dir: str | Path | None = None, resume: bool = False,
                      accelerator: Accelerator | None = None) -> Iterator[tuple[str, Step]]:  # fmt: skip
    """Train `model.clap` from random weights -> (stage, Step): its pretraining, if any, then both towers together.

    clips: items of `SoundScenes`. Pretraining draws the same batches for every conditioner.
    """
    common = {"seed": seed, "run_dir": run_dir, "resume": resume, "accelerator": accelerator}
    captions = [caption for item in clips.rest for caption in item["captions"]]

    def batches(settings):
        return loader(clips, settings.batch_size, seed)

    stages = {}
    if pretraining is not None:
        stages[STAGES[0]] = train_audio_multitask(model.clap, batches(AUDIO_MULTITASK), pretraining.tasks, **common)
        stages[STAGES[1]] = train_text_lm(model.clap, batches(TEXT_LM), pretraining.text, captions, **common)
    stages[STAGES[2]] = train_clap(model, batches(model.config.training["clap"]), **common)
    for stage, steps in stages.items():
        for step in steps:
            yield stage, step
    model.clap.share_unseen_tokens(captions)
