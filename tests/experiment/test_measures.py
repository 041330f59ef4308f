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
