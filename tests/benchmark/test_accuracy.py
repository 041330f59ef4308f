import numpy as np
import pytest
import torch

from refined_ldm.evaluation.adherence import AdherenceResult
from tests.benchmark import accuracy
from tests.support import small


@pytest.fixture
def model(monkeypatch):
    return small.awake_model(monkeypatch)


def test_rounding_is_reported_beside_plain_float32(model):
    generator = torch.Generator().manual_seed(0)
    sounds = 0.1 * torch.randn(2, model.config.samples, generator=generator)
    items = [{"waveform": sound, "caption": caption} for sound, caption in zip(sounds, ("rain", "a bell"), strict=True)]
    ways = {"quick": ("no", False), "half": ("bf16", False)}
    plain, quick, half = accuracy.rounding(model, items, ways)
    assert plain["unet_error"] == plain["mel_l1_change"] == 0 < plain["mel_l1"]
    assert quick["unet_error"] < 1e-5 < half["unet_error"] <= half["unet_error_worst"] < 0.05
    assert abs(quick["mel_l1_change"]) < 1e-3
    assert next(model.unet.parameters()).dtype == torch.float32  # it measured copies


def test_more_steps_come_nearer_to_the_reference(model):
    samplers = {"few": {"steps": 3, "sampler": "ddim"}, "many": {"steps": 40, "sampler": "ddim"},
                "itself": {"steps": 100, "sampler": "ddim", "eta": 1.0}}  # fmt: skip
    rows = {row["sampler"]: row["latent_error"] for row in
            accuracy.against_reference(model, ["rain", "a bell"], samplers, reference_steps=100)}  # fmt: skip
    assert rows["few"] > rows["many"] > rows["itself"] == 0  # without noise of its own


def test_few_steps_are_measured_with_intervals(monkeypatch):
    generator = np.random.default_rng(0)
    made = {3: generator.normal(size=(30, 6)), 9: 5 + generator.normal(size=(30, 6))}

    def measured(probed, model, items, guidance, batch_size, steps):
        return AdherenceResult([{"recall": steps / 9}] * 30, made[steps])

    monkeypatch.setattr(accuracy, "evaluate_generated", measured)
    real, said = generator.normal(size=(30, 6)), []
    samplers = {"a": {"steps": 3}, "b": {"steps": 9}}
    near, far = accuracy.few_steps(None, None, real, [{}] * 30, samplers, on_row=said.append)
    assert near["low"] <= near["frechet"] <= near["high"] < far["low"] and far["recall"] == 1 and near["clips"] == 30
    assert len(said) == 2


def test_the_more_steps_share_deep_features_the_more_changes(model):
    rows = {row["way"]: row for row in accuracy.deep_cache(model, ["rain", "a bell"], 12, (2, 6))}
    assert list(rows) == ["12 steps, DeepCache 2", "12 steps, DeepCache 6", "6 steps", "2 steps"]
    assert 0 < rows["12 steps, DeepCache 2"]["latent_error"] < rows["12 steps, DeepCache 6"]["latent_error"]
    assert model.cache_interval == 1
