import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from refined_ldm.base.files import PREFIX, _machine
from refined_ldm.durable import run_state
from refined_ldm.durable.run_state import drop_others, load_run, precision_of, save_run
from refined_ldm.training.muon import Muon


def learner(seed, steps=0):
    """A network with two optimisers and an average, moved by some random steps."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    optimizers = [torch.optim.AdamW(network[1].parameters(), 0.1), Muon([network[0].weight], 0.1)]
    for _ in range(steps):
        network(torch.randn(8, 4)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    average = {k: v + 1 for k, v in network.state_dict().items()}
    return SimpleNamespace(name="net", bare=network, optimizers=optimizers, average=average, scaler=None)


def everything(learner):
    states = {f"{n}.{p}.{k}": v for n, o in enumerate(learner.optimizers)
              for p, s in o.state_dict()["state"].items() for k, v in s.items()}  # fmt: skip
    return {**learner.bare.state_dict(), **{f"average.{k}": v for k, v in learner.average.items()}, **states}


def folders(run_dir):
    return sorted(p.name for p in (run_dir / "stage").iterdir())


def test_all_of_a_learner_comes_back(tmp_path):
    saved, other = learner(0, steps=3), learner(1)
    save_run(tmp_path, "stage", [saved], 3, {"seed": 0})
    assert load_run(tmp_path, "stage", [other]) == 3
    before, after = everything(saved), everything(other)
    assert before.keys() == after.keys() and any("momentum" in k for k in after) and any("exp_avg" in k for k in after)
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)


def test_the_last_two_are_kept_and_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / "stage" / f"{PREFIX}{_machine()}-x.tmp").mkdir(parents=True)
    for index in (5, 10, 1000):
        save_run(tmp_path, "stage", [learner(index)], index, {})
    assert folders(tmp_path) == ["step-0000010", "step-0001000"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "no state", "half a state", "no weights", "no optimiser",
                                    "one bit", "another state"])  # fmt: skip
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    good = learner(0, steps=2)
    save_run(tmp_path, "stage", [good], 2, {})
    save_run(tmp_path, "stage", [learner(0, steps=4)], 4, {})
    last = tmp_path / "stage" / "step-0000004"
    {
        "truncated": lambda: (last / "net.safetensors").write_bytes((last / "net.safetensors").read_bytes()[:-7]),
        "empty": lambda: (last / "net-average.safetensors").write_bytes(b""),
        "no state": lambda: (last / "state.json").unlink(),
        "half a state": lambda: (last / "state.json").write_text('{"step": 4'),
        "another state": lambda: (last / "state.json").write_text("[4]"),
        "no weights": lambda: (last / "net.safetensors").unlink(),
        "no optimiser": lambda: (last / "net-optimizer1.safetensors").unlink(),
        "one bit": lambda: flip_a_bit(last / "net-average.safetensors"),
    }[damage]()
    restored = learner(1)
    with pytest.warns(UserWarning, match="step-0000004 is damaged"):
        assert load_run(tmp_path, "stage", [restored]) == 2
    assert all(torch.equal(v, everything(restored)[k]) for k, v in everything(good).items())


@pytest.mark.parametrize("change", ["width", "optimizer"])
def test_a_whole_checkpoint_of_other_settings_is_refused(tmp_path, change):
    save_run(tmp_path, "stage", [learner(0)], 1, {})
    other = learner(1)
    if change == "width":
        other.bare[0] = nn.Linear(3, 9)
    else:
        other.optimizers = other.optimizers[:1]
    with pytest.raises(ValueError, match="does not fit" if change == "width" else "resume with the settings"):
        load_run(tmp_path, "stage", [other])


def test_nothing_there_is_step_zero(tmp_path):
    assert load_run(tmp_path, "stage", [learner(0)]) == 0


def test_a_save_that_breaks_off_leaves_the_earlier_ones(tmp_path, monkeypatch):
    save_run(tmp_path, "stage", [learner(0)], 1, {})

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(run_state, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_run(tmp_path, "stage", [learner(0)], 2, {})
    monkeypatch.undo()
    assert load_run(tmp_path, "stage", [learner(1)]) == 1


def flip_a_bit(path):
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)


def test_a_run_goes_on_with_its_own_seed(tmp_path):
    save_run(tmp_path, "stage", [learner(0)], 1, {"seed": 3})
    assert load_run(tmp_path, "stage", [learner(0)], seed=3) == 1
    with pytest.raises(ValueError, match="step-0000001 is of seed 3, not 4"):
        load_run(tmp_path, "stage", [learner(0)], seed=4)


@pytest.mark.parametrize("where", ["weights", "average", "optimizer"])
def test_non_finite_numbers_are_not_saved(tmp_path, where):
    good, bad = learner(0, steps=1), learner(0, steps=1)
    save_run(tmp_path, "stage", [good], 1, {})
    state = bad.optimizers[0].state_dict()["state"][0]
    places = {"weights": bad.bare[0].weight.data, "average": bad.average["0.bias"], "optimizer": state["exp_avg"]}
    places[where][0] = math.inf
    with pytest.raises(FloatingPointError, match="NaN or infinity in net.* after step 2, which was not saved"):
        save_run(tmp_path, "stage", [bad], 2, {})
    assert folders(tmp_path) == ["step-0000001"]


def test_after_a_fall_back_the_damaged_go_and_the_good_stay(tmp_path):
    for index in (2, 4, 6):
        save_run(tmp_path, "stage", [learner(index)], index, {})
    assert folders(tmp_path) == ["step-0000004", "step-0000006"]
    (tmp_path / "stage" / f"{PREFIX}{_machine()}-x.tmp").mkdir()
    (tmp_path / "stage" / "step-0000001-my-copy").mkdir()  # is nobody else's to remove
    drop_others(tmp_path, "stage", 4)  # the run goes on from step 4, since 6 is damaged
    (tmp_path / "stage" / "step-0000001-my-copy").rmdir()
    assert folders(tmp_path) == ["step-0000004"]
    save_run(tmp_path, "stage", [learner(5)], 5, {})
    assert folders(tmp_path) == ["step-0000004", "step-0000005"]


def test_the_precision_of_a_run_is_found(tmp_path):
    assert precision_of(tmp_path) is None
    save_run(tmp_path, "stage", [learner(0)], 1, {"precision": "bf16"})
    assert precision_of(tmp_path) == "bf16"
    for damaged in ("{", "[]"):
        (tmp_path / "stage" / "step-0000001" / "state.json").write_text(damaged)
        assert precision_of(tmp_path) is None
