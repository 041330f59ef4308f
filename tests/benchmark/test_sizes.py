import shutil

import numpy as np

from refined_ldm.display.figures import ROOT, read_json
from refined_ldm.text_to_audio import RefinedAudioLDM
from tests.benchmark.figures import cost_curves, ratio_dots, redraw
from tests.benchmark.sizes import cost_against_size, exponent
from tests.support import small
from tests.support.pretended_device import pretend


def test_the_exponent_is_that_of_the_larger_half():
    sizes = np.array([1, 2, 4, 8, 16, 32])
    assert abs(exponent(sizes, 3.0 * sizes**2) - 2) < 1e-9
    assert abs(exponent(sizes, 1e3 * np.ones(6)) - 0) < 1e-9
    costs = np.where(sizes < 8, 500.0, 3.0 * sizes**1.5)  # a fixed cost hides the growth of the small ones
    assert abs(exponent(sizes[::-1], costs[::-1]) - 1.5) < 1e-9


def test_every_part_is_measured_at_every_size(monkeypatch):
    small.use_small_clap(monkeypatch)
    model, said = RefinedAudioLDM(small.config(), seed=3).eval(), []
    rows = cost_against_size(said.append, lengths=(0.64, 1.28), batches=(1, 2), widths=(8, 16), model=model)
    assert len(rows) == len(said) == 2 * 3 + 2 * 3 + 2
    assert {(row["against"], row["size"]) for row in rows} == {
        ("length", 0.64), ("length", 1.28), ("batch", 1), ("batch", 2), ("width", 8), ("width", 16)
    }  # fmt: skip
    assert all(row["seconds"] > 0 for row in rows)
    figure = cost_curves(rows)
    assert len(figure.axes) in (3, 6) and figure.axes[0].get_lines()


def test_a_gpu_is_measured_too_and_waited_for(monkeypatch):
    small.use_small_clap(monkeypatch)
    model = RefinedAudioLDM(small.config(), seed=3).eval()
    with pretend("cuda") as gpu:
        model.to("cuda")
        rows = cost_against_size(lambda row: None, lengths=(0.64,), batches=(), widths=(8,), model=model)
        assert [row["part"] for row in rows] == ["U-Net step", "VAE decode", "vocoder", "U-Net step"]
        assert sum(n for place, n in gpu.waits.items() if place.endswith("(synchronize)")) >= 4 * len(rows)


def test_ratios_are_drawn_beside_their_goals():
    aloud = {"work": "thinking: aloud", "seconds": 1.0}
    resting = {"work": "resting", "peer": "q", "ratio": 1, "goal": None}
    rows = [aloud, aloud | {"peer": "p", "ratio": 2, "goal": 3}, resting]
    (ax,) = ratio_dots(rows).axes
    assert ax.collections[0].get_offsets()[:, 0].tolist() == [2, 1]
    assert list(ax.lines[0].get_xdata()) == [3]  # the only goal
    assert [label.get_text() for label in ax.get_yticklabels()] == ["thinking\nagainst p", "resting\nagainst q"]


def test_stored_tables_are_drawn_again_with_the_record_of_their_measuring(tmp_path):
    shutil.copytree(ROOT / "figures" / "data", tmp_path / "data", ignore=lambda folder, names: [
        name for name in names if name not in ("bench.csv", "bench.json", "bench_sizes.csv", "bench_sizes.json")
    ])  # fmt: skip
    before = read_json(tmp_path / "data" / "bench.json")
    table = (tmp_path / "data" / "bench.csv").read_bytes()
    redraw(tmp_path)
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("bench", "bench_sizes"))
    measured = read_json(tmp_path / "data" / "bench.json")["parameters"]["measured"]
    assert measured["seconds"] == before["parameters"].get("measured", before)["seconds"]
    assert (tmp_path / "data" / "bench.csv").read_bytes() == table
