"""Pictures of what `make bench` measured."""

import matplotlib.pyplot as plt

from tests.benchmark.sizes import exponent


def ratio_bars(rows):
    """How many times as long each peer takes as ours, beside the goal. rows: those of `against_peers` -> Figure."""
    rows = [row for row in rows if row.get("ratio")]
    figure, ax = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.2), layout="constrained")
    places = range(len(rows))
    ax.barh(places, [row["ratio"] for row in rows], color="C0", height=0.6)
    goals = [row["goal"] or float("nan") for row in rows]
    ax.scatter(goals, places, marker="|", s=220, color="C3", label="goal")
    ax.axvline(1, color="black", linewidth=1)
    ax.set_yticks(places, [f"{row['work'].partition(':')[0]}\n{row['peer']}" for row in rows], fontsize=8)
    ax.set(xscale="log", xlabel="seconds of the peer / seconds of ours (right of 1: ours is faster)")
    ticks = (0.5, 1, 2, 5, 10)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.invert_yaxis()
    ax.legend(loc="lower right")
    return figure


def cost_curves(rows):
    """Seconds and memory against length, batch and width, with fitted exponents. rows: of `cost_against_size`."""
    kinds = [("length", "seconds of sound"), ("batch", "sounds at once"), ("width", "channels of the U-Net")]
    measures = [("seconds", "seconds"), ("memory_gb", "GB at the peak")]
    measures = measures[: 1 + any(row["memory_gb"] is not None for row in rows)]
    figure, axes = plt.subplots(len(measures), 3, figsize=(10, 2.8 * len(measures)), sharey="row", squeeze=False,
                                layout="constrained")  # fmt: skip
    for (against, label), column in zip(kinds, axes.T, strict=True):
        own = [row for row in rows if row["against"] == against]
        for (measure, unit), ax in zip(measures, column, strict=True):
            for number, part in enumerate(dict.fromkeys(row["part"] for row in rows)):
                line = [(row["size"], row[measure]) for row in own if row["part"] == part and row[measure]]
                if line:
                    sizes, costs = zip(*line, strict=True)
                    grows = f"{part}, ~ size$^{{{exponent(sizes, costs):.1f}}}$"
                    ax.plot(sizes, costs, "o-", color=f"C{number}", label=grows)
            ticks = sorted({row["size"] for row in own})
            ax.set(xscale="log", yscale="log")
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.minorticks_off()
            if ax.get_lines():
                ax.legend(fontsize=7)
            if against == "length":
                ax.set_ylabel(unit)
        column[-1].set_xlabel(label)
    return figure
