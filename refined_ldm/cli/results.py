"""What commands write: its place is checked before any work, and a file is written whole or not at all."""

import csv
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from refined_ldm.files import atomic_write, check_file


def print_written(written: list[dict], start: float, as_json: bool, notes: Iterable[str] = ()) -> None:
    """Print the files that were written since `start`, or a report of them as JSON."""
    if as_json:
        report = {"written": written, "took": round(time.perf_counter() - start, 2)}
        print(json.dumps(report | {"notes": list(notes)} if notes else report))
    else:
        print("\n".join(w["file"] for w in written))


def check_result(path: Path, begins: bytes) -> None:
    """Raise OSError if a result cannot be written to `path`, or if another kind of file is there.

    begins: the bytes that results begin with. Prints that an earlier one will be replaced.
    """
    check_file(path)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(begins)) != begins:
                raise FileExistsError(f"{path} is there already and no result of this command: give another --out")
        print(f"{path} will be replaced by the new result", file=sys.stderr)


def numbered_path(path: Path) -> Path:
    """Return a path that is free: numbered if there is a file already."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows as CSV, whole or not at all."""
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
