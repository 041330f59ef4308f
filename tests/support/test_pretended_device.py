"""The pretended device refuses what a real one refuses, and computes what the CPU computes."""

import copy

import pytest
import torch
from torch import nn

from refined_ldm.devices import allow_tf32, exact_float32
from tests.support.pretended_device import DeviceFault, pretend


@pytest.fixture
def gpu():
    with pretend("cuda") as gpu:
        yield gpu


@pytest.mark.parametrize("mistake, message", [
    (lambda x: x + torch.ones(3), "expected all tensors to be on the same device"),
    (lambda x: torch.cat([x, torch.ones(3)]), "expected all tensors to be on the same device"),
    (lambda x: nn.Linear(3, 2)(x), "expected all tensors to be on the same device"),
    (lambda x: torch.ones(5)[x.long()], "expected all tensors to be on the same device"),
    (lambda x: x.numpy(), "to numpy, use Tensor.cpu"),
    (lambda x: torch.randn(3, device="cuda", generator=torch.Generator()), "device type for generator"),
    (lambda x: x.normal_(generator=torch.Generator()), "device type for generator"),
])  # fmt: skip
def test_what_a_gpu_refuses(gpu, mistake, message):
    x = torch.zeros(3, device="cuda")
    with pytest.raises(DeviceFault, match=message):
        mistake(x)
    assert gpu.faults.total() == 1


def test_what_a_gpu_takes(gpu):
    x = torch.arange(3.0, device="cuda")
    assert (x + torch.tensor(2.0)).tolist() == [2, 3, 4]  # a number on the CPU
    assert x[torch.tensor([2, 0])].tolist() == [2, 0]  # indices on the CPU
    assert x.to(torch.ones(1)).numpy().tolist() == [0, 1, 2]
    assert x.device == torch.device("cuda", 0) and x.is_cuda and not x.cpu().is_cuda
    assert all(p.is_cuda for p in nn.Linear(3, 2).to(x).parameters())
    assert copy.deepcopy(x).is_cuda and x.view(3, 1).is_cuda and torch.zeros_like(x).is_cuda
    assert not gpu.faults


def test_a_mac_has_no_float64_and_another_device_is_not_there():
    with pretend("mps"):
        with pytest.raises(DeviceFault, match="float64"):
            torch.ones(3, device="mps").double()
        with pytest.raises(DeviceFault, match="float64"):
            torch.ones(3, dtype=torch.float64).to("mps")
        with pytest.raises(RuntimeError, match="no cuda here: mps is pretended"):
            torch.ones(3, device="cuda")
        assert torch.ones(3, device="mps").cpu().double().sum() == 3


def test_waits_copies_and_operators_are_counted_where_they_are():
    with pretend("cuda") as gpu:
        x = torch.ones(4, 4).to("cuda", non_blocking=True)
        assert not gpu.waits.total() and gpu.copies == {"cpu -> cuda": 64}
        y = (x @ x).t()
        assert gpu.operators == 1  # a view is none
        for count, wait in enumerate((
            lambda: y.sum().item(), lambda: bool(y.isfinite().all()), lambda: y.cpu(), lambda: torch.ones(2).to("cuda"),
            lambda: y[0].tolist(), lambda: y[y > 0], lambda: torch.tensor([1.0], device="cuda"), torch.cuda.synchronize,
            lambda: y[[0, 1]], lambda: torch.nonzero(y),
        ), 1):  # fmt: skip
            wait()
            assert gpu.waits.total() == count, gpu.report()
        assert all(place.startswith("test_pretended_device.py:") for place in gpu.waits)
        assert "10 waits" in gpu.report() and "copied cpu -> cuda" in gpu.report()
        gpu.forget()
        assert not gpu.waits.total() and not gpu.operators


def test_training_gives_the_weights_of_the_cpu():
    def train(place):
        torch.manual_seed(0)
        network, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1)), torch.randn(16, 4)
        network.to(place)
        optimizer = torch.optim.AdamW(network.parameters(), 0.1, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            network(x.to(place)).square().mean().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()
        return {name: tensor.cpu() for name, tensor in network.state_dict().items()}

    expected = train("cpu")
    with pretend("cuda"):
        found = train("cuda")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_autocast_casts_by_the_lists_of_cuda(gpu):
    x, linear = torch.randn(2, 4, device="cuda"), nn.Linear(4, 4).to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
        assert nn.functional.layer_norm(linear(x), (4,)).dtype == torch.float32  # on the CPU it would stay bfloat16
        assert linear(x).sum().dtype == torch.float32
    assert linear(x).dtype == torch.float32


def test_tensor_cores_round_float32_unless_torch_is_told_not_to():
    x, before = torch.randn(64, 64), torch.get_float32_matmul_precision()

    def compute(x):
        return torch.stack([x @ x, nn.functional.conv1d(x, x[:, :, None])]).cpu()

    expected = compute(x)
    try:
        with pretend("cuda", tf32=True):
            allow_tf32("cuda")
            found = compute(x.to("cuda"))
            with exact_float32():
                exact = compute(x.to("cuda"))
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(exact, expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert 1e-4 < (ours - theirs).norm() / theirs.norm() < 1e-3


def test_faults_are_all_noted_if_it_is_not_strict():
    with pretend("cuda", strict=False) as gpu:
        x = torch.ones(3, device="cuda")
        x + torch.ones(3), x.numpy()
    assert gpu.faults.total() == 2 and "FAULT x1" in gpu.report()


def test_afterwards_all_is_as_it_was():
    with pretend("cuda", capability=(7, 5)):
        assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (7, 5)
        assert not torch.cuda.is_bf16_supported(including_emulation=False)
    assert torch.cuda.is_available() == (torch.cuda.device_count() > 0)
    x = torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x.t()).dtype == torch.bfloat16
    assert x.device.type == "cpu"
