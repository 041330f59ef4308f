import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from refined_ldm.config import preset
from refined_ldm.devices import (
    allow_tf32,
    exact_float32,
    feeding,
    fitting_threads,
    pick_accelerator,
    pick_device,
    pick_precision,
)
from refined_ldm.unet import UNet


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


@pytest.mark.parametrize("ratio, expected", [(0.5, "bf16"), (0.7, "bf16"), (0.8, "no"), (20.0, "no")])
def test_a_cpu_uses_bfloat16_only_where_it_is_faster(monkeypatch, ratio, expected):
    """A clock that runs slower or faster than it should, by `ratio`, for the products of bfloat16."""
    clock = iter([0.0, ratio, 0.0, 1.0] * 12)  # twelve products of each type in turn, bfloat16 first
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert pick_precision("cpu") == expected


def test_other_devices(monkeypatch):
    assert pick_precision("mps") == "no"
    for capability, expected in (((6, 1), "no"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        pick_precision.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of=capability: of)
        assert pick_precision("cuda") == expected


def test_the_machine_is_measured_once(monkeypatch):
    first = pick_precision("cpu")
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("measured again"))
    assert pick_precision("cpu") == first


@pytest.fixture
def two_threads():
    given = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(given)


@pytest.mark.parametrize("name, clips, device, threads", [
    ("tiny", 1, "cpu", 1), ("tiny", 4, "cpu", 1), ("tiny", 8, "cpu", 2), ("tiny", 1, "cuda", 2),
    ("colab", 1, "cpu", 2), ("paper", 1, "cpu", 2), ("baseline", 1, "cpu", 2),
])  # fmt: skip
def test_small_work_takes_one_thread_of_a_cpu_and_published_sizes_all(two_threads, name, clips, device, threads):
    config = preset(name)
    with torch.device("meta"):  # no memory
        unet = UNet(config.unet)
    latent = config.samples // config.mel.hop_length // 4 * config.mel.n_mels // 4
    with fitting_threads(unet, clips * latent, torch.device(device)):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_the_threads_are_as_before_even_after_an_error(two_threads):
    with pytest.raises(KeyError), fitting_threads(torch.nn.Linear(1, 1), 1, torch.device("cpu")):
        raise KeyError
    assert torch.get_num_threads() == 2


def test_a_user_who_wants_one_thread_keeps_it(two_threads):
    torch.set_num_threads(1)
    for positions in (1, 2**40):
        with fitting_threads(torch.nn.Linear(1, 1), positions, torch.device("cpu")):
            assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_weights_that_are_shared_among_processes_are_refused(monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    with pytest.raises(ValueError, match=f"training with {kind} is not supported, its shards are not saved"):
        pick_accelerator("cpu", precision="no")


def test_accelerate_takes_the_gpu_that_was_chosen(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:1"):
        pick_accelerator(name, precision="no")
    assert chosen == [torch.device("cuda:1")]


def test_a_gpu_is_fed_by_other_processes_from_pinned_memory():
    assert feeding(torch.device("cpu")) == {"num_workers": 0, "pin_memory": False}
    assert feeding(torch.device("cuda", 1))["num_workers"] >= 1 and feeding(torch.device("cuda"))["pin_memory"]


def test_two_ways_to_one_result_are_compared_in_exact_float32():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        allow_tf32("cpu")
        assert torch.get_float32_matmul_precision() == before[0]
        allow_tf32("cuda")
        assert torch.get_float32_matmul_precision() == "high"
        with exact_float32():
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", before[1])
    finally:
        torch.set_float32_matmul_precision(before[0])


def test_a_run_that_goes_on_keeps_its_precision_and_a_launcher_decides(monkeypatch):
    made = []
    monkeypatch.setattr("accelerate.state.is_initialized", lambda: False)
    monkeypatch.setattr(
        "accelerate.Accelerator",
        lambda **settings: (
            made.append(settings) or SimpleNamespace(mixed_precision="no", distributed_type=DistributedType.NO)
        ),
    )
    monkeypatch.setattr("refined_ldm.devices.pick_precision", lambda device_type: "measured")
    pick_accelerator("cpu"), pick_accelerator("cpu", precision="bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "launched")
    pick_accelerator("cpu", precision="bf16")
    assert [settings["mixed_precision"] for settings in made] == ["measured", "bf16", "launched"]
    assert all(settings["dataloader_config"].split_batches for settings in made)
