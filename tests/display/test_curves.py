"""Curves and bars show their values and intervals, and labels stand beside their lines."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from refined_ldm import display
from refined_ldm.training.loop import Step


def test_loss_curves_of_numbers_of_steps_and_of_their_parts():
    steps = [Step(10 * k, 2.0, {"loss": 2.0, "kl": 0.5}, 1e-3, 0.0) for k in range(1, 6)]
    assert display.loss_curve([2.0] * 5).lines[1].get_xdata()[-1] == 4
    line = display.loss_curve(steps, labels=["kl"]).lines[1]
    np.testing.assert_allclose((line.get_xdata()[-1], *line.get_ydata()), (50, *[0.5] * 5))
    both = display.loss_curve({"a": [1.0, 2.0], "b": steps}, log=True)
    assert [text.get_text() for text in both.get_legend().get_texts()] == ["a", "b"] and both.get_yscale() == "log"


def test_running_mean_is_centred():
    np.testing.assert_allclose(display.running_mean(np.arange(9.0), 3), [0.5, *range(1, 8), 7.5])


def test_bars_have_their_intervals():
    rows = [{"label": name, "value": v, "low": v - 1, "high": v + 2} for name, v in (("a", 3.0), ("b", 5.0))]
    ax = display.bars(rows, ylabel="score")
    assert [bar.get_height() for bar in ax.patches] == [3, 5]
    ends = ax.collections[0].get_segments()
    np.testing.assert_allclose([end[:, 1] for end in ends], [(2, 5), (4, 7)])


def test_labels_stand_at_the_ends_of_their_lines_and_do_not_overlap():
    ax = plt.figure().subplots()
    for k, end in enumerate((1.0, 1.01, 3.0)):
        ax.plot([0, 1], [0, end], label=f"line {k}")
    ax.plot([0, 1], [2, 2])  # no label of its own
    display.label_lines(ax, gap=0.1)
    places = {text.get_text(): text.xy[1] for text in ax.texts}
    assert list(places) == ["line 0", "line 1", "line 2"]
    assert places["line 1"] - places["line 0"] >= 0.1 - 1e-9
    top = ax.transAxes.inverted().transform(ax.transData.transform((1, 3.0)))
    np.testing.assert_allclose(places["line 2"], top[1])
    assert [text.get_color() for text in ax.texts] == [line.get_color() for line in ax.lines[:3]]


def test_edits_are_drawn_from_their_weakest_to_their_strongest_with_intervals():
    shares = {("SDEdit", 0.6): (0.2, 1.0), ("SDEdit", 0.8): (0.5, 2.0), ("input unchanged", np.nan): (0.0, 0.0)}
    table = pd.DataFrame([
        {"method": method, "strength": strength, "measure": measure, "value": v, "low": v - 0.1, "high": v + 0.2}
        for (method, strength), values in shares.items()
        for measure, v in zip(("new event", "log-mel L1 of the kept stretch"), values, strict=True)
    ])  # fmt: skip
    ax = display.plot_edits(table, plt.figure().subplots())
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [(1.0, 0.2), (2.0, 0.5)])
    np.testing.assert_allclose([end[:, 1] for end in ax.collections[0].get_segments()], [(0.1, 0.4), (0.4, 0.7)])
    assert [text.get_text() for text in ax.texts] == ["0.6", "0.8", "SDEdit", "input unchanged"]
    same = table[table["method"] == "input unchanged"]
    table = pd.concat([table, same.assign(method="rendered"), same.assign(method="inpainting from the event on")])
    ax = display.plot_edits(table, plt.figure().subplots())
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
