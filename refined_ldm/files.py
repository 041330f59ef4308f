"""Atomic writes of files and folders: under a temporary name, flushed to disk, then renamed."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_in_progress = set()  # temporary names that this process is writing


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` for a file or a folder, which replaces `path` when the block ends.

    Until then, and after any error, the earlier `path` stays intact. Raises OSError; for a full disk also where the
    writer (safetensors) has an error type of its own.
    """
    path = Path(path)
    temporary, replaced = (path.with_name(f".{path.name}.{os.getpid()}.{kind}.tmp") for kind in ("new", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path.parent)
    _in_progress.update((temporary, replaced))
    try:
        yield temporary
        for file in (temporary, *temporary.rglob("*")):
            _flush(file)
        if path.is_dir():
            os.replace(path, replaced)  # a folder cannot be renamed onto another
        os.replace(temporary, path)
        _flush(path.parent)  # the folder holds the new name
    except (OSError, SafetensorError) as fault:
        number = _error_number(fault)
        if number not in DISK_FULL:
            raise
        raise OSError(number, f"{os.strerror(number)}; what was there before is intact", str(path)) from fault
    finally:
        for name in (temporary, replaced):
            _remove(name)
            _in_progress.discard(name)


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


def _remove_left(folder: Path) -> None:
    """Remove the temporary files of killed processes in a folder; restore a path that was moved aside."""
    for left in folder.glob(".*.tmp"):
        name = re.fullmatch(r"\.(.+)\.(\d+)\.(new|old)\.tmp", left.name)
        if name and left not in _in_progress and (int(name[2]) == os.getpid() or not _runs(int(name[2]))):
            if name[3] == "old" and not (folder / name[1]).exists():
                os.replace(left, folder / name[1])
            else:
                _remove(left)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
