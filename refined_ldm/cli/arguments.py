"""What can be said to `refined-ldm`: every command, its options and an example."""

import argparse
import re
from pathlib import Path

from refined_ldm.integers import HIGHEST_RATE, LARGEST_SEED, LOWEST_RATE, integer, real

NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|-inf|-nan", re.IGNORECASE)
EXAMPLES = {
    "generate": 'refined-ldm generate "rain falls while a bell rings" --out runs/first --seed 1',
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
}


class Parser(argparse.ArgumentParser):
    """Bad usage is one line, which names the option."""

    def error(self, message):
        told = re.sub("^argument (.+?): must", r"\1 must", message)
        self.exit(2, f"{self.prog}: {told}; see {self.prog} --help\n")


def parser(runs):
    """The parser of every command; runs: {name of a command: the function that runs it with what was given}."""
    whole = Parser(prog="refined-ldm", description="Captions become sound, and how that is trained.")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text):
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example: {EXAMPLES[name]}")
        sub.set_defaults(run=runs[name])
        sub._negative_number_matcher = NEGATIVE  # argparse's own takes -1e1 for an option
        return sub

    def precision(sub):
        sub.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                         help="auto: bfloat16 where this device multiplies it at least twice as fast")  # fmt: skip

    sub = command("generate", "Write one WAV file for each caption.")
    sub.add_argument("captions", nargs="+", metavar="CAPTION")
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the WAV files")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--preset", default="tiny", help="tiny (shipped weights) or another preset (random weights)")
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="a run folder with all parts trained")
    sub.add_argument("--steps", type=integer(1), help="sampling steps of DPM-Solver++ (the preset's if not given)")
    sub.add_argument("--guidance", type=real(), metavar="SCALE", help="1 is none; more follows the caption harder")
    sub.add_argument("--seconds", type=real(0.01, 120), help="length of the sound (the preset's if not given)")
    sub.add_argument("--seed", type=integer(0, LARGEST_SEED), default=0)
    sub.add_argument("--negative", default="", metavar="CAPTION", help="what to move away from")
    sub.add_argument("--candidates", type=integer(1), metavar="K", help="draw K, keep the nearest to its caption")
    sub.add_argument("--picture", action="store_true", help="also write spectrograms.png")
    sub.add_argument("--device", default="auto")
    precision(sub)
    sub.add_argument("--json", action="store_true", help="print what was written as JSON")

    sub = command("train", "Train the stages of a preset or a YAML file; what is finished is kept in --run.")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("-c", "--config", "--config_yaml", type=Path, metavar="YAML",
                        help="ours, or a training configuration of AudioLDM as published")  # fmt: skip
    source.add_argument("--preset", default="tiny")
    sub.add_argument("--stage", nargs="+", metavar="STAGE",
                     help="vae clap ldm hifigan; if not given all in this order or, when the configuration names files "
                          "of trained parts, ldm (after vae, if no file holds one)")  # fmt: skip
    sub.add_argument("--run", type=Path, metavar="DIR", dest="run_dir",
                     help="folder of this run (runs/NAME, as the YAML file or the preset is called)")  # fmt: skip
    sub.add_argument("--data", metavar="PATH",
                     help="CSV file or folder of captioned recordings, AudioLDM's dataset_root.json, or WebDataset "
                          "shards: a folder of .tar files or a pattern")  # fmt: skip
    sub.add_argument("--skip-bad", action="store_true",
                     help="leave out recordings that cannot be used; the run's left-out.txt lists them")  # fmt: skip
    sub.add_argument("--clap-checkpoint", metavar="PATH", help="the published conditioner's file")
    sub.add_argument("--tokenizer", metavar="DIR", help="roberta-base's vocabulary, for LAION-CLAP's captions")
    sub.add_argument("--reload_from_ckpt", metavar="PATH", help="an AudioLDM checkpoint to start the U-Net from")
    sub.add_argument("--conditioner", metavar="NAME", help="another of CLAP_PRESETS than the configuration's")
    sub.add_argument("--max-steps", type=integer(1), help="of each stage (the configuration's if not given)")
    sub.add_argument("--lr", type=real(above=0), help="learning rate of each stage (the configuration's if not given)")
    sub.add_argument("--seed", type=integer(0, LARGEST_SEED), default=0)
    sub.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run")
    sub.add_argument("--no-discriminators", "--no-adversary", action="store_true",
                     help="hifigan: train on spectral distances alone")  # fmt: skip
    sub.add_argument("--device", default="auto")

    sub = command("inspect", "Show what a published file, a pipeline or a run holds, without running it.")
    sub.add_argument("checkpoint", type=Path, metavar="CKPT")
    sub.add_argument("--json", action="store_true", help="print what was found as JSON")

    sub = command("convert", "Write a published file as safetensors that the other commands read.")
    sub.add_argument("checkpoint", type=Path, metavar="CKPT")
    sub.add_argument("out", type=Path, metavar="OUT", help="a folder for a whole AudioLDM, else a .safetensors file")
    sub.add_argument("--tokenizer", type=Path, metavar="DIR", help="roberta-base's vocabulary, to go beside LAION-CLAP")
    sub.add_argument("--force", action="store_true", help="replace what is there")

    sub = command("infer", "Write one WAV file for each line of a list: `caption` or `filename|caption`.")
    sub.add_argument("-c", "--config_yaml", required=True, type=Path, metavar="YAML",
                     help="the configuration of the training, AudioLDM's or ours")  # fmt: skip
    sub.add_argument("-l", "--list_inference", required=True, type=Path, metavar="LIST", help="text in UTF-8")
    sub.add_argument("--reload_from_ckpt", required=True, type=Path, metavar="CKPT",
                     help="a published checkpoint, a run folder, or a step-… below its checkpoints/ldm")  # fmt: skip
    sub.add_argument("--out", type=Path, default=Path("runs/infer"), metavar="DIR", help="folder for the WAV files")
    sub.add_argument("--clap-checkpoint", metavar="PATH", help="the published conditioner's file")
    sub.add_argument("--tokenizer", metavar="DIR", help="roberta-base's vocabulary, for LAION-CLAP's captions")
    sub.add_argument("--seed", type=integer(0, LARGEST_SEED), default=0)
    sub.add_argument("--steps", type=integer(1),
                     help="sampling steps of DPM-Solver++ (the configuration's if not given)")  # fmt: skip
    sub.add_argument("--guidance", type=real(), metavar="SCALE", help="(the configuration's if not given)")
    sub.add_argument("--candidates", type=integer(1), metavar="K", help="draw K, keep the nearest to its caption")
    sub.add_argument("--skip-bad", action="store_true", help="leave out lines that cannot be followed, and name them")
    sub.add_argument("--device", default="auto")
    precision(sub)
    sub.add_argument("--json", action="store_true", help="print what was written as JSON")

    sub = command("evaluate", "Compare a folder of generated sounds with a folder of real ones, or ask a judge of "
                  "details whether a model's sounds are what their captions say.")  # fmt: skip
    sub.add_argument("generated", type=Path, metavar="GENERATED", nargs="?",
                     help="sound files, here or in folders below; with --details a model (shipped)")  # fmt: skip
    sub.add_argument("reference", type=Path, metavar="REFERENCE", nargs="?",
                     help="what they should be like, best twice as many")  # fmt: skip
    sub.add_argument("--details", type=int, metavar="N", nargs="?", const=200,
                     help="number, pitch, pace, order, loudness, distance: N captions each (200)")  # fmt: skip
    sub.add_argument("--embedding", default="aisfx", help="aisfx, tiny-gpt2, ms-clap-2023, laion-clap, panns, vggish")
    sub.add_argument("--checkpoint", type=Path, metavar="PATH", help="the embedding's published file")
    sub.add_argument("--captions", type=Path, metavar="CSV", help="columns file and caption, named like GENERATED's")
    sub.add_argument("--tokenizer", type=Path, metavar="DIR", help="laion-clap: roberta-base's vocabulary")
    sub.add_argument("--pca", type=integer(0), default=64, metavar="K",
                     help="of Frechet distances: dimensions (64); 0: all")  # fmt: skip
    sub.add_argument("--sample-rate", type=integer(LOWEST_RATE, HIGHEST_RATE), metavar="HZ",
                     help="read both at this rate (the embedding's)")  # fmt: skip
    sub.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be used")
    sub.add_argument("--seed", type=integer(0, LARGEST_SEED), default=0)
    sub.add_argument("--device", default="auto")
    sub.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    sub.add_argument("--json", action="store_true", help="print the figures as JSON")

    sub = command("budget", "Measure what each stage costs: mel, VAE, vocoder and the whole model.")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--preset", default="tiny", help="tiny (shipped weights) or another preset (random weights)")
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="a run folder with all parts trained")
    sub.add_argument("--clips", type=integer(2), default=250, metavar="N", help="scenes of the split test (250)")
    sub.add_argument("--recordings", type=Path, metavar="PATH", help="in place of scenes: a CSV file or a folder")
    sub.add_argument("--no-whole", action="store_true", help="leave out generating from the captions")
    sub.add_argument("--seed", type=integer(0, LARGEST_SEED), default=0)
    sub.add_argument("--device", default="auto")
    sub.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as CSV")
    sub.add_argument("--json", action="store_true", help="print the figures as JSON")

    sub = command("experiment", "Train and judge the arms of the claim under control; what is finished is kept.")
    sub.add_argument("names", nargs="*", metavar="NAME", help="of runs, as --list prints them; all if not given")
    sub.add_argument("--list", action="store_true", help="print the plan and what of it is finished")
    sub.add_argument("--run", type=Path, default=Path("runs/experiment"), metavar="DIR", dest="run_dir")
    sub.add_argument("--out", type=Path, metavar="DIR",
                     help="of the tables: figures/data/experiment; with other settings than its own, tables/ of --run")
    sub.add_argument("--iterations", type=integer(1), default=1500, metavar="N", help="of the arms (1500)")
    sub.add_argument("--seeds", type=integer(1), default=3)
    sub.add_argument("--clips", type=integer(2), default=8000, metavar="N",
                     help="scenes that all arms learn from (8000)")  # fmt: skip
    sub.add_argument("--preset", default="tiny", help="or colab, paper, which need the published files below")
    sub.add_argument("--audioldm", default="", metavar="PATH", help="an AudioLDM checkpoint: its VAE and vocoder")
    sub.add_argument("--laion", default="", metavar="PATH", help="630k-audioset-best.pt")
    sub.add_argument("--ms", default="", metavar="PATH", help="CLAP_weights_2023.pth")
    sub.add_argument("--tokenizer", default="", metavar="DIR", help="roberta-base's vocabulary")
    sub.add_argument("--device", default="auto")

    sub = command("verify", "Compute every claimed number again from the tables beside the figures.")
    sub.add_argument("--ledger", type=Path, default=Path("figures/claims.yaml"), metavar="YAML")
    sub.add_argument("--json", action="store_true", help="print every number as JSON")

    sub = command("notebooks", "Execute the notebooks with papermill into runs/notebooks.")
    sub.add_argument("names", nargs="*", metavar="NAME", help="01 … 06; all if not given")
    sub.add_argument("--preset", default="tiny")
    sub.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                     help="a parameter; a relative path is meant from here")  # fmt: skip
    sub.add_argument("--jobs", type=integer(1), default=1, metavar="N",
                     help="how many at once; they share the cores (1)")  # fmt: skip
    sub.add_argument("--out", type=Path, default=Path("runs/notebooks"), metavar="DIR")
    return whole
