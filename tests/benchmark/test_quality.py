from types import SimpleNamespace

import numpy as np
import pytest

from tests.benchmark import figures, quality
from tests.support import small


def test_each_way_has_its_evaluations_seconds_and_answers(monkeypatch):
    model = small.awake_model(monkeypatch)
    items = small.clips(18)
    scenes = [SimpleNamespace(item=item, caption=item["caption"]) for item in items]
    right = {"class": np.ones(18), "pitch": np.array([1.0, 0.0]), "distance": np.zeros(18)}
    classified = SimpleNamespace(correct=lambda: right)
    monkeypatch.setattr(quality, "classify_details", lambda classifier, sounds, captions: classified)
    monkeypatch.setattr(quality, "best_of", lambda work: work() is None or 0.5)
    monkeypatch.setattr(quality, "peak_memory", lambda work: 0.1)
    ways = {"guided": {"steps": 3}, "half guided": {"steps": 4, "guidance_interval": (0, 500)},
            "reused": {"steps": 3, "cache_interval": 3}}  # fmt: skip
    monkeypatch.setattr("refined_ldm.adapters.candidates.REDRAWN", 0)
    rows = quality.quality(model, None, lambda sounds: sounds.numpy()[:, :4], scenes, ways, lambda line: None)
    assert [row["evaluations"] for row in rows] == [6, 6, 6] and model.cache_interval == 1
    assert all(row["details"] == pytest.approx(19 / 20) and row["pitch"] == 0.5 for row in rows)
    assert rows[0]["low"] < 0.95 < rows[0]["high"] and rows[0]["clips"] == 18 and "distance" not in rows[0]
    assert rows[0]["frechet"] != rows[2]["frechet"]
    figure = figures.quality_dots(rows)
    assert figure.get_suptitle().startswith("Most details are right with guided") and len(figure.axes[0].texts) == 3
