import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from refined_ldm.experiment.arms import ABLATIONS, ARMS, Arm, Card
from refined_ldm.experiment.statistics import (
    collect,
    interval,
    iterations_to,
    paired,
    rows_where,
    same_machine,
    times_fewer,
    unequal,
)
from tests.support.runs import TABLE

STORED = Path(__file__).parents[1] / "support" / "stored_record"


def test_interval_is_students():
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert (mean, high - mean, mean - low) == pytest.approx((2, 4.302653 / 3**0.5, 4.302653 / 3**0.5))  # t of a table
    assert interval([2.0]) == (2, 2, 2)


def test_differences_are_taken_seed_by_seed():
    assert paired(TABLE, "frechet", {"label": "C"}, {"label": "B"}).tolist() == [-20, -25, -30]
    with pytest.raises(ValueError, match="no seed in common"):
        paired(TABLE, "frechet", {"label": "C", "seed": 0}, {"label": "B", "seed": 1})


def test_rows_are_those_of_the_given_values():
    assert rows_where(TABLE, {"label": "C", "seed": [0, 1]})["frechet"].tolist() == [85, 80]
    assert len(rows_where(TABLE, {})) == 6
    for where, fault in (({"label": "Z"}, "no row has"), ({"arm": "B"}, "no column 'arm', there are label, seed")):
        with pytest.raises(ValueError, match=fault):
            rows_where(TABLE, where)


def test_what_differs_between_the_cards_of_runs_is_named():
    runs = collect(STORED.parents[2] / "figures" / "data" / "experiment")
    arms = runs[runs["label"].isin(list("BC"))]
    assert unequal(arms[arms["iterations"] == 1500]) == []  # two conditioners differ by their nature
    mixed = arms[arms["iterations"] == 6000]
    assert unequal(mixed) == [
        "precision: bfloat16 and float32", "machine: CPU with fast bfloat16 and CPU without fast bfloat16",
        "conditioner_weights: laion, first training and laion, second training",
    ]  # fmt: skip
    assert unequal(arms[arms["label"] == "C"], but=("precision", "machine", "conditioner_weights")) == [
        "iterations: 1500 and 6000"
    ]
    (first, of_first), (second, of_second) = same_machine(mixed)
    assert (first, second) == ("bfloat16", "float32")  # that of both arms comes first
    assert set(of_first["label"]) == {"B", "C"} and set(of_second["label"]) == {"B"} and not unequal(of_first)
    more = of_first.assign(conditioner_weights="laion, third training")[of_first["label"] == "B"].assign(seed=1)
    more = pd.concat([mixed, more, of_first[of_first["label"] == "B"].assign(seed=2)])
    assert [sorted(rows["seed"]) for _, rows in same_machine(more[more["label"] == "B"])] == [[0, 2], [0, 1, 2]]


def test_an_arm_is_as_good_after_some_iterations_between_its_runs():
    table = pd.DataFrame({"iterations": [0, 100, 100, 300, 400], "frechet": [200.0, 120.0, 80.0, 50.0, 60.0]})
    reached = [iterations_to(table, "frechet", value) for value in (250.0, 200.0, 150.0, 100.0, 75.0, 49.0)]
    assert reached == [0, 0, 50, 100, 200, np.inf]


@pytest.mark.parametrize("power", [-0.5, 0.5])  # of an error, which falls, and of a recall
def test_how_many_times_fewer_iterations_comes_out_of_a_power_law(power):
    rows = [{"label": label, "iterations": n, "seed": seed, "measure": (1 + seed) * (n * sooner) ** power}
            for label, sooner in (("B", 1.0), ("C", 1.3)) for n in (100, 400) for seed in range(3)]  # fmt: skip
    table, rises = pd.DataFrame(rows), power > 0
    for at in (100, 400):
        assert times_fewer(table, "measure", "C", "B", at, (100, 400), rises) == pytest.approx([1.3] * 3)
        assert times_fewer(table, "measure", "B", "C", at, (100, 400), rises) == pytest.approx([1 / 1.3] * 3)
    assert np.isnan(times_fewer(table, "measure", "C", "B", 400, (100, 400), not rises)).all()
    with pytest.raises(ValueError, match="no row has"):
        times_fewer(table, "measure", "C", "B", 400, (100, 800))


def test_a_record_with_earlier_names_is_collected_under_the_present_ones():
    record = json.loads((STORED / "D-no-formula-300-0.json").read_text())
    assert {"wide", "weighting", "extra_drop"} <= record["arm"].keys() and "scale" in record["card"]
    row = collect(STORED).iloc[0]
    assert (row["label"], row["part"]) == ("D, no linear denoiser", "ablations")
    for name in ("error_0", "error_250", "recall", "recall_one"):  # of the tables beside the record
        assert row[name] == pytest.approx(record[name])
    changes = ABLATIONS[row["label"]]
    assert Arm.from_record(record["arm"]) == Arm(**{**ARMS["D"].__dict__, **changes})
    assert Card.from_record(record).latent_scale == record["card"]["scale"]
