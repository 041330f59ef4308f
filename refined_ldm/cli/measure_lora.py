"""Measure what a LoRA gains and forgets; write figures/lora.png and its table.

    python -m refined_ldm.cli.measure_lora [CLIPS [DETAILS]] [--data FOLDER]

A LoRA of the shipped model is trained, as by default, on 30 recordings of frogs, which no training of this
project has had, and compared with the model itself: by CLIPS (48) other recordings, and by DETAILS (40) captions of
each detail that the model knew before. --data takes 30 recordings of a folder or table instead, and compares with the
others. Rows of other recordings stay in the table.
"""

import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import pandas as pd
import torch

from refined_ldm import display
from refined_ldm.base.integers import integer
from refined_ldm.data.sources import open_recordings
from refined_ldm.data.tables import write_recordings
from refined_ldm.evaluation.detail_classifier import DetailClassifier
from refined_ldm.evaluation.details import DETAILS, select_scenes
from refined_ldm.evaluation.embeddings import Aisfx
from refined_ldm.evaluation.lora import BASE, FRECHET, LORA, measure_forgetting, measure_gain
from refined_ldm.scenes.dataset import SoundScenes
from refined_ldm.scenes.unheard import frogs
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.lora import KEPT, LORA_FILE, LoraTraining, read_lora, train_lora

NAME, LEARNED, RANK = "lora", 30, 8
FROGS, OWN = "frogs", "own recordings"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the arguments, None: of the shell, ask for."""
    parser = ArgumentParser("python -m refined_ldm.cli.measure_lora", description=__doc__.partition("\n")[0])
    parser.add_argument("clips", type=integer(2), nargs="?", default=48, metavar="CLIPS")
    parser.add_argument("details", type=integer(1), nargs="?", default=40, metavar="DETAILS")
    parser.add_argument("--data", default="", help="a folder or table of recordings with captions")
    measure(**vars(parser.parse_args(arguments)))


def measure(clips: int, details: int, data: str) -> None:
    """Train, measure, write the rows and the figure, and print the rows."""
    path, started = display.in_project("figures") / "data" / f"{NAME}.csv", time.perf_counter()
    seconds = RefinedAudioLDM.from_preset("tiny").config.seconds
    learned, held_out = recordings(data, clips, seconds)
    with TemporaryDirectory() as folder:
        model = RefinedAudioLDM.from_preset("tiny", data=str(write_recordings(Path(folder) / "recordings", learned)))
        file = Path(folder) / "run" / LORA_FILE
        began = time.process_time()  # of the processor, so that other programs do not count
        training, kept = LoraTraining(), SoundScenes("train", KEPT, seconds)
        for step in train_lora(model, file.parent, RANK, training, kept=kept):
            report("training step", step.index, training.max_steps)
        minutes = (time.process_time() - began) / 60
        model.remove_loras()
        about = read_lora(file)[1]
        facts = {"minutes of a core": minutes, "step": about["step"],
                 "megabytes": file.stat().st_size / 1e6, "held-out loss, base": about["held_out_loss_before"],
                 "held-out loss, LoRA": about["held_out_loss"]}  # fmt: skip
        rows = [{"measure": name, "sound": "", "value": value, "clips": len(learned)} for name, value in facts.items()]
        rows += measure_gain(model, file, learned, held_out, Aisfx.load(), on_clips=report)
        scenes = select_scenes(details, seconds=seconds)
        rows += measure_forgetting(model, file, scenes, DetailClassifier.load(), on_clips=report)
    what = OWN if data else FROGS
    table = pd.DataFrame([{"recordings": what, **row} for row in rows])
    print(table.to_string(index=False))
    if path.is_file():
        stored = pd.read_csv(path)
        table = pd.concat([table, stored[stored["recordings"] != what]])
    table = table.sort_values("recordings", kind="stable")
    display.save_figure(draw(table), NAME, table, {"clips": clips, "details": details}, started)


def recordings(data: str, clips: int, seconds: float) -> tuple[list[dict], list[dict]]:
    """Recordings to learn, and others to compare with: frogs, or LEARNED and all others of `data`, at random."""
    if not data:
        return frogs(LEARNED, seconds=seconds), frogs(clips, LEARNED, seconds)
    dataset = open_recordings(data, "", seconds)
    if len(dataset) < LEARNED + 2:
        raise ValueError(f"{data} has {len(dataset)} recordings: {LEARNED + 2} or more are needed")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    return [dataset[i] for i in order[:LEARNED]], [dataset[i] for i in order[LEARNED:]]


def report(what: str, done: int, total: int) -> None:
    print(f"\r{what}: {done} of {total} ", end="\n" if done == total else "", file=sys.stderr, flush=True)


def draw(table: pd.DataFrame) -> plt.Figure:
    """Distances to the held-out recordings without and with the LoRA, and the details of old captions."""
    display.set_style()
    sets = list(table["recordings"].unique())
    widths, size = [1.3] * len(sets) + [2], (8 + 4.5 * len(sets), 3.6)
    figure, axes = plt.subplots(1, 1 + len(sets), figsize=size, width_ratios=widths, layout="constrained")
    for what, ax in zip(sets, axes, strict=False):
        rows = table[(table["measure"] == FRECHET) & (table["recordings"] == what)]
        display.bars(rows, "sound", ylabel=FRECHET, title=what, ax=ax)
    kept = table[(table["recordings"] == sets[0]) & table["sound"].isin([BASE, LORA])]
    kept = kept[kept["measure"].isin(["class", *DETAILS, "all details"])]
    display.bars(kept, "measure", group="sound", ylabel="share that is right", title="old captions", ax=axes[-1])
    axes[-1].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)  # above the bars
    figure.suptitle("A LoRA comes closer to its recordings; what it costs is on the right", x=0.01, ha="left")
    return figure


if __name__ == "__main__":
    main()
