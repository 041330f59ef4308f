"""The files of a folder: sounds, the text or table row that belongs to each of them, and unused files."""

import logging
import os
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import soundfile

log = logging.getLogger(__name__)

_CUSTOMARY = """aac aif aifc aiff au avr bwf caf fap flac htk iff ircam m4a mat mp1 mp2 mp3 mpc mpga nist oga ogg opus
    paf pvf rf64 sd2 sds sf snd sph spx svx 8svx voc w64 wav wave wavex wma wve xi""".split()
AUDIO_SUFFIXES = frozenset(f".{e}" for e in [*_CUSTOMARY, *map(str.lower, soundfile.available_formats())]) - {".raw"}
SHARED = frozenset((".mat", ".iff", ".htk", ".mpc", ".sf", ".snd", ".xi"))  # with files that are no sounds
TEXT_SUFFIXES = (".txt", ".json")


def is_sound(path: Any) -> bool:
    """Whether a Path, or a `shards.Member`, is a sound: by its ending or, if other files use that too, by its bytes."""
    suffix = PurePosixPath(getattr(path, "name", path)).suffix.lower()
    if suffix not in SHARED:
        return suffix in AUDIO_SUFFIXES
    try:
        with path.open("rb") as file, soundfile.SoundFile(file):
            return True
    except (soundfile.LibsndfileError, OSError):
        return False


def find_files(folder: str | Path) -> tuple[list[Path], int]:
    """All files in a folder and below it -> (sorted paths, number of folders found again).

    Hidden files and folders, whose names begin with a point, are left out: `.ipynb_checkpoints` holds copies.

    Links to folders are followed, but no folder is entered twice. Raises OSError for a folder that
    cannot be read.
    """
    files, entered, repeated, waiting = [], set(), 0, deque([os.fspath(folder)])
    while waiting:
        top = waiting.popleft()
        if os.path.realpath(top) in entered:
            repeated += 1
            continue
        for place, folders, names in os.walk(top, onerror=_raise):
            real = os.path.realpath(place)
            if real in entered:
                repeated += 1
                folders.clear()
                continue
            entered.add(real)
            folders[:] = [name for name in folders if not name.startswith(".")]
            waiting.extend(path for name in sorted(folders) if os.path.islink(path := os.path.join(place, name)))
            files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files), repeated


def _raise(error):
    raise error


def file_inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`; FileNotFoundError if it is missing, ValueError for a name that leads out of it."""
    relative = os.path.normpath(name)
    if os.path.isabs(relative) or relative.split(os.sep)[0] == os.pardir:
        raise ValueError(f"{name!r} leads out of {folder}")
    try:
        there = (folder / relative).is_file()
    except OSError as error:  # too long for a name
        raise ValueError(f"{name!r:.80} is no file name ({error.strerror})") from error
    if not there and "\\" in name and (folder / name.replace("\\", "/")).is_file():
        there = name.replace("\\", "/")
        raise FileNotFoundError(f"{name}: no such sound file, but {there} is there: write / between folders")
    if not there:
        raise FileNotFoundError(f"{folder / relative}: no such sound file")
    return folder / relative


def captions_table(folder: Path) -> Path | None:
    """The captions.csv of a folder, in any case; None if it has none. Raises ValueError if it has several."""
    found = sorted(path for path in folder.iterdir() if path.name.casefold() == "captions.csv" and path.is_file())
    if len(found) > 1:
        raise ValueError(f"{folder} has {' and '.join(path.name for path in found)}: keep one")
    return found[0] if found else None


def without_ending(name: str) -> str:
    """The name of a sound without its ending: "a/rain.v2.wav" -> "a/rain.v2", and "a/rain.v2" is itself."""
    stem, dot, ending = name.rpartition(".")
    return stem if f"{dot}{ending}".lower() in AUDIO_SUFFIXES and stem.rpartition("/")[2] else name


def _folded(name: str) -> str:
    """A path with its last part in lower case, and accents as one character each."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + unicodedata.normalize("NFC", unicodedata.normalize("NFC", file).casefold())


class SoundNames:
    """The sounds that a text or a table row may name, by their whole name or by that without its ending.

    key: a last way to pair, by what it makes of both names (WebDataset's first point).
    """

    def __init__(self, sounds: Iterable[str], key: Callable[[str], str] | None = None):
        self.key, self.ways = key, [defaultdict(list) for _ in range(5)]
        for sound in sounds:
            stem = without_ending(sound)
            for way, name in zip(self.ways, (sound, _folded(sound), stem, _folded(stem)), strict=False):
                way[name].append(sound)
            if key:
                self.ways[4][key(sound)].append(sound)

    def owners(self, name: str) -> tuple[int, list[str]]:
        """(0: by the whole name, 1: without endings, 2: by the key; the sounds). As it is written before any case."""
        stem = without_ending(name)
        for rank, way, wanted in ((0, 0, name), (0, 1, _folded(name)), (1, 2, name), (1, 3, _folded(name)),
                                  (1, 2, stem), (1, 3, _folded(stem))):  # fmt: skip
            if found := self.ways[way].get(wanted):
                return rank, found
        return 2, self.ways[4].get(self.key(name), []) if self.key else []


def pair(
    sounds: list[str], named: dict[str, str], key: Callable[[str], str] | None = None
) -> tuple[dict[str, list[str]], list[str]]:
    """Give every text or row to the sounds that it names best, and every sound those that name it best.

    named: {text: the name that it gives}. -> ({sound: its texts, several if they name it equally well}, texts that are
    left). A text whose whole name is that of one sound belongs to no other.
    """
    names, found = SoundNames(sounds, key), defaultdict(lambda: defaultdict(list))
    for text, name in named.items():
        rank, owners = names.owners(name)
        for sound in owners:
            found[sound][rank].append(text)
    pairs = {sound: ranks[min(ranks)] for sound, ranks in found.items()}
    used = {text for texts in pairs.values() for text in texts}
    return pairs, [text for text in named if text not in used]


def pair_texts(
    sounds: list[str], texts: list[str], key: Callable[[str], str] | None = None
) -> tuple[dict[str, list[str]], list[str]]:
    """`pair` for the files rain.txt, rain.wav.txt or rain.json of the sound rain.wav; beside a .txt no .json counts."""
    pairs, left = pair(sounds, {text: text[: -len(PurePosixPath(text).suffix)] for text in texts}, key)
    for sound, found in pairs.items():
        plain = [text for text in found if text.lower().endswith(".txt")]
        pairs[sound] = plain or found
    return pairs, left


def single_text(sound: str, texts: list[str]) -> str:
    """The one text of a sound. Raises ValueError naming them if there are several."""
    if len(texts) > 1:
        raise ValueError(f"{sound} has {len(texts)} files of captions, {' and '.join(sorted(texts))}: keep one")
    return texts[0]


def unused_files(names: Iterable[str], **counts: int) -> str:
    """Unused files, for one line: "2 .md, 1 without ending, 3 texts without a sound"; "" if nothing."""
    endings = Counter(PurePosixPath(name).suffix.lower() or "without ending" for name in names)
    found = [f"{number} {ending}" for ending, number in sorted(endings.items())]
    return ", ".join(found + [f"{number} {kind.replace('_', ' ')}" for kind, number in counts.items() if number])


def log_shared_texts(folder: Path, pairs: dict[str, list[str]]) -> None:
    """Log in one line the texts that caption several sounds, as rain.txt beside rain.wav and rain.flac."""
    sounds = defaultdict(list)
    for sound, (text, *others) in pairs.items():
        if not others:
            sounds[text].append(sound)
    shared = [f"{text} captions {' and '.join(found)}" for text, found in sounds.items() if len(found) > 1]
    if shared:
        log_once(
            f"{folder}: {len(shared)} texts caption several sounds each: {', '.join(shared[:3])}"
            + " …" * (len(shared) > 3)
        )


@lru_cache(256)
def log_once(message: str) -> None:
    """Log a message once in a process."""
    log.warning(message)
