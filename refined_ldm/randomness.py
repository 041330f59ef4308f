"""The random numbers of one training step: from (seed, step) alone, however many processes rank its batch."""

import torch


def step_seed(seed, index):
    """A seed for all randomness of one step, far from those of its neighbours."""
    return (seed * 1_000_003 + index) * 2_654_435_761 % 2**63


class RankGenerator(torch.Generator):
    """The generator of a process that has the `rank`-th of `world_size` equal parts of a batch."""

    def __new__(cls, rank, world_size):
        return super().__new__(cls)

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size


def draw(make, shape, generator=None):
    """make(shape, generator=generator), the first axis of which is the batch's.

    For a share of the batch it is made for the whole batch and the rank's own part is kept, so that all processes together have
    the numbers that one process would have drawn.
    """
    world_size = getattr(generator, "world_size", 1)
    if world_size == 1:
        return make(shape, generator=generator)
    return make((world_size * shape[0], *shape[1:]), generator=generator).chunk(world_size)[generator.rank]
