"""Curves and bars: losses over steps, values with their intervals, lines that carry their own labels."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refined_ldm.base.integers import whole
from refined_ldm.display.figures import Table, table_rows
from refined_ldm.evaluation.budget import WAYS


def loss_curve(
    losses: Sequence | Mapping[str, Sequence],
    ax: Axes | None = None,
    smooth: int = 50,
    labels: Sequence[str] = (),
    log: bool = False,
    title: str = "",
    live: bool = False,
) -> Axes:
    """Draw losses, pale, and their running mean over `smooth` steps -> axes. Notebook: 03.

    losses: numbers, or the `Step`s of a training, or {label: either} for several curves.
    labels: names in `step.losses` to draw, one curve each, instead of `step.loss`.
    live: show it at once in place of what the cell has shown so far; for a loop that is still training.
    """
    ax = ax or plt.figure().subplots()
    curves = losses if isinstance(losses, dict) else {name: losses for name in labels} if labels else {"": losses}
    for label, values in curves.items():
        are_steps = len(values) and hasattr(values[0], "losses")
        x = [step.index for step in values] if are_steps else range(len(values))
        y = [step.losses[label] if labels else step.loss for step in values] if are_steps else values
        (line,) = ax.plot(x, y, linewidth=0.7, alpha=0.3)
        ax.plot(x, running_mean(y, smooth), color=line.get_color(), label=label)
    ax.set(xlabel="training step", ylabel="loss", title=title, yscale="log" if log else "linear")
    if any(curves):
        ax.legend()
    if live:
        from IPython.display import clear_output, display

        clear_output(wait=True)
        display(ax.figure)
        plt.close(ax.figure)
    return ax


def running_mean(values: Sequence[float], steps: int) -> np.ndarray:
    """Mean of the `steps` values around each one, of fewer at the ends: (n,) -> (n,)."""
    steps = whole("steps", steps, 1)
    box = np.ones(min(steps, len(values)))
    return np.convolve(values, box, "same") / np.convolve(np.ones(len(values)), box, "same")


def label_lines(ax: Axes, gap: float = 0.08, **style) -> None:
    """Write the label of each line beside its right end, in its colour, instead of a legend.

    gap: least distance between two labels, as a share of the height of the axes.
    """
    lines = [line for line in ax.lines if not line.get_label().startswith("_") and len(line.get_xdata())]
    ends = [ax.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1])) for line in lines]
    ends = [ax.transAxes.inverted().transform(end) for end in ends]
    place = -np.inf
    for k in sorted(range(len(lines)), key=lambda k: ends[k][1]):
        place = max(place + gap, ends[k][1])
        ax.annotate(lines[k].get_label(), (ends[k][0], place), xycoords="axes fraction", xytext=(6, 0),
                    textcoords="offset points", va="center", color=lines[k].get_color(),
                    **{"fontsize": 10, **style})  # fmt: skip


def bars(
    table: Table,
    label: str = "label",
    value: str = "value",
    low: str = "low",
    high: str = "high",
    group: str | None = None,
    ylabel: str = "",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw a bar for each row of a table (see `save_figure`), with its interval if it has `low` and `high` -> axes.

    group: the column that distinguishes bars of one label, by colour.
    """
    rows = table_rows(table)
    ax = ax or plt.figure().subplots()
    names = list(dict.fromkeys(row[label] for row in rows))
    groups = list(dict.fromkeys(row[group] for row in rows)) if group else [""]
    width = 0.8 / len(groups)
    for k, name in enumerate(groups):
        members = [row for row in rows if not group or row[group] == name]
        x = [names.index(row[label]) + (k - (len(groups) - 1) / 2) * width for row in members]
        y = np.array([row[value] for row in members], dtype=float)
        ax.bar(x, y, width * 0.9, label=str(name))
        if all(low in row and high in row for row in members):
            ends = np.array([(row[low], row[high]) for row in members], dtype=float).T
            ax.errorbar(x, y, np.maximum(0, [y - ends[0], ends[1] - y]), fmt="none", ecolor="black", capsize=3)
    ax.set_xticks(range(len(names)), [textwrap.fill(str(name), 14) for name in names])
    ax.set(ylabel=ylabel, title=title)
    if group:
        ax.legend()
    return ax


def plot_budget(costs: Sequence[Mapping], title: str = "") -> Figure:
    """Draw rows as `budget.Cost` has them: a panel a measure, a bar a way, dashed the original clips -> figure."""
    measures = list(dict.fromkeys(cost["measure"] for cost in costs))
    ways = [way for way in WAYS if any(cost["way"] == way for cost in costs)]
    figure, axes = plt.subplots(1, len(measures), figsize=(2.2 * len(measures) + 1.5, 0.34 * len(ways) + 1.3),
                                sharey=True, layout="constrained", squeeze=False)  # fmt: skip
    for measure, ax in zip(measures, axes[0], strict=True):
        rows = {cost["way"]: cost for cost in costs if cost["measure"] == measure}
        for place, way in enumerate(ways):
            if way in rows:
                cost = rows[way]
                reach = [[max(0, cost["value"] - cost["low"])], [max(0, cost["high"] - cost["value"])]]
                ax.barh(place, cost["value"], xerr=reach, color="C1" if "vae" in way or way == "generated" else "C0")
        first = next(iter(rows.values()))
        ax.axvline(first["baseline" if "baseline" in first else "floor"], color="black", linestyle="--", linewidth=1)
        ax.set_title(measure, fontsize=10)
        ax.set_xlim(left=0)
    axes[0, 0].set_yticks(range(len(ways)), [WAYS[way] for way in ways])
    axes[0, 0].invert_yaxis()
    figure.suptitle(title)
    return figure


def plot_edits(table, ax: Axes, title: str = "Inversion changes less of what should stay than SDEdit") -> Axes:
    """Draw rows of `evaluation.edits.measure_edit`: how often the new event is in, against what should have stayed.

    A line a method, from its weakest to its strongest edit, each with its strength; a black dot an answer without one.
    Bars are 95 % intervals. Notebook: 07.
    """
    x, y = "log-mel L1 of the kept stretch", "new event"
    wide = table.fillna({"strength": -1.0}).set_index(["method", "strength", "measure"])[["value", "low", "high"]]
    drawn = []  # points, below whose labels those of later ones near them stand
    for method in dict.fromkeys(table["method"]):
        of = wide.loc[method].unstack()
        share, change = of.xs(y, axis=1, level=1), of["value"][x]
        edited = of.index[0] >= 0
        reach = [share["value"] - share["low"], share["high"] - share["value"]]
        (line, *_) = ax.errorbar(change, share["value"], reach, fmt="o-" if edited else "k.", elinewidth=0.7)
        style = {"textcoords": "offset points", "color": line.get_color()}
        for strength in of.index if len(of) > 1 else ():
            ax.annotate(f"{strength:g}", (change[strength], share["value"][strength]), (5, -11), fontsize=8, **style)
        end = change.iloc[-1], share["value"].iloc[-1]
        near = sum(abs(end[0] - a) < 0.6 and abs(end[1] - b) < 0.12 for a, b in drawn)
        place, side = ((6, 12 * (1 - near - (len(of) > 1))), "top") if near else ((6, 4), "bottom")
        ax.annotate(textwrap.fill(method, 16), end, place, fontsize=9, va=side, **style)
        drawn += zip(change, share["value"], strict=True)
    ax.set(xlabel="log-mel L1 of the kept stretch to the input", ylabel="share with the new event", title=title)
    ax.set(xlim=(-0.1, 1.3 * wide.xs(x, level="measure")["value"].max()), ylim=(-0.05, 1.12))
    return ax
