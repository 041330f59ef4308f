import errno
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from refined_ldm.files import atomic_write
from tests.support import faults


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_and_a_folder_take_the_place_of_what_was_there(tmp_path):
    for contents in ("one", "two"):
        with atomic_write(tmp_path / "new" / "file") as temporary:
            temporary.write_text(contents)
        with atomic_write(tmp_path / "new" / "folder") as temporary:
            temporary.mkdir()
            (temporary / contents).write_text(contents)
    assert (tmp_path / "new" / "file").read_text() == "two" and names(tmp_path / "new" / "folder") == ["two"]
    assert names(tmp_path / "new") == ["file", "folder"]


def test_what_is_broken_off_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("one")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(KeyError), atomic_write(tmp_path / name) as temporary:
            temporary.write_text("half")
            assert (tmp_path / name).exists()
            raise KeyError
    assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_text() == "one"


def test_all_is_on_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    if not Path("/proc/self/fd").exists():
        pytest.skip("tells open files apart by /proc")
    monkeypatch.setattr(os, "fsync", lambda d: (done.append(Path(os.readlink(f"/proc/self/fd/{d}")).name), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("renamed"), replace(a, b)))
    with atomic_write(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
    assert done == [f".folder.{os.getpid()}.new.tmp", "a", "renamed", tmp_path.name]


def test_what_killed_processes_left_is_removed_and_what_others_write_now_is_not(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for left in (f".a.{dead.pid}.new.tmp", f".step.{dead.pid}.old.tmp", f".b.{os.getppid()}.new.tmp", ".mine.tmp"):
        (tmp_path / left).mkdir()
    with atomic_write(tmp_path / "file") as temporary:
        temporary.touch()
        with atomic_write(tmp_path / "another") as other:
            other.touch()
    assert names(tmp_path) == sorted([f".b.{os.getppid()}.new.tmp", ".mine.tmp", "another", "file", "step"])


def test_a_full_disk_is_told_whoever_finds_out(tmp_path):
    (tmp_path / "file").write_text("one")
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[0][1]))  # no file may grow over 1000 bytes
    try:
        for write in (lambda path: save_file({"a": torch.ones(999)}, path), lambda path: path.write_bytes(bytes(9999))):
            with pytest.raises(OSError, match="what was there before is intact: '.*/file'") as fault:
                with atomic_write(tmp_path / "file") as temporary:
                    write(temporary)
            assert fault.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "one"


def test_killed_at_any_file_operation_the_old_or_the_new_is_there(tmp_path):
    """A process puts a folder in the place of another and is killed at its first, second, … file operation."""
    found = []
    for number in range(1, 30):
        folder = tmp_path / str(number) / "folder"
        folder.mkdir(parents=True)
        (folder / "whole").write_text("old")
        process = os.fork()
        if not process:
            faults.FileEvents(folder.parent, number, faults.die)()
            with atomic_write(folder) as temporary:
                temporary.mkdir()
                (temporary / "whole").write_text("new")
            os._exit(0)
        status = faults.wait(process)
        with atomic_write(folder.parent / "next") as temporary:
            temporary.touch()
        assert names(folder.parent) == ["folder", "next"] and names(folder) == ["whole"]
        found.append((folder / "whole").read_text())
        if status == 0:
            break
    assert found == sorted(found, reverse=True) and found[0] == "old" and found[-1] == "new" and len(found) > 6
