"""Atomic writes of files and folders: under a temporary name, flushed to disk, then renamed."""

import errno
import fcntl
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from safetensors import SafetensorError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ABANDONED = 3600  # seconds without a change after which a temporary folder of another machine may be removed
PREFIX = ".refined-ldm-"  # of temporary folders, whose names are PREFIX, the machine, something random, ".tmp"
JUNK = rf"\.DS_Store|{re.escape(PREFIX)}.*\.tmp"  # files that do not count as the content of a folder


# Checks before any work


def check_place(path: str | Path, holds: str | None = None) -> None:
    """Raise OSError if `path` exists and must not be replaced by a file or, with `holds`, by a folder.

    A file replaces a regular file only. A folder replaces a folder of its own kind only: every name in it must match
    the pattern `holds`.
    """
    path = Path(path)
    if not path.exists():
        return
    if holds is None and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise IsADirectoryError(f"{path} is {kind}, so it is not replaced: give the name of a file")
    if holds is not None and not path.is_dir():
        raise FileExistsError(f"{path} is a file, so it is not replaced by a folder: give another name")
    if holds is not None:
        others = sorted(p.name for p in path.iterdir() if not re.fullmatch(f"{holds}|{JUNK}", p.name))
        if others:
            raise FileExistsError(f"{path} also holds {', '.join(others[:5])}, so it is not replaced: give another")


def check_file(path: str | Path) -> None:
    """Raise OSError if no file can be written to `path`: because of its name, its place or missing rights."""
    path = Path(path)
    check_place(path)
    check_writable(path.absolute().parent, [path.name])


def check_folder(folder: str | Path, names: Iterable[str] = ()) -> None:
    """Raise OSError if the files `names` cannot be written into a folder, which need not exist yet."""
    folder, names = Path(folder), list(names)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, where a folder is needed: give another name")
    for name in names:
        check_place(folder / name)
    check_writable(folder.absolute(), names)


def check_writable(folder: Path, names: Iterable[str]) -> None:
    """Raise OSError if `names` cannot be written below an absolute folder, which need not exist yet.

    It writes a temporary file into the nearest existing folder and counts the bytes of every name.
    """
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file, where a folder is needed: give another name")
    limit = os.pathconf(nearest, "PC_NAME_MAX")
    for name in (*folder.relative_to(nearest).parts, *names):
        if (size := len(os.fsencode(name))) > limit:
            message = f"a name may have {limit} bytes here, this has {size}: give a shorter one"
            raise OSError(errno.ENAMETOOLONG, message, str(name))
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as fault:
        message = f"{os.strerror(fault.errno)}: give a folder that can be written to"
        raise OSError(fault.errno, message, str(nearest)) from fault


# Writing


@contextmanager
def atomic_write(path: str | Path, holds: str | None = None, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path for a file or, with `holds`, a folder, which replaces `path` when the block ends.

    Until then, and after any error, the earlier `path` stays intact. holds: see `check_place`. replace: whether an
    earlier file is replaced; if not, and there is one, FileExistsError. Raises OSError: before anything is written
    where `check_place` does; for a full disk also where the writer (safetensors) has an error type of its own.
    """
    path = Path(path)
    check_place(path, holds)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with _temporary_folder(path.parent) as work:
        temporary, old = work / "new", work / "old"
        try:
            yield temporary
            for file in (temporary, *temporary.rglob("*")):
                _flush(file)
            if holds is not None and path.is_dir():
                old.mkdir()
                os.replace(path, old / path.name)  # a folder cannot be renamed onto another
            if replace:
                os.replace(temporary, path)
            else:
                _place_beside(temporary, path)
            _flush(path.parent)  # the folder holds the new name
        except (OSError, SafetensorError) as fault:
            number = _error_number(fault)
            if number not in DISK_FULL:
                raise
            raise OSError(number, f"{os.strerror(number)}; what was there before is intact", str(path)) from fault


def _place_beside(temporary: Path, path: Path) -> None:
    """Give a file its name, atomically, unless that is taken (FileExistsError)."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)


def _flush(path: Path) -> None:
    """Flush a file or a folder to disk, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _error_number(fault: Exception) -> int | None:
    found = re.search(r"os error (\d+)", str(fault))  # the message of safetensors
    return int(found[1]) if found else getattr(fault, "errno", None)


# Temporary folders: one for each write, locked until it ends


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a temporary folder in `parent` for this write alone; it is removed at the end."""
    while True:
        work = Path(tempfile.mkdtemp(".tmp", f"{PREFIX}{_machine()}-", parent))
        try:
            descriptor = os.open(work, os.O_RDONLY)
        except FileNotFoundError:  # removed by `remove_leftovers` of another process before it was locked
            continue
        except OSError:
            work.rmdir()
            raise
        with suppress(OSError):  # without locks `remove_leftovers` goes by the age of a folder
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if work.exists():
            break
        os.close(descriptor)
    try:
        yield work
    finally:
        _clear(work)
        os.close(descriptor)


def remove_leftovers(parent: Path) -> None:
    """Remove the temporary folders of killed writers in a folder; restore paths that were moved aside.

    A running writer holds a lock. Locks are only visible on its own machine, so temporary folders of other machines are
    removed by age; process numbers would not do, since containers share disks without sharing them.
    """
    for left in parent.glob(f"{PREFIX}*.tmp"):
        with suppress(OSError):  # removed by another process, or not ours to remove
            descriptor = os.open(left, os.O_RDONLY)
            try:
                if _is_left(left, descriptor):
                    _clear(left)
            finally:
                os.close(descriptor)


def _is_left(work: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if work.name.startswith(f"{PREFIX}{_machine()}-"):
            return True
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        pass
    changed = max(path.stat().st_mtime for path in (work, *work.rglob("*")))
    return time.time() - changed > ABANDONED


def _clear(work: Path) -> None:
    """Remove a temporary folder; a path that was moved into it is restored if its name is free."""
    for old in work.glob("old/*"):
        if not (work.parent / old.name).exists():
            os.replace(old, work.parent / old.name)
    shutil.rmtree(work, ignore_errors=True)


@cache
def _machine() -> str:
    """A name for the machine whose processes share locks: the boot id of the kernel if there is one, else the host."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        name = platform.node()
    return re.sub(r"\W", "", name)[:32] or "host"


@contextmanager
def errors_at(place: str | Path) -> Iterator[None]:
    """Begin the message of a ValueError with the place where it was found: a file, or a part of one."""
    try:
        yield
    except ValueError as fault:
        raise ValueError(f"{place}: {fault}") from fault


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
