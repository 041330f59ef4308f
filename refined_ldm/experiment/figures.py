"""The pictures of the experiment, each drawn from the tables below figures/data."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from refined_ldm.experiment.statistics import interval

ARM_NAMES = {
    "A": "A: baseline as published", "B": "B: baseline, mended and tuned", "C": "C: B with the other conditioner",
    "D": "D: C with the recipe", "E": "E: B with the recipe",
    "B, wide": "B, twice the channels", "D, wide": "D, twice the channels",
}  # fmt: skip
COLOURS = {"A": "0.6", "B": "C0", "C": "C1", "D": "C3", "E": "C2"}  # by the first letter; wide ones are dashed
MEASURES = {"error_250": "noise error, t ≥ 250", "frechet": "Fréchet distance, aiSFX", "recall": "class recall"}


def curves(folder, runs):
    """Noise errors along training of some runs -> table: label, seed, iterations, step, seconds, error, error_250."""
    tables = []
    for run in runs.to_dict("records"):
        table = pd.read_csv(folder / f"{run['name']}.csv")
        late = table[table["t"] >= 250].groupby("step")["error"].mean()
        table = table.groupby("step").agg(seconds=("seconds", "max"), error=("error", "mean")).assign(error_250=late)
        tables.append(table.reset_index().assign(label=run["label"], seed=run["seed"], iterations=run["iterations"]))
    return pd.concat(tables)


def plot_curves(table, formula, column="error_250", ax=None):
    """A band over seeds for every arm, noise error against iterations, both in their logarithm; dashed, the formula."""
    ax = ax or plt.figure(figsize=(8, 4)).subplots()
    for label, rows in table.groupby("label"):
        by_step = rows[rows["step"] > 0].groupby("step")[column]
        middle = by_step.mean()
        ax.fill_between(middle.index, by_step.min(), by_step.max(), color=COLOURS[label], alpha=0.25)
        ax.plot(middle.index, middle, color=COLOURS[label], label=ARM_NAMES[label])
    ax.axhline(formula, color="black", linestyle="--", linewidth=1, label="the formula, no network")
    ax.set(xscale="log", yscale="log", xlabel="iterations", ylabel=MEASURES.get(column, "noise error"))
    return ax


def plot_targets(runs, targets, measures=MEASURES):
    """Final quality against iterations: a point a run, a line an arm; dotted, what has to be reached -> figure."""
    figure, axes = plt.subplots(1, len(measures), figsize=(4 * len(measures), 4.0), layout="constrained")
    first = runs.loc[runs["label"] == "B", "iterations"].min()
    for (column, title), ax in zip(measures.items(), axes, strict=True):
        error = column.startswith("error")  # A's has another latent scale, and is not compared
        for label, rows in runs[runs["label"] != "A"].groupby("label") if error else runs.groupby("label"):
            twice = "wide" in label
            point = {"marker": "s", "markersize": 6, "fillstyle": "none"} if twice else {"marker": "o", "markersize": 4}
            ax.plot(rows["iterations"], rows[column], color=COLOURS[label[0]], alpha=0.8, linestyle="none", **point)
            middle = rows.groupby("iterations")[column].mean()
            ax.plot(middle.index, middle, "--" if twice else "-", color=COLOURS[label[0]], label=ARM_NAMES[label])
        ax.axhline(targets[column], color="black", linestyle=":", label=f"B after {first:,} iterations")
        for n, end in runs[runs["label"] == "B, wide"].groupby("iterations")[column].mean().items():
            ax.axhline(end, color=COLOURS["B"], linestyle=":", label=f"{ARM_NAMES['B, wide']}, after {n:,}")
        at = sorted(runs["iterations"].unique())
        at = [n for n, before in zip(at, [0, *at], strict=False) if n > 1.25 * before]  # labels would touch
        ax.set(xscale="log", xlabel="iterations", title=title)
        ax.set_xticks(at, [f"{n:g}" for n in at], fontsize=9, rotation=45)
        ax.set_ylim(bottom=0)
        ax.minorticks_off()
    names = axes[1].get_legend_handles_labels()  # the first has no arm A
    figure.legend(*names, fontsize=9, loc="outside lower center", ncols=4)
    return figure


def plot_steps(rows, value, ylabel="", title="", reference=None, ax=None):
    """A bar for each row of {"label", value}, with `low` and `high` if there are; dashed, a reference -> axes.

    A bar that is below the reference, with all of its interval, is red.
    """
    rows = pd.DataFrame(rows)
    ax = ax or plt.figure(figsize=(8, 0.36 * len(rows) + 1)).subplots()
    labels = [textwrap.shorten(str(label), 60) for label in rows["label"]]
    most = rows["high"] if "high" in rows else rows[value]
    ax.barh(labels, rows[value], color=["C3" if reference is not None and v < reference else "C0" for v in most])
    if {"low", "high"} <= set(rows):
        reach = np.maximum(0, [rows[value] - rows["low"], rows["high"] - rows[value]])
        ax.errorbar(rows[value], labels, xerr=reach, fmt="none", ecolor="black", capsize=3)
    if reference is not None:
        ax.axvline(reference, color="black", linestyle="--", linewidth=1)
    ax.invert_yaxis()
    ax.set(xlabel=ylabel, title=title)
    return ax


def plot_beside(runs, label, measures=MEASURES):
    """A bar a run in every measure; grey and dashed, the one called `label`, which they differ from in one thing."""
    figure, axes = plt.subplots(1, len(measures), figsize=(11, 0.36 * len(runs) + 1.2), sharey=True)
    for (column, title), ax in zip(measures.items(), axes, strict=True):
        ax.barh(runs["label"], runs[column], color=["0.6" if name == label else "C0" for name in runs["label"]])
        ax.axvline(float(runs.loc[runs["label"] == label, column].iloc[0]), color="black", linestyle="--", linewidth=1)
        ax.set(xlabel=title)
        ax.locator_params(axis="x", nbins=4)
    axes[0].invert_yaxis()
    return figure


def plot_guidance(table, measures=("frechet", "recall")):
    """Measures against guidance, a line for each run of a table (label, iterations, guidance, measures) -> figure."""
    figure, axes = plt.subplots(1, len(measures), figsize=(10, 3.2), layout="constrained")
    for column, ax in zip(measures, axes, strict=True):
        for (label, iterations), rows in table.groupby(["label", "iterations"], sort=False):
            style = "s--" if "wide" in label else "o-"
            ax.plot(rows["guidance"], rows[column], style, color=COLOURS[label[0]], fillstyle="none",
                    label=f"{label}, {iterations:,} iterations", alpha=0.5 if iterations < 1000 else 1)  # fmt: skip
        ax.set(xlabel="guidance", title=MEASURES[column])
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, loc="outside right center")
    return figure


def plot_by_timestep(tables, ax=None):
    """{name: table of one run (step, t, error)} -> axes: its last errors by timestep, as a factor of the first's."""
    ax = ax or plt.figure(figsize=(8, 3.4)).subplots()
    reference = None
    for name, table in tables.items():
        rows = table[table["step"] == table["step"].max()].set_index("t")["error"]
        reference = rows if reference is None else reference
        ax.plot(rows.index, rows / reference, label=name)
    ax.set(yscale="log", xlabel="timestep t (0 is the clean sound)", ylabel="noise error over the formula's")
    ax.set_yticks([0.8, 1, 1.5, 2, 3], ["0.8", "1", "1.5", "2", "3"])
    ax.minorticks_off()
    ax.legend(fontsize=9)
    return ax


def summary(runs, columns):
    """One row for each label and number of iterations: mean and 95 % interval over seeds of some columns."""
    rows = []
    for (label, iterations), group in runs.groupby(["label", "iterations"]):
        row = {"arm": ARM_NAMES.get(label, label), "iterations": iterations, "seeds": len(group)}
        for column in columns:
            mean, low, high = interval(group[column].dropna()) if group[column].notna().any() else (np.nan,) * 3
            row |= {column: mean, f"{column}_low": low, f"{column}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)
