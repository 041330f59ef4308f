"""Scores of two sets of clips: every number of `metrics` with its interval and with what it is to be held against.

The interval is of other generated clips of the same sort (`bootstrap_interval`). The floor of a distance is what real
clips score against other real ones. Halves of the reference are all there is for that, and distances depend on how many
clips they see: `same_size` is the value at the floor's size, and those two may be compared.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from refined_ldm.evaluation.metrics import (
    bootstrap_interval,
    clap_score,
    floor,
    found_at_k,
    frechet_distance,
    frechet_infinity,
    inception_score,
    kernel_distance,
    kl_divergence,
    recall_at_k,
    zero_shot,
)

DRAWS = 100  # sets of clips, for the interval of a distance
SPLITS = 10  # published inception scores are the mean over so many parts of the clips
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
    low: float  # 95 % of what other clips of the same sort would give
    high: float
    same_size: float | None  # distances: the value for as few clips as the floor is of
    floor: float | None  # what it is to be held against
    floor_of: str  # what that is
    clips: int  # generated ones that were counted


@dataclass(frozen=True)
class FolderEmbeddings:
    """The clips of one folder, heard."""

    names: list[str]
    rows: list[np.ndarray]  # (K, D) of each clip; K = 1 but for VGGish
    classes: np.ndarray | None  # (n, C) probabilities

    def together(self, clips=None):
        """All rows of the clips with these numbers, or of all clips."""
        clips = range(len(self.rows)) if clips is None else np.ravel(clips)
        return np.concatenate([self.rows[int(i)] for i in clips])

    def map(self, change):
        """The same clips with every (K, D) changed."""
        return FolderEmbeddings(self.names, [change(rows) for rows in self.rows], self.classes)


def main_directions(rows, k):
    """The k main directions of rows (n, D) -> (D, k), those of `frechet_distance(a, rows, pca=k)`."""
    return np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][:k].T


def projection(rows, k):
    """A function from (n, D) to (n, k), onto the main directions of `rows`; with k = None it changes nothing."""
    axes = main_directions(rows, k) if k else None
    return lambda x: x @ axes if k else x


# Each of these returns what Score holds after the metric's name.


def _distance(distance, generated, reference, pca, seed):
    def between(a, b):
        onto = projection(b, pca)
        return distance(onto(a), onto(b))

    n, half = len(generated.rows), len(reference.rows) // 2
    whole = reference.together()
    onto = projection(whole, pca)
    near, aim = generated.map(onto), onto(whole)  # projected once: the reference stays the same in all draws
    interval = bootstrap_interval(lambda some: distance(near.together(some), aim), np.arange(n), resamples=DRAWS,
                                  seed=seed, centre=True)  # fmt: skip
    few, rng, numbers = min(n, half), np.random.default_rng(seed), np.arange(len(reference.rows))[:, None]

    def made(_, others):
        return between(generated.together(rng.permutation(n)[:few]), reference.together(others))

    def real(some, others):
        return between(reference.together(some[:few]), reference.together(others))

    try:
        values = (floor(numbers, which, seed=seed) for which in (made, real))
        floors = (*values, f"{few} real clips against {half} others")
    except ValueError as fault:
        floors = None, None, f"none: {fault}"
    return distance(near.together(), aim), *interval, *floors, n


def _classes(heard):
    if heard.classes is None:
        raise ValueError("needs an embedding that names classes: panns")
    return heard.classes


def _kl_divergence(generated, reference, seed):
    q, p = _classes(generated), _classes(reference)
    if any(len(set(heard.names)) < len(heard.names) for heard in (generated, reference)):
        raise ValueError("needs names that differ in more than their endings")
    number = {name: i for i, name in enumerate(reference.names)}
    pairs = [(number[name], i) for i, name in enumerate(generated.names) if name in number]
    if len(pairs) < 2:
        raise ValueError("needs 2 or more generated files that are named as their references are")
    p, q = p[[i for i, _ in pairs]], q[[i for _, i in pairs]]
    each = [kl_divergence(p[i : i + 1], q[i : i + 1]) for i in range(len(pairs))]
    chance = kl_divergence(np.roll(p, len(p) // 2, axis=0), q)
    interval = bootstrap_interval(np.mean, each, seed=seed)
    return kl_divergence(p, q), *interval, None, chance, "chance: the references of others", len(pairs)


def _inception_score(generated, reference, splits, seed):
    rng = np.random.default_rng(seed)
    p, own = (rng.permutation(_classes(heard)) for heard in (generated, reference))
    if min(len(p), len(own)) < 2 * splits:
        raise ValueError(f"needs {2 * splits} clips or more in both folders")
    score = partial(inception_score, splits=splits)
    interval = bootstrap_interval(score, p, resamples=DRAWS, seed=seed, centre=True)
    return score(p), *interval, None, score(own), f"the reference's own, {len(own)} clips", len(p)


def _cosines(audio, text):
    """(n, D), (n, D) -> (n, n), captions x clips."""
    if text is None or len(text) < 2:
        raise ValueError("needs captions of 2 clips or more and an embedding that reads them: tiny-gpt2, ms-clap-2023 "
                         "or laion-clap")  # fmt: skip
    return zero_shot(text, audio).scores


def _clap_score(audio, text, seed):
    cosine = _cosines(audio, text)
    own, n = np.diag(cosine), len(cosine)
    chance = (cosine.sum() - own.sum()) / (n * (n - 1))
    interval = bootstrap_interval(np.mean, own, seed=seed)
    return clap_score(audio, text), *interval, None, float(chance), "chance: the captions of others", n


def _recall(audio, text, k, seed):
    cosine = _cosines(audio, text)
    if k >= len(cosine):
        raise ValueError(f"needs captions of {k + 1} clips or more")
    interval = bootstrap_interval(np.mean, found_at_k(cosine, k), seed=seed)
    return recall_at_k(text, audio, k), *interval, None, k / len(cosine), "chance", len(cosine)


def count_scores(generated, reference, captioned, text, pca, seed, tell):
    """Two FolderEmbeddings -> all Score that can be counted, {metric: what it needs} of the others.

    captioned: the numbers of the generated clips that `text`, the embeddings (n, D) of captions or None, belongs to;
    pca: dimensions of the Frechet distances, or None. tell() is called after each.
    """
    g, r = generated, reference
    means = [heard.map(lambda rows: rows.mean(axis=0, keepdims=True)) for heard in (g, r)]
    audio = means[0].together(captioned) if text is not None else None
    ways = {
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
            scores.append(Score(metric, *ways[metric]()))
        except ValueError as fault:
            left_out[metric] = str(fault)
        tell()
    return tuple(scores), left_out
