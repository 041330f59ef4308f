"""A figure is written with its table and its provenance."""

import csv
import json
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

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
