"""The log of a training: a CSV file with a line for every step, in all digits of float32."""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refined_ldm.base.files import atomic_write


class CsvLogger:
    """Append the losses of every step to the CSV file `path`; a resumed run keeps its earlier lines.

    with CsvLogger(path, resume) as write: write(step) for every `train.Step`. Raises OSError if it cannot be written.
    """

    def __init__(self, path: str | Path, resume: bool = False):
        self.path, self.resume, self.file = Path(path), resume, None

    def __enter__(self) -> Callable[[Any], None]:
        return self.write

    def write(self, step: Any) -> None:
        """Append one line: index, learning rate, seconds and losses of a `train.Step`. Raises OSError."""
        try:
            if self.file is None:  # not before the first step: a refused run must not empty the file of the one before
                self._begin(step)
            losses = (f"{value:.9g}" for value in step.losses.values())
            csv.writer(self.file).writerow([step.index, f"{step.lr:.6g}", f"{step.seconds:.4f}", *losses])
            self.file.flush()  # before the step is saved, so that the curve reaches as far as any checkpoint
        except OSError as fault:
            raise OSError(fault.errno, os.strerror(fault.errno), str(self.path)) from fault

    def _begin(self, step):
        header = ",".join(["step", "lr", "seconds", *step.losses]) + "\r\n"
        kept = self._lines_before(step.index) if self.resume and self.path.is_file() else []
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(kept or [header]), newline="")
        self.file = open(self.path, "a", newline="")

    def _lines_before(self, index):
        """The header and the lines of earlier steps: those after the checkpoint that is resumed are trained again."""
        with open(self.path, newline="") as file:
            lines = [line for line in file if line.endswith("\n")]  # the last may have been cut by a kill
        return lines[:1] + [line for line in lines[1:] if int(line.split(",")[0]) < index]

    def __exit__(self, *_):
        if self.file:
            self.file.close()
