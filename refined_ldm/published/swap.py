"""Another conditioner for a trained U-Net: only the layer that the caption enters is new, and it can be fitted.

AudioLDM's U-Net receives a caption embedding c as film = W c + b, and nowhere else. From the old and the new embeddings
of some captions, W and b are chosen so that each caption keeps its film vector.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FilmFit:
    """A fitted layer and its errors, relative to the spread of the film vectors over the captions."""

    weight: torch.Tensor  # (E, D)
    bias: torch.Tensor  # (E,)
    captions: int
    residual: float  # 0: every caption keeps its film vector; 1: all get the same
    loo_error: float  # leave-one-out error: what to expect of new captions


def fit_film(embedding: torch.Tensor, film: torch.Tensor) -> FilmFit:
    """Fit film = W c + b by ridge regression (Hoerl & Kennard 1970) to N captions.

    embedding: (N, D) new embeddings, film: (N, E) film vectors of the same captions. The ridge strength minimises the
    leave-one-out error, which has a closed form (PRESS, Allen 1974). If the film vectors are an affine function of the
    embeddings, the fit is exact. Raises ValueError for fewer than 3 captions.
    """
    if len(embedding) != len(film) or len(embedding) < 3:
        raise ValueError(f"give at least 3 captions, the same for both: got {len(embedding)} and {len(film)}")
    c, y = embedding.detach().cpu().double(), film.detach().cpu().double()
    c_mean, y_mean = c.mean(0), y.mean(0)
    u, s, vt = torch.linalg.svd(c - c_mean, full_matrices=False)  # (N, K), (K,), (K, D)
    along = u.T @ (y - y_mean)  # (K, E)
    spread = (y - y_mean).norm()

    best = None
    for strength in 10.0 ** torch.arange(-12, 1, dtype=torch.double):
        kept = s**2 / (s**2 + strength * s[0] ** 2)  # of each direction
        error = (y - y_mean) - u @ (kept[:, None] * along)  # (N, E)
        leverage = (u**2 * kept).sum(1) + 1 / len(c)
        loo_error = (error / (1 - leverage).clamp(min=1e-14)[:, None]).norm() / spread
        if best is None or loo_error < best[0]:
            best = loo_error, error.norm() / spread, kept
    loo_error, residual, kept = best
    weight = (vt.T @ ((kept / s.clamp(min=1e-300))[:, None] * along)).T
    bias = y_mean - weight @ c_mean
    return FilmFit(weight.float(), bias.float(), len(c), float(residual), float(loo_error))
