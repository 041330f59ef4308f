import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from torch import nn

from refined_ldm.vae import VAEConfig
from refined_ldm.weights import SkipInit, load_into, read_weights, rounded, save_weights


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))  # with integer and float buffers


def test_weights_settings_and_notes_come_back_equal(module, tmp_path):
    path = tmp_path / "deep" / "model.safetensors"
    save_weights(path, module, VAEConfig(channels=24), step=7, note="né")
    state, metadata = read_weights(path)
    assert state.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(state[name], value) and state[name].dtype == value.dtype
    config = metadata["config"] | {"channel_mult": tuple(metadata["config"]["channel_mult"])}  # JSON knows no tuples
    assert VAEConfig(**config) == VAEConfig(channels=24)
    assert metadata["step"] == 7 and metadata["note"] == "né"


def test_weights_are_not_cut_to_integers(module, tmp_path):
    with pytest.raises(ValueError, match="dtype must be a floating-point type or torch.int8, got torch.int16"):
        save_weights(tmp_path / "model.safetensors", module, dtype=torch.int16)
    assert not any(tmp_path.iterdir())


def test_half_precision_on_disk_is_float32_in_memory(module, tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, module, dtype=torch.float16)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("0.weight").dtype == torch.float16
    state, metadata = read_weights(path)
    assert state["0.weight"].dtype == torch.float32 and metadata["config"] is None
    assert state["1.num_batches_tracked"].dtype == torch.int64
    torch.testing.assert_close(state["0.weight"], module[0].weight.detach(), atol=1e-3, rtol=1e-3)
    assert not torch.equal(state["0.weight"], module[0].weight)


def test_8_bits_are_a_step_for_each_row(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with torch.no_grad():
        module[0].weight[0] *= 1e-3
        module[0].weight[1] = 0
    path = tmp_path / "model.safetensors"
    save_weights(path, module, dtype=torch.int8)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("0.weight").dtype == torch.int8
        assert file.get_tensor("0.bias").dtype == torch.float16
    state, _ = read_weights(path)
    weight = module[0].weight.detach()
    step = weight.flatten(1).abs().amax(1) / 127
    assert ((state["0.weight"] - weight).flatten(1).abs().amax(1) <= 0.5 * step + 1e-9).all()
    assert state.keys() == module.state_dict().keys() and state["1.num_batches_tracked"].dtype == torch.int64
    found = rounded(module.state_dict(), torch.int8)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    save_weights(path, found, dtype=torch.int8)  # and again: the same numbers
    assert torch.allclose(read_weights(path)[0]["0.weight"], state["0.weight"], atol=1e-7)


@pytest.mark.parametrize("largest", [7, 2**15 - 1, 2**15, 2**40])
def test_integers_of_any_size_come_back(tmp_path, largest):
    integers = torch.tensor([-largest, 0, largest])
    save_weights(tmp_path / "a.safetensors", {"integers": integers})
    found = read_weights(tmp_path / "a.safetensors")[0]["integers"]
    assert torch.equal(found, integers) and found.dtype == torch.int64


def test_shared_and_transposed_tensors_can_be_saved(tmp_path):
    weight = torch.randn(4, 6)
    save_weights(tmp_path / "a.safetensors", {"transposed": weight.T, "parameter": nn.Parameter(weight)})
    state, _ = read_weights(tmp_path / "a.safetensors")
    assert torch.equal(state["transposed"], weight.T)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_saved_file_is_as_readable_as_the_umask_says(module, tmp_path, mask):
    before = os.umask(mask)
    try:
        save_weights(tmp_path / "a.safetensors", module)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~mask


def test_a_broken_off_save_leaves_the_earlier_file(module, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_weights(path, module)
    before = path.read_bytes()

    def power_cut(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("power cut")

    monkeypatch.setattr("refined_ldm.weights.save_file", power_cut)
    with pytest.raises(OSError, match="power cut"):
        save_weights(path, {k: v + 1 for k, v in module.state_dict().items()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_truncated_empty_and_foreign_files_get_a_clear_error(module, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        read_weights(tmp_path / "nowhere.safetensors")
    path = tmp_path / "model.safetensors"
    save_weights(path, module)
    whole = path.read_bytes()
    for content in (b"", whole[:-5], whole[:40], b"not a checkpoint at all", json.dumps({"a": 1}).encode()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
            read_weights(path)


def test_load_into_copies_every_tensor(module):
    other = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    assert load_into(other, module.state_dict(), "memory") is other
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("changes, message", [
    ({"0.bias": None}, "1 missing: 0.bias"),
    ({"extra": torch.zeros(1)}, "1 unexpected: extra"),
    ({"0.weight": torch.zeros(5, 4)}, r"1 of another shape: 0.weight \(5, 4\) for \(5, 3\)"),
    ({"0.bias": None, "extra": torch.zeros(1)}, "1 missing: 0.bias; 1 unexpected: extra"),
])  # fmt: skip
def test_load_into_names_what_does_not_fit(module, changes, message):
    before = {k: v.clone() for k, v in module.state_dict().items()}
    wrong = {k: v + 1 for k, v in before.items()} | changes
    with pytest.raises(ValueError, match=f"file.x does not fit Sequential: .*{message}"):
        load_into(module, {k: v for k, v in wrong.items() if v is not None}, "file.x")
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())  # nothing was copied


@pytest.mark.parametrize("change, message", [
    (torch.Tensor.to_sparse, "0.weight sparse for dense"),
    (lambda weight: weight.to("meta"), r"0.weight without numbers \(meta\)"),
])  # fmt: skip
def test_tensors_that_hold_no_plain_numbers_are_refused_by_name(module, change, message):
    state = module.state_dict()
    state["0.weight"] = change(state["0.weight"])
    with pytest.raises(ValueError, match=f"a.ckpt does not fit Sequential: 1 of another type: {message}"):
        load_into(module, state, "a.ckpt")


def test_weights_that_will_be_loaded_are_not_drawn():
    before = torch.get_rng_state()
    with SkipInit():
        built = nn.Sequential(nn.Conv1d(3, 5, 7), nn.Linear(300, 50), nn.Embedding(100, 8), nn.BatchNorm1d(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(built[3].weight, torch.ones(5)) and built[1].weight.shape == (50, 300)
    assert nn.Linear(300, 50).weight.std() > 0.01 and not torch.equal(torch.get_rng_state(), before)
