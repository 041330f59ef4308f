from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from refined_ldm.experiment import measures
from refined_ldm.experiment.arms import ARMS, Arm, Run
from refined_ldm.experiment.runs import run_arm
from refined_ldm.experiment.statistics import collect
from tests.support.pretended_device import pretend
from tests.support.small import awake_model

TABLES = Path(__file__).parents[2] / "figures" / "data"


@pytest.fixture(scope="module")
def table():
    return collect(TABLES / "experiment")


@pytest.fixture(scope="module")
def ended(table):
    return measures.ended(table)


def equal(found, name):
    stored = pd.read_csv(TABLES / f"{name}.csv")
    pd.testing.assert_frame_equal(found.reset_index(drop=True)[list(stored)], stored, check_dtype=False, rtol=1e-4)


def test_the_stored_tables_come_out_of_the_stored_runs(table, ended):
    ablated = measures.ablations(table, ended, 300)
    assert ablated["label"].iloc[0] == "D" and ablated["D after, by frechet"].iloc[0] == pytest.approx(300)
    arms = measures.arms_compared(table, 1500)
    equal(measures.error_curves(TABLES / "experiment", arms).round(6), "06_arms")


def test_only_runs_of_one_precision_are_compared(ended):
    """The stored runs of B after 6,000 iterations are in both, those of C in bfloat16, the short ones in float32."""
    arms = measures.arms_compared(ended, 1500)
    assert [set(rows["precision"]) for _, rows in arms.groupby("iterations")] == [{"float32"}, {"bfloat16"}]
    effects = measures.encoder_effects(ended, 1500).set_index(["difference", "iterations", "measure"])
    row = effects.loc[("C - B", 6000, "frechet")]
    assert (row["precision"], row["seeds"], row["mean"]) == ("bfloat16", 1, pytest.approx(212.375 - 233.310, abs=1e-3))
    assert not row["one law"] and effects.loc[("D - E", 1500, "frechet"), "one law"]
    reached = measures.targets_reached(ended, 1500)
    assert set(reached.loc[reached["baseline"] == "B", "precision"]) == {"float32"}
    wide = reached[(reached["its iterations"] == 12000) & (reached["measure"] == "frechet")].iloc[0]
    assert wide["precision"] == "bfloat16" and wide["at least"] and wide["factor"] == pytest.approx(3)


def test_a_baseline_that_was_not_run_has_no_row(ended):
    found = measures.targets_reached(ended[ended["label"] != "B, wide"], 1500)
    assert set(found["baseline"]) == {"A", "B"} and (found["factor"] >= 1).all()


def branch(label, iterations, seed, **values):
    """A row of `collect`: noise error 1 / iterations, and as it would be with one card of all branches."""
    kind = "laion" if label in "BEG" else "ms"
    found = {"error_250": 1 / iterations, "frechet": 100.0, "recall": 0.5, "number": 0.5, "pitch": 0.5, "pace": 0.5,
             "order": 0.5}  # fmt: skip
    card = {"precision": "bfloat16", "machine": "a CPU", "lr_schedule": "wsd", "conditioner_weights": f"{kind}, 1"}
    return {
        "label": f"{label}, wsd",
        "iterations": iterations,
        "seed": seed,
        "conditioner": kind,
        **found,
        **card,
        **values,
    }


def test_branches_are_compared_where_all_four_arms_have_them():
    rows = [branch(arm, n, seed) for arm in "DEFG" for n in (750, 1500) for seed in (0, 1)]
    rows[-1]["iterations"] = 3000  # G has no second seed after 1500 iterations
    rows += [branch("B", 750, 1), branch("B", 6000, 0)]
    found = measures.branches_compared(pd.DataFrame(rows))
    assert set(zip(found["iterations"], found["seed"], strict=True)) == {(750, 0), (750, 1), (1500, 0)}
    assert list(found["label"].unique()) == ["B", "D", "E", "F", "G"] and len(found) == 13
    rows[0]["precision"] = "float32"
    with pytest.raises(
        ValueError, match="these branches do not compare, they differ in precision: bfloat16 and float32"
    ):
        measures.branches_compared(pd.DataFrame(rows))


def test_effects_of_branches_are_paired_by_seed_in_every_measure():
    rows = [branch(arm, 750, seed, pitch=0.5 + 0.1 * seed * (arm == "F")) for arm in "DEFG" for seed in range(3)]
    effects = measures.branch_effects(measures.branches_compared(pd.DataFrame(rows)))
    assert set(effects["measure"]) == {"error_250", "frechet", "recall", "number", "pitch", "pace", "order"}
    pitch = effects[effects["measure"] == "pitch"].set_index("difference")["mean"]
    assert pitch.to_dict() == pytest.approx({"D - E": 0, "F - D": 0.1, "G - E": 0})
    assert measures.branch_effects(measures.branches_compared(pd.DataFrame(rows[:3]))).empty


def test_the_last_doubling_of_the_baseline_stands_beside_the_factor():
    rows = [branch("B", n, 0, recall=n / 10_000) for n in (1500, 3000, 6000)]
    rows += [branch("E", n, 0, recall=2 * n / 10_000, error_250=1e-4) for n in (750, 1500)]
    found = measures.plateau(pd.DataFrame(rows)).set_index(["iterations", "measure"])
    assert found["gained"].xs(3000).to_dict() == pytest.approx({"error_250": 0.5, "frechet": 0, "recall": 1.0})
    assert found.loc[(3000, "recall"), "factor"] == pytest.approx(2) and not found.loc[(3000, "recall"), "at least"]
    assert found.loc[(6000, "error_250"), "factor"] == 8 and found.loc[(6000, "error_250"), "at least"]
    assert found.loc[(6000, "recall"), "factor"] == 0  # E has not been trained that far


def test_a_summary_has_the_interval_over_seeds(ended):
    row = measures.summary(ended[(ended["label"] == "B") & (ended["iterations"] == 1500)], ["frechet"]).iloc[0]
    assert row["seeds"] == 3 and row["frechet_low"] < row["frechet"] < row["frechet_high"]


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """The same after the training of an oracle."""
    run_arm(small, Run("oracle", Arm("oracle"), 4, 0, "controls"), tmp_path_factory.mktemp("out"), evaluate=False)
    return small


def test_missing_runs_are_named(small):
    with pytest.raises(FileNotFoundError, match="none of the runs of this sweep"):
        measures.guidance_sweep(small, 12)
    assert measures.mels_along_training(small, 12) == {}


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_pictures_along_training_come_from_the_device(kind, tmp_path, monkeypatch):
    model = awake_model(monkeypatch)
    weights = tmp_path / "runs" / Run("D", ARMS["D"], 12, 0, "arms").name / "ldm.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    with pretend(kind):
        there = SimpleNamespace(folder=tmp_path, base=model.to(kind), trained=lambda run: model)
        (mel,) = measures.mels_along_training(there, 12).values()
    assert mel.dtype == np.float16 and mel.shape == (32, 16)


def test_reference_scores_and_the_order_of_an_oracle_are_measured(trained, monkeypatch):
    floor, ceiling = measures.reference_scores(trained)
    assert floor["clips"] == ceiling["clips"] == 6 and 0 <= ceiling["recall"] <= 1
    monkeypatch.setitem(ARMS, "oracle", Arm("oracle"))
    rows = measures.order_scores(trained, 12, count=12)
    assert [row["label"] for row in rows] == ["the clips themselves", "oracle"]
    assert rows[0]["value"] > 0.5


def test_confounds_are_those_of_arm_c(small, monkeypatch):
    arm, given = Arm("random"), {}
    monkeypatch.setitem(ARMS, "C", arm)
    monkeypatch.setattr(measures, "ten_ways", lambda *args: given.update(args=args) or [])
    monkeypatch.setattr(small, "scale_of", lambda arm, seed: seed)
    monkeypatch.setattr(small, "trained", lambda run: small.model(run.arm, run.seed, run.iterations)[0])
    measures.loss_confounds(small, 4)
    _, latents, text, seen, seen_text, sounds, scales = given["args"]
    assert len(latents) == len(text) == len(sounds) == 4 and len(seen) == len(seen_text) == 24
    assert scales == list(range(20)) and torch.isfinite(sounds).all()
