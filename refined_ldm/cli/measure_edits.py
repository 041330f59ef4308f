"""Measure edits against rendered right answers; write figures/edits.png and its table.

    python -m refined_ldm.cli.measure_edits [CLIPS] [TASK …]

TASK: edit, inpaint, extend, long, loop (default: all). Tasks that are not measured keep their rows in the table.
`gallery` as the only TASK draws figures/editing.png: one sound, and what the functions make of it; `figure` draws
figures/edits.png again from its table.
"""

import sys
import time
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import torch

from refined_ldm import display
from refined_ldm.evaluation.detail_judge import DetailJudge
from refined_ldm.evaluation.edits import TASKS, counterfactuals
from refined_ldm.inference import optimize_for_inference
from refined_ldm.text_to_audio import RefinedAudioLDM

NAME = "edits"
GALLERY = 1  # the scene of the gallery
SHORT = {"extend": 2, "loop": 3, "long": 12}  # these take as many times fewer clips, since each takes longer


def main(clips: int, tasks: Sequence[str]) -> None:
    """Draw the gallery, or measure `tasks` on `clips` scenes each, and print the rows."""
    path = display.in_project("figures") / "data" / f"{NAME}.csv"
    if list(tasks) == ["gallery"]:
        return gallery()
    if list(tasks) == ["figure"]:
        table = pd.read_csv(path)
        return display.save_figure(draw(table), NAME, table, {"clips": clips})
    if unknown := set(tasks) - TASKS.keys():
        sys.exit(f"no task {', '.join(sorted(unknown))}: there are {', '.join(TASKS)}")
    started = time.perf_counter()
    model, judge = RefinedAudioLDM.from_preset("tiny"), DetailJudge.load()
    optimize_for_inference(model, "no")
    rows = pd.read_csv(path).to_dict("records") if path.is_file() else []
    for task in tasks or TASKS:
        count = max(1, clips // SHORT.get(task, 1))
        found = TASKS[task](model, judge, count, on_clips=lambda *done: print(*done, file=sys.stderr, flush=True))
        rows = [row for row in rows if row["task"] != task] + found
        rows.sort(key=lambda row: list(TASKS).index(row["task"]))
        display.save_figure(draw(pd.DataFrame(rows)), NAME, rows, {"clips": clips}, started)  # kept if interrupted
        print(pd.DataFrame(found).drop(columns="task").to_string(index=False), flush=True)


def gallery() -> None:
    """Draw a scene, its rendered counterfactual, and the results of four functions."""
    started, model = time.perf_counter(), RefinedAudioLDM.from_preset("tiny")
    before, after, _ = counterfactuals(GALLERY + 1)[GALLERY]
    sound, caption, onset = before["waveform"], after["caption"], before["events"][1].onset
    inverted = model.edit(sound, caption, 0.8, "inversion", before["caption"])
    sounds = {
        f"the sound: {before['caption']}": sound,
        f"rendered: {caption}": after["waveform"],
        "edit, strength 0.8": model.edit(sound, caption, 0.8),
        "edit by inversion, strength 0.8": inverted,
        f"inpaint from {onset:.1f} s on": model.inpaint(sound, caption, onset),
        "inpaint above 2 kHz": model.inpaint(sound, before["caption"], band=(2000, 8000)),
    }
    display.set_style()
    title = "One sound, and what the functions make of it"
    figure = display.plot_mels(model.mel(torch.stack(list(sounds.values()))), list(sounds), size=(3.2, 2), title=title)
    display.save_figure(figure, "editing", None, {"scene": before["id"]}, started)


def draw(table: pd.DataFrame) -> plt.Figure:
    """Plot the share with the new event against the change of the kept stretch, a line a method, by strength."""
    display.set_style()
    figure, ax = plt.subplots(figsize=(7, 4))
    x, y = "log-mel L1 of the kept stretch", "new event"
    wide = table[table["task"] == "edit"].fillna({"strength": -1.0})  # the trivial answers have no strength
    wide = wide.pivot(index=["method", "strength"], columns="measure", values="value").reset_index()
    for method, group in wide.groupby("method", sort=False):
        edited = group["strength"].iloc[0] >= 0
        (line,) = ax.plot(group[x], group[y], "o-" if edited else "k.")
        last = group.iloc[-1]
        label = f"{method}, strength {' to '.join(f'{s:g}' for s in group['strength'])}" if edited else method
        ax.annotate(label, (last[x], last[y]), xytext=(6, 4), textcoords="offset points", fontsize=9,
                    color=line.get_color())  # fmt: skip
    ax.set_title("Inversion changes less of what should stay than SDEdit")
    ax.set(xlabel="log-mel L1 of the kept stretch to the input", ylabel="share with the new event")
    ax.set(xlim=(-0.1, 1.25 * wide[x].max()), ylim=(-0.05, 1.12))
    return figure


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 24, sys.argv[2:])
