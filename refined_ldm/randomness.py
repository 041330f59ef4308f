"""Random numbers that depend on what they are for: training on (seed, step), sampling on (seed, caption) alone."""

import hashlib
from collections.abc import Callable, Sequence

import torch


def step_seed(seed: int, index: int) -> int:
    """The seed of all randomness of training step `index`; neighbouring steps get distant seeds."""
    return (seed * 1_000_003 + index) * 2_654_435_761 % 2**63


class RankGenerator(torch.Generator):
    """The generator of process `rank` of `world_size`, each of which has an equal part of the batch."""

    def __new__(cls, rank: int, world_size: int):
        return super().__new__(cls)

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size


def draw(
    make: Callable[..., torch.Tensor], shape: tuple[int, ...], generator: torch.Generator | None = None
) -> torch.Tensor:
    """make(shape, generator=generator) -> a random tensor whose first axis is the batch.

    With a `RankGenerator` the tensor is made for the whole batch and the rank's own rows are returned: all processes
    together have the numbers that one process would have drawn.
    """
    world_size = getattr(generator, "world_size", 1)
    if world_size == 1:
        return make(shape, generator=generator)
    return make((world_size * shape[0], *shape[1:]), generator=generator).chunk(world_size)[generator.rank]


def caption_generators(captions: Sequence[str], seed: int | str) -> list[torch.Generator]:
    """A generator for each caption, seeded by (seed, caption, number of equal captions before it)."""
    generators, seen = [], {}
    for caption in captions:
        copy = seen[caption] = seen.get(caption, -1) + 1
        digest = hashlib.sha256(f"{seed}/{copy}/{caption}".encode()).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
    return generators
