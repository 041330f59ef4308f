"""Another conditioner for a trained U-Net: only the layer that the caption enters is new, and it can be fitted.

AudioLDM's U-Net hears a caption as film = W c + b, and nowhere else. Where the new conditioner's embeddings of some
captions are known beside the old one's, W and b are chosen so that each caption keeps the film vector it had.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FilmFit:
    """A fitted layer, and what it leaves of the film vectors, as a share of their spread over the captions."""

    weight: torch.Tensor  # (E, D)
    bias: torch.Tensor  # (E,)
    captions: int
    residual: float  # 0: every caption keeps its film vector; 1: all get the same
    left_out: float  # the same for each caption under the layer fitted to the others: what to expect of new captions


def fit_film(embedding, film):
    """New embeddings (N, D) and the film vectors (N, E) of the same N captions -> FilmFit.

    Ridge regression (Hoerl & Kennard 1970), as strong as leaves the least error when every caption is in turn left out;
    that error has a closed form (Allen's PRESS, 1974). Where the film vectors are an affine function of the embeddings,
    that is no ridge to speak of and the fit is exact.
    """
    if len(embedding) != len(film) or len(embedding) < 3:
        raise ValueError(f"give at least 3 captions, the same for both: got {len(embedding)} and {len(film)}")
    c, y = embedding.detach().double().cpu(), film.detach().double().cpu()
    c_mean, y_mean = c.mean(0), y.mean(0)
    u, s, vt = torch.linalg.svd(c - c_mean, full_matrices=False)  # (N, K), (K,), (K, D)
    along = u.T @ (y - y_mean)  # (K, E)
    spread = (y - y_mean).norm()

    best = None
    for strength in 10.0 ** torch.arange(-12, 1, dtype=torch.double):
        kept = s**2 / (s**2 + strength * s[0] ** 2)  # of each direction
        error = (y - y_mean) - u @ (kept[:, None] * along)  # (N, E)
        leverage = (u**2 * kept).sum(1) + 1 / len(c)
        left_out = (error / (1 - leverage).clamp(min=1e-14)[:, None]).norm() / spread
        if best is None or left_out < best[0]:
            best = left_out, error.norm() / spread, kept
    left_out, residual, kept = best
    weight = (vt.T @ ((kept / s.clamp(min=1e-300))[:, None] * along)).T
    bias = y_mean - weight @ c_mean
    return FilmFit(weight.float(), bias.float(), len(c), float(residual), float(left_out))
