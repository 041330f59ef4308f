"""Figures with their provenance: one style, and beside each PNG its table and the commit and parameters it came from.

Call `set_style()` once, at the top of a notebook.
"""

import csv
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

import refined_ldm
from refined_ldm.base.files import atomic_write

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(refined_ldm.__file__).resolve().parent.parent
REPOSITORY = ROOT if (ROOT / "pyproject.toml").exists() else None  # a copy installed elsewhere has none
Table = Union["pd.DataFrame", Mapping[str, Sequence], Sequence[Mapping]]  # columns, or rows
SOURCES = ("refined_ldm", "notebooks", "tests/benchmark")  # what draws figures
STYLE = {
    "figure.dpi": 80,  # stored in notebooks: small on purpose
    "figure.figsize": (8, 3),
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "figure.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.cmap": "magma",
    "legend.frameon": False,
}


def set_style() -> None:
    """Use one style for every figure of a notebook."""
    plt.rcParams.update(STYLE)


def stored_figures() -> Path:
    """The folder of stored figures, their tables and the claims: the repository's; a wheel's has no pictures."""
    return (REPOSITORY or Path(refined_ldm.__file__).parent) / "figures"


def in_project(folder: str | Path) -> Path:
    """A relative folder is one of the repository's, or of the working directory for an installed package."""
    return (REPOSITORY or Path.cwd()) / folder


def save_figure(
    figure: Figure,
    name: str,
    table: Table | None = None,
    parameters: dict | None = None,
    started: float | None = None,
    folder: str | Path = "figures",
) -> None:
    """Write `folder`/name.png, its table as data/name.csv, and its provenance as data/name.json.

    table: rows as dicts, {column: values}, or a pandas DataFrame. started: `time.perf_counter()` before the work.
    A relative folder is as `in_project` says.
    """
    folder = in_project(folder)
    origin = {
        "figure": name,
        "parameters": parameters or {},
        "seconds": None if started is None else round(time.perf_counter() - started, 1),
        "commit": _commit() if REPOSITORY else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else f"CPU, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "numpy", "matplotlib")},
    }
    with atomic_write(folder / f"{name}.png") as path:
        figure.savefig(path, dpi=110, format="png")
    if table is not None:
        save_table(table, name, folder)
    with atomic_write(folder / "data" / f"{name}.json") as path:
        path.write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def save_table(table: Table, name: str, folder: str | Path = "figures") -> None:
    """Write a table alone, as `save_figure` does: `folder`/data/name.csv."""
    rows = table_rows(table)
    with atomic_write(in_project(folder) / "data" / f"{name}.csv") as path:
        with open(path, "w", newline="", encoding="utf-8") as file:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: v.item() if hasattr(v, "item") else v for k, v in row.items()} for row in rows)


def table_rows(table: Table) -> list[dict]:
    """A pandas DataFrame, {column: values} or rows as dicts -> rows as dicts."""
    if hasattr(table, "to_dict"):
        return table.to_dict("records")
    if isinstance(table, dict):
        return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    return list(table)


def read_json(path: str | Path) -> Any:
    """The contents of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _commit() -> str | None:
    """The commit of this code, with "+dirty" if what draws figures has changed since; None without git."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", *SOURCES)
        return git("rev-parse", "HEAD").strip() + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
