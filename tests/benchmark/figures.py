"""Pictures of what `make bench` measured: python -m tests.benchmark.figures draws them again from the stored tables."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from refined_ldm.display.curves import label_lines
from refined_ldm.display.figures import ROOT, read_json, save_figure
from tests.benchmark.sizes import exponent


def ratio_dots(rows):
    """How many times as long each peer takes as ours, beside the goal. rows: those of `against_peers` -> Figure."""
    rows = [row for row in rows if row.get("ratio")]
    figure, ax = plt.subplots(figsize=(10, 0.42 * len(rows) + 1.4), layout="constrained")
    places = list(range(len(rows)))
    faster = ["C0" if row["ratio"] >= 1 else "C3" for row in rows]
    ax.scatter([row["ratio"] for row in rows], places, c=faster, s=50, zorder=2)
    for row, place in zip(rows, places, strict=True):
        ax.annotate(f"{row['ratio']:.2g}", (row["ratio"], place), (7, 0), textcoords="offset points", va="center",
                    fontsize=9)  # fmt: skip
    goals = [(row["goal"], place) for row, place in zip(rows, places, strict=True) if row["goal"]]
    ax.plot(*(zip(*goals, strict=True) if goals else ((), ())), "|", color="0.4", markersize=14, label="goal")
    ax.axvline(1, color="black", linewidth=1)
    ax.set_yticks(places, [f"{row['work'].partition(':')[0]}\nagainst {row['peer']}" for row in rows], fontsize=8)
    ticks = (0.5, 1, 2, 5, 10)
    ax.set(xscale="log", xlim=(0.5, 10), ylim=(len(rows) - 0.5, -0.5),
           xlabel="seconds of the peer / seconds of ours (right of 1: ours is faster)")  # fmt: skip
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.grid(axis="y", color="0.92")
    ax.legend(loc="lower right", fontsize=9)
    ahead = sum(row["ratio"] >= 1 for row in rows)
    figure.suptitle(f"Ours is faster in {ahead} of {len(rows)} comparisons on a CPU", x=0.01, ha="left", fontsize=12)
    return figure


def cost_curves(rows):
    """Seconds and memory against length, batch and width, with fitted exponents. rows: of `cost_against_size`."""
    kinds = [("length", "length of the sound (s)"), ("batch", "sounds in a batch"), ("width", "channels of the U-Net")]
    measures = [("seconds", "time (s)"), ("memory_gb", "peak memory (GB)")]
    measures = measures[: 1 + any(row["memory_gb"] is not None for row in rows)]
    figure, axes = plt.subplots(len(measures), 3, figsize=(11, 3 * len(measures)), sharey="row", sharex="col",
                                squeeze=False, layout="constrained")  # fmt: skip
    for (against, label), column in zip(kinds, axes.T, strict=True):
        own = [row for row in rows if row["against"] == against]
        for (measure, unit), ax in zip(measures, column, strict=True):
            for number, part in enumerate(dict.fromkeys(row["part"] for row in rows)):
                line = [(row["size"], row[measure]) for row in own if row["part"] == part and row[measure]]
                if line:
                    sizes, costs = zip(*line, strict=True)
                    grows = f"{part}\n$\\propto$ size$^{{{exponent(sizes, costs):.1f}}}$"
                    ax.plot(sizes, costs, "o-", color=f"C{number}", label=grows)
            ticks = sorted({row["size"] for row in own})
            ax.set(xscale="log", yscale="log")
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.minorticks_off()
            label_lines(ax, 0.16, fontsize=8)
            if against == "length":
                ax.set_ylabel(unit)
        column[-1].set_xlabel(label)
    figure.suptitle("Time grows a little faster than the sound's length, memory slower (preset tiny, CPU)", x=0.01,
                    ha="left", fontsize=12)  # fmt: skip
    return figure


QUALITIES = (("details", "low", "high"), ("frechet", "frechet_low", "frechet_high"))


def quality_dots(rows):
    """Right details and Fréchet distance against the seconds of a clip. rows: those of `quality` -> Figure.

    The ways are numbered from the quickest on; brackets hold the evaluations of the U-Net.
    """
    rows = sorted(rows, key=lambda row: row["seconds"])
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.5), layout="constrained")
    for number, row in enumerate(rows, 1):
        colour, label = f"C{number % 10}", f"{number}  {row['way']} ({row['evaluations']:g})"
        for ax, (value, low, high) in zip(axes, QUALITIES, strict=True):
            ax.vlines(row["seconds"], row[low], row[high], color=colour, linewidth=1, alpha=0.4)
            ax.plot(row["seconds"], row[value], "o", color=colour, markersize=13, label=label)
            ax.annotate(number, (row["seconds"], row[value]), fontsize=8, color="white", ha="center", va="center")
    axes[0].set(ylabel="share of right details")
    axes[1].set(ylabel="aiSFX Fréchet distance (lower is nearer)")
    for ax in axes:
        ax.set(xscale="log", xlabel="seconds for one clip")
        ax.set_xticks(ticks := [0.15, 0.3, 0.6, 1.2, 2.4, 4.8], list(map(str, ticks)))
        ax.minorticks_off()
        ax.grid(color="0.92")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, markerscale=0.5,
                  frameon=False)  # fmt: skip
    best = max(rows, key=lambda row: row["details"])
    figure.suptitle(f"Most details are right with {best['way']}, in {best['seconds']:.2g} s a clip", x=0.01, ha="left",
                    fontsize=12)  # fmt: skip
    return figure


def redraw(folder=ROOT / "figures"):
    """Draw the pictures from folder/data/NAME.csv. Their records keep the commit and the seconds of measuring."""
    for name, draw in (("bench", ratio_dots), ("bench_sizes", cost_curves), ("bench_quality", quality_dots)):
        if not (Path(folder) / "data" / f"{name}.csv").is_file():
            continue
        table, origin = pd.read_csv(Path(folder) / "data" / f"{name}.csv"), Path(folder) / "data" / f"{name}.json"
        before = read_json(origin)
        measured = before["parameters"] or {"measured": {key: before[key] for key in ("commit", "seconds", "device")}}
        figure = draw(table.astype(object).where(table.notna(), None).to_dict("records"))
        save_figure(figure, name, None, measured, folder=Path(folder).absolute())


if __name__ == "__main__":
    redraw()
