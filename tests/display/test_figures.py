"""A figure is written with its table and its provenance."""

import csv
import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import refined_ldm
from refined_ldm import display


def test_a_figure_is_written_with_its_table_and_its_origin(tmp_path):
    pandas = pytest.importorskip("pandas")
    figure = plt.figure()
    columns = {"t": [1, 2], "loss": torch.tensor([0.5, 0.25])}
    for table in (columns, pandas.DataFrame({k: np.array(v) for k, v in columns.items()})):
        display.save_figure(figure, "01_x", table, {"seed": 3}, time.perf_counter(), folder=tmp_path)
        with open(tmp_path / "data" / "01_x.csv") as file:
            assert list(csv.reader(file)) == [["t", "loss"], ["1", "0.5"], ["2", "0.25"]]
    origin = json.loads((tmp_path / "data" / "01_x.json").read_text())
    assert origin["parameters"] == {"seed": 3} and origin["seconds"] < 60 and origin["versions"]["torch"]
    assert {path.name for path in tmp_path.rglob("*")} == {"01_x.png", "data", "01_x.csv", "01_x.json"}


def test_a_gpu_is_named_only_where_it_was_used(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    for used, named in ((False, "CPU, "), (True, "a GPU")):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        display.save_figure(plt.figure(), "01_x", folder=tmp_path)
        assert json.loads((tmp_path / "data" / "01_x.json").read_text())["device"].startswith(named)


def test_a_figure_takes_the_place_of_no_folder(tmp_path):
    figure, _ = plt.subplots()
    for place in ("a.png", "data/a.csv", "data/a.json"):
        folder = tmp_path / place.replace("/", "-")
        (folder / place).mkdir(parents=True)
        with pytest.raises(IsADirectoryError, match="is a folder, so it is not replaced"):
            display.save_figure(figure, "a", [{"x": 1}], folder=folder)
        assert (folder / place).is_dir()


def test_stored_figures_are_the_repositorys_or_the_wheels(tmp_path, monkeypatch):
    assert (display.stored_figures() / "data" / "experiment" / "A-1500-0.csv").is_file()
    assert (display.stored_figures() / "claims.yaml").is_file()
    monkeypatch.setattr("refined_ldm.display.figures.REPOSITORY", None)  # as in a wheel
    monkeypatch.chdir(tmp_path)
    assert display.stored_figures() == Path(refined_ldm.__file__).parent / "figures"
    assert display.in_project("runs/experiment") == tmp_path / "runs" / "experiment"
    assert display.in_project(tmp_path / "other") == tmp_path / "other"
