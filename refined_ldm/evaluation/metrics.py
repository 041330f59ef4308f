"""Metrics: distances between sets of embeddings, agreement with captions, and their confidence intervals.

Every function takes numpy arrays or torch tensors with one clip a row and computes in float64. Two functions say what a
value means: `real_vs_real` gives the distance between two halves of the real clips, `bootstrap_interval` how much a
value varies from one draw of clips to another.

Notebook: 05
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import eigh
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax
from scipy.stats import beta

from refined_ldm.base.integers import whole, whole_seed


def as_rows(x: ArrayLike, name: str) -> np.ndarray:
    """An array or tensor -> (n, d) float64 array; raises ValueError unless it is a matrix of finite values."""
    if hasattr(x, "detach"):  # a torch tensor on any device, in any precision
        x = x.detach().cpu().double().numpy()
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"{name} must be (n, d) with one clip a row, got {x.shape}")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if bad.size:
        raise ValueError(f"{name} has {bad.size} rows with non-finite values, the first is {bad[0]}: leave them out")
    return x


def _same_width(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = as_rows(a, "a"), as_rows(b, "b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must be of the same width, got {a.shape} and {b.shape}")
    return a, b


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = _same_width(a, b)
    if len(a) != len(b):
        raise ValueError(f"row i of a belongs to row i of b, got {len(a)} and {len(b)} rows")
    return a, b


# Distances between two sets of embeddings: is the generated sound like the real sound, as a whole?


def frechet_distance(a: ArrayLike, b: ArrayLike, pca: int | None = None) -> float:
    """Distance between the Gaussians fitted to a (n, d) and to b (m, d), the reference (Heusel et al. 2017, eq. 6).

        |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    `pca=k` first projects both onto the k principal components of b: with fewer clips than dimensions the covariances
    are mostly noise. The estimate is biased upwards, more so with fewer clips: compare sets of the same size only.
    Raises ValueError for sets of less than 2 clips or of different widths.

    Notebook: 05
    """
    a, b = _same_width(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs 2 clips or more, got {len(a)} and {len(b)}")
    shift = b.mean(axis=0)
    a, b = a - shift, b - shift
    if pca is not None:
        pca = whole(f"pca, for a reference of {b.shape},", pca, 1, min(b.shape))
        width = b.shape[1]
        directions = eigh(b.T @ b, subset_by_index=(width - pca, width - 1))[1]  # (d, k)
        a, b = a @ directions, b @ directions
    # With C = R'R (R from the QR decomposition of the centred rows), the eigenvalues of (C_a C_b)^(1/2) are the
    # singular values of R_a R_b': no matrix square root, and exact when there are fewer clips than dimensions.
    mean = a.mean(axis=0)
    root_a = np.linalg.qr(a - mean, mode="r") / np.sqrt(len(a) - 1)
    root_b = np.linalg.qr(b, mode="r") / np.sqrt(len(b) - 1)
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return float(max(0.0, mean @ mean + (root_a**2).sum() + (root_b**2).sum() - 2 * overlap))


def frechet_infinity(a: ArrayLike, b: ArrayLike, pca: int | None = None, sizes: int = 15, seed: int = 0) -> float:
    """The Frechet distance extrapolated to infinitely many clips in a: a line in 1/n through random subsets of a.

    Chong & Forsyth 2020; for audio Gui et al. 2024. Subsets have n/4 to n clips; b is always whole and keeps its bias.
    """
    a, b = _same_width(a, b)
    rng, sizes = np.random.default_rng(whole_seed(seed)), whole("sizes", sizes, 1)
    counts = np.unique(np.linspace(max(2, len(a) // 4), len(a), sizes).astype(int))
    if len(counts) < 2:
        raise ValueError(f"a line needs subsets of 2 or more sizes, got {len(a)} clips in `a` and sizes={sizes}")
    distances = [frechet_distance(a[rng.permutation(len(a))[:n]], b, pca) for n in counts]
    return float(np.polyfit(1 / counts, distances, 1)[1])


def kernel_distance(a: ArrayLike, b: ArrayLike, kernel: str = "polynomial") -> float:
    """Squared maximum mean discrepancy between a (n, d) and b (m, d), unbiased: 0 on average for equal distributions.

    "polynomial": (x.y / d + 1)^3, the KID of Binkowski et al. 2018. "gaussian": exp(-|x - y|^2 / 2 s^2) with s the
    median distance within the reference b, times 100: the KAD of Chung et al. 2025.

    Notebook: 05
    """
    a, b = _same_width(a, b)
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ValueError(f"the unbiased estimate needs 2 clips or more, got {n} and {m}")
    if kernel == "polynomial":
        scale, aa, bb, ab = 1.0, *((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    elif kernel == "gaussian":
        aa, bb, ab = squared_distances(a, a), squared_distances(b, b), squared_distances(a, b)
        width = np.median(np.sqrt(bb[np.triu_indices(m, k=1)]))
        if width == 0:
            raise ValueError("more than half of the reference's clips are the same: it has no kernel width")
        scale, aa, bb, ab = 100.0, *(np.exp(-d / (2 * width**2)) for d in (aa, bb, ab))
    else:
        raise ValueError(f'kernel must be "polynomial" or "gaussian", got {kernel!r}')
    within_a = (aa.sum() - np.trace(aa)) / (n * (n - 1))
    within_b = (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(scale * (within_a + within_b - 2 * ab.mean()))


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances (n, m) between the rows of x (n, d) and y (m, d)."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T, 0)


# Class probabilities of a classifier


def kl_divergence(p: ArrayLike, q: ArrayLike, eps: float = 1e-6) -> float:
    """Mean over pairs of KL(p_i || q_i): p (n, K) of real clips, q (n, K) of clips generated from their captions.

    As AudioGen (Kreuk et al. 2023) and AudioLDM define it, with `eps` added to q.
    """
    p, q = _paired(p, q)
    p, q = _probabilities(p, "p"), _probabilities(q, "q")
    return float((p * (np.log(p, out=np.zeros_like(p), where=p > 0) - np.log(q + eps))).sum(axis=1).mean())


def inception_score(p: ArrayLike, splits: int = 1) -> float:
    """exp(mean over clips of KL(p_i || mean p)), 1 to K: clear classes, and many of them (Salimans et al. 2016).

    Published figures are the mean over 10 `splits` of the shuffled clips; it is lower the smaller a split is.

    Notebook: 05
    """
    p = _probabilities(as_rows(p, "p"), "p")
    splits = whole("splits", splits, 1, len(p))

    def score(part: np.ndarray) -> float:
        log_ratio = np.log(np.maximum(part, 1e-300)) - np.log(np.maximum(part.mean(axis=0), 1e-300))
        return np.exp((part * log_ratio).sum(axis=1).mean())

    edges = [i * len(p) // splits for i in range(splits + 1)]  # as audioldm_eval cuts them
    return float(np.mean([score(p[start:end]) for start, end in pairwise(edges)]))


def _probabilities(p: np.ndarray, name: str) -> np.ndarray:
    if (p < 0).any() or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise ValueError(f"{name} must be probabilities: rows >= 0 that sum to 1, got sums near {p.sum(axis=1)[0]:.3g}")
    return p


# Joint embeddings: does the sound fit its caption?


def unit(x: ArrayLike, name: str) -> np.ndarray:
    """Rows of x (n, d) scaled to norm 1; raises ValueError for a row of zeros."""
    x = as_rows(x, name)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    if not norm.all():
        raise ValueError(f"{name} has a row of zeros, which has no direction")
    return x / norm


def clap_score(audio_embedding: ArrayLike, text_embedding: ArrayLike) -> float:
    """Mean cosine between each clip and its caption, both (n, D): -1 to 1.

    Notebook: 05
    """
    audio, text = _paired(audio_embedding, text_embedding)
    return float((unit(audio, "audio_embedding") * unit(text, "text_embedding")).sum(axis=1).mean())


def recall_at_k(queries: ArrayLike, candidates: ArrayLike, k: int) -> float:
    """Share of queries (n, D) whose own candidate, the same row of candidates (n, D), is among the k nearest by cosine.

    Captions as queries and clips as candidates give text-to-audio retrieval, swapped audio-to-text. Ties count as in
    random order, on average: an encoder that maps everything to one point scores k / n.
    """
    queries, candidates = _paired(queries, candidates)
    k = whole("k", k, 1, len(candidates))
    return float(found_at_k(unit(queries, "queries") @ unit(candidates, "candidates").T, k).mean())


def found_at_k(cosine: np.ndarray, k: int) -> np.ndarray:
    """Cosines (n, n), queries x candidates -> (n,) whether each row's own column is among its k nearest, 0 to 1."""
    own = np.diag(cosine)[:, None]
    nearer = (cosine > own + 1e-6).sum(axis=1)  # 1e-6: what float32 embeddings of the same caption may differ by
    as_near = (np.abs(cosine - own) <= 1e-6).sum(axis=1)  # itself included
    return ((k - nearer) / as_near).clip(0, 1)


class ZeroShot(NamedTuple):
    """The result of `zero_shot`."""

    accuracy: float  # share of clips given their own class; NaN without labels
    predictions: np.ndarray  # (n,) index of the nearest class
    scores: np.ndarray  # (n, K) cosines


def zero_shot(audio_embedding: ArrayLike, class_embedding: ArrayLike, labels: ArrayLike | None = None) -> ZeroShot:
    """Classify each clip (n, D) by the nearest class prompt (K, D); labels (n,) are indices of the true classes."""
    audio, classes = _same_width(audio_embedding, class_embedding)
    scores = unit(audio, "audio_embedding") @ unit(classes, "class_embedding").T
    predictions = scores.argmax(axis=1)
    accuracy = np.nan if labels is None else np.mean(predictions == np.asarray(labels).reshape(len(predictions)))
    return ZeroShot(float(accuracy), predictions, scores)


# A linear probe: are the captioned events in the sound?


def label_matrix(labels: Sequence[str | Sequence[str]], classes: Sequence[str]) -> np.ndarray:
    """Labels, one class name or a tuple of names a clip -> (n, K) bool, column k for classes[k].

    Raises ValueError for a label that is not among the classes.
    """
    column = {name: k for k, name in enumerate(classes)}
    matrix = np.zeros((len(labels), len(classes)), dtype=bool)
    for i, names in enumerate(labels):
        for name in [names] if isinstance(names, str) else names:
            if name not in column:
                raise ValueError(f"clip {i} is labelled {name!r}, which is not among the {len(classes)} classes")
            matrix[i, column[name]] = True
    return matrix


def class_recall(scores: ArrayLike, labels: ArrayLike) -> float:
    """Mean over clips of the share of a clip's m captioned classes among its m best scored classes.

    scores (n, K), higher is likelier; labels (n, K) bool with 1 or more true a row (`label_matrix`). With one class a
    clip this is accuracy. Ties count as in random order, on average: constant scores give chance, mean(m) / K.

    Notebook: 05
    """
    scores, labels = as_rows(scores, "scores"), as_rows(labels, "labels").astype(bool)
    if scores.shape != labels.shape or not labels.any(axis=1).all():
        raise ValueError(f"labels must be {scores.shape} with a true class in every row, got {labels.shape}")
    m = labels.sum(axis=1, keepdims=True)
    above = (scores[:, None, :] > scores[:, :, None]).sum(axis=2)  # (n, K): classes scored higher than this one
    tied = (scores[:, None, :] == scores[:, :, None]).sum(axis=2)  # itself included
    chosen = ((m - above) / tied).clip(0, 1)
    return float(((chosen * labels).sum(axis=1) / m[:, 0]).mean())


class LinearProbe:
    """Logistic regression on standardised embeddings.

    One class a clip: a softmax over the classes. `multi_label`: one binary regression per class, fitted together.
    `penalty` weighs half the squared weights against the mean log-loss (scikit-learn's C is 1 / (n penalty)).

    Notebook: 05
    """

    def __init__(self, classes: Sequence[str], multi_label: bool = False, penalty: float = 1e-2):
        self.classes, self.multi_label, self.penalty = tuple(classes), multi_label, penalty

    def fit(self, x: ArrayLike, labels: Sequence[str | Sequence[str]], max_iterations: int = 500) -> "LinearProbe":
        """Fit to embeddings x (n, d) and labels, a name or a tuple of names a clip, by L-BFGS from zero -> self.

        Raises ValueError for another number of labels, or several classes a clip without `multi_label`.
        """
        x, y = as_rows(x, "x"), label_matrix(labels, self.classes).astype(float)
        if len(x) != len(y):
            raise ValueError(f"expected one label for each clip, got {len(x)} clips and {len(y)} labels")
        if not self.multi_label and (y.sum(axis=1) != 1).any():
            raise ValueError("clips with several classes or none need LinearProbe(..., multi_label=True)")
        self.mean, self.std = x.mean(axis=0), x.std(axis=0)
        self.std[self.std < 1e-8] = 1.0  # a constant dimension
        x = (x - self.mean) / self.std
        shape = (x.shape[1] + 1, len(self.classes))

        def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weight, bias = flat.reshape(shape)[:-1], flat.reshape(shape)[-1]
            logits = x @ weight + bias
            if self.multi_label:
                loss = (np.logaddexp(0, logits) - y * logits).sum()
            else:
                loss = -(y * log_softmax(logits, axis=1)).sum()
            error = (self._link(logits) - y) / len(x)
            gradient = np.vstack([x.T @ error + self.penalty * weight, error.sum(axis=0)])
            return loss / len(x) + self.penalty / 2 * (weight**2).sum(), gradient.ravel()

        start, options = np.zeros(np.prod(shape)), {"maxiter": whole("max_iterations", max_iterations, 1)}
        found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
        self.weight, self.bias = found.x.reshape(shape)[:-1], found.x.reshape(shape)[-1]
        return self

    def logits(self, x: ArrayLike) -> np.ndarray:
        """Embeddings (n, d) -> scores (n, K) for `class_recall`."""
        return (as_rows(x, "x") - self.mean) / self.std @ self.weight + self.bias

    def probabilities(self, x: ArrayLike) -> np.ndarray:
        """Embeddings (n, d) -> (n, K): rows sum to 1, or with `multi_label` each class has its own probability."""
        return self._link(self.logits(x))

    def predict(self, x: ArrayLike, m: int = 1) -> list[tuple[str, ...]]:
        """Embeddings (n, d) -> for each clip its m likeliest class names, the likeliest first."""
        best = np.argsort(-self.logits(x), axis=1, kind="stable")[:, : whole("m", m, 1, len(self.classes))]
        return [tuple(self.classes[k] for k in row) for row in best]

    def _link(self, logits: np.ndarray) -> np.ndarray:
        return expit(logits) if self.multi_label else softmax(logits, axis=1)


# Confidence intervals and baselines


def bootstrap_interval(
    statistic: Callable[..., float],
    *arrays: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    centre: bool = False,
) -> tuple[float, float]:
    """Percentile interval (low, high) of statistic(*arrays) over other draws of the same number of clips (Efron 1979).

    Rows are drawn with replacement, the same of every array: `bootstrap_interval(class_recall, scores, labels)`.
    Repeated clips push a Frechet distance up; `centre` moves the percentiles so that their mean is the statistic:
    `bootstrap_interval(lambda a: frechet_distance(a, b), a, centre=True, resamples=100)`. Events that are absent from
    the sample have no weight: 200 right of 200 gives (1, 1), though another 200 may hold three that are wrong.

    Notebook: 05
    """
    arrays = [np.asarray(x.detach().cpu() if hasattr(x, "detach") else x) for x in arrays]
    n = len(arrays[0])
    if n < 2 or any(len(x) != n for x in arrays):
        raise ValueError(f"arrays must have the same number of rows, 2 or more, got {[len(x) for x in arrays]}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    rng, resamples = np.random.default_rng(whole_seed(seed)), whole("resamples", resamples, 1)
    rows = (rng.integers(n, size=n) for _ in range(resamples))
    draws = np.array([statistic(*(x[i] for x in arrays)) for i in rows])
    if centre:
        draws += statistic(*arrays) - draws.mean()
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def real_vs_real(
    reference: ArrayLike, metric: Callable[[np.ndarray, np.ndarray], float], splits: int = 10, seed: int = 0
) -> float:
    """The baseline of a perfect model: the mean of metric(half, other half) over random halves of real clips (n, d).

    Most metrics depend on the number of clips: give twice as many real clips as there are generated ones.

    Notebook: 05
    """
    reference = as_rows(reference, "reference")
    if len(reference) < 4:
        raise ValueError(f"two halves need 4 clips or more, got {len(reference)}")
    rng, half, splits = np.random.default_rng(whole_seed(seed)), len(reference) // 2, whole("splits", splits, 1)
    orders = (rng.permutation(len(reference)) for _ in range(splits))
    return float(np.mean([metric(reference[i[:half]], reference[i[half : 2 * half]]) for i in orders]))


def share(right: ArrayLike) -> dict[str, float]:
    """Results (n,) of 0 to 1 -> {"value", "low", "high", "clips"}: the mean and its 95 % interval.

    The interval is that of a binomial proportion (Clopper & Pearson 1934).
    """
    n, k = len(right), float(np.sum(right))
    low = beta.ppf(0.025, k, n - k + 1) if k > 0 else 0.0
    high = beta.ppf(0.975, k + 1, n - k) if k < n else 1.0
    return {"value": k / n, "low": float(low), "high": float(high), "clips": n}
