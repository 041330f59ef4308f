"""What the two towers of a conditioner learned before they met: the published encoders' histories, in miniature.

MS-CLAP's HTS-AT was first trained on 22 audio tasks and its GPT-2 on the next token (Elizalde et al. 2023); LAION-
CLAP's HTS-AT on the classes of AudioSet and its RoBERTa on masked tokens (Wu et al. 2023). Here the tasks are those
that the metadata of a scene can set, and the texts are the captions. Both histories get the same clips and as many
updates, so that what a history gives can be measured beside what the architecture gives.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from refined_ldm.config import StageConfig
from refined_ldm.data.captioned_audio import loader
from refined_ldm.randomness import draw
from refined_ldm.scenes.classes import CLASSES
from refined_ldm.training.loop import optimise
from refined_ldm.training.stages import one_caption_each, train_clap

NAMES = tuple(sorted(CLASSES))
TASKS = {  # name: how many numbers it asks for; yes or no for every class, or one number
    "class": len(NAMES), "order": len(NAMES), "pitch": 1, "count": 1, "density": 1, "loudness": 1, "distance": 1,
}  # fmt: skip
YES_OR_NO = ("class", "order", "distance")
MASKED = 0.15  # share of the tokens that RoBERTa has to guess (Liu et al. 2019)
MASK_ID = 3  # <unk>, which no caption holds, stands for a token that is hidden


@dataclass(frozen=True)
class Pretraining:
    """hearing: tasks of the audio tower; reading: "next token" or "masked token" for the text tower."""

    hearing: tuple[str, ...]
    reading: str


PRETRAINING = {
    "tiny-gpt2": Pretraining(tuple(TASKS), "next token"),
    "tiny-roberta": Pretraining(("class",), "masked token"),
}
HEARING = StageConfig(500, 32, 1e-3, weight_decay=0.05)  # one for both, as the updates are to be the same
READING = StageConfig(500, 64, 1e-3, weight_decay=0.05)


def task_targets(scenes):
    """Scenes ("kind", "labels", "events") -> {task: (values (B, n), known (B, n) bool)}.

    class: is it heard; order: which of a sequence comes first; pitch: octaves above 400 Hz, count: log2 of how many,
    density: log2 of how often a second, distance: is it far, all of the louder event; loudness: by how many tens of dB
    the other is softer.
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


class Hearing(nn.Module):
    """An audio tower and, for every task, a linear layer that reads the answer off its pooled output."""

    def __init__(self, clap, tasks):
        super().__init__()
        if unknown := set(tasks) - set(TASKS):
            raise ValueError(f"no task {', '.join(sorted(unknown))}: there are {', '.join(TASKS)}")
        self.audio, self.heads = clap.audio, nn.ModuleDict(
            {name: nn.Linear(clap.config.audio_channels, TASKS[name]) for name in tasks}
        )  # fmt: skip

    def forward(self, decibels):
        """decibels (B, 1, T, F) of `Clap.log_mel` -> {task: answer (B, n)}"""
        pooled = self.audio(decibels).pooler_output
        return {name: head(pooled) for name, head in self.heads.items()}


def hearing_loss(answers, targets):
    """{task: answer (B, n)}, {task: (values, known)} -> {"loss": mean over tasks, task: its own}, of what is known."""
    losses = {}
    for name, answer in answers.items():
        value, known = (x.to(answer.device) for x in targets[name])
        distance = F.binary_cross_entropy_with_logits if name in YES_OR_NO else F.mse_loss
        error = distance(answer.float(), value, reduction="none")
        losses[name] = (error * known).sum() / known.sum().clamp(min=1)
    return {"loss": torch.stack(list(losses.values())).mean(), **losses}


def train_hearing(clap, loader, tasks, settings=HEARING, sample_rate=16_000, seed=0, run_dir=None, resume=False,
                  accelerator=None):  # fmt: skip
    """Train the audio tower of `clap` on tasks, with batches of "waveform" (B, N), "events", "labels", "kind"."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hearing = Hearing(clap, tasks).to(clap.mel_bank.device)

    def losses(network, batch, generator, index):
        keys = ("events", "labels", "kind")
        scenes = [dict(zip(keys, values, strict=True)) for values in zip(*(batch[k] for k in keys), strict=True)]
        return hearing_loss(network(clap.log_mel(batch["waveform"], sample_rate)), task_targets(scenes))

    networks = {"hearing": (hearing, losses)}
    yield from optimise("hearing", networks, loader, settings, seed, run_dir, resume, accelerator, clap.mel_bank.device)


class Reading(nn.Module):
    """A text tower that guesses tokens: its output against its own token table (tied weights, Press & Wolf 2017)."""

    def __init__(self, clap, vocabulary):
        super().__init__()
        self.text = clap.text
        self.register_buffer("vocabulary", vocabulary, persistent=False)  # (V,) ids that captions hold, ascending

    def forward(self, ids, mask):
        """ids (B, L), mask (B, L) -> logits (B, L, V) over the vocabulary"""
        states = self.text(ids, attention_mask=mask).last_hidden_state
        table = self.text.get_input_embeddings().weight[self.vocabulary]  # (V, W)
        return states @ table.T / table.shape[1] ** 0.5


def vocabulary_of(clap, captions):
    """The token ids that captions hold, ascending (V,)."""
    return torch.cat([clap.tokenizer([c], clap.config.max_tokens)[0].flatten() for c in set(captions)]).unique()


def train_reading(clap, loader, reading, captions, settings=READING, seed=0, run_dir=None, resume=False,
                  accelerator=None):  # fmt: skip
    """Train the text tower of `clap` to guess the next or the masked tokens of captions, with batches of "captions".

    captions: all there are, whose tokens are what may be guessed.
    """
    if reading not in ("next token", "masked token"):
        raise ValueError(f'reading must be "next token" or "masked token", got {reading!r}')
    device = clap.mel_bank.device
    vocabulary = vocabulary_of(clap, captions).to(device)

    def losses(network, batch, generator, index):
        chosen = one_caption_each(batch["captions"], generator)
        ids, mask = (x.to(device) for x in clap.tokenizer(chosen, clap.config.max_tokens))
        wanted = torch.searchsorted(vocabulary, ids)  # (B, L) places in the vocabulary
        if reading == "next token":
            logits, wanted, asked = network(ids, mask)[:, :-1], wanted[:, 1:], mask[:, 1:].bool()
        else:
            hidden = draw(torch.rand, ids.shape, generator).to(device) < MASKED
            asked = hidden & mask.bool()
            logits = network(ids.masked_fill(asked, MASK_ID), mask)
        errors = F.cross_entropy(logits[asked].float(), wanted[asked], reduction="sum")
        return {"loss": errors / asked.sum().clamp(min=1)}

    networks = {"reading": (Reading(clap, vocabulary), losses)}
    yield from optimise("reading", networks, loader, settings, seed, run_dir, resume, accelerator, device)


def train_conditioner(model, clips, history=None, seed=0, run_dir=None, resume=False, accelerator=None):
    """Train `model.clap` from nothing -> yields (stage, Step): first its `Pretraining`, if any, then both towers together.

    clips: items of `SoundScenes`. The history draws the same batches for every conditioner.
    """
    common = {"seed": seed, "run_dir": run_dir, "resume": resume, "accelerator": accelerator}
    captions = [caption for item in clips.rest for caption in item["captions"]]
    if history is not None:
        batches = loader(clips, HEARING.batch_size, seed)
        for step in train_hearing(model.clap, batches, history.hearing, **common):
            yield "hearing", step
        batches = loader(clips, READING.batch_size, seed)
        for step in train_reading(model.clap, batches, history.reading, captions, **common):
            yield "reading", step
    batches = loader(clips, model.config.training["clap"].batch_size, seed)
    for step in train_clap(model, batches, **common):
        yield "clap", step
    model.clap.share_unseen_tokens(captions)
