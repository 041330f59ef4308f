"""Does the sound follow its caption? A judge from outside listens, and a linear probe puts names to what it hears.

The probe learns the names from rendered scenes of `val`, which no model was trained on. Then it listens to `test`: to
the rendered clips themselves (its ceiling), to their copies through VAE and vocoder (the ceiling of our path), to clips
generated from their captions, and to clips generated from each other's captions (chance).

A published conditioner is accepted if it names the recordings of ESC-50 (Piczak 2015) as well as published.
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch

from refined_ldm.audio import load_audio
from refined_ldm.data.tables import field, read_rows
from refined_ldm.evaluation.metrics import (
    LinearProbe,
    bootstrap_interval,
    class_recall,
    frechet_distance,
    label_matrix,
    zero_shot,
)
from refined_ldm.integers import whole
from refined_ldm.scenes.classes import CLASSES
from refined_ldm.scenes.dataset import KINDS, SoundScenes

EVENT = ("event",)
ESC50_PROMPTS = {  # of the authors' own scripts, zero_shot_classification.py and esc50_api.py
    "ms-clap-2023": "this is the sound of {}",
    "laion-clap": "This is a sound of {}",
}
ESC50_ACCURACY = {"ms-clap-2023": 0.939, "laion-clap": 0.910}  # published: Elizalde et al. 2023, Wu et al. 2023


class ProbedEmbedding:
    """A judge, waveform (B, N), sample rate -> embedding (B, D), with a fitted probe: embedding -> class names."""

    def __init__(self, judge, probe, sample_rate=16_000):
        self.judge, self.probe, self.sample_rate = judge, probe, sample_rate

    def embed(self, waveform):
        """waveform (B, N) -> (B, D) array."""
        return self.judge(waveform.cpu(), self.sample_rate).cpu().numpy()


@dataclass(frozen=True)
class AdherenceResult:
    """What a listener heard in n clips."""

    rows: list  # n dicts: id, kind, caption, labels (what was asked for), heard (as many names), recall (0 to 1)
    embeddings: np.ndarray  # (n, D)

    @property
    def recall(self):
        """(n,) share of each clip's captioned classes that was heard; with one event, right or wrong."""
        return np.array([row["recall"] for row in self.rows])


def fit_probe(judge, size=1500, seed=0, seconds=2.56, batch_size=32, on_clips=None):
    """Train a probe on `size` rendered scenes of `val` -> ProbedEmbedding. on_clips(done, all) reports progress."""
    size, batch_size = whole("size", size, 1), whole("batch_size", batch_size, 1)
    scenes = SoundScenes("val", size, seconds, seed)
    embeddings, labels = [], []
    for start in range(0, size, batch_size):
        items = [scenes[i] for i in range(start, min(start + batch_size, size))]
        embeddings.append(judge(_waveforms(items), 16_000).cpu().numpy())
        labels += [item["labels"] for item in items]
        if on_clips:
            on_clips(len(labels), size)
    probe = LinearProbe(scenes.classes, multi_label=True)
    return ProbedEmbedding(judge, probe.fit(np.concatenate(embeddings), labels))


def rendered_clips(count, split="test", kinds=KINDS, seed=0, seconds=2.56):
    """The first `count` scenes of a split, rendered: a list of `SoundScenes` items."""
    count = whole("count", count, 1)
    scenes = SoundScenes(split, count, seconds, seed, kinds)
    return [scenes[i] for i in range(count)]


def judge_embeddings(listener, embeddings, items):
    """embeddings (n, D) of what was made for items[i] -> AdherenceResult."""
    if len(embeddings) != len(items):
        raise ValueError(f"one clip an item: got {len(embeddings)} and {len(items)}")
    logits = listener.probe.logits(embeddings)
    wanted = label_matrix([item["labels"] for item in items], listener.probe.classes)
    rows = []
    for item, scores, labels in zip(items, logits, wanted, strict=True):
        heard = np.argsort(-scores, kind="stable")[: labels.sum()]
        rows.append({
            "id": item["id"], "kind": item["kind"], "caption": item["caption"], "labels": " + ".join(item["labels"]),
            "heard": " + ".join(listener.probe.classes[k] for k in heard),
            "recall": class_recall(scores[None], labels[None]),
        })  # fmt: skip
    return AdherenceResult(rows, embeddings)


def judge_rendered(listener, items):
    """The ceiling: the clips that the captions were written for."""
    return judge_embeddings(listener, listener.embed(_waveforms(items)), items)


@torch.no_grad()
def judge_copied(listener, model, items, batch_size=8):
    """The ceiling of our path: the same clips through mel, VAE and vocoder, with no diffusion."""
    batches = _waveforms(items).to(model.device).split(whole("batch_size", batch_size, 1))
    embeddings = [listener.embed(model.to_waveform(model.decode(model.encode(w)))) for w in batches]
    return judge_embeddings(listener, np.concatenate(embeddings), items)


def judge_generated(listener, model, items, guidance=None, steps=None, seed=0, batch_size=8, on_clips=None, **how):
    """Clips generated from the captions of `items`. guidance, steps: None takes the preset's; how: as in `generate`."""
    captions, embeddings, batch_size = [item["caption"] for item in items], [], whole("batch_size", batch_size, 1)
    seconds = items[0]["waveform"].shape[0] / listener.sample_rate
    for start in range(0, len(items), batch_size):
        batch = captions[start : start + batch_size]
        embeddings.append(listener.embed(model.generate(batch, seconds, steps, guidance, seed, **how)))
        if on_clips:
            on_clips(start + len(batch), len(items))
    return judge_embeddings(listener, np.concatenate(embeddings), items)


def judge_shuffled(listener, judged, items):
    """The same clips held against the captions of others, those half the list further on: chance.

    A clip's sound depends on its own caption and the seed alone, so generating from shuffled captions would give the
    same clips once more.
    """
    half = len(items) // 2
    return judge_embeddings(listener, judged.embeddings, items[half:] + items[:half])


def summary(judged, reference=None, pca=64):
    """{"clips", "recall", "low", "high"}, a 95 % bootstrap interval over clips, and "frechet" to a reference AdherenceResult."""
    low, high = bootstrap_interval(np.mean, judged.recall)
    told = {"clips": len(judged.rows), "recall": float(judged.recall.mean()), "low": low, "high": high}
    if reference is not None:
        pca = min(whole("pca", pca, 1), len(judged.rows) - 1, *reference.embeddings.shape)
        told |= {"frechet": frechet_distance(judged.embeddings, reference.embeddings, pca), "pca": pca}
    return told


def adherence(listener, model, count=200, guidance=None, steps=None, seed=0, on_clips=None):
    """The whole comparison on `count` one-event and `count` mixed clips of `test` -> (table rows, {name: AdherenceResult}).

    Names: rendered, copied (through VAE and vocoder), generated, shuffled; each "…, one event" and "…, all kinds".
    A row's Frechet distance is to the rendered clips of the same captions.
    """
    judged, table, count = {}, [], whole("count", count, 2)
    for name, kinds in {"one event": EVENT, "all kinds": KINDS}.items():
        items = rendered_clips(count, kinds=kinds, seconds=model.config.seconds)
        told = {"rendered": judge_rendered(listener, items), "copied": judge_copied(listener, model, items)}
        told["generated"] = judge_generated(listener, model, items, guidance, steps, seed, on_clips=on_clips)
        told["shuffled"] = judge_shuffled(listener, told["generated"], items)
        judged |= {f"{sound}, {name}": judgement for sound, judgement in told.items()}
        table += [{"sound": sound, "clips of": name, **summary(judgement, told["rendered"])}
                  for sound, judgement in told.items()]  # fmt: skip
    return table, judged


def class_prompt(name):
    """A caption for a class alone, as zero-shot naming needs it: "the sound of a dog barking"."""
    subject, _, ing, rest = CLASSES[name].phrases[0].split("|")
    prompt = f"the sound of {subject.replace('*', '')} {ing}{rest.replace('#', 'notes')}"
    return re.sub(r"\ba (?=[aeiou])", "an ", prompt)


def read_esc50(folder):
    """ESC-50 as published, meta/esc50.csv beside audio/ -> n paths, K classes in words, index of each clip's (n,)."""
    table = Path(folder) / "meta" / "esc50.csv"
    if not table.is_file():
        raise FileNotFoundError(f"no {table}: give the folder that holds ESC-50's meta/ and audio/")
    rows = [(field(row, "filename"), field(row, "category")) for _, row in read_rows(table, ("filename", "category"))]
    if not rows:
        raise ValueError(f"{table} lists no recording")
    names = [category.replace("_", " ") for _, category in rows]
    classes = sorted(set(names))
    paths = [Path(folder) / "audio" / PurePath(name).name for name, _ in rows]
    return paths, classes, np.array([classes.index(name) for name in names])


@torch.no_grad()
def zero_shot_esc50(clap, prompt, folder, on_clips=None):
    """Name every recording of ESC-50 by the nearest of its 50 prompts -> ZeroShot.

    `prompt` has {} for the class, as those of ESC50_PROMPTS. Recordings are read at the conditioner's own rate: those
    of our data sets, at 16 kHz, lack the upper half of what it knows. on_clips(done, all) reports progress.
    """
    paths, classes, truth = read_esc50(folder)
    rate, audio = clap.config.sample_rate, []
    for done, path in enumerate(paths, 1):
        audio.append(clap.embed_audio(load_audio(path, rate), rate).cpu())
        if on_clips:
            on_clips(done, len(paths))
    return zero_shot(torch.cat(audio), clap.embed_text([prompt.format(name) for name in classes]), truth)


def accept_conditioner(name, accuracy, tolerance=0.01):
    """Raise ValueError if the zero-shot accuracy on ESC-50 is not the published one, within the tolerance."""
    published = ESC50_ACCURACY[name]
    if not abs(accuracy - published) <= tolerance:
        raise ValueError(
            f"{name} names {accuracy:.1%} of ESC-50, published are {published:.1%}: its front end, prompts or weights "
            "are not the published ones. Nothing is trained on embeddings that fail this"
        )


def _waveforms(items):
    return torch.stack([item["waveform"] for item in items])
