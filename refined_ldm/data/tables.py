"""Tables (CSV, JSON lines) and captions; invalid lines are refused by their number."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path

from refined_ldm.audio import save_audio
from refined_ldm.tokenizer import CONTROL, one_line


def read_rows(
    path: str | Path,
    needed: tuple[str, ...],
    header: tuple[str, ...] = (),
    on_fault: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, dict]]:
    """Rows of a table in UTF-8 that has the columns `needed`, each with the number of its last line.

    A table is a CSV file with commas and a header, whose quoted values may break over lines; or JSON lines (.jsonl),
    an object a line. header: the columns of a CSV file that has none; its lines that begin with # are left out.
    on_fault: called with a message for each broken row, which otherwise raises. Raises FileNotFoundError, or ValueError
    for another encoding, a missing or repeated column, or a quote left open.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {'file of JSON lines' if is_json_lines(path) else 'CSV file'}")

    def report(number, fault):
        if on_fault is None:
            raise ValueError(f"{path}, line {number}: {fault}")
        on_fault(f"{path.name}, line {number}: {fault}")

    kind = "JSON lines" if is_json_lines(path) else "a CSV file"
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            if is_json_lines(path):
                yield from _json_rows(lines, needed, report)
            else:
                yield from _csv_rows(path, lines, needed, header, report)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not {kind} in UTF-8 ({error}): save it again in UTF-8") from error


def is_json_lines(path: Path) -> bool:
    """Whether a table is of JSON lines, by its ending."""
    return path.suffix.lower() in (".jsonl", ".ndjson")


def _json_rows(lines, needed, report):
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            report(number, f"not a line of JSON ({error})")
            continue
        if not isinstance(row, dict) or any(column not in row for column in needed):
            held = list(row) if isinstance(row, dict) else type(row).__name__
            report(number, f"expected an object with {', '.join(map(repr, needed))}, got {held}")
            continue
        yield number, as_in_a_table(row)


def as_in_a_table(row: dict) -> dict:
    """A row of JSON or YAML as one of a table: null is "", numbers and dates are texts; anything else stays."""
    return {key: "" if value is None else str(value) if _is_plain(value) else value for key, value in row.items()}


def _is_plain(value):
    return isinstance(value, int | float | date) and not isinstance(value, bool) and value == value  # no NaN


def _csv_rows(path, lines, needed, header, report):
    if header:  # empty lines are no rows, but they count
        lines = ("\n" if line.startswith("#") else line for line in lines)
    rows = csv.DictReader(lines, header or None, strict=True, skipinitialspace=bool(header))
    is_first = True
    while True:
        begun = rows.line_num + 1
        try:
            if is_first:
                is_first = False
                _check_columns(path, list(rows.fieldnames or ()), needed)
            begun = rows.line_num + 1
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            report(begun, f"not a CSV file ({error}): a quote may be left open")
        else:
            yield rows.line_num, row


def _check_columns(path, header, needed):
    for column in needed:
        if header.count(column) != 1:
            number = "one column" if column in header else "a column"
            raise ValueError(
                f"{path}: expected {number} {column!r}, its header is {header}"
                + ("; separate values by commas" if len(header) == 1 else "")
            )


def field(row: dict, column: str) -> str:
    """The value of a column, trimmed; ValueError if it is empty, or if the row has more or fewer values than that."""
    if column not in row:
        raise ValueError(f"no {column!r}, only {', '.join(map(str, row))}")
    if row[column] is None:
        raise ValueError(f"the row ends before the column {column!r}; put a caption that holds a line break in quotes")
    value = text_in(row, column)
    if not value:
        raise ValueError(f"the column {column!r} is empty")
    if None in row:
        raise ValueError("more values than columns; put a caption that contains a comma in quotes")
    return value


def text_in(row: dict, column: str) -> str:
    """The value of a column, trimmed, "" if there is none; ValueError for a list or an object, as JSON may hold."""
    value = row.get(column) or ""
    if not isinstance(value, str):
        raise ValueError(f"the column {column!r} holds a {type(value).__name__}, where one value was expected")
    return value.strip()


def captions_in(row: dict, column: str) -> tuple[str, ...]:
    """The captions in a column: one, or those of a list; ValueError if there are none."""
    if isinstance(row.get(column), list):
        captions = tuple(clean_caption(text) for text in row[column] if isinstance(text, str))
        if not captions:
            raise ValueError(f"the column {column!r} is empty")
        return captions
    return (clean_caption(field(row, column)),)


def span_in(row: dict) -> tuple[float, float | None]:
    """The columns "start" and "end" of a row, in seconds -> (start, 0 if there is none; end, None if there is none)."""
    start, end = text_in(row, "start"), text_in(row, "end")
    try:
        span = float(start or 0), float(end) if end else None
    except ValueError:
        raise ValueError(f"start and end must be numbers of seconds, got {start!r} and {end!r}") from None
    if not 0 <= span[0] < (math.inf if span[1] is None else span[1]) <= math.inf:
        raise ValueError(f"start must be 0 or more and below end, got {start or 0} and {end or 'no end'}")
    return span


def clean_caption(text: str) -> str:
    """A caption as `one_line` gives it; ValueError if nothing is left."""
    caption = one_line(text)
    if not caption:
        raise ValueError("the caption is empty")
    return caption


def json_captions(raw: bytes, name: str | Path, needed: bool = True) -> tuple[tuple[str, ...], str]:
    """Texts, or lists of them, under "text" and every key with "caption" in it; and the "label".

    Raises ValueError naming the file if it is no JSON in UTF-8 or, where they are `needed`, holds no captions.
    """
    try:
        held = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not a JSON file in UTF-8 ({error})") from error
    if not isinstance(held, dict):
        if not needed:
            return (), ""
        raise ValueError(f"{name}: expected an object, got a {type(held).__name__}")
    values = [value for key, value in held.items() if key == "text" or "caption" in key]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    captions = tuple(dict.fromkeys(clean_caption(text) for text in texts if isinstance(text, str) and one_line(text)))
    if needed and not captions:
        raise ValueError(f'{name}: expected "caption", "captions" or "text", it has {", ".join(held)!s:.80}')
    return captions, str(held.get("label") or "")


def caption_lines(raw: bytes, name: str | Path) -> tuple[str, ...]:
    """The captions in a text file, one a line; ValueError naming the file if it is not UTF-8 or has none."""
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not a text in UTF-8 ({error})") from error
    captions = tuple(clean_caption(line) for line in lines if re.sub(CONTROL, " ", line).strip())
    if not captions:
        raise ValueError(f"{name}: expected a caption on each line, the file has no text")
    return captions


def write_recordings(folder: str | Path, items: Sequence[dict]) -> Path:
    """Write items with "waveform" (N,) at 16 kHz and "caption" as WAV files and captions.csv -> the path of the table.

    Raises FileExistsError if the folder is there already.
    """
    table = Path(folder) / "captions.csv"
    table.parent.mkdir(parents=True)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "caption"))
        for number, item in enumerate(items):
            writer.writerow((save_audio(table.parent / f"{number:03d}.wav", item["waveform"]).name, item["caption"]))
    return table
