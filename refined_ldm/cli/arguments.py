"""The command line of `refined-ldm`: every command, its options and an example."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refined_ldm.base.integers import HIGHEST_RATE, LOWEST_RATE, integer, real
from refined_ldm.cli import edit
from refined_ldm.cli.parser import Parser

NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|-inf|-nan", re.IGNORECASE)
EXAMPLES = {
    "generate": 'refined-ldm generate "thunder rolls while a bird chirps" --out runs/first --seed 1',
    "data": "refined-ldm data clotho:/data/clotho --split development --picture clotho.png",
    "train": "refined-ldm train --preset tiny --stage vae clap ldm hifigan --run runs/tiny",
    "inspect": "refined-ldm inspect audioldm-s-full-v2.ckpt",
    "convert": "refined-ldm convert audioldm-s-full-v2.ckpt runs/audioldm-s --tokenizer roberta-base",
    "infer": "refined-ldm infer --config_yaml audioldm_custom.yaml --list_inference captions.lst "
    "--reload_from_ckpt runs/audioldm_custom",
    "evaluate": "refined-ldm evaluate runs/infer recordings --captions captions.csv --embedding tiny-gpt2; "
    "refined-ldm evaluate --details --out details.csv",
    "budget": "refined-ldm budget --clips 50 --recordings captions.csv",
    "experiment": "refined-ldm experiment C-1500-0 --run runs/experiment",
    "verify": "refined-ldm verify",
    "notebooks": "refined-ldm notebooks --preset tiny -p steps 10",
    "app": "refined-ldm app --checkpoint runs/tiny --port 8000",
    **edit.EXAMPLES,
}


def parser(runs: dict[str, Callable[[argparse.Namespace], Any]]) -> Parser:
    """The parser of every command; runs: {name of a command: the function that runs it with the parsed options}."""
    whole = Parser(
        prog="refined-ldm", description="Generate sound from captions; train, convert and evaluate the models."
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example: {EXAMPLES[name]}")
        sub.set_defaults(run=runs[name])
        sub._negative_number_matcher = NEGATIVE  # argparse's own pattern treats -1e1 as an option
        return sub

    _generate(command("generate", "Write one WAV file for each caption."))
    edit.add_commands(command)
    _app(command("app", "Open a page in the browser with the functions of the shell, for this machine alone."))
    _data(command("data", "Show what a data set holds before training: lengths, levels, captions, duplicates, faults."))
    _train(
        command("train", "Train the stages of a preset or a YAML file. Finished stages in --run are not trained again.")
    )
    sub = command(
        "inspect", "Show the contents of a published file, a pipeline or a run without executing anything in it."
    )
    sub.add_argument("checkpoint", type=Path, metavar="CKPT")
    sub.shared("--json")
    _convert(command("convert", "Convert a published file to safetensors that the other commands can load."))
    _infer(command("infer", "Write one WAV file for each line of a list. A line is `caption` or `filename|caption`."))
    _evaluate(
        command(
            "evaluate",
            "Compare a folder of generated sounds with a folder of real ones; or, with --details, measure whether a "
            "model's sounds have the details of their captions.",
        )
    )
    _budget(command("budget", "Measure the error that each stage adds: mel, VAE, vocoder and the whole model."))
    _experiment(
        command("experiment", "Train and measure the arms of the controlled experiment. Finished runs are kept.")
    )
    sub = command("verify", "Recompute the evidence of every claim, and compare the documents with the stored tables.")
    sub.add_argument("--ledger", type=Path, default=Path("figures/claims.yaml"), metavar="YAML")
    sub.shared("--json")
    _notebooks(command("notebooks", "Execute the notebooks with papermill into runs/notebooks."))
    return whole


# fmt: off


def _generate(sub):
    sub.add_argument("captions", nargs="+", metavar="CAPTION")
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the WAV files")
    sub.model()
    sub.shared("--steps", "--guidance", "--seed", "--negative", "--candidates", "--lora")
    sub.add_argument("--seconds", type=real(0.01, 120), help="length of the sound (default: the preset's)")
    sub.add_argument("--student", nargs="?", const=True, type=Path, metavar="FILE",
                     help="sample with the student of `train --distill` in FILE, or the model's own, in 4 (default), "
                     "2 or 1 steps")
    sub.add_argument("--picture", action="store_true", help="also write spectrograms.png")
    sub.shared("--device", "--precision", "--json")


def _app(sub):
    sub.add_argument("--port", type=integer(1, 65_535), default=7860, help="port on 127.0.0.1 (7860)")
    sub.add_argument("--no-browser", action="store_true", help="serve the page without opening a browser")
    sub.model()
    sub.shared("--lora", "--device", "--precision")


def _data(sub):
    sub.add_argument("root", metavar="DATA", help="as --data of train: a table, a folder, a known data set, shards")
    sub.shared("--split", "--file-column", "--caption-column")
    sub.add_argument("--seconds", type=real(0.01, 120), default=2.56, help="length that training uses of a clip (2.56)")
    sub.add_argument("--picture", type=Path, metavar="PNG", help="also draw lengths, rates, levels and captions")
    sub.shared("--json")


def _train(sub):
    source = sub.add_mutually_exclusive_group()
    source.add_argument("-c", "--config", "--config_yaml", type=Path, metavar="YAML",
                        help="a configuration of this project, or a published training configuration of AudioLDM")
    source.add_argument("--preset",
                        help="sizes and settings: tiny, colab, paper or baseline (default: those of the run of "
                        "--from, else tiny)")
    sub.add_argument("--stage", nargs="+", metavar="STAGE",
                     help="any of vae clap ldm hifigan (default: all in this order; if the configuration names files "
                     "of trained parts, ldm alone, after vae if no file holds one), or of details-text details-audio")
    sub.add_argument("--run", type=Path, metavar="DIR", dest="run_dir",
                     help="folder of this run (default: runs/NAME, named after the YAML file or the preset)")
    sub.add_argument("--data", metavar="PATH",
                     help="CSV file, JSON lines or folder of captioned recordings; a known data set, by its folder or "
                     "as clotho:FOLDER; AudioLDM's dataset_root.json; WebDataset shards, a folder of .tar files or a "
                     "pattern; Parquet files")
    sub.shared("--split", "--file-column", "--caption-column")
    sub.shared("--skip-bad", help="leave out unusable recordings; the run's left-out.txt lists them")
    sub.shared("--clap-checkpoint", "--tokenizer")
    sub.add_argument("--from", "--reload_from_ckpt", dest="reload_from_ckpt", metavar="BASE",
                     help="trained weights to start from: a preset with shipped weights, a run folder or an AudioLDM "
                     "checkpoint")
    beside = sub.add_mutually_exclusive_group()
    beside.add_argument("--lora", type=integer(1, 256), metavar="RANK",
                        help="train a LoRA of this rank beside the U-Net of --from (default: of --preset), on --data")
    beside.add_argument("--distill", action="store_true",
                        help="train a student of the U-Net of --from (default: of --preset) that samples in 4, 2 or 1 "
                        "steps, on the captions of --data (default: the model's own); the configuration has its "
                        "settings below training: distill")
    beside.add_argument("--matcher", action="store_true",
                        help="train a matcher for the model of --from (default: of --preset), which chooses among "
                        "candidates, on rendered scenes")
    beside.add_argument("--refiner", action="store_true",
                        help="train a refiner for the model of --from (default: of --preset), which gives finished "
                        "latents their texture, on the clips of --data (default: the model's own)")
    sub.add_argument("--keep", metavar="PATH",
                     help="LoRA: recordings, as --data, of what the model should not forget; `scenes` for the "
                     "embedded ones, `none` for none (default: scenes if it was trained on them)")
    sub.add_argument("--conditioner", metavar="NAME", help="a conditioner of CLAP_PRESETS, not the configuration's")
    sub.add_argument("--max-steps", type=integer(1), help="training steps of each stage (default: the configuration's)")
    sub.add_argument("--lr", type=real(above=0), help="learning rate of each stage (default: the configuration's)")
    sub.add_argument("--resume", action="store_true", help="resume from the last checkpoint of the run")
    sub.add_argument("--no-discriminators", "--no-adversary", action="store_true",
                     help="hifigan: train with spectral losses alone, without discriminators")
    sub.shared("--seed", "--device")


def _convert(sub):
    sub.add_argument("checkpoint", type=Path, metavar="CKPT")
    sub.add_argument("out", type=Path, metavar="OUT", help="a folder for a whole AudioLDM, else a .safetensors file")
    sub.shared("--tokenizer", type=Path, help="folder of roberta-base's vocabulary, to be stored beside LAION-CLAP")
    sub.add_argument("--force", action="store_true", help="replace an earlier output")


def _infer(sub):
    sub.add_argument("-c", "--config_yaml", required=True, type=Path, metavar="YAML",
                     help="configuration of the training, AudioLDM's or of this project")
    sub.add_argument("-l", "--list_inference", required=True, type=Path, metavar="LIST",
                     help="text file in UTF-8, one caption a line")
    sub.add_argument("--reload_from_ckpt", required=True, type=Path, metavar="CKPT",
                     help="a published checkpoint, a run folder, or a step-… below its checkpoints/ldm")
    sub.add_argument("--out", type=Path, default=Path("runs/infer"), metavar="DIR", help="folder for the WAV files")
    sub.shared("--clap-checkpoint", "--tokenizer", "--seed", "--steps", "--guidance", "--candidates")
    sub.shared("--skip-bad", help="leave out invalid lines and print them")
    sub.shared("--device", "--precision", "--json")


def _evaluate(sub):
    sub.add_argument("generated", type=Path, metavar="GENERATED", nargs="?",
                     help="folder of sounds, searched with its subfolders; with --details, a run (the shipped model)")
    sub.add_argument("reference", type=Path, metavar="REFERENCE", nargs="?",
                     help="folder of real sounds, best twice as many")
    sub.add_argument("--details", type=integer(2), metavar="N", nargs="?", const=200,
                     help="measure number, pitch, pace, order, loudness and distance on N captions each (200)")
    sub.add_argument("--embedding", default="aisfx",
                     help="one of aisfx, tiny-gpt2, ms-clap-2023, laion-clap, panns, vggish (aisfx)")
    sub.shared("--checkpoint", metavar="PATH", help="published file of the embedding; with --details the classifier's")
    sub.add_argument("--captions", type=Path, metavar="CSV",
                     help="table with the columns file and caption, for the files of GENERATED")
    sub.shared("--tokenizer", type=Path)
    sub.add_argument("--pca", type=integer(0), default=64, metavar="K",
                     help="principal components for Frechet distances (64); 0: all dimensions")
    sub.add_argument("--sample-rate", type=integer(LOWEST_RATE, HIGHEST_RATE), metavar="HZ",
                     help="sample rate for both folders (default: the embedding's)")
    sub.add_argument("--out", type=Path, metavar="FILE",
                     help="also write the results as JSON, those of --details as CSV")
    sub.shared("--skip-bad", "--seed", "--device", "--json")


def _budget(sub):
    sub.model()
    sub.add_argument("--clips", type=integer(2), default=250, metavar="N", help="scenes of the test split (250)")
    sub.add_argument("--recordings", type=Path, metavar="PATH", help="CSV file or folder of recordings, not scenes")
    sub.add_argument("--no-whole", action="store_true", help="do not generate from the captions")
    sub.add_argument("--out", type=Path, metavar="FILE", help="also write the results as CSV")
    sub.shared("--seed", "--device", "--json")


def _experiment(sub):
    sub.add_argument("names", nargs="*", metavar="NAME", help="runs or parts of the plan, as --list prints them (all)")
    sub.add_argument("--list", action="store_true", help="print all runs and which are finished")
    sub.add_argument("--run", type=Path, default=Path("runs/experiment"), metavar="DIR", dest="run_dir")
    sub.add_argument("--out", type=Path, metavar="DIR",
                     help="folder for the tables (default: figures/data/experiment; with other settings, tables/ in "
                     "--run)")
    sub.add_argument("--iterations", type=integer(1), default=1500, metavar="N", help="steps of each arm (1500)")
    sub.add_argument("--seeds", type=integer(1), default=3, help="seeds of each arm (3)")
    sub.add_argument("--clips", type=integer(2), default=8000, metavar="N", help="training scenes of each arm (8000)")
    sub.shared("--preset", help="tiny, or colab or paper, which need the published files below")
    sub.add_argument("--audioldm", default="", metavar="PATH", help="AudioLDM checkpoint with the VAE and the vocoder")
    sub.add_argument("--laion", default="", metavar="PATH", help="LAION-CLAP's file 630k-audioset-best.pt")
    sub.add_argument("--ms", default="", metavar="PATH", help="MS-CLAP's file CLAP_weights_2023.pth")
    sub.shared("--tokenizer", default="")
    sub.shared("--device")


def _notebooks(sub):
    sub.add_argument("names", nargs="*", metavar="NAME", help="01 … 09 (default: all)")
    sub.shared("--preset", help="sizes and settings: tiny, colab, paper or baseline (tiny)")
    sub.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                     help="set a notebook's parameter; relative paths start at the current folder")
    sub.add_argument("--jobs", type=integer(1), default=1, metavar="N", help="notebooks executed at once (1)")
    sub.add_argument("--out", type=Path, default=Path("runs/notebooks"), metavar="DIR")
