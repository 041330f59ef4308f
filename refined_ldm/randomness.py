"""The random numbers of one training step: from (seed, step) alone, however many processes share its batch."""

import torch


def step_seed(seed, index):
    """A seed for all randomness of one step, far from those of its neighbours."""
    return (seed * 1_000_003 + index) * 2_654_435_761 % 2**63


class ShareGenerator(torch.Generator):
    """The generator of a process that has the `share`-th of `shares` equal parts of a batch."""

    def __new__(cls, share, shares):
        return super().__new__(cls)

    def __init__(self, share, shares):
        self.share, self.shares = share, shares


def draw(make, shape, generator=None):
    """make(shape, generator=generator), the first axis of which is the batch's.

    For a share of the batch it is made for the whole batch and the share is kept, so that all processes together have
    the numbers that one process would have drawn.
    """
    shares = getattr(generator, "shares", 1)
    if shares == 1:
        return make(shape, generator=generator)
    return make((shares * shape[0], *shape[1:]), generator=generator).chunk(shares)[generator.share]
