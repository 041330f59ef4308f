"""WebDataset shards: tar archives that hold NAME.wav beside NAME.txt or NAME.json, read in place.

A text belongs to the sound whose whole name it has (a.1.txt to a.1.wav, not to a.2.wav); only where there is none, to
all those with its key, which in WebDataset is the name up to the first point.

Nothing is unpacked. The headers of an archive are read once; from then on each of its sounds is an offset and a size,
which is opened like any file. So shuffling, resuming, and sharing among processes and workers are those of loose files.
A name in an archive stays a name: it never becomes a path.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path, PurePosixPath
from typing import IO

from refined_ldm.data.listing import TEXT_SUFFIXES, is_sound, pair_texts, single_text
from refined_ldm.data.tables import caption_lines, json_captions

TEXT_BYTES = 1 << 20  # a longer text is no caption
DAMAGE = (tarfile.TarError, ValueError, OverflowError, MemoryError, OSError)  # what tarfile raises on damaged headers


@dataclass(frozen=True)
class Inside:
    """A file inside an archive, which is named, found and dated like a Path; subclasses open it."""

    archive: Path
    name: str

    def __str__(self) -> str:
        return f"{self.archive}: {self.name}"

    def is_file(self) -> bool:
        return self.archive.is_file()

    def stat(self) -> os.stat_result:
        """Size and time of change of the archive."""
        return self.archive.stat()


@dataclass(frozen=True)
class Member(Inside):
    """A file inside a tar archive."""

    offset: int  # bytes, where its contents begin
    size: int  # bytes

    @contextmanager
    def open(self, mode: str = "rb") -> Iterator[IO[bytes]]:
        """A binary file that ends where the member does."""
        info = tarfile.TarInfo(self.name)
        info.offset_data, info.size = self.offset, self.size
        with tarfile.open(self.archive, "r:") as tar:  # one header is read
            yield tar.extractfile(info)


def find_shards(where: str | Path) -> list[Path]:
    """The archives that a path names: a .tar file, a folder's .tar files, or those of a pattern like set/*.tar."""
    path = Path(where)
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() == ".tar")
    if path.suffix.lower() != ".tar":
        return []
    return [path] if path.is_file() else sorted(map(Path, glob(str(where))))


def shard_sounds(shards: list[Path], passed: list[str] | None = None) -> Iterator[tuple[str, Callable[[], tuple]]]:
    """Yield (where it is, function that returns it or raises ValueError) for every sound and every fault of shards.

    A sound is (member, id, captions, label). Faults are a sound that is empty, or has no caption or two; a name that
    comes twice or leads out; a link or device; and an archive that is cut or damaged: what stands before the damage is
    still given. Names of members that are neither go into the list `passed`.
    """
    repeated = [name for name, times in Counter(shard.name for shard in shards).items() if times > 1]
    if repeated:
        raise ValueError(f"two shards are called {repeated[0]}: their names identify sounds, so rename one")
    for shard in shards:
        sounds, texts, others, faults = _members(shard)
        pairs, left = pair_texts([member.name for member in sounds], list(texts), _key)
        if passed is not None:
            passed += others + left
        for member in sounds:
            beside = pairs.get(member.name, [])
            yield str(member), lambda member=member, beside=beside, texts=texts: _sound(member, beside, texts)
        for fault in faults:
            yield str(shard), lambda fault=fault: _raise(fault)


def _raise(fault):
    raise ValueError(fault)


def _members(shard: Path) -> tuple[list[Member], dict[str, bytes], list[str], list[str]]:
    """-> members that are sounds, {name of a text: its contents}, names of the others, faults."""
    sounds, texts, others, faults, seen, end = [], {}, [], [], set(), 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE * info.isreg()
                name, path = info.name, PurePosixPath(info.name)
                suffix = path.suffix.lower()
                if info.isdir() or any(part.startswith(".") and part != ".." for part in path.parts):
                    continue
                if not info.isreg() or info.issparse():
                    faults.append(f"{name} is no plain file but a link, a device or a sparse file")
                elif path.is_absolute() or ".." in path.parts:
                    faults.append(f"{name!r} leads out of the archive")
                elif name in seen:
                    faults.append(f"{name} is there twice")
                elif suffix in TEXT_SUFFIXES:
                    texts[name] = tar.extractfile(info).read(TEXT_BYTES)
                elif is_sound(member := Member(shard, name, info.offset_data, info.size)):
                    sounds.append(member)
                else:
                    others.append(name)
                seen.add(name)
        with open(shard, "rb") as file:  # tarfile takes a damaged header for the end
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end of the archive at byte {end}")
    except DAMAGE as fault:
        whole = f"what stands before byte {end} is whole" if end else "a shard is a tar archive that is not compressed"
        faults.append(f"cut or damaged ({fault}): fetch it again; {whole}")
    size = shard.stat().st_size
    return [member for member in sounds if member.offset + member.size <= size], texts, others, faults


def _key(name: str) -> str:
    """WebDataset's: the name up to the first point after the folders."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _sound(member: Member, beside: list[str], texts: dict) -> tuple[Member, str, tuple[str, ...], str]:
    if member.size == 0:
        raise ValueError("the file is empty (0 bytes)")
    if not beside:
        raise ValueError(f"it has no caption: neither {_key(member.name)}.txt nor .json is in the archive")
    name = single_text(member.name, beside)
    raw, suffix = texts[name], PurePosixPath(name).suffix.lower()
    if len(raw) == TEXT_BYTES:
        raise ValueError(f"its {suffix} file has {TEXT_BYTES} bytes or more, which is no caption")
    captions, label = (caption_lines(raw, name), "") if suffix == ".txt" else json_captions(raw, name)
    return member, f"{member.archive.stem}/{member.name}", captions, label
