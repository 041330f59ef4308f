"""Turn a finished run of `tiny` into the shipped weights and their card.

    python -m refined_ldm.cli.ship_weights runs/tiny [PART …]

refined_ldm/weights/tiny/*.safetensors: in half precision, vocoder, conditioners and adapters in 8 bits.
card.json and README.md beside them hold the commands, the training curves' last values and what was measured on the
very files that are shipped. PART, to measure only some of it: conditioners, budget, adherence. The folder of
`refined-ldm train --distill` ships its student alone, and those of `refined-ldm train --matcher` and `--refiner`
matcher and refiner.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from refined_ldm import display
from refined_ldm.adapters.matcher import MATCHER_FILE, Matcher
from refined_ldm.adapters.refiner import REFINER_FILE, Refiner
from refined_ldm.adapters.student import STUDENT_FILE, read_student, save_student
from refined_ldm.base.files import atomic_write
from refined_ldm.clap import Clap
from refined_ldm.discriminators import Discriminators
from refined_ldm.evaluation.adherence import class_prompt, fit_probe, measure_adherence, rendered_clips
from refined_ldm.evaluation.budget import error_budget
from refined_ldm.evaluation.details import select_scenes, twin_choices
from refined_ldm.evaluation.embeddings.aisfx import Aisfx
from refined_ldm.evaluation.metrics import recall_at_k, zero_shot
from refined_ldm.evaluation.pitch import Crepe
from refined_ldm.model_folder import WEIGHTS
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.pipeline import DISCRIMINATOR_FILES
from refined_ldm.vae import PatchDiscriminator
from refined_ldm.weights import load_into, read_weights, save_weights, weights_digest

FOLDER = WEIGHTS / "tiny"
COMMANDS = {
    "vae": "refined-ldm train --preset tiny --stage vae --run runs/tiny",
    "clap": "refined-ldm train --preset tiny --stage clap --run runs/tiny",
    "ldm": "refined-ldm train --preset tiny --stage ldm --run runs/tiny",
    "hifigan": "refined-ldm train --preset tiny --stage hifigan --run runs/tiny",
    "clap-tiny-roberta": "refined-ldm train --conditioner tiny-roberta --stage clap --lr 5e-4 --run runs/tiny-roberta",
    "details-text": "refined-ldm train -c launch/tiny_details.yaml --stage details-text --run runs/tiny-details",
    "details-audio": "refined-ldm train -c launch/tiny_details.yaml --stage details-audio --run runs/tiny-details",
    "ldm-details": "refined-ldm train -c launch/tiny_details.yaml --stage ldm --run runs/tiny-details",
    "roberta-details-text": "refined-ldm train -c launch/tiny_details.yaml --conditioner tiny-roberta "
                            "--stage details-text --max-steps 3000 --run runs/roberta-details",
    "roberta-details-audio": "refined-ldm train -c launch/tiny_details.yaml --conditioner tiny-roberta "
                             "--stage details-audio --max-steps 2200 --run runs/roberta-details",
}  # fmt: skip
TABLES = {  # of a stage whose losses are not in RUN/STAGE.csv, from the folder that holds the runs
    "clap-tiny-roberta": "tiny-roberta/clap.csv", "ldm-details": "tiny-details/ldm.csv",
    **{stage: f"tiny-details/{stage}.csv" for stage in ("details-text", "details-audio")},
    **{f"roberta-{stage}": f"roberta-details/{stage}.csv" for stage in ("details-text", "details-audio")},
}  # fmt: skip
SHOWN = {  # losses drawn, and what to call them
    "vae": {"vae/l1": "mel L1 (nats)", "vae/perceptual": "perceptual"},
    "hifigan": {"vocoder/mel": "mel L1 (nats)", "vocoder/stft": "STFT distance"},
    "clap": {"loss": "contrastive loss (nats)"},
    "clap-tiny-roberta": {"loss": "contrastive loss (nats)"},
    "ldm": {"loss": "denoising loss (MSE)"},
    "details-text": {"loss": "loss (nats)", "pairs": "contrastive", "read": "probe"},
    "details-audio": {"pairs": "contrastive", "twins": "twins", "read": "probe"},
    "roberta-details-text": {"loss": "loss (nats)", "pairs": "contrastive", "read": "probe"},
    "roberta-details-audio": {"pairs": "contrastive", "twins": "twins", "read": "probe"},
    "ldm-details": {"loss": "denoising loss (MSE)"},
}
TITLES = {"vae": "VAE", "clap": "CLAP, HTS-AT + GPT-2", "ldm": "U-Net", "hifigan": "vocoder",
          "clap-tiny-roberta": "CLAP, HTS-AT + RoBERTa", "details-text": "details, GPT-2",
          "details-audio": "details, HTS-AT", "ldm-details": "U-Net, more noise",
          "roberta-details-text": "details, RoBERTa", "roberta-details-audio": "details, its HTS-AT"}  # fmt: skip


def ship(run: Path) -> None:
    """Write the model's parts and discriminators in float16; vocoder, conditioners and adapters in 8 bits."""
    model = RefinedAudioLDM.load(run)
    (FOLDER / STUDENT_FILE).unlink(missing_ok=True)  # that of the weights before
    model.save(FOLDER, torch.float16)
    for part in ("hifigan", "clap"):
        model.save_part(part, FOLDER, torch.int8)
    discriminators = {
        "hifigan": Discriminators(model.config.discriminators),
        "vae": PatchDiscriminator(model.config.vae_discriminator),
    }
    for stage, name in DISCRIMINATOR_FILES.items():
        load_into(discriminators[stage], read_weights(run / name)[0], run / name)
        save_weights(FOLDER / name, discriminators[stage], discriminators[stage].config, torch.float16)
    other = run.parent / "roberta-details" / "clap-tiny-roberta.safetensors"
    if other.is_file():
        Clap.load("tiny-roberta", other).save(FOLDER / other.name, torch.int8)  # for notebook 02 alone
    check_size()


def ship_student(run: Path) -> None:
    """Ship the student of the run, whose teacher must be the shipped weights."""
    tensors, metadata = read_student(run / STUDENT_FILE)
    save_student(FOLDER / STUDENT_FILE, tensors, dtype=torch.int8, **{k: v for k, v in metadata.items() if k != "kind"})
    RefinedAudioLDM.load(FOLDER)  # refuses a student of other weights
    check_size()


def check_size() -> None:
    """Print the size of all parts together; exit with an error above the limit."""
    total = sum(path.stat().st_size for path in FOLDER.glob("*.safetensors"))
    if total > 30e6:
        sys.exit(f"{total / 1e6:.1f} MB of weights, 30 is the limit")
    print(f"{total / 1e6:.1f} MB")


def curves(run: Path) -> dict[str, dict]:
    """For every stage: steps, seconds, and losses averaged over the last 200 steps; and a figure of all."""
    summary, tables = {}, {}
    for stage, command in COMMANDS.items():
        path = run.parent / TABLES[stage] if stage in TABLES else run / f"{stage}.csv"
        tables[stage] = table = pd.read_csv(path)
        summary[stage] = {"command": command, "seed": 0, "steps": int(table["step"].iloc[-1]),
                          "seconds": round(table["seconds"].sum()),
                          "losses": table.drop(columns=["step", "lr", "seconds"])[-200:].mean().to_dict()}  # fmt: skip
        shutil.copy(path, "figures/data/training_tiny_" + stage + ".csv")
    display.save_figure(draw_curves(tables), "training_tiny")
    return summary


def draw_curves(tables: dict[str, pd.DataFrame]) -> plt.Figure:
    """{stage: its CSV table} -> figure: a panel a stage, losses over steps, with their running mean over 200 steps."""
    display.set_style()
    figure = plt.figure(figsize=(17, 5), layout="constrained")
    for ax, (stage, table) in zip(figure.subplots(2, 5).flat, tables.items(), strict=False):
        shown = SHOWN.get(stage, {"loss": "loss"})
        minutes = table["seconds"].sum() / 60
        for column, label in shown.items():
            (line,) = ax.plot(table["step"], table[column], linewidth=0.5, alpha=0.25, label="_")
            mean = display.running_mean(table[column].to_numpy(), 200)
            ax.plot(table["step"], mean, color=line.get_color(), label=label)
        _, high = np.nanpercentile(table[list(shown)], (0, 98))
        ax.set(title=f"{TITLES[stage]}, {minutes:.0f} min", xlabel="training step", ylim=(0, 1.2 * high))
        ax.set_ylabel(next(iter(shown.values())) if len(shown) == 1 else "loss")
        if len(shown) > 1:
            display.label_lines(ax, fontsize=9)
    for ax in figure.axes[len(tables) :]:
        figure.delaxes(ax)
    figure.suptitle("The losses of the stages of tiny (pale: single steps)", x=0.01, ha="left")
    return figure


@torch.no_grad()
def conditioners() -> dict[str, dict[str, float]]:
    """For each shipped conditioner: retrieval among 200 mixed test scenes, naming of 200 one-event ones, and twins."""
    scores, mixed, single = {}, rendered_clips(200), rendered_clips(200, kinds=("event",))
    scenes = select_scenes(100)
    names = sorted({label for item in single for label in item["labels"]})
    for path in sorted(FOLDER.glob("clap-*.safetensors")):
        name = path.stem.removeprefix("clap-")
        clap = Clap.load(name)
        audio, alone = (clap.embed_audio(waveforms(items), 16_000) for items in (mixed, single))
        text = clap.embed_text([item["caption"] for item in mixed])
        truth = [names.index(item["labels"][0]) for item in single]
        scores[name] = {
            "R@1 text to audio": recall_at_k(text, audio, 1), "R@10 text to audio": recall_at_k(text, audio, 10),
            "R@10 audio to text": recall_at_k(audio, text, 10),
            "zero-shot": zero_shot(alone, clap.embed_text([class_prompt(n) for n in names]), truth).accuracy,
            "twins": {row.pop("detail"): row for row in twin_choices(clap, scenes)},
        }  # fmt: skip
    return scores


def budget(model: RefinedAudioLDM, embed: Aisfx) -> list[dict]:
    """The error that each stage adds on 250 test clips -> rows; also draws the figure."""
    started = time.perf_counter()
    costs = [asdict(cost) for cost in error_budget(model, embed, Crepe.load())]
    figure = display.plot_budget(costs, "What each stage costs: 250 test clips, 50 notes; dashed, the clips themselves")
    display.save_figure(figure, "04_budget", costs, {"command": "refined-ldm budget"}, started)
    return costs


def waveforms(items: list[dict]) -> torch.Tensor:
    """The waveforms of B clips: (B, N)."""
    return torch.stack([item["waveform"] for item in items])


def main(run: Path, parts: Sequence[str]) -> None:
    """Ship the run and measure `parts` of the card again, or all if there are none."""
    start = time.perf_counter()
    if (run / STUDENT_FILE).is_file() and not (run / "ldm.safetensors").is_file():
        ship_student(run)
        return
    if (run / MATCHER_FILE).is_file() and not (run / "ldm.safetensors").is_file():
        Matcher.load(run / MATCHER_FILE).save(FOLDER / MATCHER_FILE, torch.int8)
        return
    if (run / REFINER_FILE).is_file() and not (run / "ldm.safetensors").is_file():
        Refiner.load(run / REFINER_FILE).save(FOLDER / REFINER_FILE, torch.int8)
        check_size()
        return
    ship(run)
    embed, model = Aisfx.load(), RefinedAudioLDM.from_preset("tiny")
    measure = {
        "conditioners": conditioners,
        "budget": lambda: budget(model, embed),
        "adherence": lambda: measure_adherence(fit_probe(embed, 3000), model, 200)[0],
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


def draw_adherence(card: dict, started: float) -> None:
    """The figure that notebook 05 shows in place of its own quick measurement."""
    figure, ax = plt.subplots(figsize=(8, 3.2))
    display.bars(
        card["adherence"],
        "sound",
        "recall",
        group="clips of",
        ylabel="class recall",
        ax=ax,
        title="Between chance and ceiling (200 clips a bar)",
    )
    ax.set_ylim(0, 1.05)
    rows = pd.DataFrame(card["adherence"]).assign(weights=weights_digest(RefinedAudioLDM.from_preset("tiny")))
    display.save_figure(figure, "05_adherence", rows, {"clips": 200, "probe_clips": 3000}, started)


def write(card: dict) -> None:
    """Replace card.json, whole or not at all."""
    with atomic_write(FOLDER / "card.json") as temporary:
        temporary.write_text(json.dumps(card, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
