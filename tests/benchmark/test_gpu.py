"""What `make gpu` measures, with its sizes turned down, on the CPU."""

import json
import os
import re
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from refined_ldm.devices import pick_precision
from tests.benchmark import gpu
from tests.support.accelerators import forget_accelerators
from tests.support.pretended_device import pretend

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_accelerator_after_another():
    yield
    forget_accelerators()


def test_every_section_runs_on_the_cpu_and_is_written(tmp_path, capsys, monkeypatch):
    slow_machine = {name: (function, 3600) for name, (function, limit) in gpu.SECTIONS.items()}
    monkeypatch.setattr(gpu, "SECTIONS", slow_machine)
    arguments = ["--small", "--device", "cpu", "--seconds", "3600", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "gpu.json").read_text())
    sections = found["sections"]
    assert list(sections) == list(gpu.SECTIONS) and (tmp_path / "gpu_unet.png").stat().st_size > 5000
    assert all(result["rows"] for name, result in sections.items() if name != "notebooks")
    assert [row["met"] for row in sections["resumed"]["rows"]] == [True] * 4
    exact, *_, twice, mel = (row["error"] for row in sections["against_cpu"]["rows"])
    assert exact == twice == mel == 0  # the CPU beside itself
    (trained,) = sections["training"]["rows"]
    assert trained["steps"] == trained["of"] == 8 and (tmp_path / "ldm.safetensors").is_file()
    for row in sections["unet"]["rows"]:
        parts = sum(value for name, value in row.items() if name.endswith(", ms") and name != "whole step, ms")
        assert 0 < row["whole step, ms"] <= parts * 1.05


def test_a_section_that_fails_or_lasts_too_long_does_not_cost_the_others(tmp_path, monkeypatch):
    def fails(m):
        raise torch.OutOfMemoryError("too large")

    def sleeps(m):
        yield {"b": 1}
        assert json.loads((tmp_path / "gpu.json").read_text())["sections"]["sleeps"] == {"rows": [{"b": 1}]}
        try:
            time.sleep(20)
        except Exception:  # noqa: BLE001 as what goes on without a damaged cache
            yield {"b": 2}

    sections = {"fails": (fails, 5), "sleeps": (sleeps, 1), "works": (lambda m: [{"a": 1}], 5)}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    machine = gpu.Machine(torch.device("cpu"), gpu.SMALL, out=tmp_path)
    found = gpu.measure(machine, list(sections), on_line=lambda line: None)["sections"]
    assert "too large" in found["fails"]["failed"] and "stopped after 1 s" in found["sleeps"]["failed"]
    assert found["sleeps"]["rows"] == [{"b": 1}]  # what was measured before is kept
    assert found["works"]["rows"] == [{"a": 1}] and json.loads((tmp_path / "gpu.json").read_text())["sections"] == found
    machine.ends = 0.0
    found = gpu.measure(machine, ["works"], on_line=lambda line: None)["sections"]
    assert found["works"]["failed"] == "OutOfTime: no time was left"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_limit_that_a_destructor_swallows_is_reached_again():
    class Lingers:
        def __del__(self):
            time.sleep(5)

    start = time.monotonic()
    with pytest.raises(gpu.OutOfTime), gpu.time_limit(0.1, again=0.2):
        Lingers()  # what is raised here is dropped
        time.sleep(20)
    assert time.monotonic() - start < 4
    time.sleep(0.3)  # nothing is raised afterwards


def test_notebooks_end_within_their_section_and_their_kernels_find_the_package(tmp_path, monkeypatch):
    seen = []

    def run(command, timeout, env, **_):
        seen.append((command[4], env["PYTHONPATH"].split(os.pathsep)[0]))
        assert timeout <= 28
        if command[4] == "03":
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=int(command[4] == "02"), stderr="a warning\n02_x stopped at cell 3\n")

    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setitem(gpu.SECTIONS, "notebooks", (gpu.notebooks, 30))
    machine = gpu.Machine(torch.device("cpu"), replace(gpu.SMALL, notebooks=("01", "02", "03")), out=tmp_path)
    rows = gpu.measure(machine, ["notebooks"], on_line=lambda line: None)["sections"]["notebooks"]["rows"]
    assert [row["ended"] for row in rows] == ["ran", "02_x stopped at cell 3", "did not end in time"]
    assert seen == [(name, str(ROOT)) for name in ("01", "02", "03")]


@pytest.mark.slow
def test_every_section_runs_on_a_pretended_gpu(tmp_path, monkeypatch):
    """But for what is not pretended: pinned memory and CUDA graphs."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(gpu, "graphed", lambda module, *inputs: module)
    monkeypatch.setattr(gpu, "SECTIONS", {name: (function, 3600) for name, (function, _) in gpu.SECTIONS.items()})
    pick_precision.cache_clear()
    with pretend("cuda") as device:
        machine = gpu.Machine(torch.device("cuda"), gpu.SMALL, time.monotonic() + 3600, tmp_path)
        sections = gpu.measure(machine, list(gpu.SECTIONS))["sections"]
    pick_precision.cache_clear()
    assert not device.faults and not [result["failed"] for result in sections.values() if "failed" in result]
    assert all(row["met"] for name in ("against_cpu", "resumed") for row in sections[name]["rows"])
    assert [row["precision"] for row in sections["half_precision"]["rows"]] == ["no", "bf16", "fp16"]


@pytest.mark.slow
def test_a_notebook_runs_by_papermill(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    machine = gpu.Machine(torch.device("cpu"), replace(gpu.SMALL, notebooks=("01",)), time.monotonic() + 1800, tmp_path)
    (row,) = gpu.notebooks(machine)
    assert row["ended"] == "ran", row


def test_the_training_is_that_of_the_shipped_weights_and_fits_the_time(tmp_path, monkeypatch):
    config = gpu.Sizes().details(tmp_path)
    assert config.start_from and config.training["ldm"].max_steps > 1000 and (ROOT / config.start_from).is_dir()
    slow = SimpleNamespace(median=lambda seconds: 100.0, mean=statistics.mean)
    monkeypatch.setattr(gpu, "statistics", slow), monkeypatch.setattr(gpu, "SAVED", 0)
    machine = gpu.Machine(torch.device("cpu"), gpu.SMALL, time.monotonic() + 500, tmp_path)
    found = gpu.measure(machine, ["training"], on_line=lambda line: None)["sections"]["training"]
    assert "failed" not in found and 2 <= found["rows"][0]["steps"] <= 4 < found["rows"][0]["of"]
    assert (tmp_path / "ldm.safetensors").is_file()


def test_the_page_has_a_place_for_every_section():
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- gpu_(\w+) -->", page) == ["machine", *gpu.SECTIONS]
