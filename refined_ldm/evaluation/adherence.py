"""Adherence to captions: an embedding trained by others and a linear probe name the classes that are in a clip.

The probe is fitted to rendered scenes of `val`, which no model was trained on, and applied to `test`: to the rendered
clips themselves (the upper bound of the probe), to their copies through VAE and vocoder (the upper bound of the model),
to clips generated from their captions, and to clips generated from other captions (chance).

A published conditioner is accepted if its zero-shot accuracy on ESC-50 (Piczak 2015) is the published one.

Notebook: 05
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from refined_ldm.audio import load_audio
from refined_ldm.base.integers import whole
from refined_ldm.data.tables import field, read_rows
from refined_ldm.evaluation.metrics import (
    LinearProbe,
    ZeroShot,
    bootstrap_interval,
    class_recall,
    frechet_distance,
    label_matrix,
    zero_shot,
)
from refined_ldm.scenes.classes import CLASSES
from refined_ldm.scenes.dataset import KINDS, SoundScenes

if TYPE_CHECKING:
    from refined_ldm.clap import Clap
    from refined_ldm.text_to_audio import RefinedAudioLDM

Embed = Callable[[torch.Tensor, int], torch.Tensor]  # waveform (B, N), sample rate in Hz -> embedding (B, D)
Progress = Callable[[int, int], None]  # called with the number of clips done and of all clips
EVENT = ("event",)
ESC50_PROMPTS = {  # of the authors' own scripts, zero_shot_classification.py and esc50_api.py
    "ms-clap-2023": "this is the sound of {}",
    "laion-clap": "This is a sound of {}",
}
ESC50_ACCURACY = {"ms-clap-2023": 0.939, "laion-clap": 0.910}  # published: Elizalde et al. 2023, Wu et al. 2023


class ProbedEmbedding:
    """A embed, which embeds waveforms, with a fitted probe, which names the classes in an embedding."""

    def __init__(self, embed: Embed, probe: LinearProbe, sample_rate: int = 16_000):
        self.embed, self.probe, self.sample_rate = embed, probe, sample_rate

    def embed_audio(self, waveform: torch.Tensor) -> np.ndarray:
        """Waveform (B, N) at `sample_rate` -> embedding (B, D)."""
        return self.embed(waveform.cpu(), self.sample_rate).cpu().numpy()


@dataclass(frozen=True)
class AdherenceResult:
    """The predictions of a probe for n clips."""

    rows: list[dict[str, Any]]  # n: id, kind, caption, labels (captioned classes), predicted (as many classes), recall
    embeddings: np.ndarray  # (n, D)

    @property
    def recall(self) -> np.ndarray:
        """(n,) share of each clip's captioned classes among the predicted ones, 0 to 1."""
        return np.array([row["recall"] for row in self.rows])


def fit_probe(
    embed: Embed,
    size: int = 1500,
    seed: int = 0,
    seconds: float = 2.56,
    batch_size: int = 32,
    on_clips: Progress | None = None,
) -> ProbedEmbedding:
    """Fit a probe to `size` rendered scenes of `val`. on_clips(done, all) reports progress.

    Notebook: 05
    """
    size, batch_size = whole("size", size, 1), whole("batch_size", batch_size, 1)
    scenes = SoundScenes("val", size, seconds, seed)
    embeddings, labels = [], []
    for start in range(0, size, batch_size):
        items = [scenes[i] for i in range(start, min(start + batch_size, size))]
        embeddings.append(embed(_waveforms(items), 16_000).cpu().numpy())
        labels += [item["labels"] for item in items]
        if on_clips:
            on_clips(len(labels), size)
    probe = LinearProbe(scenes.classes, multi_label=True)
    return ProbedEmbedding(embed, probe.fit(np.concatenate(embeddings), labels))


def rendered_clips(
    count: int, split: str = "test", kinds: tuple[str, ...] = KINDS, seed: int = 0, seconds: float = 2.56
) -> list[dict[str, Any]]:
    """The first `count` scenes of a split, rendered: a list of `SoundScenes` items."""
    count = whole("count", count, 1)
    scenes = SoundScenes(split, count, seconds, seed, kinds)
    return [scenes[i] for i in range(count)]


def evaluate_embeddings(
    probed: ProbedEmbedding, embeddings: np.ndarray, items: list[dict[str, Any]]
) -> AdherenceResult:
    """Compare embeddings (n, D) with the captioned classes of n items; raises ValueError for another number."""
    if len(embeddings) != len(items):
        raise ValueError(f"expected one clip for each item, got {len(embeddings)} clips and {len(items)} items")
    logits = probed.probe.logits(embeddings)
    targets = label_matrix([item["labels"] for item in items], probed.probe.classes)
    rows = []
    for item, scores, labels in zip(items, logits, targets, strict=True):
        predicted = np.argsort(-scores, kind="stable")[: labels.sum()]
        rows.append(
            {
                "id": item["id"],
                "kind": item["kind"],
                "caption": item["caption"],
                "labels": " + ".join(item["labels"]),
                "predicted": " + ".join(probed.probe.classes[k] for k in predicted),
                "recall": class_recall(scores[None], labels[None]),
            }
        )
    return AdherenceResult(rows, embeddings)


def evaluate_rendered(probed: ProbedEmbedding, items: list[dict[str, Any]]) -> AdherenceResult:
    """The upper bound: the rendered clips themselves."""
    return evaluate_embeddings(probed, probed.embed_audio(_waveforms(items)), items)


@torch.no_grad()
def evaluate_copied(
    probed: ProbedEmbedding, model: "RefinedAudioLDM", items: list[dict[str, Any]], batch_size: int = 8
) -> AdherenceResult:
    """The upper bound of the model: the rendered clips through mel, VAE and vocoder, without diffusion."""
    batches = _waveforms(items).to(model.device).split(whole("batch_size", batch_size, 1))
    embeddings = [probed.embed_audio(model.to_waveform(model.decode(model.encode(w)))) for w in batches]
    return evaluate_embeddings(probed, np.concatenate(embeddings), items)


def evaluate_generated(
    probed: ProbedEmbedding,
    model: "RefinedAudioLDM",
    items: list[dict[str, Any]],
    guidance: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    on_clips: Progress | None = None,
    **settings: Any,
) -> AdherenceResult:
    """Clips generated from the captions of `items`. guidance, steps: None: the preset's; settings: of `generate`."""
    captions, embeddings, batch_size = [item["caption"] for item in items], [], whole("batch_size", batch_size, 1)
    seconds = items[0]["waveform"].shape[0] / probed.sample_rate
    for start in range(0, len(items), batch_size):
        batch = captions[start : start + batch_size]
        embeddings.append(probed.embed_audio(model.generate(batch, seconds, steps, guidance, seed, **settings)))
        if on_clips:
            on_clips(start + len(batch), len(items))
    return evaluate_embeddings(probed, np.concatenate(embeddings), items)


def evaluate_shuffled(probed: ProbedEmbedding, result: AdherenceResult, items: list[dict[str, Any]]) -> AdherenceResult:
    """Chance: the same clips compared with other captions, those half the list further on.

    A clip depends on its own caption and the seed alone, so generating from shuffled captions would give the same
    clips again.
    """
    half = len(items) // 2
    return evaluate_embeddings(probed, result.embeddings, items[half:] + items[:half])


def summary(result: AdherenceResult, reference: AdherenceResult | None = None, pca: int = 64) -> dict[str, float]:
    """The mean of a result -> {"clips", "recall", "low", "high"}, with a 95 % bootstrap interval over clips.

    With a reference also "frechet", the Frechet distance to it, and "pca", the dimensions of that.
    """
    low, high = bootstrap_interval(np.mean, result.recall)
    metrics = {"clips": len(result.rows), "recall": float(result.recall.mean()), "low": low, "high": high}
    if reference is not None:
        pca = min(whole("pca", pca, 1), len(result.rows) - 1, *reference.embeddings.shape)
        metrics |= {"frechet": frechet_distance(result.embeddings, reference.embeddings, pca), "pca": pca}
    return metrics


def measure_adherence(
    probed: ProbedEmbedding,
    model: "RefinedAudioLDM",
    count: int = 200,
    guidance: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    on_clips: Progress | None = None,
) -> tuple[list[dict[str, Any]], dict[str, AdherenceResult]]:
    """The whole comparison on `count` one-event and `count` mixed clips of `test` -> (table rows, results by name).

    Names: rendered, copied (through VAE and vocoder), generated, shuffled; each "…, one event" and "…, all kinds".
    A row's Frechet distance is to the rendered clips of the same captions.

    Notebook: 05
    """
    results, table, count = {}, [], whole("count", count, 2)
    for name, kinds in {"one event": EVENT, "all kinds": KINDS}.items():
        items = rendered_clips(count, kinds=kinds, seconds=model.config.seconds)
        found = {"rendered": evaluate_rendered(probed, items), "copied": evaluate_copied(probed, model, items)}
        found["generated"] = evaluate_generated(probed, model, items, guidance, steps, seed, on_clips=on_clips)
        found["shuffled"] = evaluate_shuffled(probed, found["generated"], items)
        for sound, result in found.items():
            results[f"{sound}, {name}"] = result
            table.append({"sound": sound, "clips of": name, **summary(result, found["rendered"])})
    return table, results


def class_prompt(name: str) -> str:
    """A caption of a class for zero-shot classification: "the sound of a dog barking"."""
    subject, _, ing, rest = CLASSES[name].phrases[0].split("|")
    prompt = f"the sound of {subject.replace('*', '')} {ing}{rest.replace('#', 'notes')}"
    return re.sub(r"\ba (?=[aeiou])", "an ", prompt)


def read_esc50(folder: str | Path) -> tuple[list[Path], list[str], np.ndarray]:
    """ESC-50 as published, meta/esc50.csv beside audio/ -> n paths, K class names, the class index of each clip (n,).

    Raises FileNotFoundError or ValueError if the folder does not hold it.
    """
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
def zero_shot_esc50(clap: "Clap", prompt: str, folder: str | Path, on_clips: Progress | None = None) -> ZeroShot:
    """Classify every recording of ESC-50 by the nearest of its 50 prompts.

    `prompt` has {} for the class, as those of ESC50_PROMPTS. Recordings are read at the conditioner's own sample rate,
    since at 16 kHz they lack the upper half of its band. on_clips(done, all) reports progress.
    """
    paths, classes, truth = read_esc50(folder)
    rate, audio = clap.config.sample_rate, []
    for done, path in enumerate(paths, 1):
        audio.append(clap.embed_audio(load_audio(path, rate), rate).cpu())
        if on_clips:
            on_clips(done, len(paths))
    return zero_shot(torch.cat(audio), clap.embed_text([prompt.format(name) for name in classes]), truth)


def accept_conditioner(name: str, accuracy: float, tolerance: float = 0.01) -> None:
    """Raise ValueError unless the zero-shot accuracy on ESC-50 is the published one, within the tolerance."""
    published = ESC50_ACCURACY[name]
    if not abs(accuracy - published) <= tolerance:
        raise ValueError(
            f"{name} classifies {accuracy:.1%} of ESC-50, published are {published:.1%}: its front end, prompts or "
            "weights are not the published ones, so no model is trained on its embeddings"
        )


def _waveforms(items: list[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([item["waveform"] for item in items])
