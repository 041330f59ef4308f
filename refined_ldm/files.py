"""Files and folders written whole or not at all: under a temporary name, flushed to disk, then renamed."""

import errno
import hashlib
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_under_way = set()  # temporary names that this process writes to now


@contextmanager
def atomic_write(path):
    """Yield a name beside `path` to write a file or a folder under; at the end that takes the place of `path`.

    Until then, and whenever anything goes wrong, what was there before stays as it is. Raises OSError; of a full disk
    too where the writer (safetensors) has an error of its own.
    """
    path = Path(path)
    temporary, replaced = (path.with_name(f".{path.name}.{os.getpid()}.{kind}.tmp") for kind in ("new", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path.parent)
    _under_way.update((temporary, replaced))
    try:
        yield temporary
        for file in (temporary, *temporary.rglob("*")):
            _flush(file)
        if path.is_dir():
            os.replace(path, replaced)  # a folder takes no other's place
        os.replace(temporary, path)
        _flush(path.parent)  # which holds the new name
    except (OSError, SafetensorError) as fault:
        number = _error_number(fault)
        if number not in FULL:
            raise
        raise OSError(number, f"{os.strerror(number)}; what was there before is intact", str(path)) from fault
    finally:
        for name in (temporary, replaced):
            _remove(name)
            _under_way.discard(name)


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


def _remove_left(folder):
    """Remove what processes left that were killed while writing in a folder; what lost its name gets it back."""
    for left in folder.glob(".*.tmp"):
        told = re.fullmatch(r"\.(.+)\.(\d+)\.(new|old)\.tmp", left.name)
        if told and left not in _under_way and (int(told[2]) == os.getpid() or not _runs(int(told[2]))):
            if told[3] == "old" and not (folder / told[1]).exists():
                os.replace(left, folder / told[1])
            else:
                _remove(left)


def _runs(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256(path):
    """The sha256 of a file, read in pieces, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
