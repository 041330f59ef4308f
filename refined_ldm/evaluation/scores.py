"""Scores of two sets of clips: every metric of `metrics` with its confidence interval and its baseline.

The interval is over draws of the generated clips (`bootstrap_interval`). The baseline of a distance is the
distance between two halves of the reference (`real_vs_real`). Distances depend on the number of clips: `same_size` is
the distance at the size of the baseline, and these two can be compared.

Notebook: 05
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from refined_ldm.evaluation.metrics import (
    bootstrap_interval,
    clap_score,
    found_at_k,
    frechet_distance,
    frechet_infinity,
    inception_score,
    kernel_distance,
    kl_divergence,
    real_vs_real,
    recall_at_k,
    zero_shot,
)

DRAWS = 100  # resamples for the interval of a distance
SPLITS = 10  # published inception scores are means over 10 parts of the clips
RANKS = (1, 5, 10)
METRICS = {  # in the order of the table
    "frechet_distance": "Frechet distance",
    "frechet_infinity": "Frechet, infinite n",
    "kernel_polynomial": "kernel distance, polynomial",
    "kernel_gaussian": "kernel distance, gaussian",
    "kl_divergence": "KL divergence",
    "inception_score": "inception score",
    "inception_score_parts": f"inception score, {SPLITS} parts",
    "clap_score": "CLAP score",
    **{f"recall_at_{k}": f"recall at {k}" for k in RANKS},
}


@dataclass(frozen=True)
class Score:
    """One line of the table."""

    metric: str  # a key of METRICS
    value: float
    low: float  # 95 % bootstrap interval
    high: float
    same_size: float | None  # of distances: the value at the number of clips of the baseline
    baseline: float | None
    baseline_of: str  # its definition, or the reason why there is none
    clips: int  # generated clips that were used


@dataclass(frozen=True)
class FolderEmbeddings:
    """The embeddings of the clips of one folder."""

    names: list[str]
    rows: list[np.ndarray]  # (K, D) for each clip; K = 1 except for VGGish, which has a row for each window
    classes: np.ndarray | None  # (n, C) probabilities

    def stacked(self, clips: Sequence[int] | None = None) -> np.ndarray:
        """The rows (n, D) of the clips with these indices; None: of all clips."""
        clips = range(len(self.rows)) if clips is None else np.ravel(clips)
        return np.concatenate([self.rows[int(i)] for i in clips])

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "FolderEmbeddings":
        """The same clips with a function applied to the rows (K, D) of each."""
        return FolderEmbeddings(self.names, [function(rows) for rows in self.rows], self.classes)


def principal_components(rows: np.ndarray, k: int) -> np.ndarray:
    """The first k principal components of rows (n, D) -> (D, k), as in `frechet_distance(a, rows, pca=k)`."""
    return np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][:k].T


def projection(rows: np.ndarray, k: int | None) -> Callable[[np.ndarray], np.ndarray]:
    """The function (n, D) -> (n, k) onto the principal components of `rows`; the identity for k = None."""
    axes = principal_components(rows, k) if k else None
    return lambda x: x @ axes if k else x


# Each of the following functions returns the fields of Score after `metric`.

Fields = tuple[float, float, float, float | None, float | None, str, int]


def _distance(
    distance: Callable[[np.ndarray, np.ndarray], float],
    generated: FolderEmbeddings,
    reference: FolderEmbeddings,
    pca: int | None,
    seed: int,
) -> Fields:
    def between(a: np.ndarray, b: np.ndarray) -> float:
        onto = projection(b, pca)
        return distance(onto(a), onto(b))

    n, half = len(generated.rows), len(reference.rows) // 2
    whole = reference.stacked()
    onto = projection(whole, pca)
    projected, target = generated.map(onto), onto(whole)  # projected once: the reference is the same in all draws

    def drawn(clips: np.ndarray) -> float:
        return distance(projected.stacked(clips), target)

    interval = bootstrap_interval(drawn, np.arange(n), resamples=DRAWS, seed=seed, centre=True)
    few, rng, indices = min(n, half), np.random.default_rng(seed), np.arange(len(reference.rows))[:, None]

    def generated_vs_half(_: np.ndarray, second: np.ndarray) -> float:
        return between(generated.stacked(rng.permutation(n)[:few]), reference.stacked(second))

    def half_vs_half(first: np.ndarray, second: np.ndarray) -> float:
        return between(reference.stacked(first[:few]), reference.stacked(second))

    try:
        values = (real_vs_real(indices, metric, seed=seed) for metric in (generated_vs_half, half_vs_half))
        baseline = (*values, f"{few} real clips against {half} others")
    except ValueError as fault:
        baseline = None, None, f"none: {fault}"
    return distance(projected.stacked(), target), *interval, *baseline, n


def _classes(embeddings: FolderEmbeddings) -> np.ndarray:
    if embeddings.classes is None:
        raise ValueError("needs an embedding with class probabilities: panns")
    return embeddings.classes


def _kl_divergence(generated: FolderEmbeddings, reference: FolderEmbeddings, seed: int) -> Fields:
    q, p = _classes(generated), _classes(reference)
    if any(len(set(side.names)) < len(side.names) for side in (generated, reference)):
        raise ValueError("needs names that differ in more than their endings")
    index = {name: i for i, name in enumerate(reference.names)}
    pairs = [(index[name], i) for i, name in enumerate(generated.names) if name in index]
    if len(pairs) < 2:
        raise ValueError("needs 2 or more generated files with the names of their references")
    p, q = p[[i for i, _ in pairs]], q[[i for _, i in pairs]]
    each = [kl_divergence(p[i : i + 1], q[i : i + 1]) for i in range(len(pairs))]
    chance = kl_divergence(np.roll(p, len(p) // 2, axis=0), q)
    interval = bootstrap_interval(np.mean, each, seed=seed)
    return kl_divergence(p, q), *interval, None, chance, "chance: references of other clips", len(pairs)


def _inception_score(generated: FolderEmbeddings, reference: FolderEmbeddings, splits: int, seed: int) -> Fields:
    rng = np.random.default_rng(seed)
    p, real = (rng.permutation(_classes(side)) for side in (generated, reference))
    if min(len(p), len(real)) < 2 * splits:
        raise ValueError(f"needs {2 * splits} clips or more in both folders")
    score = partial(inception_score, splits=splits)
    interval = bootstrap_interval(score, p, resamples=DRAWS, seed=seed, centre=True)
    return score(p), *interval, None, score(real), f"the reference, {len(real)} clips", len(p)


def _cosines(audio: np.ndarray, text: np.ndarray | None) -> np.ndarray:
    """Embeddings of clips (n, D) and captions (n, D) -> (n, n), captions x clips."""
    if text is None or len(text) < 2:
        raise ValueError(
            "needs captions of 2 clips or more and an embedding of captions: tiny-gpt2, ms-clap-2023 or laion-clap"
        )
    return zero_shot(text, audio).scores


def _clap_score(audio: np.ndarray, text: np.ndarray | None, seed: int) -> Fields:
    cosine = _cosines(audio, text)
    own, n = np.diag(cosine), len(cosine)
    chance = (cosine.sum() - own.sum()) / (n * (n - 1))
    interval = bootstrap_interval(np.mean, own, seed=seed)
    return clap_score(audio, text), *interval, None, float(chance), "chance: captions of other clips", n


def _recall(audio: np.ndarray, text: np.ndarray | None, k: int, seed: int) -> Fields:
    cosine = _cosines(audio, text)
    if k >= len(cosine):
        raise ValueError(f"needs captions of {k + 1} clips or more")
    interval = bootstrap_interval(np.mean, found_at_k(cosine, k), seed=seed)
    return recall_at_k(text, audio, k), *interval, None, k / len(cosine), "chance", len(cosine)


def compute_scores(
    generated: FolderEmbeddings,
    reference: FolderEmbeddings,
    captioned: Sequence[int],
    text: np.ndarray | None,
    pca: int | None,
    seed: int,
    on_metric: Callable[[], None],
) -> tuple[tuple[Score, ...], dict[str, str]]:
    """All scores that can be computed, and {metric: the reason} for the others.

    captioned: indices of the generated clips whose captions have the embeddings `text` (n, D), or None; pca: dimensions
    of the Frechet distances, or None. on_metric() is called after each metric.
    """
    g, r = generated, reference
    means = [side.map(lambda rows: rows.mean(axis=0, keepdims=True)) for side in (g, r)]
    audio = means[0].stacked(captioned) if text is not None else None
    functions = {
        "frechet_distance": partial(_distance, frechet_distance, g, r, pca, seed),
        "frechet_infinity": partial(_distance, partial(frechet_infinity, seed=seed), g, r, pca, seed),
        "kernel_polynomial": partial(_distance, kernel_distance, *means, None, seed),
        "kernel_gaussian": partial(_distance, partial(kernel_distance, kernel="gaussian"), *means, None, seed),
        "kl_divergence": partial(_kl_divergence, g, r, seed),
        "inception_score": partial(_inception_score, g, r, 1, seed),
        "inception_score_parts": partial(_inception_score, g, r, SPLITS, seed),
        "clap_score": partial(_clap_score, audio, text, seed),
        **{f"recall_at_{k}": partial(_recall, audio, text, k, seed) for k in RANKS},
    }
    scores, left_out = [], {}
    for metric in METRICS:
        try:
            scores.append(Score(metric, *functions[metric]()))
        except ValueError as fault:
            left_out[metric] = str(fault)
        on_metric()
    return tuple(scores), left_out
