"""What steers the arms of the experiment: conditioners with and without their history, token states, an oracle."""

from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn
from torch.utils.data import Dataset

from refined_ldm.data.caches import cache_latents
from refined_ldm.data.captioned_audio import SAMPLE_RATE
from refined_ldm.durable.csv_log import CsvLogger
from refined_ldm.experiment.pretraining import NAMES, PRETRAINING, train_conditioner
from refined_ldm.experiment.probes import names_in_order
from refined_ldm.text_to_audio import RefinedAudioLDM

TOKENS = 20  # of a caption that cross-attention sees
CLAP_RATES = {"laion": 5e-4, "ms": 1e-3}  # of the contrastive stage, each its own best
TOWERS = {  # the two conditioners in miniature, and as published
    "tiny": {"laion": "tiny-roberta", "ms": "tiny-gpt2"},
    "published": {"laion": "laion-clap", "ms": "ms-clap-2023"},
}


class Tokens(nn.Module):
    """A conditioner that gives, behind its embedding, the states of its text tower: (B, D + TOKENS * W)."""

    def __init__(self, clap):
        super().__init__()
        self.clap, self.embedding_dim = clap, clap.embedding_dim

    def embed_text(self, captions):
        states, mask = self.clap.text_states(captions)
        states = (states * mask[..., None])[:, :TOKENS]
        states = nn.functional.pad(states, (0, 0, 0, TOKENS - states.shape[1]))
        return torch.cat([self.clap.embed_text(captions), states.flatten(1)], dim=1)


class Oracle(nn.Module):
    """Knows from the metadata which classes a caption names, in the order of their onsets: no reading, no error."""

    def __init__(self, items, embedding_dim):
        super().__init__()
        self.embedding_dim, self.known = embedding_dim, {"": ()}
        self.register_buffer("place", torch.zeros(0), persistent=False)  # where the model is
        self.learn(items)

    def learn(self, items):
        """Be told the captions of more scenes."""
        for item in items:
            names = [name for name in names_in_order(item) if name in item["labels"]]
            self.known |= {caption: (item["kind"], *names) for caption in item["captions"]}

    def embed_text(self, captions):
        if unknown := [caption for caption in captions if caption not in self.known]:
            raise ValueError(f"the oracle cannot read {unknown[0]!r}: it has to be told its scene first (`learn`)")
        rows = torch.zeros(len(captions), self.embedding_dim)
        for row, caption in zip(rows, captions, strict=True):
            for place, name in enumerate(self.known[caption][1:]):
                row[place * len(NAMES) + NAMES.index(name)] = 1
            if self.known[caption]:
                row[-1 - ("event", "sequence", "overlap").index(self.known[caption][0])] = 1
        return nn.functional.normalize(rows, dim=1).to(self.place.device)


def prepare_conditioners(experiment, runs, seed=0, on_step=None):
    """Train the conditioners that runs need and the folder does not hold yet, with their histories or plain."""
    wanted = {run.arm.conditioner for run in runs}
    for kind, tower in experiment.towers.items():
        if kind in experiment.files:
            continue
        for plain in ("", "-plain"):
            path = experiment.folder / f"clap-{tower}{plain}.safetensors"
            if kind + plain not in wanted or path.is_file():
                continue
            clap = replace(experiment.config.training["clap"], max_steps=800, batch_size=32, lr=CLAP_RATES[kind])
            config = replace(experiment.config, clap=tower, training=experiment.config.training | {"clap": clap})
            run_dir = experiment.folder / f"{tower}{plain}"
            model = RefinedAudioLDM(config, seed).to(experiment.device)
            history = None if plain else PRETRAINING[tower]
            with ExitStack() as stack:
                curves = {}
                for stage, step in train_conditioner(model, experiment.clips, history, seed, run_dir, resume=True):
                    if stage not in curves:
                        curves[stage] = stack.enter_context(CsvLogger(run_dir / f"{stage}.csv", resume=True))
                    curves[stage](step)
                    if on_step:
                        on_step(stage, step)
            model.clap.save(path)


def _no_latent(waveform):
    return torch.zeros(len(waveform), 1)


def embedded_captions(folder, clips, embed):
    """Embeddings of every caption, cached: a shape of its own beside one set of latents."""
    return cache_latents(folder, clips, _no_latent, embed, {**clips.made_of, "of": folder.name})


def embedded_sounds(folder, clips, clap):
    """Embeddings of the sounds themselves, cached under the same key."""

    class Sounds(Dataset):
        def __len__(self):
            return len(clips)

        def __getitem__(self, index):
            return clips[index] | {"captions": [str(index)]}

    def embed(indices):
        waveform = torch.stack([clips[int(i)]["waveform"] for i in indices])
        return clap.embed_audio(waveform, SAMPLE_RATE)

    return cache_latents(folder, Sounds(), _no_latent, embed, {**clips.made_of, "of": folder.name})
