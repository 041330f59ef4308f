"""Results that commands write: their place is checked before any work; files are written whole or not at all."""

import csv
import sys
from pathlib import Path

from refined_ldm.base.files import atomic_write, check_file


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


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows as CSV, whole or not at all."""
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


_write_table = write_table  # its earlier name, stable for callers outside
