"""The matcher: how well does a latent fit a caption? It chooses among candidates before they are decoded.

CLAP puts sound and caption into one vector each and compares the two, and in one vector "twice" is near "three times".
A matching head looks at both at once (image-text matching of ALBEF, Li et al. 2021): the caption's embedding asks the
frames of the latent, and what they answer is summed up, so that it can count. It reads latents, so that only the chosen
candidate goes through VAE and vocoder.

Notebook: 09
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refined_ldm.base.integers import cast_numbers
from refined_ldm.weights import load_into, read_weights, save_weights

MATCHER_FILE = "matcher.safetensors"


@dataclass(frozen=True)
class MatcherConfig:
    """Sizes of a matcher. channels, frames, bins: C, T and F of the latents; embedding_dim: D of the conditioner."""

    channels: int = 8
    frames: int = 64
    bins: int = 16
    embedding_dim: int = 256
    width: int = 128
    layers: int = 3  # of the transformer over frames
    questions: int = 8  # that a caption asks

    def __post_init__(self):
        cast_numbers(self)
        if min(vars(self).values()) < 1 or self.width % 4:
            raise ValueError(f"sizes of a matcher must be positive and its width a multiple of 4, got {self}")


class Matcher(nn.Module):
    """Scaled latents (B, C, T, F), embeddings (P, D) of captions, the latent of each (P,) -> logits (P,) of a fit."""

    def __init__(self, config: MatcherConfig):
        super().__init__()
        self.config = config
        width, channels = config.width, (config.channels, 48, 64, 96)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=(1, 1 + (k > 0)), padding=1) for k, (a, b) in enumerate(pairwise(channels))
        )  # the second and the third halve the bins
        self.norms = nn.ModuleList(nn.GroupNorm(8, channel) for channel in channels[1:])
        self.projection = nn.Linear(channels[-1] * -(-config.bins // 4), width)
        self.place = nn.Parameter(0.02 * torch.randn(config.frames, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        wide = 2 * width
        self.caption = nn.Sequential(nn.Linear(config.embedding_dim, wide), nn.GELU(), nn.Linear(wide, wide))
        self.query = nn.Linear(wide, config.questions * width)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.answer = nn.Linear(width, width // 4)
        self.decide = nn.Sequential(
            nn.Linear(config.questions * 3 * (width // 4) + 2 * width, 4 * width), nn.GELU(),
            nn.Linear(4 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1),
        )  # fmt: skip

    def frames(self, latent: Tensor) -> Tensor:
        """Latents (B, C, T, F) -> features of their frames (B, T, width)."""
        h = latent
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            h = F.silu(norm(convolution(h)))
        h = self.projection(h.transpose(1, 2).flatten(2)) + self.place
        for layer in self.layers:
            h = layer(h)
        return self.norm(h)

    def compare(self, frames: Tensor, row: Tensor, embedding: Tensor) -> Tensor:
        """Features (B, T, width) and embeddings (P, D) of captions for latents `row` (P,) -> logits (P,)."""
        caption = self.caption(embedding * self.config.embedding_dim**0.5)
        questions = self.query(caption).unflatten(1, (self.config.questions, -1))  # (P, questions, width)
        keys, values = self.key(frames)[row], self.answer(F.gelu(self.value(frames)))[row]
        gate = torch.sigmoid(torch.einsum("ptw,pqw->pqt", keys, questions) / self.config.width**0.5)
        time = torch.linspace(-1, 1, frames.shape[1], device=frames.device)
        total = torch.einsum("pqt,ptv->pqv", gate, values)  # a sum, not a mean: it counts
        early_or_late = torch.einsum("pqt,ptv->pqv", gate * time, values)
        mean = total / gate.sum(2, keepdim=True).clamp(min=1e-3)
        answers = [total.flatten(1) / 8, early_or_late.flatten(1) / 8, mean.flatten(1)]
        return self.decide(torch.cat([*answers, caption], dim=1))[:, 0]

    def forward(self, latent: Tensor, row: Tensor, embedding: Tensor) -> Tensor:
        return self.compare(self.frames(latent), row, embedding)

    def rank(self, latent: Tensor, embedding: Tensor, candidates: int) -> Tensor:
        """Rank every `candidates` of the latents by their fit to embeddings -> rows (candidates, B), the best first."""
        rows = torch.arange(len(latent), device=latent.device)
        fit = self(latent.float(), rows, embedding.float()).view(-1, candidates)
        order = fit.argsort(1, descending=True)
        return (order + candidates * torch.arange(len(fit), device=fit.device)[:, None]).T

    def fits(self, shape: Sequence[int], embedding_dim: int) -> bool:
        """Whether latents of this shape (C, T, F) and embeddings are of the sizes that the matcher was trained on."""
        c = self.config
        return (*shape, embedding_dim) == (c.channels, c.frames, c.bins, c.embedding_dim)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write weights and sizes as safetensors."""
        save_weights(path, self, self.config, dtype)

    @classmethod
    def load(cls, path: str | Path) -> "Matcher":
        """Read a file written by `save` -> the matcher in evaluation mode. Raises FileNotFoundError, ValueError."""
        state, metadata = read_weights(path)
        try:
            config = MatcherConfig(**metadata["config"])
        except (KeyError, TypeError) as fault:
            raise ValueError(f"{path} is no matcher of `refined-ldm train --matcher` ({fault})") from fault
        return load_into(cls(config), state, path).eval()
