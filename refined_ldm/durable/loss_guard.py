"""A loss that jumps is reported at once."""

import math
from collections import deque
from statistics import median


class SpikeWatch:
    """How far a loss stands out from those of the last 100 steps, told once until it has come back."""

    def __init__(self, factor=3.0, least=20):
        self.factor, self.least, self.seen, self.out = factor, least, deque(maxlen=100), False

    def __call__(self, loss):
        """-> loss / median of the earlier ones if that has come above `factor` and there were enough, else None."""
        usual = median(self.seen) if len(self.seen) >= self.least else math.inf
        before, self.out = self.out, loss > self.factor * usual > 0
        self.seen.append(loss)
        return loss / usual if self.out and not before else None
