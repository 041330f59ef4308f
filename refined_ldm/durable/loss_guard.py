"""A loss that jumps is reported at once."""

import math
from collections import deque
from statistics import median


class SpikeWatch:
    """Compares each loss with the median of the last 100 steps; a spike is reported once, until the loss is back.

    factor: the smallest ratio to the median that is a spike. least: earlier losses needed before any is reported.
    """

    def __init__(self, factor: float = 3.0, least: int = 20):
        self.factor, self.least, self.seen, self.out = factor, least, deque(maxlen=100), False

    def __call__(self, loss: float) -> float | None:
        """Add a loss -> its ratio to the median of the earlier ones at the beginning of a spike, else None."""
        usual = median(self.seen) if len(self.seen) >= self.least else math.inf
        before, self.out = self.out, loss > self.factor * usual > 0
        self.seen.append(loss)
        return loss / usual if self.out and not before else None
