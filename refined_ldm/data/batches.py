"""Endless shuffled batches of a data set, each of which depends only on the seed and its number."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from refined_ldm.base.integers import whole, whole_seed


def collate(items: list[dict]) -> dict:
    """A batch: tensors are stacked ("waveform" (B, N)), every other key that all items have is a list of B values."""
    keys = [key for key in items[0] if all(key in item for item in items)]
    batch = {key: [item[key] for item in items] for key in keys}
    return {k: torch.stack(v) if isinstance(v[0], torch.Tensor) else v for k, v in batch.items()}


class StepSampler:
    """Endless batches of indices; the k-th depends only on (seed, k), so a run resumes at `start_step`.

    Shuffled epochs follow one another without a gap, each holding every index once. A batch may span two epochs, or
    many when the data set is smaller than a batch.
    """

    drop_last = True  # every batch is full; Accelerate asks

    def __init__(self, size: int, batch_size: int, seed: int = 0, start_step: int = 0):
        self.size = whole("size", size, 1)
        self.batch_size = whole("batch_size", batch_size, 1)
        self.seed = whole_seed(seed)
        self.start_step = whole("start_step", start_step, 0)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start_step * self.batch_size, self.size)
        waiting = self._shuffled(epoch)[position:]
        while True:
            while len(waiting) < self.batch_size:
                epoch += 1
                waiting = waiting + self._shuffled(epoch)
            yield waiting[: self.batch_size]
            waiting = waiting[self.batch_size :]

    def _shuffled(self, epoch: int) -> list[int]:
        return np.random.default_rng((self.seed, epoch)).permutation(self.size).tolist()


def loader(
    dataset: Dataset,
    batch_size: int,
    seed: int = 0,
    start_step: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Endless batches of `dataset`; the k-th is the same from any `start_step`.

    num_workers: processes that load ahead; pin_memory: a GPU copies from such memory while it computes
    (`devices.feeding` gives both).
    """
    sampler, workers = StepSampler(len(dataset), batch_size, seed, start_step), whole("num_workers", num_workers, 0)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers, pin_memory=pin_memory)
