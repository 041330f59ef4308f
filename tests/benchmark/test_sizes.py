import numpy as np

from refined_ldm.text_to_audio import RefinedAudioLDM
from tests.benchmark.figures import cost_curves, ratio_bars
from tests.benchmark.sizes import cost_against_size, exponent
from tests.support import small


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


def test_ratios_are_drawn_beside_their_goals():
    aloud = {"work": "thinking: aloud", "seconds": 1.0}
    resting = {"work": "resting", "peer": "q", "ratio": 1, "goal": None}
    rows = [aloud, aloud | {"peer": "p", "ratio": 2, "goal": 3}, resting]
    (ax,) = ratio_bars(rows).axes
    assert [bar.get_width() for bar in ax.patches] == [2, 1]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["thinking\np", "resting\nq"]
