"""Measure edits against rendered right answers; write figures/edits.png and its table.

    python -m refined_ldm.cli.measure_edits [CLIPS] [TASK …]

TASK: edit, inpaint, extend, upsample, long, loop, variations, interpolate (default: all). Tasks that are not measured
keep their rows in the table, which says of which weights each row is. `gallery` as the only TASK draws
figures/editing.png and editing_long.png, a sound from each function; `figure` draws figures/edits.png again from its
table.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import torch

from refined_ldm import display
from refined_ldm.base.integers import integer
from refined_ldm.editing import differing_stretch, read_sound
from refined_ldm.evaluation.detail_classifier import DetailClassifier
from refined_ldm.evaluation.edits import CUTOFF, RATE, TASKS, counterfactuals, low_passed
from refined_ldm.inference import optimize_for_inference
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.weights import weights_digest

NAME = "edits"
GALLERY = 1  # the scene of the gallery
SHORT = {
    "extend": 2,
    "upsample": 2,
    "loop": 3,
    "variations": 3,
    "interpolate": 3,
    "long": 12,
}  # as many times fewer clips, since each takes longer


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the arguments, None: of the shell, ask for."""
    parser = argparse.ArgumentParser("python -m refined_ldm.cli.measure_edits", description=__doc__.partition(";")[0])
    parser.add_argument("clips", type=integer(1), nargs="?", default=24, metavar="CLIPS")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; or gallery, or figure")
    measure(**vars(parser.parse_args(arguments)))


def measure(clips: int, tasks: Sequence[str]) -> None:
    """Draw the gallery, or measure `tasks` on `clips` scenes each, and print the rows."""
    path = display.in_project("figures") / "data" / f"{NAME}.csv"
    if list(tasks) == ["gallery"]:
        return gallery()
    if list(tasks) == ["figure"]:
        if not path.is_file():
            sys.exit(f"no table {path}: measure it first")
        table = pd.read_csv(path)
        return display.save_figure(draw(table), NAME, table, {"clips": clips})
    if unknown := set(tasks) - TASKS.keys():
        sys.exit(f"no task {', '.join(sorted(unknown))}: there are {', '.join(TASKS)}")
    started = time.perf_counter()
    model, classifier = RefinedAudioLDM.from_preset("tiny"), DetailClassifier.load()
    weights = weights_digest(model)
    optimize_for_inference(model, "no")
    rows = []
    if path.is_file():
        table = pd.read_csv(path).astype(object)
        rows = table.where(table.notna(), None).to_dict("records")
    for task in tasks or TASKS:
        count = max(1, clips // SHORT.get(task, 1))
        found = TASKS[task](model, classifier, count, on_clips=lambda *done: print(*done, file=sys.stderr, flush=True))
        found = [row | {"weights": weights} for row in found]
        rows = [row for row in rows if row["task"] != task] + found
        rows.sort(key=lambda row: list(TASKS).index(row["task"]))
        if any(row["task"] == "edit" for row in rows):
            display.save_figure(draw(pd.DataFrame(rows)), NAME, rows, {"clips": clips}, started)  # kept if interrupted
        else:  # the figure shows that task alone
            display.save_table(rows, NAME)
        print(pd.DataFrame(found).drop(columns=["task", "weights"]).to_string(index=False), flush=True)


def draw(table: pd.DataFrame) -> plt.Figure:
    """Adherence against change, of the rows of the task `edit`."""
    display.set_style()
    figure, ax = plt.subplots(figsize=(7, 4))
    display.plot_edits(table[table["task"] == "edit"], ax)
    return figure


def gallery() -> None:
    """Draw a scene, its rendered counterfactual, and a sound from each function: short ones, and long ones."""
    started, model = time.perf_counter(), RefinedAudioLDM.from_preset("tiny")
    weights = weights_digest(model)
    before, after, _ = counterfactuals(GALLERY + 1)[GALLERY]
    sound, source, caption = before["waveform"], before["caption"], after["caption"]
    first, last = (at / RATE for at in differing_stretch(model, read_sound(model, sound, None), caption, source))
    short = {
        f"the sound: {source}": sound,
        f"rendered: {caption}": after["waveform"],
        "edit by SDEdit, strength 0.8": model.edit(sound, caption, 0.8),
        "edit by inversion, strength 0.8": model.edit(sound, caption, 0.8, "inversion", source),
        f"edit by DiffEdit: {first:.1f} to {last:.1f} s": model.edit(sound, caption, 0.8, "diffedit", source),
        "inpaint above 2 kHz": model.inpaint(sound, source, band=(2000, 8000)),
        f"nothing above {CUTOFF} Hz": low_passed(sound),
        "super-resolution of it": model.super_resolve(low_passed(sound), source, CUTOFF),
        "a variation, strength 0.6": model.variations(sound, source, 1, 0.6)[0],
    }
    seconds = len(sound) / RATE
    long = {
        "extend by its own length": model.extend(sound, source, seconds),
        "loop “crickets chirp”, twice": model.loop("crickets chirp", seconds).repeat(2),
        "“rain falls”, from the middle on “a dog barks”": model.generate_long(
            [(0, "rain falls"), (seconds, "a dog barks")], 2 * seconds
        ),
    }
    display.set_style()
    for name, sounds, title in (
        ("editing", short, "One sound, and what the functions make of it"),
        ("editing_long", long, "Continued, in a loop, and with a change of caption"),
    ):
        mels = model.mel(torch.stack(list(sounds.values())))
        figure = display.plot_mels(mels, list(sounds), size=(3.2, 2), title=title)
        display.save_figure(figure, name, None, {"scene": before["id"], "weights": weights}, started)


if __name__ == "__main__":
    main()
