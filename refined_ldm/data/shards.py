"""WebDataset shards: tar archives that hold NAME.wav beside NAME.txt or NAME.json, read where they lie.

Nothing is unpacked. The headers of an archive are read once; from then on each of its sounds is an offset and a size,
which is opened like any file. So shuffling, resuming, and sharing among processes and workers are those of loose files.
A name in an archive stays a name: it never becomes a path.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path, PurePosixPath

from refined_ldm.data.tables import caption_lines, clean_caption

TEXT_BYTES = 1 << 20  # a longer text is no caption
DAMAGE = (tarfile.TarError, ValueError, OverflowError, MemoryError, OSError)  # what tarfile raises on damaged headers


@dataclass(frozen=True)
class Member:
    """A file inside a tar archive, which opens like a Path."""

    archive: Path
    name: str
    offset: int  # bytes, where its contents begin
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.archive}: {self.name}"

    def is_file(self) -> bool:
        return self.archive.is_file()

    def stat(self):
        """Of the archive: size and time of change."""
        return self.archive.stat()

    @contextmanager
    def open(self, mode: str = "rb"):
        """A binary file that ends where the member does."""
        info = tarfile.TarInfo(self.name)
        info.offset_data, info.size = self.offset, self.size
        with tarfile.open(self.archive, "r:") as tar:  # one header is read
            yield tar.extractfile(info)


def find_shards(where: str | Path) -> list[Path]:
    """The archives that a path names: a .tar file, a folder's .tar files, or those of a pattern like set/*.tar."""
    path = Path(where)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.suffix != ".tar":
        return []
    return [path] if path.is_file() else sorted(map(Path, glob(str(where))))


def shard_sounds(shards: list[Path], suffixes: frozenset[str]) -> Iterator[tuple[str, Callable[[], tuple]]]:
    """(where it stands, function that gives it or raises ValueError) for every sound and every fault of shards.

    A sound, told by one of `suffixes`, is (member, id, captions, label). Faults are a sound that is empty or has no
    caption; a name that comes twice or leads out; a link or device; and an archive that is cut or damaged: what stands
    before the damage is still given.
    """
    repeated = [name for name, times in Counter(shard.name for shard in shards).items() if times > 1]
    if repeated:
        raise ValueError(f"two shards are called {repeated[0]}: their names tell sounds apart, so rename one")
    for shard in shards:
        sounds, texts, faults = _members(shard, suffixes)
        for member in sounds:
            yield str(member), lambda member=member, texts=texts: _sound(member, texts)
        for fault in faults:
            yield str(shard), lambda fault=fault: _raise(fault)


def _raise(fault):
    raise ValueError(fault)


def _members(shard: Path, suffixes) -> tuple[list[Member], dict, list[str]]:
    """-> members that are sounds, {key: {".txt" or ".json": contents}}, faults."""
    sounds, texts, faults, seen, end = [], {}, [], set(), 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE * info.isreg()
                name, path = info.name, PurePosixPath(info.name)
                suffix = path.suffix.lower()
                if info.isdir() or path.name.startswith("."):
                    continue
                if not info.isreg() or info.issparse():
                    faults.append(f"{name} is no plain file but a link, a device or a sparse file")
                elif path.is_absolute() or ".." in path.parts:
                    faults.append(f"{name!r} leads out of the archive")
                elif name in seen:
                    faults.append(f"{name} is there twice")
                elif suffix in suffixes:
                    sounds.append(Member(shard, name, info.offset_data, info.size))
                elif suffix in (".txt", ".json"):
                    texts.setdefault(_key(name), {})[suffix] = tar.extractfile(info).read(TEXT_BYTES)
                seen.add(name)
        with open(shard, "rb") as file:  # tarfile takes whatever is no header for the end
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end of the archive at byte {end}")
    except DAMAGE as fault:
        whole = f"what stands before byte {end} is whole" if end else "a shard is a tar archive that is not compressed"
        faults.append(f"cut or damaged ({fault}): fetch it again; {whole}")
    size = shard.stat().st_size
    return [member for member in sounds if member.offset + member.size <= size], texts, faults


def _key(name: str) -> str:
    """WebDataset's: the name up to the first point after the folders."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _sound(member: Member, texts: dict) -> tuple[Member, str, tuple[str, ...], str]:
    if member.size == 0:
        raise ValueError("the file is empty (0 bytes)")
    beside = texts.get(_key(member.name), {})
    if not beside:
        raise ValueError(f"it has no caption: neither {_key(member.name)}.txt nor .json is in the archive")
    suffix = max(beside)  # .txt, where there are both: the other then has more than captions
    raw = beside[suffix]
    if len(raw) == TEXT_BYTES:
        raise ValueError(f"its {suffix} file has {TEXT_BYTES} bytes or more, which is no caption")
    name = f"{_key(member.name)}{suffix}"
    captions, label = (caption_lines(raw, name), "") if suffix == ".txt" else _captions_of_json(raw, name)
    return member, f"{member.archive.stem}/{member.name}", captions, label


def _captions_of_json(raw: bytes, name: str) -> tuple[tuple[str, ...], str]:
    """Texts, or lists of them, under "text" and every key that speaks of a caption; and the "label"."""
    try:
        told = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not a JSON file in UTF-8 ({error})") from error
    if not isinstance(told, dict):
        raise ValueError(f"{name}: expected an object, got a {type(told).__name__}")
    values = [value for key, value in told.items() if key == "text" or "caption" in key]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    captions = tuple(dict.fromkeys(clean_caption(text) for text in texts if isinstance(text, str) and text.strip()))
    if not captions:
        raise ValueError(f'{name}: expected "caption", "captions" or "text", it has {", ".join(told)!s:.80}')
    return captions, str(told.get("label") or "")
