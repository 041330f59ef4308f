"""The conditioners of the arms: pretrained or not, with token states, and an oracle. Notebook: 06"""

from collections.abc import Callable, Iterable, Sized
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import Dataset

from refined_ldm.clap import Clap
from refined_ldm.data.caches import cache_latents
from refined_ldm.data.captioned_audio import SAMPLE_RATE
from refined_ldm.durable.csv_log import CsvLogger
from refined_ldm.experiment.arms import Run
from refined_ldm.experiment.pretraining import NAMES, PRETRAINING, train_conditioner
from refined_ldm.experiment.probes import names_in_order
from refined_ldm.scenes.dataset import KINDS
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.contrasts import train_text_details
from refined_ldm.training.loop import Step

if TYPE_CHECKING:
    from refined_ldm.experiment.protocol import Experiment

TOKENS = 20  # of a caption that cross-attention sees
CLAP_RATES = {"laion": 5e-4, "ms": 1e-3}  # of the contrastive stage, each its own best
TOWERS = {  # the two conditioners in miniature, and as published
    "tiny": {"laion": "tiny-roberta", "ms": "tiny-gpt2"},
    "published": {"laion": "laion-clap", "ms": "ms-clap-2023"},
}


class Tokens(nn.Module):
    """A conditioner that appends the states of its text tower to its embedding: captions -> (B, D + TOKENS * W)."""

    def __init__(self, clap: Clap):
        super().__init__()
        self.clap, self.embedding_dim = clap, clap.embedding_dim

    def embed_text(self, captions: list[str]) -> torch.Tensor:
        """Captions -> (B, D + TOKENS * W)."""
        states, mask = self.clap.text_states(captions)
        states = (states * mask[..., None])[:, :TOKENS]
        states = nn.functional.pad(states, (0, 0, 0, TOKENS - states.shape[1]))
        return torch.cat([self.clap.embed_text(captions), states.flatten(1)], dim=1)


class Oracle(nn.Module):
    """Looks up in the metadata which classes a caption names, in the order of their onsets: captions -> (B, D)."""

    def __init__(self, items: Iterable[dict], embedding_dim: int):
        super().__init__()
        self.embedding_dim, self.known = embedding_dim, {"": ()}
        self.register_buffer("place", torch.zeros(0), persistent=False)  # follows the model's device
        self.learn(items)

    def learn(self, items: Iterable[dict]) -> None:
        """Add the captions of more scenes."""
        for item in items:
            names = [name for name in names_in_order(item) if name in item["labels"]]
            self.known |= {caption: (item["kind"], *names) for caption in item["captions"]}

    def embed_text(self, captions: list[str]) -> torch.Tensor:
        """Captions -> unit vectors (B, D), zero for "". Raises ValueError for a caption of no scene that was added."""
        if unknown := [caption for caption in captions if caption not in self.known]:
            raise ValueError(f"the oracle has no scene for {unknown[0]!r}: add its scene with `learn` first")
        rows = torch.zeros(len(captions), self.embedding_dim)
        for row, caption in zip(rows, captions, strict=True):
            for place, name in enumerate(self.known[caption][1:]):
                row[place * len(NAMES) + NAMES.index(name)] = 1
            if self.known[caption]:
                row[-1 - KINDS.index(self.known[caption][0])] = 1
        return nn.functional.normalize(rows, dim=1).to(self.place.device)


def prepare_conditioners(
    experiment: "Experiment", runs: list[Run], seed: int = 0, on_step: Callable[[str, Step], None] | None = None
) -> None:
    """Train the conditioners that `runs` need and that neither the folder nor a published file holds yet.

    Those trained on details ("-details") start from the one that was not, and train the text tower alone: no arm with
    such a conditioner embeds sounds. on_step(stage, step) is called after every iteration.
    """
    names = {run.arm.conditioner for run in runs} - {"random", "oracle"}
    names |= {name.removesuffix("-details") for name in names}
    for name in sorted(names):  # "ms" before "ms-details"
        kind, _, history = name.partition("-")
        path = experiment.clap_path(name)
        if path.is_file() or name in experiment.files:
            continue
        tower, training = experiment.towers[kind], experiment.config.training
        common = {"seed": seed, "run_dir": path.with_name(path.stem.removeprefix("clap-")), "resume": True}
        if history == "details":
            clap = experiment.trained_clap(kind)
            details = train_text_details(clap, experiment.clips, training["details-text"], **common)
            steps = (("details-text", step) for step in details)
        else:
            settings = replace(training["clap"], max_steps=800, batch_size=32, lr=CLAP_RATES[kind])
            config = replace(experiment.config, clap=tower, training=training | {"clap": settings})
            model = RefinedAudioLDM(config, seed).to(experiment.device)
            clap = model.clap
            steps = train_conditioner(model, experiment.clips, None if history else PRETRAINING[tower], **common)
        with ExitStack() as stack:
            logs = {}
            for stage, step in steps:
                if stage not in logs:
                    logs[stage] = stack.enter_context(CsvLogger(common["run_dir"] / f"{stage}.csv", resume=True))
                logs[stage](step)
                if on_step:
                    on_step(stage, step)
        clap.save(path)


def embedded_captions(folder: Path, clips: Dataset, embed: Callable[[list[str]], torch.Tensor]) -> Dataset:
    """Embeddings of every caption, cached in a folder of their own beside one set of latents."""
    return cache_latents(folder, clips, no_embedding, embed, {**clips.made_of, "of": folder.name})


class _OwnSounds(Dataset):
    """The clips, each with its index in place of its captions."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        return self.clips[index] | {"captions": [str(index)]}


def embedded_sounds(folder: Path, clips: Dataset, clap: nn.Module) -> Dataset:
    """Embeddings of the sounds themselves, cached under the same key."""

    def embed(indices):
        return clap.embed_audio(torch.stack([clips[int(i)]["waveform"] for i in indices]), SAMPLE_RATE)

    return cache_latents(folder, _OwnSounds(clips), no_embedding, embed, {**clips.made_of, "of": folder.name})


def no_embedding(items: Sized) -> torch.Tensor:
    """Stands for an embedding or a latent that a cache does not need: (B, ...) -> zeros (B, 1)."""
    return torch.zeros(len(items), 1)
