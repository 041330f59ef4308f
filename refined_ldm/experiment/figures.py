"""The pictures of the experiment, each drawn from a table below figures/data. Notebook: 06"""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refined_ldm.display.curves import label_lines
from refined_ldm.display.figures import Table
from refined_ldm.experiment.arms import BRANCH
from refined_ldm.experiment.measures import MEASURES

ARM_NAMES = {  # labels of the stored records, in words
    "A": "A: baseline as published", "B": "B: baseline, fixed and tuned", "C": "C: B with the other conditioner",
    "D": "D: C with the recipe", "E": "E: B with the recipe",
    "F": "F: D with details", "G": "G: E with details",
    "B, wide": "B with twice the channels", "D, wide": "D with twice the channels",
    "D, unconditional linear denoiser": "unconditional linear denoiser", "D, no linear denoiser": "no linear denoiser",
    "D, AdamW": "AdamW in place of Muon", "D, faint captions": "embeddings of norm 1",
    "D, uniform timesteps": "uniform timesteps", "D, last weights": "no average of weights",
    "tokens": "token states beside it", "oracle": "oracle of the events", "random": "untrained conditioner",
}  # fmt: skip
COLOURS = {"A": "0.5", "B": "C0", "C": "C1", "D": "C3", "E": "C2", "F": "C4", "G": "C5"}  # by the first letter


def plot_curves(table: pd.DataFrame, linear: float, column: str = "error_250", ax: Axes | None = None) -> Axes:
    """Noise error against iterations, both logarithmic: a line an arm, a band over its seeds.

    table: of `measures.error_curves`; linear: the error of the linear denoiser alone, dashed. Arms with the same recipe
    lie on one another: the wide, pale line is that of the first conditioner, the dotted one on it that of the other.
    """
    ax = ax or plt.figure(figsize=(8, 4)).subplots()
    styles = {"C": ":", "D": ":"}  # the other conditioner
    for label, rows in table.groupby("label"):
        by_step = rows[rows["step"] > 0].groupby("step")[column]
        middle, over = by_step.mean(), label in styles
        ax.fill_between(middle.index, by_step.min(), by_step.max(), color=COLOURS[label], alpha=0.2, linewidth=0)
        ax.plot(middle.index, middle, styles.get(label, "-"), color=COLOURS[label], label=label,
                linewidth=2 if over else 3.5, alpha=1 if over else 0.6, zorder=3 if over else 2)  # fmt: skip
    ax.axhline(linear, color="black", linestyle="--", linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="iterations", ylabel=MEASURES.get(column, "noise error"))
    ax.annotate("linear denoiser, no network", (table["step"][table["step"] > 0].min(), linear), (0, 4), fontsize=9,
                textcoords="offset points")  # fmt: skip
    label_lines(ax)
    return ax


def plot_targets(runs: pd.DataFrame, reached: pd.DataFrame) -> Figure:
    """Measures at the end of training against its length: a column a measure, a line an arm.

    The rows: the small U-Net, the one with twice the channels, and the branches (`arms.BRANCH`), also of the small one,
    which compare with each other alone. A line joins runs of one precision; the dots of all but float32 are hollow.
    runs: finished runs; reached: of `measures.targets_reached`. An arrow leads from the end of a baseline to where D is
    as good, with the factor between their iterations ("≥" where D's shortest run is better already).
    """
    wide, branch = runs["label"].str.contains("wide"), runs["label"].str.endswith(BRANCH)
    rows = {"small U-Net": runs[~wide & ~branch], "twice the channels": runs[wide],
            "small U-Net, all trained anew": runs[branch]}  # fmt: skip
    rows = {name: part for name, part in rows.items() if len(part)}
    figure, axes = plt.subplots(len(rows), len(MEASURES), figsize=(10.5, 2.9 * len(rows)), sharex=True,
                                layout="constrained", squeeze=False)  # fmt: skip
    for line, (name, part) in zip(axes, rows.items(), strict=True):
        for (column, title), ax in zip(MEASURES.items(), line, strict=True):
            compared = part[part["label"] != "A"] if column.startswith("error") else part  # A has another latent scale
            last = compared.sort_values("iterations").groupby("label")["precision"].last()  # where a name is written
            for (label, precision), own in compared.groupby(["label", "precision"]):
                colour, middle = COLOURS[label[0]], own.groupby("iterations")[column].mean()
                fill = "full" if precision == "float32" else "none"
                ax.plot(own["iterations"], own[column], "o", color=colour, markersize=4, alpha=0.7, fillstyle=fill)
                ax.plot(middle.index, middle, color=colour, label=label[0] if precision == last[label] else None)
            ax.set(xscale="log", xlim=(100, 15_000), title=f"{title}\n{name}")
            ax.set_ylim(0, 1.12 * compared[column].max())
            ax.set_xticks([150, 500, 1500, 6000], ["150", "500", "1,500", "6,000"])
            ax.minorticks_off()
            goals = reached[reached["baseline"].isin(part["label"]) & (reached["baseline"].str[0] == "B")
                            & (reached["arm"].str[0] == "D") & (reached["measure"] == column)]  # fmt: skip
            for goal in goals[np.isfinite(goals["reached after"])].to_dict("records"):
                start, end = goal["its iterations"], goal["reached after"]
                ax.annotate("", (end, goal["goal"]), (start, goal["goal"]),
                            arrowprops={"arrowstyle": "->", "color": "0.4", "linestyle": ":"})  # fmt: skip
                sign = "≥ " if goal["at least"] else ""
                ax.annotate(f"{sign}{goal['factor']:.2g}×", ((start * end) ** 0.5, goal["goal"]), (0, 2), fontsize=8,
                            textcoords="offset points", ha="center", color="0.3")  # fmt: skip
            label_lines(ax)
    for ax in axes[-1]:
        ax.set_xlabel("iterations of training")
    return figure


def plot_dots(rows: Table, value: str, xlabel: str = "", title: str = "", reference: float | None = None,
              ax: Axes | None = None) -> Axes:  # fmt: skip
    """A dot for each row of {"label", value}, with `low` and `high` if there are; dashed, a reference.

    A dot below the reference, with all of its interval, is red.
    """
    rows = pd.DataFrame(rows)
    ax = ax or plt.figure(figsize=(8, 0.36 * len(rows) + 1)).subplots()
    labels = [textwrap.shorten(ARM_NAMES.get(label, str(label)), 60) for label in rows["label"]]
    if {"low", "high"} <= set(rows):
        ax.hlines(labels, rows["low"], rows["high"], color="0.4", linewidth=2, zorder=1)
    most = rows["high"] if "high" in rows else rows[value]
    colours = ["C3" if reference is not None and x < reference else "C0" for x in most]
    ax.scatter(rows[value], labels, color=colours, s=45, zorder=2)
    if reference is not None:
        ax.axvline(reference, color="black", linestyle="--", linewidth=1)
    ax.grid(axis="y", color="0.9")
    ax.set(xlabel=xlabel, title=title, ylim=(len(rows) - 0.5, -0.5))
    return ax


def plot_beside(runs: pd.DataFrame, label: str, measures: dict[str, str] = MEASURES) -> Figure:
    """A bar a run in every measure; grey and dashed, the run called `label`, from which each differs in one thing."""
    figure, axes = plt.subplots(1, len(measures), figsize=(10.5, 0.36 * len(runs) + 1.4), sharey=True,
                                layout="constrained")  # fmt: skip
    names = [ARM_NAMES.get(name, name) for name in runs["label"]]
    for (column, title), ax in zip(measures.items(), axes, strict=True):
        ax.barh(names, runs[column], color=["0.6" if name == label else "C0" for name in runs["label"]])
        ax.axvline(float(runs.loc[runs["label"] == label, column].iloc[0]), color="black", linestyle="--", linewidth=1)
        ax.set(xlabel=title)
        ax.locator_params(axis="x", nbins=4)
    axes[0].invert_yaxis()
    return figure


def plot_guidance(table: pd.DataFrame, measures: tuple[str, ...] = ("frechet", "recall")) -> Figure:
    """Measures (rows) against guidance, the baseline's and the recipe's runs beside each other; filled, the best value.

    table: label, iterations, guidance, and the measures.
    """
    baseline = table["label"].str[0].isin(["A", "B", "C"])
    columns = {name: part for name, part in (("baseline", table[baseline]), ("recipe", table[~baseline])) if len(part)}
    figure, axes = plt.subplots(len(measures), len(columns), figsize=(10, 2.4 * len(measures)), sharex=True,
                                sharey="row", layout="constrained", squeeze=False)  # fmt: skip
    for (name, part), line in zip(columns.items(), axes.T, strict=True):
        for column, ax in zip(measures, line, strict=True):
            part = part.sort_values("guidance", ignore_index=True)
            for (label, iterations), rows in part.groupby(["label", "iterations"], sort=False):
                colour, style = COLOURS[label[0]], "--" if "wide" in label else "-"
                ax.plot(rows["guidance"], rows[column], style, marker="o", color=colour, fillstyle="none",
                        label=f"{label}, {iterations:,}")  # fmt: skip
                best = rows.loc[rows[column].idxmin() if column != "recall" else rows[column].idxmax()]
                ax.plot(best["guidance"], best[column], "o", color=colour)
            ax.set_ylim(0, 1.08 * table[column].max())
            label_lines(ax, 0.1, fontsize=9)
        line[0].set_title(name)
        line[-1].set_xlabel("guidance scale")
    for column, ax in zip(measures, axes[:, 0], strict=True):
        ax.set_ylabel(MEASURES[column])
    return figure


def plot_by_timestep(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Last noise errors by timestep (t, error, label), as a factor of those of the first label."""
    ax = ax or plt.figure(figsize=(8, 3.4)).subplots()
    reference = table[table["label"] == table["label"].iloc[0]].set_index("t")["error"]
    for number, (name, rows) in enumerate(table.groupby("label", sort=False)):
        factor = rows.set_index("t")["error"] / reference
        colour = COLOURS.get(name[0], "black")
        ax.plot(factor.index, factor, color=colour, alpha=1 - 0.15 * number if name[0] == "D" else 1)
        most = np.log(factor).abs().idxmax() if factor.ne(1).any() else factor.index[len(factor) // 8]
        ax.annotate(name, (most, factor[most]), color=colour, fontsize=9, ha="center", va="center",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    ax.set(yscale="log", xlim=(0, 1000), xlabel="timestep t (0: clean sound, 999: noise)",
           ylabel="noise error / that of\nthe linear denoiser")  # fmt: skip
    ax.set_yticks([0.8, 1, 1.5, 2, 3], ["0.8", "1", "1.5", "2", "3"])
    ax.minorticks_off()
    return ax
