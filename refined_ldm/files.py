"""Files and folders written whole or not at all: under a temporary name, flushed to disk, then renamed."""

import errno
import fcntl
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from safetensors import SafetensorError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ABANDONED = 3600  # seconds without a change after which a temporary folder of another machine counts as left behind
PREFIX = ".refined-ldm-"  # of temporary folders, whose names are PREFIX, the machine, something random, ".tmp"
JUNK = rf"\.DS_Store|{re.escape(PREFIX)}.*\.tmp"  # what may lie in a folder without being anybody's


# --- before any work ---


def check_place(path, holds=None):
    """Raise OSError if what stands at `path` must not give way to a file or, with `holds`, to a folder.

    A file takes no place but that of a regular file, a folder that of one of its own kind: `holds` is the pattern of
    the names in such a folder, and one that holds anything else is somebody else's.
    """
    path = Path(path)
    if not path.exists():
        return
    if holds is None and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise IsADirectoryError(f"{path} is {what}, so it is not replaced: give the name of a file")
    if holds is not None and not path.is_dir():
        raise FileExistsError(f"{path} is a file, so it is not replaced by a folder: give another name")
    if holds is not None:
        others = sorted(p.name for p in path.iterdir() if not re.fullmatch(f"{holds}|{JUNK}", p.name))
        if others:
            raise FileExistsError(f"{path} also holds {', '.join(others[:5])}, so it is not replaced: give another")


def check_file(path):
    """Raise OSError if no file can be written to `path`: for what stands there, for its name, for want of rights."""
    path = Path(path)
    check_place(path)
    check_writable(path.absolute().parent, [path.name])


def check_folder(folder, names=()):
    """Raise OSError if the files `names` cannot be written into a folder, which need not be there yet."""
    folder, names = Path(folder), list(names)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, where a folder is needed: give another name")
    for name in names:
        check_place(folder / name)
    check_writable(folder.absolute(), names)


def check_writable(folder, names):
    """Raise OSError if `names` cannot be written below an absolute folder, which need not be there yet.

    Tries to write into the nearest folder there is, and counts the bytes of every name.
    """
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, where a folder is needed: give another name")
    most = os.pathconf(there, "PC_NAME_MAX")
    for name in (*folder.relative_to(there).parts, *names):
        if len(os.fsencode(name)) > most:
            raise OSError(errno.ENAMETOOLONG, f"a name may have {most} bytes here, this has "
                          f"{len(os.fsencode(name))}: give a shorter one", str(name))  # fmt: skip
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as fault:
        told = f"{os.strerror(fault.errno)}: give a folder that can be written to"
        raise OSError(fault.errno, told, str(there)) from fault


# --- writing ---


@contextmanager
def atomic_write(path, holds=None, replace=True):
    """Yield a name to write a file under, or, with `holds`, a folder; at the end that takes the place of `path`.

    Until then, and whenever anything goes wrong, what was there before stays as it is. holds: see `check_place`.
    replace: whether an earlier file gives way; if not, and there is one, FileExistsError. Raises OSError, before
    anything is written where `check_place` does; of a full disk too where the writer (safetensors) has its own error.
    """
    path = Path(path)
    check_place(path, holds)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left(path.parent)
    with _workplace(path.parent) as work:
        temporary, old = work / "new", work / "old"
        try:
            yield temporary
            for file in (temporary, *temporary.rglob("*")):
                _flush(file)
            if holds is not None and path.is_dir():
                old.mkdir()
                os.replace(path, old / path.name)  # a folder takes no other's place
            if replace:
                os.replace(temporary, path)
            else:
                _place_beside(temporary, path)
            _flush(path.parent)  # which holds the new name
        except (OSError, SafetensorError) as fault:
            number = _error_number(fault)
            if number not in FULL:
                raise
            raise OSError(number, f"{os.strerror(number)}; what was there before is intact", str(path)) from fault


def _place_beside(temporary, path):
    """Give a file its name unless that is taken (FileExistsError), whoever else writes here."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)


def _flush(path):
    """Have the disk hold what was written to a file or a folder, so that a power cut does not undo it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _error_number(fault):
    told = re.search(r"os error (\d+)", str(fault))  # safetensors' way to say it
    return int(told[1]) if told else getattr(fault, "errno", None)


# --- temporary folders: one for each writing, locked as long as it is under way ---


@contextmanager
def _workplace(parent):
    """A folder in `parent` that this writing alone works in, and that is gone at the end."""
    while True:
        work = Path(tempfile.mkdtemp(".tmp", f"{PREFIX}{_machine()}-", parent))
        try:
            descriptor = os.open(work, os.O_RDONLY)
        except FileNotFoundError:  # taken for left behind before it was locked
            continue
        except OSError:
            work.rmdir()
            raise
        with suppress(OSError):  # where there are no locks, age tells what was left behind
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if work.exists():
            break
        os.close(descriptor)
    try:
        yield work
    finally:
        _clear(work)
        os.close(descriptor)


def remove_left(parent):
    """Remove what writers left in a folder that were killed; what lost its name gets it back.

    A writer that lives holds a lock, which tells only on the machine it runs on: containers share disks without
    sharing the numbers of their processes, machines share disks without sharing locks.
    """
    for left in parent.glob(f"{PREFIX}*.tmp"):
        with suppress(OSError):  # somebody else removed it, or may
            descriptor = os.open(left, os.O_RDONLY)
            try:
                if _is_left(left, descriptor):
                    _clear(left)
            finally:
                os.close(descriptor)


def _is_left(work, descriptor):
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


def _clear(work):
    """Remove a temporary folder; what it holds of old gets its name back if nothing has that."""
    for old in work.glob("old/*"):
        if not (work.parent / old.name).exists():
            os.replace(old, work.parent / old.name)
    shutil.rmtree(work, ignore_errors=True)


@cache
def _machine():
    """A name for what shares locks with this process: the running kernel where it has one, else the host."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        name = platform.node()
    return re.sub(r"\W", "", name)[:32] or "host"


def sha256(path):
    """The sha256 of a file, read in pieces, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
