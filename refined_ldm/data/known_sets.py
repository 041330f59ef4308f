"""The known data sets, in the layouts that they are published in, as one table.

A data set is a few lists (CSV, JSON, YAML) whose rows name sounds, and captions or classes. The lists are recognised by
their names and columns, wherever they lie below the folder; so are the sounds, whatever folder a downloader chose.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from refined_ldm.data.listing import SoundNames, file_inside, find_files, is_sound, without_ending
from refined_ldm.data.tables import as_in_a_table, captions_in, clean_caption, field, is_json_lines, read_rows, text_in

TEMPLATE = "the sound of {}"  # a caption from the names of classes
CAPTION_COLUMNS = ("caption", "captions", "text", "transcription")  # of folders for Hugging Face's `datasets`
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
               "val": "validation", "dev": "validation", "test": "test", "testing": "test", "eval": "test"}  # fmt: skip


def youtube_id(stem: str) -> str:
    """The id in the name that a downloader gave a clip: ID, YID, ID_30, ID_30000_40000 or ID_30.0-40.0; else the name.

    An id has 11 characters, and may begin with Y, a dash or an underscore itself.
    """
    found = re.fullmatch(r"Y?([\w-]{11})(_[\d.]+([-_][\d.]+)?)?", stem)
    return found[1] if found else stem


def letters_and_digits(stem: str) -> str:
    """A name without what archives and systems change in it: case, accents, spaces and punctuation."""
    return "".join(c for c in unicodedata.normalize("NFKD", stem.casefold()) if c.isalnum()) or stem


@dataclass(frozen=True)
class KnownSet:
    """The lists of a data set and their columns."""

    title: str
    lists: dict[str, str]  # {end of the path of a list: its split; "{fold}" is a column}
    file: tuple[str, ...]  # columns that name the sound, tried in this order
    captions: tuple[str, ...] = ()  # columns of captions, or
    classes: str = ""  # the column of classes, separated by commas
    class_ids: str = ""  # the column of their ids in AudioSet's ontology
    columns: tuple[str, ...] = ()  # others, by which a list is recognised
    header: tuple[str, ...] = ()  # of lists without one
    training: tuple[str, ...] = ()  # splits that "train" means; empty: all
    sound_key: Callable[[str], str] = letters_and_digits  # equal for a sound's name and the list's, if all else fails
    incomplete: bool = False  # whether every copy lacks clips: they are counted, and are no faults
    relative: bool = False  # whether names are paths that start at the list

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that a list must have."""
        given = (*self.file, *self.captions[:1], self.classes, self.class_ids, *self.columns)
        return tuple(dict.fromkeys(column for column in given if column))


KNOWN = {
    "audiocaps": KnownSet(
        "AudioCaps", {"train.csv": "train", "val.csv": "val", "test.csv": "test"}, ("youtube_id", "audiocap_id"),
        ("caption",), columns=("start_time",), training=("train",), sound_key=youtube_id, incomplete=True,
    ),
    "clotho": KnownSet(
        "Clotho", {f"clotho_captions_{split}.csv": split for split in ("development", "validation", "evaluation")},
        ("file_name",), tuple(f"caption_{k}" for k in range(1, 6)), training=("development",),
    ),
    "wavcaps": KnownSet(
        "WavCaps", {"as_final.json": "AudioSet_SL", "bbc_final.json": "BBC_Sound_Effects",
                    "fsd_final.json": "FreeSound", "sb_final.json": "SoundBible"},
        ("id",), ("caption",), incomplete=True,
    ),
    "audioset": KnownSet(
        "AudioSet", {f"{split}_segments.csv": split for split in ("balanced_train", "unbalanced_train", "eval")},
        ("YTID",), class_ids="positive_labels", header=("YTID", "start_seconds", "end_seconds", "positive_labels"),
        training=("balanced_train", "unbalanced_train"), sound_key=youtube_id, incomplete=True,
    ),
    "esc50": KnownSet("ESC-50", {"esc50.csv": "fold{fold}"}, ("filename",), classes="category", columns=("fold",)),
    "urbansound8k": KnownSet(
        "UrbanSound8K", {"UrbanSound8K.csv": "fold{fold}"}, ("slice_file_name",), classes="class", columns=("fold",)
    ),
    "fsd50k": KnownSet(
        "FSD50K", {"FSD50K.ground_truth/dev.csv": "{split}", "FSD50K.ground_truth/eval.csv": "eval"}, ("fname",),
        classes="labels", class_ids="mids", training=("train",),
    ),
    "macs": KnownSet("MACS", {"MACS.yaml": ""}, ("filename",), ("captions",)),
    "audiofolder": KnownSet(
        "an audiofolder of Hugging Face", {"metadata.csv": "", "metadata.jsonl": ""}, ("file_name",),
        training=("train",), relative=True,
    ),
}  # fmt: skip


def named_set(data: str) -> tuple[str, str]:
    """The name and folder of "clotho:FOLDER", ("clotho", "FOLDER"); any other text is a path, ("", text)."""
    name, colon, root = str(data).partition(":")
    return (name.lower(), root) if colon and name.lower() in KNOWN else ("", str(data))


def find_lists(name: str, files: list[Path]) -> list[tuple[Path, str]]:
    """The lists of a known data set among `files`, each with its split (which may name columns, as "fold{fold}").

    Raises ValueError if two files could be the same list.
    """
    known, found = KNOWN[name], []
    for ending, split in known.lists.items():
        fits = [path for path in files if f"/{path.as_posix()}".casefold().endswith(f"/{ending}".casefold())]
        fits = [path for path in fits if _has_columns(path, known)]
        if len(fits) > 1 and not known.relative:
            raise ValueError(f"{fits[0]} and {fits[1]} could both be {known.title}'s {ending}: give the folder of one")
        found += [(path, split or split_of(path) if known.relative else split) for path in fits]
    return found


def detect_known_set(root: str | Path) -> tuple[str, list[Path]]:
    """The name of the known data set whose layout a folder has, and its lists; "" if it has none."""
    files = find_files(root)[0]
    for name in KNOWN:
        if lists := find_lists(name, files):
            return name, [path for path, _ in lists]
    return "", []


def split_of(path: Path) -> str:
    """The split in the name of a file or, if there is none, in those of its folders: train, validation, test or ""."""
    for part in reversed(path.parts):
        words = re.split(r"[^a-z]+", part.lower())
        if found := [SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES]:
            return found[0]
    return ""


def wanted_splits(split: str, training: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a split is wanted: all are for "", several may be given with commas, and "train" means `training`."""
    names = {name.strip().casefold() for name in split.split(",") if name.strip()}
    if "train" in names:
        names = names - {"train"} | {name.casefold() for name in training} if training else set()
    return lambda name: not names or not name or name.casefold() in names


def known_entries(
    name: str, root: Path, split: str, missing: list[str], template: str = TEMPLATE, caption: str = ""
) -> Iterator[tuple[str, Callable[[], tuple]]]:
    """Yield (where it is listed, function that returns it or raises ValueError) for the rows of a known data set.

    A row is (path, id, captions, classes, where, split). Rows whose sound is not on disk go into `missing` if every
    copy of the data set lacks some. caption: the column of captions, in place of the data set's own.
    Raises FileNotFoundError for a folder without the lists, ValueError for a split that no list has.
    """
    known = KNOWN[name]
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder of {known.title}")
    files = find_files(root)[0]
    lists = find_lists(name, files)
    if not lists:
        raise FileNotFoundError(f"{root}: no list of {known.title} below it, which is {' or '.join(known.lists)}")
    sounds = Sounds(root, [path for path in files if is_sound(path)], known)
    classes = Classes(files, known) if known.class_ids else None
    wanted, seen = wanted_splits(split, known.training), set()
    for path, split_template in lists:
        if "{" not in split_template and not wanted(split_template):
            seen.add(split_template)
            continue
        broken = []
        for number, row in _rows(path, known, broken.append):
            of = split_template.format_map(defaultdict(str, {k: v for k, v in row.items() if k}))
            seen.add(of)
            if not wanted(of):
                continue
            where = f"{path.name}, {'entry' if path.suffix in ('.json', '.yaml') else 'line'} {number}"
            try:
                sound = sounds.of(row, path, of)
            except FileNotFoundError as fault:
                if known.incomplete:
                    missing.append(f"{where}: {fault}")
                    continue
                yield where, lambda fault=fault: _raise(fault)
                continue
            except ValueError as fault:
                yield where, lambda fault=fault: _raise(fault)
                continue

            def entry(row=row, sound=sound, where=where, of=of):
                said, label = _captions(row, known, classes, template, caption)
                return sound, sound.relative_to(root).as_posix(), said, label, where, of

            yield where, entry
        for fault in broken:
            yield "", lambda fault=fault: _raise(ValueError(fault))
    if split and not any(map(wanted, seen)):
        raise ValueError(f"{root}: {known.title} has no split {split!r}, only {', '.join(sorted(seen))}")


def _raise(fault):
    raise fault


class Sounds:
    """The sounds below a folder, found by what a list calls them."""

    def __init__(self, root: Path, paths: list[Path], known: KnownSet):
        self.root, self.known, self.places = root, known, defaultdict(list)
        for path in paths:
            self.places[path.name].append(path)
        self.names = SoundNames(self.places, lambda name: known.sound_key(without_ending(name)))

    def of(self, row: dict, listed: Path, split: str) -> Path:
        """The sound of a row. Raises FileNotFoundError if there is none, ValueError for a broken row or several."""
        names = [row[column] for column in self.known.file if field(row, column)]
        if self.known.relative:
            return file_inside(listed.parent, names[0].strip())
        for name in names:  # as it is written: Clotho has names that begin with a space
            found = [path for name in self.names.owners(name)[1] for path in self.places[name]]
            if beside := [path for path in found if split and split.casefold() in self.folder(path)]:
                found = beside  # as in WavCaps, whose parts number their sounds alike
            if len(found) > 1:
                raise ValueError(f"{name!r} could be {found[0]} or {found[1]}: keep one")
            if found:
                return found[0]
        raise FileNotFoundError(f"no sound file of {names[0]!r} below {self.root}")

    def folder(self, path: Path) -> str:
        """The folder of a sound below the root, in lower case."""
        return path.parent.relative_to(self.root).as_posix().casefold()


class Classes:
    """AudioSet's classes: names by their ids, and which are above which, from the files that come with it."""

    def __init__(self, files: list[Path], known: KnownSet):
        self.names, children = {}, {}
        by_name = {path.name: path for path in files}
        if table := by_name.get("class_labels_indices.csv"):
            self.names = {row["mid"]: row["display_name"] for _, row in read_rows(table, ("mid", "display_name"))}
        if ontology := by_name.get("ontology.json"):
            try:
                for node in _json(ontology):
                    self.names.setdefault(node["id"], str(node["name"]))
                    children[node["id"]] = list(node["child_ids"])
            except (KeyError, TypeError) as error:
                raise ValueError(f"{ontology}: not in the form of AudioSet's ontology ({error!r:.200})") from error
        if not self.names and not known.classes:
            raise FileNotFoundError(
                f"{known.title} lists ids of classes: put class_labels_indices.csv or ontology.json beside its lists"
            )
        self.above = defaultdict(set)  # {id: the classes above it}
        for top in children:
            below, seen = list(children[top]), set()
            while below:
                if (id := below.pop()) not in seen:
                    seen.add(id)
                    self.above[id].add(top)
                    below += children.get(id, ())

    def lowest(self, ids: list[str]) -> list[str]:
        """The ids without those above another of them: of "Dog" and "Animal" only "Dog"."""
        covered = set().union(*(self.above[id] for id in ids))
        return [id for id in dict.fromkeys(ids) if id not in covered] or ids  # in a circle each is above the other


def _captions(row, known, classes, template, caption) -> tuple[tuple[str, ...], str]:
    """-> (captions, names of classes)."""
    if caption or known.relative:
        column = caption or next((c for c in CAPTION_COLUMNS if c in row), "")
        if column not in row:
            raise ValueError(f"no column {column or ' or '.join(CAPTION_COLUMNS)}, only {', '.join(row)}")
        return captions_in(row, column), ""
    if known.captions:
        first, *others = known.captions
        more = [clean_caption(text) for column in others if (text := text_in(row, column))]
        return tuple(dict.fromkeys((*captions_in(row, first), *more))), ""
    names = _split_names(field(row, known.classes)) if known.classes else []
    if known.class_ids:
        ids = _split_names(field(row, known.class_ids))
        if known.classes and len(names) != len(ids):
            raise ValueError(f"{len(names)} classes but {len(ids)} ids")
        if unknown := [id for id in ids if not known.classes and id not in classes.names]:
            raise ValueError(f"no class has the id {unknown[0]!r}")
        called = dict(zip(ids, names, strict=True)) if known.classes else classes.names
        names = [called[id] for id in classes.lowest(ids)]
    words = [name.replace("_", " ").lower() for name in names]
    return (clean_caption(template.format(in_words(words))),), ", ".join(names)


def in_words(names: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _split_names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _rows(path, known, on_fault) -> Iterator[tuple[int, dict]]:
    """The rows of a list; broken ones are given to `on_fault`."""
    if path.suffix not in (".json", ".yaml"):
        yield from read_rows(path, known.file[:1] if is_json_lines(path) else known.needed, known.header, on_fault)
        return
    try:
        if path.suffix == ".json":  # WavCaps; its first lists have no "data" around them
            entries = listed if isinstance(listed := _json(path), list) else listed["data"]
        else:  # MACS
            entries = yaml.safe_load(path.read_text(encoding="utf-8"))["files"]
            entries = [e | {"captions": [a["sentence"] for a in e["annotations"]]} for e in entries]
        rows = [as_in_a_table(entry) for entry in entries]
    except (KeyError, TypeError, AttributeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not in the form of {known.title}'s lists ({error!r:.200})") from error
    yield from enumerate(rows, 1)


def _json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file in UTF-8 ({error})") from error


def _has_columns(path, known) -> bool:
    """Whether a file may be a list of a data set: CSV files must have its columns."""
    if path.suffix.lower() != ".csv" or known.header:
        return True
    try:
        with path.open("rb") as lines:  # of another encoding, too, which `read_rows` refuses by name
            names = lines.readline().decode("utf-8-sig", "replace").split(",")
    except OSError:
        return False
    header = [name.strip().strip('"') for name in names]
    return all(column in header for column in known.needed)
