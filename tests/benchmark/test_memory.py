"""The memory that docs/gpu.md and the notebooks state is what is counted, and what is counted is right."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from refined_ldm.clap import CLAP_PRESETS
from tests.benchmark import memory
from tests.support import small

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "figures" / "data" / "memory.csv"


def test_the_peak_is_that_of_what_is_alive_at_once():
    def chain():
        x = torch.ones(1000)  # 4 kB
        x = x * 2  # beside its input: 8 kB
        return x[:10].clone() + x.view(10, 100).sum()  # views hold no memory of their own

    assert 8000 <= memory.peak_of(chain) < 8400
    assert memory.peak_of(lambda: [torch.ones(1000) for _ in range(5)]) == 20_000
    weight = torch.ones(1000, requires_grad=True)
    assert 6000 <= memory.peak_of(lambda: (weight[:500] * 2).sum(), grad=True) < 6100  # of the product, of the weight


def test_a_small_model_takes_its_weights_and_more_for_more_sounds(monkeypatch):
    monkeypatch.setitem(CLAP_PRESETS, "tiny-gpt2", small.CLAP)
    found = memory.counted(small.config())
    weights = 4 * sum(p.numel() for p in small.awake_model(monkeypatch).parameters())
    one, sixteen = (found[f"generating {n} at once"] for n in ("1 sound", "16 sounds"))
    assert weights < one < sixteen < weights + 20 * (one - weights)
    plain, again = (found[f"training the U-Net, batch 2{name}"] for name in ("", ", with gradient checkpointing"))
    assert one < again < 1.001 * plain < found["training the U-Net, batch 4"]  # so small a model saves nothing by it


def stored():
    with STORED.open(newline="", encoding="utf-8") as file:
        return {row["work"]: row for row in csv.DictReader(file)}


def test_published_sizes_fit_the_goals():
    paper = {work: float(row["paper"]) for work, row in stored().items()}
    assert paper["generating 1 sound at once"] <= 6 and paper["training the U-Net, batch 2"] <= 15
    assert paper["training the U-Net, batch 2, with gradient checkpointing"] < paper["training the U-Net, batch 2"]


STATED = {
    "02": "generating 1 sound at once", "03": "training the U-Net, batch 4",
    "04": "training the vocoder with its discriminators, batch 4", "05": "generating 16 sounds at once",
    "06": "training the U-Net, batch 4",
}  # fmt: skip


@pytest.mark.parametrize("name", STATED)
def test_the_first_cell_of_a_notebook_states_its_memory(name):
    (path,) = (ROOT / "notebooks").glob(f"{name}_*.ipynb")
    text = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    row = stored()[STATED[name]]
    found = re.search(r"GPU memory:\*\* ([\d.]+) GB at `colab` and ([\d.]+) GB at `paper`", " ".join(text.split()))
    assert found and list(found.groups()) == [row["colab"], row["paper"]]


@pytest.mark.slow
def test_the_stored_table_is_what_the_networks_take():
    assert list(stored().values()) == memory.rows(), "python -m tests.benchmark.memory"
