"""CSV tables and captions; invalid lines are refused by their number."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from refined_ldm.tokenizer import CONTROL, one_line


def read_rows(path: str | Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """Rows of a CSV file in UTF-8, with commas and a header that has the columns `needed`, each with its line number.

    Raises FileNotFoundError, or ValueError for another encoding, a missing or repeated column, or a quote left open.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such CSV file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines, strict=True)
            header = list(rows.fieldnames or ())
            for column in needed:
                if header.count(column) != 1:
                    number = "one column" if column in header else "a column"
                    raise ValueError(
                        f"{path}: expected {number} {column!r}, its header is {header}"
                        + ("; separate values by commas" if len(header) == 1 else "")
                    )
            for row in rows:
                yield rows.line_num, row
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error}): save it again in UTF-8") from error
    except csv.Error as error:
        begun = rows.line_num + 1
        raise ValueError(f"{path}, line {begun}: not a CSV file ({error}): a quote may be left open") from error


def field(row: dict, column: str) -> str:
    """The value of a column, trimmed; ValueError if it is empty, or if the row has more or fewer values than that."""
    if row[column] is None:
        raise ValueError(f"the row ends before the column {column!r}; put a caption that holds a line break in quotes")
    value = row[column].strip()
    if not value:
        raise ValueError(f"the column {column!r} is empty")
    if None in row:
        raise ValueError("more values than columns; put a caption that contains a comma in quotes")
    return value


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
