"""Parquet files as Hugging Face's `datasets` writes them: sounds in a column of {"bytes", "path"}, read in place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO

from refined_ldm.data.known_sets import CAPTION_COLUMNS, split_of
from refined_ldm.data.listing import find_files
from refined_ldm.data.shards import Inside
from refined_ldm.data.tables import captions_in

SUFFIX = ".parquet"


@dataclass(frozen=True)
class Cell(Inside):
    """A sound in a Parquet file, which opens like a Path."""

    column: str
    group: int  # of rows, which are decoded together
    row: int  # in its group

    @contextmanager
    def open(self, mode: str = "rb") -> Iterator[IO[bytes]]:
        """A binary file of the sound alone."""
        raw = _group(self.archive, self.group, self.column)[self.row]["bytes"].as_py()
        if not raw:
            raise ValueError(f"{self}: the row holds no sound")
        yield BytesIO(raw)


def find_parquet(where: str | Path) -> list[Path]:
    """The Parquet files that a path names: itself, or those in a folder and below it."""
    path = Path(where)
    files = find_files(path)[0] if path.is_dir() else [path] * path.is_file()
    return [file for file in files if file.suffix.lower() == SUFFIX]


def parquet_sounds(
    files: list[Path], wanted: Callable[[str], bool], audio: str = "", caption: str = ""
) -> Iterator[tuple[str, Callable[[], tuple]]]:
    """Yield (where it is, function that returns (cell, id, captions, label, where, split) or raises) for every row.

    wanted: whether a split, which the name of a file tells, is read. audio, caption: the columns; by default "audio",
    and the first of CAPTION_COLUMNS. Raises ValueError for a missing column, or if pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{files[0]}: Parquet files need pyarrow ({error}): pip install pyarrow") from error
    for path in files:
        if wanted(split := split_of(Path(path.name))):
            try:
                with ParquetFile(path) as file:
                    yield from _rows_of(file, path, split, audio or "audio", caption)
            except (OSError, ArrowException) as error:
                raise ValueError(f"{path}: not a Parquet file, or damaged ({error})") from error


def _rows_of(file, path, split, audio, caption):
    from pyarrow.types import is_struct

    columns = file.schema_arrow.names
    caption = caption or next((column for column in CAPTION_COLUMNS if column in columns), CAPTION_COLUMNS[0])
    for column in (audio, caption):
        if column not in columns:
            raise ValueError(f"{path}: expected a column {column!r}, it has {', '.join(columns)}")
    kind = file.schema_arrow.field(audio).type
    if not is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise ValueError(f"{path}: the column {audio!r} must hold sounds as {{'bytes', 'path'}}, it holds {kind}")

    def recording(cell, text):
        held = {caption: text if isinstance(text, list) else str(text or "")}
        id = f"{path.stem}/{cell.name.replace(' ', '-')}"
        return cell, id, captions_in(held, caption), "", f"{path.name}, {cell.name}", split

    number = 0
    for group in range(file.num_row_groups):
        for row, text in enumerate(file.read_row_group(group, columns=[caption])[caption].to_pylist()):
            number += 1
            cell = Cell(path, f"row {number}", audio, group, row)
            yield f"{path.name}, {cell.name}", lambda cell=cell, text=text: recording(cell, text)


@lru_cache(2)
def _group(path: Path, group: int, column: str):
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column])[column]
