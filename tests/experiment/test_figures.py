import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from refined_ldm.experiment import figures as display_arms

RUNS = pd.DataFrame(
    [
        {"label": label, "iterations": n, "seed": seed, "error_250": error + 0.001 * seed, "frechet": 100.0 * error,
         "recall": 1 - error}
        for label, n, error in (("A", 100, 0.9), ("B", 100, 0.5), ("D", 10, 0.4), ("D, wide", 10, 0.3))
        for seed in (0, 1)
    ]
)  # fmt: skip


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_targets_show_a_point_for_every_run_and_leave_out_the_loss_of_another_scale():
    figure = display_arms.plot_targets(RUNS, RUNS[RUNS["label"] == "B"][list(display_arms.MEASURES)].mean())
    points = [sum(len(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "None") for ax in figure.axes]
    assert points == [6, 8, 8]  # A's noise error is at another latent scale
    assert [line.get_ydata()[0] for line in figure.axes[1].lines[-1:]] == [50.0]


def test_the_run_that_others_differ_from_is_grey_and_its_value_is_drawn_through_all():
    figure = display_arms.plot_beside(RUNS[RUNS["seed"] == 0], "B")
    bars = figure.axes[1].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([90, 50, 40, 30])
    assert len({bar.get_facecolor() for bar in bars}) == 2 and bars[0].get_facecolor() != bars[1].get_facecolor()
    assert figure.axes[1].lines[0].get_xdata()[0] == 50


def test_guidance_is_a_line_for_every_run():
    table = pd.concat([RUNS[RUNS["seed"] == 0].assign(guidance=g) for g in (1.0, 2.0)])
    figure = display_arms.plot_guidance(table)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "A, 100 iterations", "B, 100 iterations", "D, 10 iterations", "D, wide, 10 iterations"]  # fmt: skip
    np.testing.assert_allclose(figure.axes[1].lines[1].get_ydata(), [0.5, 0.5])


def test_a_wide_baseline_is_a_target_of_its_own_at_each_of_its_lengths():
    wide = RUNS[RUNS["label"] == "B"].assign(label="B, wide", frechet=20.0)
    longer = wide.assign(iterations=2 * wide["iterations"], frechet=15.0)
    figure = display_arms.plot_targets(pd.concat([RUNS, wide, longer]), RUNS[list(display_arms.MEASURES)].mean())
    ends = figure.axes[1].lines[-2:]
    assert [end.get_ydata()[0] for end in ends] == [20, 15] and {end.get_linestyle() for end in ends} == {":"}


def test_errors_by_timestep_are_a_factor_of_the_first():
    formula = pd.DataFrame({"step": 0, "t": [25, 75], "error": [0.2, 0.1]})
    trained = pd.DataFrame({"step": [0, 0, 5, 5], "t": [25, 75, 25, 75], "error": [9, 9, 0.1, 0.2]})
    ax = display_arms.plot_by_timestep({"formula": formula, "trained": trained})
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [0.5, 2.0])


def test_a_summary_has_the_interval_over_seeds():
    row = display_arms.summary(RUNS[RUNS["label"] == "B"], ["error_250"]).iloc[0]
    assert row["seeds"] == 2 and row["error_250"] == pytest.approx(0.5005)
    assert row["error_250_low"] < 0.5 and row["error_250_high"] > 0.501  # two seeds say little
