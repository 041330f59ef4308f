import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from refined_ldm.data.batches import loader
from refined_ldm.devices import pick_accelerator
from refined_ldm.experiment.arms import ARMS, PRECISIONS, Arm, Card, Run
from refined_ldm.experiment.protocol import GRID
from refined_ldm.experiment.runs import eval_steps, iteration_seconds, run_arm
from refined_ldm.experiment.statistics import collect
from refined_ldm.training.stages import train_ldm


def test_evaluation_steps_are_even_in_the_logarithm():
    found = sorted(eval_steps(1500))
    assert found[-1] == 1500 and len(found) == 12
    assert np.ptp(np.diff(np.log(found))) < 0.1


def test_a_run_is_evaluated_written_and_not_repeated(small, tmp_path):
    run = Run("oracle", Arm("oracle"), 4, 0, "controls")
    record = run_arm(small, run, tmp_path)
    assert record["card"]["latent_scale"] == pytest.approx(small.scale, rel=1e-4)
    assert 0 <= record["recall"] <= 1 and record["frechet"] > 0 and record["iterations"] == 4
    assert record["card"]["precision"] == PRECISIONS[pick_accelerator("cpu").mixed_precision]
    assert Card.from_record(record) == Card(**record["card"])
    errors = pd.read_csv(tmp_path / "oracle-4-0.csv")
    assert sorted(errors["t"].unique()) == list(GRID) and errors["step"].max() == 4
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert run_arm(small, run, tmp_path) == json.loads((tmp_path / "oracle-4-0.json").read_text())
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    row = collect(tmp_path).iloc[0]
    last = errors[errors["step"] == 4]
    assert row["error_250"] == pytest.approx(last["error"][last["t"] >= 250].mean())
    assert row["recall"] == pytest.approx(pd.read_csv(tmp_path / "oracle-4-0-classes.csv")["recall"].mean())
    details = pd.read_csv(tmp_path / "oracle-4-0-details.csv").set_index("detail")
    assert {"number", "pitch", "pace", "order"} <= set(details.index) and row["pitch"] == details.loc["pitch", "value"]


def test_a_run_is_evaluated_anew_at_another_guidance_and_refused_with_another_arm(small, tmp_path):
    run = Run("B", replace(ARMS["B"], conditioner="oracle", guidance=1.0), 4, 0, "arms")
    first = run_arm(small, run, tmp_path)
    curve = (tmp_path / "B-4-0.csv").read_bytes()
    louder = replace(run, arm=replace(run.arm, guidance=9.0))
    second = run_arm(small, louder, tmp_path)
    assert second["arm"]["guidance"] == 9.0 and second["frechet"] != first["frechet"]
    assert second["seconds"] == first["seconds"] and (tmp_path / "B-4-0.csv").read_bytes() == curve
    assert json.loads((tmp_path / "B-4-0.json").read_text()) == second == run_arm(small, louder, tmp_path)
    with pytest.raises(ValueError, match=r"B-4-0.json is of an arm with other settings \(lr: 0.001 there, 0.01 here\)"):
        run_arm(small, replace(run, arm=replace(run.arm, lr=1e-2)), tmp_path)
    assert json.loads((tmp_path / "B-4-0.json").read_text()) == second


def test_iterations_of_arms_are_timed_in_turn(small, monkeypatch):
    waits = []
    monkeypatch.setattr("refined_ldm.experiment.runs.synchronize", waits.append)
    oracle = {label: replace(ARMS[label], conditioner="oracle") for label in "BD"}
    rows = iteration_seconds(small, oracle, rounds=3, warm=1)
    assert [row["label"] for row in rows] == ["B", "D"] and rows[0]["times_the_first"] == 1
    assert all(row["seconds"] > 0 for row in rows) and rows[1]["times_the_first"] > 0
    assert waits == [small.device] * 2 * 2 * 4  # before and after each iteration


def test_decays_branch_off_one_trunk_and_end_as_runs_of_their_own(small, tmp_path):
    """5 and 10 steps decay after 4 and 8: with a stop in between, 4 + 1 + 4 + 2 steps are trained, none twice."""
    arm = replace(ARMS["D"], conditioner="random", lr_schedule="wsd")
    runs, indices = [Run("D, wsd", arm, n, 1, "branches") for n in (5, 10)], []

    def stop(step):
        if step.index == 10:
            raise KeyboardInterrupt

    run_arm(small, runs[0], tmp_path, on_step=lambda step: indices.append(step.index), evaluate=False)
    with pytest.raises(KeyboardInterrupt):
        run_arm(small, runs[1], tmp_path, on_step=lambda step: (indices.append(step.index), stop(step)), evaluate=False)
    assert indices == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]
    record = run_arm(small, runs[1], tmp_path, resume=True, evaluate=False)
    steps = pd.read_csv(small.folder / "runs" / runs[1].name / "steps.csv")
    assert list(steps["step"]) == list(range(1, 11)) and record["seconds"] == round(steps["seconds"].sum(), 1)
    alone, examples = small.model(arm, 1, 10)
    for _ in train_ldm(alone, loader(examples, alone.config.training["ldm"].batch_size, 1), seed=1):
        pass
    errors = pd.read_csv(tmp_path / f"{runs[1].name}.csv")
    assert sorted(errors["step"].unique())[0] == 0 and errors["step"].max() == 10
    expected = [float(f"{error:.6g}") for error in small.noise_error(alone)]
    assert list(errors[errors["step"] == 10]["error"]) == expected


def test_a_run_that_was_stopped_goes_on_to_the_same_end(small, tmp_path):
    run = Run("random", replace(ARMS["D"], conditioner="random"), 6, 1, "controls")
    with pytest.raises(KeyboardInterrupt):

        def stop(step):
            if step.index == 3:
                raise KeyboardInterrupt

        run_arm(small, run, tmp_path / "a", on_step=stop, evaluate=False)
    run_arm(small, run, tmp_path / "a", resume=True, evaluate=False)
    again = replace(run, label="again")
    run_arm(small, again, tmp_path / "b", evaluate=False)
    a, b = pd.read_csv(tmp_path / "a" / f"{run.name}.csv"), pd.read_csv(tmp_path / "b" / f"{again.name}.csv")
    last = [table[table["step"] == 6]["error"].to_numpy() for table in (a, b)]
    assert np.array_equal(*last)
    assert set(a["step"]) == set(b["step"])
