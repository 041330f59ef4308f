"""AudioLDM's way of listing recordings: `dataset_root.json`, and one JSON file for each split of each data set.

{"NAME": "folder of recordings", "metadata": {"path": {"NAME": {"train": "train.json", …}}}}
{"data": [{"wav": "below/that/folder.wav", "caption": "A dog barks", "labels": "/m/05tny_"}, …]}
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def audioldm_entries(path: str | Path, split: str, names: tuple[str, ...] = ()) -> Iterator[tuple]:
    """Yield (where it is listed, name of the data set, folder of its recordings, entry) for all entries of `split`.

    names: the data sets to read; all that are listed if empty. Raises FileNotFoundError for a file that is missing, and
    ValueError for one that has another form.
    """
    path = Path(path)
    root = _object(path)
    metadata = root.get("metadata")
    listed = metadata.get("path") if isinstance(metadata, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f'{path}: expected {{"metadata": {{"path": {{NAME: {{"train": FILE, …}}}}}}, NAME: FOLDER}}')
    for name in names or listed:
        files = listed.get(name)
        if not isinstance(files, dict) or not isinstance(root.get(name), str):
            raise ValueError(f"{path}: no data set {name!r} with a folder; it lists {', '.join(listed)}")
        if not isinstance(files.get(split), str):
            raise ValueError(f"{path}: {name} has no split {split!r}, only {', '.join(files)}")
        folder, file = _beside(path, root[name]), _beside(path, files[split])
        entries = _object(file).get("data")
        if not isinstance(entries, list):
            raise ValueError(f'{file}: expected {{"data": [{{"wav": …, "caption": …}}, …]}}')
        for number, entry in enumerate(entries, 1):
            yield f"{file.name}, entry {number}", name, folder, entry


def wav_and_captions(entry: Any) -> tuple[str, list[str]]:
    """The file name of an entry and its captions, from every key with "caption" in it; ValueError if one is missing."""
    if not isinstance(entry, dict) or not isinstance(entry.get("wav"), str) or not entry["wav"].strip():
        raise ValueError(f'expected "wav" with a file name, got {str(entry)[:80]}')
    captions = [text.strip() for key, text in entry.items() if "caption" in key and isinstance(text, str)]
    if not any(captions):
        raise ValueError(f"{entry['wav']} has no caption")
    return entry["wav"], [caption for caption in captions if caption]


def _beside(path: Path, named: str) -> Path:
    """The target of a path in a dataset_root.json; AudioLDM keeps that file three folders below where it runs."""
    places = [*path.absolute().parents[:4], Path.cwd()]
    for place in places:
        try:
            if (place / named).exists():
                return place / named
        except OSError:  # too long for a name
            break
    raise FileNotFoundError(
        f"{path} names {named:.200}, which is neither in {places[0]}, nor in one of the three "
        f"folders above it, nor in {Path.cwd()}"
    )


def _object(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such JSON file of AudioLDM's data sets")
    try:
        contents = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8; of brackets in brackets
        raise ValueError(f"{path}: not a JSON file in UTF-8 ({error})") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: expected an object, got a {type(contents).__name__}")
    return contents
