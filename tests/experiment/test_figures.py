import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from refined_ldm.experiment import figures
from refined_ldm.experiment.measures import MEASURES

RUNS = pd.DataFrame(
    [
        {"label": label, "iterations": n, "seed": seed, "error_250": error + 0.001 * seed, "frechet": 100.0 * error,
         "recall": 1 - error, "precision": "float32"}
        for label, n, error in (("A", 1000, 0.9), ("B", 1000, 0.5), ("D", 150, 0.4), ("D, wide", 150, 0.3))
        for seed in (0, 1)
    ]
)  # fmt: skip
REACHED = pd.DataFrame([{"baseline": "B", "its iterations": 1000, "arm": "D", "measure": "frechet", "goal": 50.0,
                         "reached after": 150.0, "factor": 1000 / 150, "at least": True}])  # fmt: skip


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_targets_show_a_point_for_every_run_and_leave_out_the_loss_of_another_scale():
    figure = figures.plot_targets(RUNS, REACHED)
    points = [sum(len(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "None") for ax in figure.axes]
    assert points == [4, 6, 6, 2, 2, 2]  # A's noise error is at another latent scale; the wide U-Net has its own row


def test_branches_have_a_row_of_their_own():
    more = RUNS[RUNS["label"] == "B"].assign(label="B, wsd")
    axes = figures.plot_targets(pd.concat([RUNS, more]), REACHED).axes
    titles = [ax.get_title("left") + ax.get_title() for ax in axes]  # the style of the figures puts them to the left
    assert len(titles) == 9 and all("anew" in title for title in titles[6:])


def test_a_factor_that_the_shortest_run_sets_is_a_lower_bound():
    texts = [[text.get_text() for text in ax.texts] for ax in figures.plot_targets(RUNS, REACHED).axes]
    assert "≥ 6.7×" in texts[1] and not any("×" in text for text in texts[0] + texts[2])
    figure = figures.plot_targets(RUNS, REACHED.assign(**{"at least": False}))
    assert "6.7×" in [text.get_text() for text in figure.axes[1].texts]


def test_no_line_joins_runs_of_two_precisions():
    half = RUNS[RUNS["label"] == "D"].assign(iterations=600, precision="bfloat16")
    both = RUNS[RUNS["label"] == "B"].assign(precision="bfloat16")
    lines = figures.plot_targets(pd.concat([RUNS, half, both]), REACHED).axes[1].lines
    joined = [line for line in lines if line.get_linestyle() == "-"]
    assert joined and all(len(line.get_xdata()) == 1 for line in joined)
    assert [line.get_fillstyle() for line in lines if list(line.get_xdata()) == [600, 600]] == ["none"]
    assert sorted(line.get_label() for line in joined if line.get_label()[0] != "_") == ["A", "B", "D"]  # each once


def test_curves_of_both_conditioners_can_be_seen_on_one_another():
    table = pd.DataFrame([{"label": label, "step": step, "error_250": 1 / step} for label in "BC" for step in (1, 10)])
    lines = figures.plot_curves(table, 0.5).lines[:2]
    assert lines[0].get_linewidth() > lines[1].get_linewidth() and lines[1].get_linestyle() == ":"


def test_the_run_that_others_differ_from_is_grey_and_its_value_is_drawn_through_all():
    figure = figures.plot_beside(RUNS[RUNS["seed"] == 0], "B")
    bars = figure.axes[1].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([90, 50, 40, 30])
    assert len({bar.get_facecolor() for bar in bars}) == 2 and bars[0].get_facecolor() != bars[1].get_facecolor()
    assert figure.axes[1].lines[0].get_xdata()[0] == 50


def test_a_dot_whose_whole_interval_is_below_the_reference_is_red():
    rows = [{"label": high, "value": 0.4, "low": 0.3, "high": high} for high in (0.45, 0.6)]
    ax = figures.plot_dots(rows, "value", reference=0.5)
    assert np.allclose(ax.collections[0].get_segments()[1][:, 0], [0.3, 0.6])
    red, blue = ax.collections[1].get_facecolor()
    assert tuple(red) != tuple(blue)


def test_guidance_is_a_line_for_every_run_with_its_best_value_filled():
    table = pd.concat([RUNS[RUNS["seed"] == 0].assign(guidance=g, frechet=100 / g) for g in (1.0, 2.0)])
    baseline, recipe, *_ = figures.plot_guidance(table).axes
    assert {text.get_text() for text in baseline.texts} == {"A, 1,000", "B, 1,000"}
    assert {text.get_text() for text in recipe.texts} == {"D, 150", "D, wide, 150"}
    np.testing.assert_allclose(baseline.lines[0].get_ydata(), [100, 50])
    assert list(baseline.lines[1].get_xdata()) == [2.0]


def test_errors_by_timestep_are_a_factor_of_the_first():
    table = pd.DataFrame({"t": [25, 75] * 2, "error": [0.2, 0.1, 0.1, 0.2], "label": ["linear"] * 2 + ["D"] * 2})
    np.testing.assert_allclose(figures.plot_by_timestep(table).lines[1].get_ydata(), [0.5, 2.0])


def test_every_measure_has_its_words():
    assert list(MEASURES) == ["error_250", "frechet", "recall"]
