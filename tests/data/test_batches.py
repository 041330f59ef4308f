"""A resumed run sees the batches it would have seen."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset

from refined_ldm.data.batches import StepSampler, collate, loader
from refined_ldm.data.captioned_audio import CaptionedAudio
from tests.support.recordings import record


def test_collate_stacks_waveforms_and_lists_the_rest():
    items = [{"waveform": torch.full((4,), i), "caption": str(i), "extra": i} for i in (1.0, 2.0)]
    del items[1]["extra"]
    batch = collate(items)
    assert batch.keys() == {"waveform", "caption"}
    assert batch["waveform"].shape == (2, 4) and batch["caption"] == ["1.0", "2.0"]


@pytest.mark.parametrize("size, batch_size", [(10, 3), (3, 8), (1, 4), (8, 8)])
def test_every_epoch_holds_every_index_once(size, batch_size):
    stream = [index for batch in islice(StepSampler(size, batch_size, seed=3), 5 * size) for index in batch]
    epochs = np.array(stream[: 5 * size]).reshape(5, size)
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    assert size < 3 or len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew


@pytest.mark.parametrize("start_step", [0, 1, 4, 17])
def test_a_resumed_run_goes_on_with_the_same_batches(start_step):
    whole = list(islice(StepSampler(10, 4, seed=1), 25))
    assert list(islice(StepSampler(10, 4, seed=1, start_step=start_step), 25 - start_step)) == whole[start_step:]
    assert list(islice(StepSampler(10, 4, seed=2), 25)) != whole


def test_the_loader_is_endless_and_the_same_with_workers(tmp_path):
    for name in "abc":
        record(tmp_path / f"{name}.wav", seconds=0.01, seed=ord(name))
    dataset = ConcatDataset([CaptionedAudio.from_folder(tmp_path, seconds=0.01)])
    alone = list(islice(loader(dataset, batch_size=4, seed=5), 6))
    helped = list(islice(loader(dataset, batch_size=4, seed=5, start_step=2, num_workers=1), 4))
    assert alone[0]["waveform"].shape == (4, 160)
    for a, b in zip(alone[2:], helped, strict=True):
        assert a["id"] == b["id"] and torch.equal(a["waveform"], b["waveform"])


def test_accelerate_takes_the_loader():
    accelerate = pytest.importorskip("accelerate")
    items = [{"waveform": torch.full((2,), float(i))} for i in range(3)]
    plain = islice(loader(items, batch_size=2), 4)
    prepared = islice(accelerate.Accelerator(cpu=True).prepare(loader(items, batch_size=2)), 4)
    for a, b in zip(plain, prepared, strict=True):
        assert torch.equal(a["waveform"], b["waveform"])


@pytest.mark.parametrize("make", [
    lambda n: StepSampler(n, 4), lambda n: StepSampler(4, n), lambda n: loader([0], n),
    lambda n: loader([0], 1, start_step=n), lambda n: loader([0], 1, num_workers=n),
])  # fmt: skip
def test_whole_floats_are_integers_and_others_are_refused(make):
    make(1.0), make(np.int32(1)), make(torch.tensor(1))
    for wrong in (1.5, True, float("nan"), "1", None, torch.ones(2)):
        with pytest.raises(ValueError, match="must be a whole number"):
            make(wrong)


def test_a_whole_float_as_seed_is_the_same_seed():
    assert next(iter(StepSampler(9, 9.0, seed=3.0))) == next(iter(StepSampler(9, 9, seed=3)))
