"""Everything that reaches the screen: spectrograms, players, curves, source code, sliders, and figures with their data.

Axes are in seconds, Hz and dB. Plotting functions draw into `ax`, or make a figure of their own, and return the axes
(or the figure, where there are several axes). Call `set_style()` once, at the top of a notebook.
"""

import csv
import html
import inspect
import json
import math
import os
import subprocess
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import refined_ldm
from refined_ldm.evaluation.budget import WAYS
from refined_ldm.mel import LDM_MEL, MelSpectrogram, hz_to_mel

ROOT = Path(refined_ldm.__file__).resolve().parent.parent
REPOSITORY = ROOT if (ROOT / "pyproject.toml").exists() else None  # a copy installed elsewhere has none
STYLE = {
    "figure.dpi": 80,  # stored in notebooks: small on purpose
    "figure.figsize": (8, 3),
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "image.cmap": "magma", "legend.frameon": False,
}  # fmt: skip
RANGE = 80  # dB below the loudest point that a spectrogram shows
TICKS = (125, 500, 1000, 2000, 4000, 8000, 16_000)  # Hz


def set_style():
    """One look for every figure of a notebook."""
    plt.rcParams.update(STYLE)


def plot_waveform(waveform, sample_rate=16_000, title="", ax=None):
    """Draw a waveform (N,) or (1, N) over seconds -> axes."""
    ax = ax or plt.figure(figsize=(8, 1.8)).subplots()
    waveform = _array(waveform).reshape(-1)
    ax.plot(np.arange(len(waveform)) / sample_rate, waveform, linewidth=0.5)
    ax.set(xlabel="s", ylabel="amplitude", title=title, xlim=(0, len(waveform) / sample_rate))
    return ax


def plot_mel(mel, config=LDM_MEL, title="", ax=None):
    """Draw a log-mel (1, 1, T, F), (1, T, F) or (T, F), in dB above the floor -> axes."""
    shape = tuple(mel.shape)
    if mel.ndim < 2 or math.prod(shape[:-2]) != 1:
        raise ValueError(f"mel must be one spectrogram (1, 1, T, F) or (T, F), got {shape}: plot_mels draws several")
    ax = ax or plt.figure().subplots()
    levels = _decibels(mel, config).reshape(shape[-2:])
    image = _draw_mel(ax, levels, config, levels.max())
    ax.set(xlabel="s", ylabel="Hz", title=title)
    ax.figure.colorbar(image, ax=ax, label="dB above the floor", pad=0.01)
    return ax


def plot_mels(mels, titles=(), config=LDM_MEL, columns=3, size=(3.2, 2.1)):
    """Draw log-mels (B, 1, T, F) in a grid with one colour scale, each `size` inches -> figure."""
    if mels.ndim != 4 or mels.shape[1] != 1:
        raise ValueError(f"mels must be (B, 1, T, F), got {tuple(mels.shape)}")
    levels = _decibels(mels, config)[:, 0]  # (B, T, F)
    columns = min(columns, len(levels))
    rows = math.ceil(len(levels) / columns)
    figure = plt.figure(figsize=(max(5, size[0] * columns), 0.5 + size[1] * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for ax in grid.flat[len(levels) :]:
        ax.set_axis_off()
    for k, ax in enumerate(grid.flat[: len(levels)]):
        image = _draw_mel(ax, levels[k], config, levels.max(), TICKS if size[1] > 1.5 else TICKS[1::2])
        ax.set_title(textwrap.fill(titles[k], int(11 * size[0])) if k < len(titles) else "", fontsize=10, loc="left")
        lowest = k + columns >= len(levels)
        ax.tick_params(labelbottom=lowest)
        ax.set(xlabel="s" if lowest else "", ylabel="Hz" if k % columns == 0 else "")
    figure.colorbar(image, ax=grid, label="dB above the floor", pad=0.01)
    return figure


def play(waveform, sample_rate=16_000, title=""):
    """Show a player of a waveform (N,) or (1, N) at the loudness it has."""
    _show_html(_player(waveform, sample_rate, title))


def compare(waveforms, titles, config=LDM_MEL, columns=3):
    """Show the spectrogram and the player of each waveform (B, N), side by side -> figure."""
    waveforms = torch.as_tensor(np.stack([_array(w).reshape(-1) for w in waveforms]))
    figure = plot_mels(MelSpectrogram(config)(waveforms), titles, config, columns)
    plt.show()  # the pictures first, then the players
    cells = [_player(w, config.sample_rate, title) for w, title in zip(waveforms, titles, strict=True)]
    _show_html(f'<div style="display:grid;grid-template-columns:repeat({columns},1fr)">{"".join(cells)}</div>')
    return figure


def _draw_mel(ax, levels, config, top, ticks=TICKS):
    """levels (T, F) and top, the brightest, in dB -> image."""
    top = max(top, 1.0)  # all silence is black
    frames, bands = levels.shape
    extent = (0, frames * config.hop_length / config.sample_rate, -0.5, bands - 0.5)
    image = ax.imshow(levels.T, origin="lower", aspect="auto", extent=extent, interpolation="nearest", cmap="magma",
                      vmin=max(0, top - RANGE), vmax=top)  # fmt: skip
    shown = [hz for hz in ticks if config.fmin <= hz <= config.fmax]
    low, high = hz_to_mel(config.fmin).item(), hz_to_mel(config.fmax).item()
    # Band k of `bands` lies k + 1 steps of mel above fmin (and is drawn at height k).
    positions = [(hz_to_mel(hz).item() - low) / (high - low) * (bands + 1) - 1 for hz in shown]
    ax.set_yticks(np.clip(positions, -0.5, bands - 0.5), [f"{hz // 1000}k" if hz >= 1000 else str(hz) for hz in shown])
    return image


def _decibels(mel, config):
    return 20 / math.log(10) * (_array(mel) - math.log(config.floor))


def _array(x):
    return x.detach().float().cpu().numpy() if hasattr(x, "detach") else np.asarray(x, dtype=np.float32)


def _player(waveform, sample_rate, title):
    from IPython.display import Audio

    audio = Audio(np.clip(_array(waveform).reshape(-1), -1, 1), rate=sample_rate, normalize=False)
    return f"<div><div>{html.escape(title)}</div>{audio._repr_html_()}</div>"


def _show_html(text):
    from IPython.display import HTML, display

    display(HTML(text))


def loss_curve(losses, ax=None, smooth=50, labels=(), log=False, title="", live=False):
    """Draw losses, faint, and their running mean over `smooth` steps -> axes.

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
    ax.set(xlabel="step", ylabel="loss", title=title, yscale="log" if log else "linear")
    if any(curves):
        ax.legend()
    if live:
        from IPython.display import clear_output, display

        clear_output(wait=True)
        display(ax.figure)
        plt.close(ax.figure)
    return ax


def running_mean(values, steps):
    """Mean of the `steps` values around each one, of fewer at the ends: (n,) -> (n,)."""
    box = np.ones(min(steps, len(values)))
    return np.convolve(values, box, "same") / np.convolve(np.ones(len(values)), box, "same")


def loss_by_timestep(timesteps, losses, bins=10, steps=1000, ax=None, title="", label=""):
    """Draw the loss of each example over its diffusion step, and the mean of `bins` equal ranges -> axes."""
    ax = ax or plt.figure().subplots()
    timesteps, losses = _array(timesteps).reshape(-1), _array(losses).reshape(-1)
    edges = np.linspace(0, steps, bins + 1)
    which = np.clip(np.digitize(timesteps, edges) - 1, 0, bins - 1)
    means = [losses[which == k].mean() if (which == k).any() else np.nan for k in range(bins)]
    (line,) = ax.plot((edges[:-1] + edges[1:]) / 2, means, marker="o", label=label)
    ax.scatter(timesteps, losses, s=4, alpha=0.25, color=line.get_color(), linewidths=0)
    ax.set(xlabel="diffusion step t (0: clean, last: noise)", ylabel="loss", title=title, xlim=(0, steps))
    if label:
        ax.legend()
    return ax


def bars(table, label="label", value="value", low="low", high="high", group=None, ylabel="", title="", ax=None):
    """Draw a bar for each row of a table (see `save_figure`), with its interval if it has `low` and `high` -> axes.

    group: the column that tells bars of one label apart, by colour.
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


def plot_budget(costs, title=""):
    """Draw rows as `budget.Cost` has them: a panel a measure, a bar a way, dashed the floor -> figure."""
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
        ax.axvline(next(iter(rows.values()))["floor"], color="black", linestyle="--", linewidth=1)
        ax.set_title(measure, fontsize=10)
        ax.set_xlim(left=0)
    axes[0, 0].set_yticks(range(len(ways)), [WAYS[way] for way in ways])
    axes[0, 0].invert_yaxis()
    figure.suptitle(title)
    return figure


def claims_table(ledger):
    """What was claimed, what became of it and what was found: `claims.read_ledger` -> a table that wraps its text."""
    import pandas as pd

    rows = [{"claimed": claim["words"], "status": claim["status"], "found": " ".join(claim["found"].split())}
            for claim in ledger if claim["status"] != "measured"]  # fmt: skip
    wrapped = {"white-space": "pre-wrap", "text-align": "left", "max-width": "32em", "vertical-align": "top"}
    return pd.DataFrame(rows).style.set_properties(**wrapped).hide(axis="index")


def read_json(path):
    """What a JSON file holds."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def show_source(item):
    """Show the source of a function, a method or a class, with its file and line."""
    from IPython.display import Markdown, display

    item = inspect.unwrap(item)
    lines, first = inspect.getsourcelines(item)
    path = Path(inspect.getsourcefile(item)).resolve()
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    display(Markdown(f"`{name}`, line {first}\n```python\n{textwrap.dedent(''.join(lines)).rstrip()}\n```"))


def explore(function, **controls):
    """Show sliders and menus that call `function` anew; they start at its defaults.

    controls: (low, high) or (low, high, step) for a slider, a list for a menu, text for a field, a bool for a box.
    """
    try:
        import ipywidgets
    except ImportError:
        print("The sliders need ipywidgets (pip install ipywidgets); the plot above shows their first position.")
        return
    from IPython.display import display
    from IPython.utils.capture import capture_output

    knobs, screen = ipywidgets.interactive(function, {"manual": True}, **controls).kwargs_widgets, ipywidgets.Output()

    # What `function` shows is caught here and handed to the screen as a whole. An Output used as a context asks the
    # client to answer, which now and then stops papermill and nbconvert for good (nbclient issue 312).
    def call(_=None):
        with capture_output() as shown:
            try:
                function(**{knob.description: knob.value for knob in knobs})
                plt.show()
            except ValueError as fault:
                print(fault)
        text = [{"output_type": "stream", "name": "stdout", "text": shown.stdout}] if shown.stdout else []
        rich = [{"output_type": "display_data", "data": i.data, "metadata": i.metadata} for i in shown.outputs]
        screen.outputs = text + rich

    for knob in knobs:
        knob.style, knob.layout.width = {"description_width": "120px"}, "420px"
        if hasattr(knob, "continuous_update"):
            knob.continuous_update = False  # once the slider is let go
        knob.observe(call, "value")
    plt.show()  # what the cell has drawn so far stays outside
    call()
    display(ipywidgets.VBox([*knobs, screen]))


def save_figure(figure, name, table=None, parameters=None, started=None, folder="figures"):
    """Write `folder`/name.png, the table it was drawn from as data/name.csv, and where it comes from as data/name.json.

    table: rows as dicts, {column: values}, or a pandas DataFrame. started: `time.perf_counter()` before the work.
    A relative folder is one of the repository's, or of the working directory for an installed package.
    """
    folder = (REPOSITORY or Path.cwd()) / folder
    (folder / "data").mkdir(parents=True, exist_ok=True)
    origin = {
        "figure": name,
        "parameters": parameters or {},
        "seconds": None if started is None else round(time.perf_counter() - started, 1),
        "commit": _commit() if REPOSITORY else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "numpy", "matplotlib")},
    }
    _replace(folder / f"{name}.png", lambda path: figure.savefig(path, dpi=110, format="png"))
    if table is not None:
        save_table(table, name, folder)
    _replace(folder / "data" / f"{name}.json", lambda path: path.write_text(json.dumps(origin, indent=1) + "\n"))


def save_table(table, name, folder="figures"):
    """Write a table alone, as `save_figure` does: `folder`/data/name.csv."""
    folder = (REPOSITORY or Path.cwd()) / folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"{name}.csv", lambda path: _write_csv(path, table_rows(table)))


def table_rows(table):
    """A pandas DataFrame, {column: values} or rows as dicts -> rows as dicts."""
    if hasattr(table, "to_dict"):
        return table.to_dict("records")
    if isinstance(table, dict):
        return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    return list(table)


def _write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: v.item() if hasattr(v, "item") else v for k, v in row.items()} for row in rows)


def _commit():
    """The commit this code is at, with "+dirty" if package or notebooks have changed since; None without git."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", "refined_ldm", "notebooks")
        return git("rev-parse", "HEAD").strip() + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _replace(path, write):
    """Write to a temporary name, then rename, so that nobody reads half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.replace(path)
