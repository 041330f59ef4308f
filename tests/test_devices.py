import time

import pytest
import torch

from refined_ldm.devices import pick_device, pick_precision


@pytest.fixture(autouse=True)
def forget():
    pick_precision.cache_clear()
    yield
    pick_precision.cache_clear()


@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_the_first_there_is(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device() == torch.device(expected)


def test_a_device_that_is_not_here_is_refused():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("abacus", "cuda:99"):
        with pytest.raises(ValueError, match=f"no device '{name}' here"):
            pick_device(name)


@pytest.mark.parametrize("ratio, expected", [(0.3, "bf16"), (0.7, "no"), (20.0, "no")])
def test_a_cpu_uses_bfloat16_only_where_it_is_twice_as_fast(monkeypatch, ratio, expected):
    """A clock that runs slower or faster than it should, by `ratio`, for the products of bfloat16."""
    clock = iter([0.0, ratio, 0.0, 1.0] * 6)  # six products of each type in turn, bfloat16 first
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert pick_precision("cpu") == expected


def test_other_devices(monkeypatch):
    assert pick_precision("mps") == "no"
    for emulated, expected in ((True, "no"), (False, "bf16")):
        pick_precision.cache_clear()
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, e=emulated: including_emulation or not e
        )
        assert pick_precision("cuda") == expected


def test_the_machine_is_measured_once(monkeypatch):
    first = pick_precision("cpu")
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("measured again"))
    assert pick_precision("cpu") == first
