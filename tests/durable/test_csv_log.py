import csv
import errno
import os
from types import SimpleNamespace

import pytest

from refined_ldm.durable.csv_log import CsvLogger


def step(index, loss=0.5):
    return SimpleNamespace(index=index, lr=0.1, seconds=0.01, losses={"loss": loss, "l1": 2.0})


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_step_is_on_disk_as_soon_as_it_is_reported_in_every_digit(tmp_path):
    with CsvLogger(tmp_path / "curve.csv") as write:
        for index in (1, 2):
            write(step(index, 0.1234567890123))
            assert [row["step"] for row in rows(tmp_path / "curve.csv")] == [str(i) for i in range(1, index + 1)]
    assert rows(tmp_path / "curve.csv")[1] == {"step": "2", "lr": "0.1", "seconds": "0.0100", "loss": "0.123456789",
                                               "l1": "2"}  # fmt: skip


@pytest.mark.parametrize("torn", ["", "4,0.1", "4,0.1,0.0100,0.5,2", "1"])  # the last was to be 10
def test_a_resumed_run_keeps_the_lines_before_it_and_none_that_a_kill_cut(tmp_path, torn):
    path = tmp_path / "curve.csv"
    with CsvLogger(path) as write:
        for index in (1, 2, 3):
            write(step(index, 7.0))
    path.write_text(path.read_text() + torn)
    with CsvLogger(path, resume=True) as write:
        write(step(3, 8.0))
    assert [(row["step"], row["loss"]) for row in rows(path)] == [("1", "7"), ("2", "7"), ("3", "8")]


def test_no_step_no_change(tmp_path):
    (tmp_path / "curve.csv").write_text("as it was")
    with CsvLogger(tmp_path / "curve.csv"):
        pass
    assert (tmp_path / "curve.csv").read_text() == "as it was"


def test_the_lines_before_stay_until_the_file_with_them_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "curve.csv"
    with CsvLogger(path) as write:
        write(step(1))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyError))  # a kill just before
    with pytest.raises(KeyError), CsvLogger(path, resume=True) as write:
        write(step(2))
    assert [row["step"] for row in rows(path)] == ["1"]


def test_a_full_disk_names_the_curve(tmp_path):
    def full(_):
        raise OSError(errno.ENOSPC, "no space")

    with CsvLogger(tmp_path / "curve.csv") as write:
        write(step(1))
        opened, write.__self__.file = write.__self__.file, SimpleNamespace(write=full)
        with pytest.raises(OSError, match="No space left on device: '.*curve.csv'"):
            write(step(2))
        write.__self__.file = opened
