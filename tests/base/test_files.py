import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from refined_ldm.base import files
from refined_ldm.base.files import atomic_write, check_file, check_folder, check_place
from tests.support import faults


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_and_a_folder_take_the_place_of_what_was_there(tmp_path):
    for contents in ("one", "two"):
        with atomic_write(tmp_path / "new" / "file") as temporary:
            temporary.write_text(contents)
        with atomic_write(tmp_path / "new" / "folder", "one|two") as temporary:
            temporary.mkdir()
            (temporary / contents).write_text(contents)
    assert (tmp_path / "new" / "file").read_text() == "two" and names(tmp_path / "new" / "folder") == ["two"]
    assert names(tmp_path / "new") == ["file", "folder"]


def test_what_is_broken_off_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("one")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(KeyError), atomic_write(tmp_path / name, None if name == "file" else "") as temporary:
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
    with atomic_write(tmp_path / "folder", "a") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
    assert done == ["new", "a", "renamed", tmp_path.name]


def write(path, contents="new"):
    with atomic_write(path) as temporary:
        temporary.write_text(contents)


@pytest.mark.parametrize("stands", ["empty folder", "folder", "link to a folder", "pipe"])
def test_a_file_replaces_regular_files_alone(tmp_path, stands):
    place = tmp_path / "out"
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "keep.txt").write_text("precious")
    {
        "empty folder": place.mkdir,
        "folder": lambda: (tmp_path / "real").rename(place),
        "link to a folder": lambda: place.symlink_to(tmp_path / "real"),
        "pipe": lambda: os.mkfifo(place),
    }[stands]()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="out is .*, so it is not replaced: give the name of a file"):
        with atomic_write(place):
            pytest.fail("work began")
    for check in (check_file, check_place):
        with pytest.raises(OSError, match="so it is not replaced"):
            check(place)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_comes_to_be_meanwhile_stays(tmp_path):
    with pytest.raises(OSError), atomic_write(tmp_path / "out") as temporary:
        temporary.write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "keep.txt").write_text("precious")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "keep.txt").read_text() == "precious"


def test_a_folder_takes_the_place_of_its_own_kind_alone(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    for name in ("a.npy", "b.npy", "keep.txt", ".DS_Store"):
        (tmp_path / "folder" / name).write_text("precious")
    for name, message in (("file", "file is a file"), ("folder", "folder also holds keep.txt, so it is not replaced")):
        with pytest.raises(OSError, match=message), atomic_write(tmp_path / name, r".+\.npy"):
            pytest.fail("work began")
    (tmp_path / "folder" / "keep.txt").unlink()
    with atomic_write(tmp_path / "folder", r".+\.npy") as temporary:
        temporary.mkdir()
    assert names(tmp_path / "folder") == [] and (tmp_path / "file").read_text() == "precious"


def test_a_folder_that_cannot_be_replaced_gets_its_name_back(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("old")
    replace = os.replace

    def fails_once(a, b):
        if Path(a).name == "new":
            raise OSError(errno.EIO, "the disk is gone")
        return replace(a, b)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(OSError, match="the disk is gone"), atomic_write(tmp_path / "folder", "a") as temporary:
        temporary.mkdir()
    assert names(tmp_path) == ["folder"] and (tmp_path / "folder" / "a").read_text() == "old"


def test_a_file_that_must_not_be_replaced_stays(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    for link in (os.link, no_links):
        monkeypatch.setattr(os, "link", link)
        with atomic_write(tmp_path / "file", replace=False) as temporary:
            temporary.write_text("old")
        with pytest.raises(FileExistsError), atomic_write(tmp_path / "file", replace=False) as temporary:
            temporary.write_text("new")
        assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"
        (tmp_path / "file").unlink()


def test_a_name_may_be_as_long_as_the_disk_has_it_and_a_longer_one_is_reported_before(tmp_path):
    most = os.pathconf(tmp_path, "PC_NAME_MAX")
    write(tmp_path / ("x" * most))
    for check, given in ((check_file, [tmp_path / "a" / ("é" * most)]), (check_folder, [tmp_path / ("y" * 999) / "b"]),
                         (check_folder, [tmp_path, ["fine", "z" * (most + 1)]])):  # fmt: skip
        with pytest.raises(OSError, match="name") as fault:
            check(*given)
        assert fault.value.errno == errno.ENAMETOOLONG
    assert names(tmp_path) == ["x" * most]


def test_an_unwritable_place_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("precious")
    for check in (check_file, check_folder):
        check(tmp_path / "a" / "b" / "c")
        with pytest.raises(NotADirectoryError, match="file is a file, where a folder is needed"):
            check(tmp_path / "file" / "a" / "b")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        check_folder(tmp_path / "file")

    def refused(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)  # root may write wherever the disk lets it
    for check in (check_file, check_folder):
        with pytest.raises(OSError, match="Read-only file system: give a folder that can be written to"):
            check(tmp_path / "a" / "b")
    assert names(tmp_path) == ["file"]


# --- who else writes there ---


def left_behind(folder, machine, age=0):
    """A temporary folder as a killed writer leaves it, on a machine of some name, `age` seconds ago."""
    left = folder / f"{files.PREFIX}{machine}-{age}.tmp"
    (left / "old").mkdir(parents=True)
    (left / "new").write_text("half")
    (left / "old" / f"lost {machine} {age}").write_text("precious")
    for path in (*left.rglob("*"), left):
        os.utime(path, (time.time() - age,) * 2)
    return left


def test_what_killed_writers_left_is_removed_and_gives_back_what_it_holds(tmp_path):
    long = 2 * files.ABANDONED
    here, old, young = (left_behind(tmp_path, *of) for of in ((files._machine(),), ("other", long), ("other", 60)))
    (tmp_path / ".mine.tmp").mkdir()
    write(tmp_path / "file")
    assert not here.exists() and not old.exists() and young.exists()  # another machine's may be at work
    back = [f"lost {files._machine()} 0", f"lost other {long}"]
    assert names(tmp_path) == sorted([young.name, ".mine.tmp", "file", *back])


WRITER = """
import sys
from pathlib import Path
from refined_ldm.base import files
with files.atomic_write(Path(sys.argv[1])) as temporary:
    temporary.write_text("theirs")
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("container", [False, True])
def test_what_others_write_now_stays_though_no_process_has_their_number(tmp_path, container):
    """The processes of a container have numbers of their own: the other's may be nobody's here, or this process's."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "theirs")]
    if container:
        inside = ["unshare", "--pid", "--fork", "--mount-proc"]
        if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
            pytest.skip("may not make a container")
        command = [*inside, *command]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        write(tmp_path / "ours")
        write(tmp_path / "ours")
        other.stdin.close()
        assert other.wait() == 0
    assert names(tmp_path) == ["ours", "theirs"] and (tmp_path / "theirs").read_text() == "theirs"


def test_without_locks_leftovers_are_removed_by_age(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    young, old = (left_behind(tmp_path, files._machine(), age) for age in (60, 2 * files.ABANDONED))
    write(tmp_path / "file")
    assert young.exists() and not old.exists() and (tmp_path / "file").read_text() == "new"


def test_many_writers_of_one_folder_do_not_disturb_each_other(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write(tmp_path / "shared", str(number)), range(100)))
    assert names(tmp_path) == ["shared"]


def test_a_full_disk_is_named_whichever_library_finds_it(tmp_path):
    (tmp_path / "file").write_text("one")
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[0][1]))  # no file may grow over 1000 bytes
    try:
        for fill in (lambda path: save_file({"a": torch.ones(999)}, path), lambda path: path.write_bytes(bytes(9999))):
            with pytest.raises(OSError, match="what was there before is intact: '.*/file'") as fault:
                with atomic_write(tmp_path / "file") as temporary:
                    fill(temporary)
            assert fault.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "one"


def test_killed_at_any_file_operation_the_old_or_the_new_is_there(tmp_path):
    """A process puts a folder in the place of another and is killed at its first, second, … file operation."""
    found = []
    for number in range(1, 60):
        folder = tmp_path / str(number) / "folder"
        folder.mkdir(parents=True)
        (folder / "whole").write_text("old")
        process = os.fork()
        if not process:
            faults.FileEvents(folder.parent, number, faults.die)()
            with atomic_write(folder, "whole") as temporary:
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
