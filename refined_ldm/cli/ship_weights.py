"""Turn a finished run of `tiny` into the shipped weights and their card.

    python -m refined_ldm.cli.ship_weights runs/tiny [PART …]

Half precision, refined_ldm/weights/tiny/*.safetensors; card.json and README.md beside them hold the commands, the
training curves' last values and what was measured on the very files that are shipped. PART, if only some of it is to be
measured anew: conditioners, budget, adherence.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from refined_ldm import display
from refined_ldm.clap import Clap
from refined_ldm.discriminators import Discriminators
from refined_ldm.evaluation.adherence import class_prompt, fit_probe, measure_adherence, rendered_clips
from refined_ldm.evaluation.budget import error_budget
from refined_ldm.evaluation.embeddings.aisfx import Aisfx
from refined_ldm.evaluation.metrics import recall_at_k, zero_shot
from refined_ldm.evaluation.pitch import Crepe
from refined_ldm.text_to_audio import WEIGHTS, RefinedAudioLDM
from refined_ldm.training.pipeline import DISCRIMINATOR_FILES
from refined_ldm.vae import PatchDiscriminator
from refined_ldm.weights import load_into, read_weights, save_weights

FOLDER = WEIGHTS / "tiny"
COMMANDS = {
    "vae": "refined-ldm train --preset tiny --stage vae --run runs/tiny",
    "clap": "refined-ldm train --preset tiny --stage clap --run runs/tiny",
    "ldm": "refined-ldm train --preset tiny --stage ldm --run runs/tiny",
    "hifigan": "refined-ldm train --preset tiny --stage hifigan --run runs/tiny",
    "clap-tiny-roberta": "refined-ldm train --conditioner tiny-roberta --stage clap --lr 5e-4 --run runs/tiny-roberta",
}
SHOWN = {  # losses drawn, and what to call them
    "vae": {"vae/l1": "mel L1", "vae/perceptual": "perceptual"},
    "hifigan": {"vocoder/mel": "mel L1", "vocoder/stft": "STFT distance"},
}


def ship(run):
    """Write the model's parts and their discriminators in float16, and the second conditioner if there is one."""
    model = RefinedAudioLDM.load(run)
    model.save(FOLDER, torch.float16)
    discriminators = {
        "hifigan": Discriminators(model.config.discriminators),
        "vae": PatchDiscriminator(model.config.vae_discriminator),
    }
    for stage, name in DISCRIMINATOR_FILES.items():
        load_into(discriminators[stage], read_weights(run / name)[0], run / name)
        save_weights(FOLDER / name, discriminators[stage], discriminators[stage].config, torch.float16)
    other = run.parent / "tiny-roberta" / "clap-tiny-roberta.safetensors"
    if other.is_file():
        Clap.load("tiny-roberta", other).save(FOLDER / other.name, torch.float16)
    total = sum(path.stat().st_size for path in FOLDER.glob("*.safetensors"))
    if total > 30e6:
        sys.exit(f"{total / 1e6:.1f} MB of weights, 30 is the limit")
    print(f"{total / 1e6:.1f} MB")


def curves(run):
    """For every stage: steps, seconds, and losses averaged over the last 200 steps; and a figure of all."""
    told, figure = {}, plt.figure(figsize=(10, 4.4), layout="constrained")
    for ax, (stage, command) in zip(figure.subplots(2, 3).flat, COMMANDS.items(), strict=False):
        path = (run.parent / "tiny-roberta" / "clap.csv") if stage == "clap-tiny-roberta" else run / f"{stage}.csv"
        table = pd.read_csv(path)
        told[stage] = {"command": command, "seed": 0, "steps": int(table["step"].iloc[-1]),
                       "seconds": round(table["seconds"].sum()),
                       "losses": table.drop(columns=["step", "lr", "seconds"])[-200:].mean().to_dict()}  # fmt: skip
        shown = SHOWN.get(stage, {"loss": "loss"})
        display.loss_curve({label: table[column].to_numpy() for column, label in shown.items()}, ax, 200, title=stage)
        low, high = np.nanpercentile(table[list(shown)], (0, 98))
        ax.set(ylim=(min(0, low), 1.2 * high), ylabel="")
        shutil.copy(path, "figures/data/training_tiny_" + stage + ".csv")
    figure.delaxes(figure.axes[-1])
    display.save_figure(figure, "training_tiny")
    return told


@torch.no_grad()
def conditioners():
    """Retrieval among 200 mixed test scenes and naming of 200 one-event ones, for each shipped conditioner."""
    told, mixed, single = {}, rendered_clips(200), rendered_clips(200, kinds=("event",))
    names = sorted({label for item in single for label in item["labels"]})
    for path in sorted(FOLDER.glob("clap-*.safetensors")):
        name = path.stem.removeprefix("clap-")
        clap = Clap.load(name)
        audio, alone = (clap.embed_audio(waveforms(items), 16_000) for items in (mixed, single))
        text = clap.embed_text([item["caption"] for item in mixed])
        truth = [names.index(item["labels"][0]) for item in single]
        told[name] = {
            "R@1 text to audio": recall_at_k(text, audio, 1), "R@10 text to audio": recall_at_k(text, audio, 10),
            "R@10 audio to text": recall_at_k(audio, text, 10),
            "zero-shot": zero_shot(alone, clap.embed_text([class_prompt(n) for n in names]), truth).accuracy,
        }  # fmt: skip
    return told


def budget(model, judge):
    """What each stage costs, on 250 test clips -> rows; and the figure of it."""
    started = time.perf_counter()
    costs = [asdict(cost) for cost in error_budget(model, judge, Crepe.load())]
    figure = display.plot_budget(costs, "What each stage costs: 250 test clips, 50 notes; dashed, the clips themselves")
    display.save_figure(figure, "04_budget", costs, {"command": "refined-ldm budget"}, started)
    return costs


def waveforms(items):
    return torch.stack([item["waveform"] for item in items])


def main(run, parts):
    """Ship the run and measure `parts` of the card anew; what is not named stays as the card has it."""
    start = time.perf_counter()
    ship(run)
    judge, model = Aisfx.load(), RefinedAudioLDM.from_preset("tiny")
    measure = {
        "conditioners": conditioners,
        "budget": lambda: budget(model, judge),
        "adherence": lambda: measure_adherence(fit_probe(judge, 3000), model, 200)[0],
    }
    unknown = set(parts) - measure.keys()
    if unknown:
        sys.exit(f"no part {', '.join(sorted(unknown))}: there are {', '.join(measure)}")
    card = json.loads((FOLDER / "card.json").read_text()) if parts else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    here = {"commit": commit, "versions": {n: version(n) for n in ("torch", "transformers", "accelerate", "numpy")}}
    if not parts:
        card |= {"weights": "tiny", "training": curves(run)}
    for part in parts or measure:
        begin = time.perf_counter()
        card[part] = measure[part]()
        card.setdefault("measured", {})[part] = {**here, "seconds": round(time.perf_counter() - begin)}
        write(card)
        if part == "adherence":
            draw_adherence(card, start)


def draw_adherence(card, started):
    """The figure that notebook 05 shows in place of its own quick measurement."""
    figure, ax = plt.subplots(figsize=(8, 3.2))
    display.bars(card["adherence"], "sound", "recall", group="clips of", ylabel="class recall", ax=ax,
                 title="Between chance and ceiling (200 clips a bar)")  # fmt: skip
    ax.set_ylim(0, 1.05)
    display.save_figure(figure, "05_adherence", card["adherence"], {"clips": 200, "probe_clips": 3000}, started)


def write(card):
    temporary = FOLDER / "card.json.tmp"
    temporary.write_text(json.dumps(card, indent=1))
    temporary.replace(FOLDER / "card.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
