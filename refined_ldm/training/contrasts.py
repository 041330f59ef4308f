"""A conditioner learns details: captions that differ in one thing as hard negatives, one tower at a time.

A caption and its twin with another number, pitch, pace, loudness or order share nearly every word, so a contrastive
loss over a batch of other scenes hardly separates them. T-CLAP (Yuan et al. 2024) and CompA (Ghosh et al. 2024) let
language models write such twins; the grammar of `SoundScenes` writes them exactly. First the text tower learns, while
the embeddings of the sounds stay as they are: a denoiser sees nothing but captions, so what is one point there is one
sound. Then the audio tower follows, while the captions stay where they are (locked tuning, after Zhai et al. 2022).
"""

import math
import random
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from refined_ldm.clap import Clap, contrastive_loss
from refined_ldm.config import StageConfig
from refined_ldm.data.captioned_audio import loader
from refined_ldm.scenes.captions import TIMES, Caption
from refined_ldm.scenes.classes import CLASSES
from refined_ldm.scenes.dataset import KINDS, captions_of
from refined_ldm.training.loop import optimise

DETAILS = ("number", "pitch", "pace", "loudness", "order")
MARGIN = 0.5  # cosine that a caption and its twin are pushed below

NAMES = tuple(sorted(CLASSES))
SLOTS = 2  # events of a caption, in the order in which they sound or, at the same time, are named
ANSWERS = {  # of each event: what a linear layer has to read off a caption's embedding, 0 where nothing is said
    "class": ("", *NAMES), "number": range(len(TIMES)), "pitch": ("", "low", "high"), "pace": ("", "slow", "fast"),
    "loudness": ("", "soft", "loud"), "distance": ("", "distant"),
}  # fmt: skip
QUESTIONS = [len(KINDS)] + SLOTS * [len(answers) for answers in ANSWERS.values()]  # how many answers each has


def answers_of(caption: Caption) -> list[int]:
    """Return the answers that a caption gives to QUESTIONS: its kind, then class and details of each event."""
    answers = [KINDS.index(caption.kind)]
    for clause in (*caption.clauses, None)[:SLOTS]:
        if clause is None:
            answers += len(ANSWERS) * [0]
            continue
        sound, said = CLASSES[clause.name], clause.said()
        answers += [
            1 + NAMES.index(clause.name),
            said.get("number", 0),
            1 + sound.low_high.index(said["pitch"]) if "pitch" in said else 0,
            1 + sound.slow_fast.index(said["pace"].strip()) if "pace" in said else 0,
            1 + (said["loudness"] == " loudly") if "loudness" in said else 0,
            int("distance" in said),
        ]
    return answers


class WrittenClips(Dataset):
    """The captions of scenes: a scene's own and `more` others that name every detail they can, without the sound."""

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
    differ from it in one detail. `waveforms=False` leaves the sound out; `embeddings` (len(clips), D) put its embedding
    in.
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
    """Return up to `count` captions that differ from one in a single detail, of as many details as there are."""
    waiting = [source.sample(others, len(others)) for _, others in sorted(caption.contrasts().items())]
    source.shuffle(waiting)
    chosen = []
    while len(chosen) < count and any(waiting):
        for others in waiting:
            if others and len(chosen) < count:
                chosen.append(others.pop())
    return chosen


def twin_loss(
    audio: torch.Tensor, text: torch.Tensor, twins: torch.Tensor, row: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the right caption of a sound among its twins, mean over the sounds that have some.

    audio, text: (B, D) unit norm, pairs in the same row; twins: (M, D), of the rows `row` (M,), which do not fall;
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


def nearness_loss(text: torch.Tensor, twins: torch.Tensor, row: torch.Tensor, margin: float = MARGIN) -> torch.Tensor:
    """Mean excess of the cosine between captions (B, D) and their twins (M, D), of rows `row` (M,), over a margin."""
    if not len(row):
        return text.new_zeros(())
    return F.relu((text[row] * twins).sum(1) - margin).mean()


class DetailReader(nn.Module):
    """A conditioner and the linear layer that reads details off its caption embeddings; the layer is not kept."""

    def __init__(self, clap: Clap):
        super().__init__()
        self.clap, self.read = clap, nn.Linear(clap.embedding_dim, sum(QUESTIONS))

    def forward(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """B captions -> embeddings (B, D), logits (B, all answers of all QUESTIONS)."""
        text = self.clap.embed_text(captions)
        return text, self.read(text * self.clap.embedding_dim**0.5)


def reading_loss(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """logits (B, sum of QUESTIONS), answers (B, len(QUESTIONS)) -> mean cross-entropy, summed over the questions."""
    parts = logits.float().split(QUESTIONS, dim=1)
    return sum(F.cross_entropy(part, answer) for part, answer in zip(parts, answers.T, strict=True))


def _written(batch, device):
    """Captions, twins, the row of each twin (M,), and the answers of both (B + M, len(QUESTIONS)) of a batch."""
    captions = [written[0][0] for written in batch["written"]]
    twins = [text for written in batch["written"] for text, _ in written[1:]]
    row = torch.tensor([i for i, written in enumerate(batch["written"]) for _ in written[1:]], dtype=torch.long)
    answers = [written[0][1] for written in batch["written"]] + [a for w in batch["written"] for _, a in w[1:]]
    return captions, twins, row.to(device), torch.tensor(answers, device=device)


def train_text_details(clap, clips, settings: StageConfig, seed=0, run_dir=None, resume=False, accelerator=None):
    """Train the text tower of `clap` to tell captions from their twins -> yields Steps; its audio tower stays.

    clips: a cache of scenes (`cache_clips`), whose sounds are embedded once.
    """
    device = clap.mel_bank.device
    clap.eval()
    parts = [range(start, min(start + 64, len(clips))) for start in range(0, len(clips), 64)]
    embeddings = torch.cat([embed_clips(clap, clips, part) for part in parts])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = DetailReader(clap).to(device)

    def losses(network, batch, generator, index):
        captions, twins, row, answers = _written(batch, device)
        text, logits = network(captions + twins)
        audio, scale = batch["audio_embedding"].to(text), clap.logit_scale.detach()
        own, others = text.split([len(captions), len(twins)])
        terms = {
            "pairs": contrastive_loss(audio, own, scale),
            "heard": twin_loss(audio, own, others, row, scale),
            "near": nearness_loss(own, others, row),
            "read": reading_loss(logits, answers),
        }
        return {"loss": terms["pairs"] + 0.5 * terms["heard"] + terms["near"] + terms["read"], **terms}

    batches = loader(ContrastedClips(clips, embeddings=embeddings, waveforms=False), settings.batch_size, seed)
    with _only(clap, "text"):
        networks = {"reader": (reader, losses)}
        yield from optimise("details-text", networks, batches, settings, seed, run_dir, resume, accelerator, device)


def train_audio_details(clap, clips, settings: StageConfig, seed=0, run_dir=None, resume=False, accelerator=None):
    """Train the audio tower of `clap` to hear what tells captions from their twins -> yields Steps; captions stay."""
    device = clap.mel_bank.device

    def losses(network, batch, generator, index):
        captions, twins, row, _ = _written(batch, device)
        with torch.no_grad():
            network.text.eval(), network.text_projection.eval()
            own, others = network.embed_text(captions + twins).split([len(captions), len(twins)])
        audio = network.embed_audio(batch["waveform"].to(device), 16_000)
        terms = {
            "pairs": contrastive_loss(audio, own, network.logit_scale),
            "heard": twin_loss(audio, own, others, row, network.logit_scale),
        }
        return {"loss": terms["pairs"] + terms["heard"], **terms}

    batches = loader(ContrastedClips(clips), settings.batch_size, seed)
    with _only(clap, "audio"):
        networks = {"clap": (clap, losses)}
        yield from optimise("details-audio", networks, batches, settings, seed, run_dir, resume, accelerator, device)


@torch.no_grad()
def embed_clips(clap, clips, indices):
    """The embeddings (B, D) of some clips' sounds."""
    return clap.embed_audio(torch.stack([clips[i]["waveform"] for i in indices]), 16_000).cpu()


@contextmanager
def _only(clap, tower):
    """Inside, one tower and its projection are all that learns."""
    try:
        for name, parameter in clap.named_parameters():
            parameter.requires_grad_(name.startswith(tower) or (name == "logit_scale" and tower == "audio"))
        yield
    finally:
        clap.requires_grad_(True)
