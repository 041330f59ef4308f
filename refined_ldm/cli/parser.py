"""The parser of a command, and the options that several commands have."""

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

from refined_ldm.base.integers import LARGEST_SEED, integer, real


def lora(text: str) -> tuple[Path, float]:
    """Parse FILE or FILE:WEIGHT -> (path, weight), 1 without a weight."""
    file, colon, weight = text.rpartition(":")
    if not colon or Path(text).is_file():
        return Path(text), 1.0
    return Path(file), real()(weight)


SHARED = {  # options of several commands
    "--preset": {"default": "tiny", "help": "tiny (shipped weights) or another preset (random weights)"},
    "--checkpoint": {"type": Path, "metavar": "DIR", "help": "a run folder with all parts trained"},
    "--steps": {"type": integer(1), "help": "sampling steps (default: the configuration's)"},
    "--guidance": {
        "type": real(), "metavar": "SCALE",
        "help": "strength of classifier-free guidance; 1 is without it, more follows the caption more closely",
    },
    "--seed": {"type": integer(0, LARGEST_SEED), "default": 0, "help": "seed of all random numbers (0)"},
    "--negative": {"default": "", "metavar": "CAPTION", "help": "a caption for guidance to move away from"},
    "--candidates": {
        "type": integer(1), "metavar": "K", "help": "generate K sounds and keep the one nearest to its caption",
    },
    "--lora": {
        "nargs": "+", "action": "extend", "default": [], "type": lora, "metavar": "FILE[:WEIGHT]",
        "help": "LoRAs of this model, by `train --lora`; several add up (WEIGHT: 1)",
    },
    "--precision": {
        "choices": ("auto", "bf16", "fp16", "fp32"), "default": "auto",
        "help": "auto: the half precision that this device multiplies faster than float32, if there is one",
    },
    "--device": {"default": "auto", "help": "auto, cpu, cuda or mps"},
    "--json": {"action": "store_true", "help": "print the results as JSON"},
    "--split": {
        "default": "", "metavar": "NAMES", "help": "split or folds of a known data set, with commas between them",
    },
    "--file-column": {"default": "", "metavar": "NAME", "help": "column with the names of files (file)"},
    "--caption-column": {"default": "", "metavar": "NAME", "help": "column with the captions (caption)"},
    "--clap-checkpoint": {"metavar": "PATH", "help": "published file of the conditioner"},
    "--tokenizer": {"metavar": "DIR", "help": "folder of roberta-base's vocabulary, for LAION-CLAP"},
    "--skip-bad": {"action": "store_true", "help": "leave out what cannot be used, and say which and why"},
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """A parser that reports bad usage in one line, which names the option."""

    def error(self, message: str) -> NoReturn:
        """Print the message in one line and exit with status 2."""
        text = re.sub("^argument (.+?): must", r"\1 must", message)
        self.exit(2, f"{self.prog}: {text}; see {self.prog} --help\n")

    def shared(self, *names: str, **changes: Any) -> None:
        """Add options of SHARED, with `changes` of their settings."""
        for name in names:
            self.add_argument(name, **SHARED[name] | changes)

    def model(self) -> None:
        """Add --preset and --checkpoint, of which one may be given."""
        source = self.add_mutually_exclusive_group()
        for name in ("--preset", "--checkpoint"):
            source.add_argument(name, **SHARED[name])
