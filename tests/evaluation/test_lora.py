from dataclasses import replace

import numpy as np
import pytest
import torch

from refined_ldm.adapters.lora import GUIDANCE, LoraConfig, save_lora
from refined_ldm.evaluation import lora
from refined_ldm.evaluation.detail_classifier import DetailClassifier
from refined_ldm.evaluation.details import named_details, select_scenes
from refined_ldm.evaluation.lora import BASE, LORA, LOSS, distances, measure_forgetting, measure_gain
from tests.support import small

pytest.importorskip("peft")


def embed(waveform, rate):
    """Mean power in 8 parts of a sound, in place of a network."""
    return waveform.unflatten(1, (8, -1)).square().mean(2)


@pytest.fixture
def model(monkeypatch):
    return small.loud_model(monkeypatch)


def write(path, model, size):
    torch.manual_seed(1)
    loras = model.with_loras()
    matrices = loras.add(2)
    with torch.no_grad():
        for matrix in matrices.values():
            matrix.normal_(std=0.5).mul_(size)
    save_lora(path, matrices, LoraConfig(2), loras.base, model.config.name)
    model.remove_loras()
    return path


def values(rows):
    return {(row["measure"], row["sound"]): row["value"] for row in rows}


def test_a_lora_of_zeros_gains_nothing_and_forgets_nothing(model, tmp_path):
    file, clips, done = write(tmp_path / "zero.safetensors", model, 0), small.clips(10), []
    model.config = replace(model.config, guidance_scale=GUIDANCE)  # that of a model with LoRAs
    found = values(measure_gain(model, file, clips[:5], clips[5:], embed, on_clips=lambda *a: done.append(a)))
    for measure in (lora.FRECHET, lora.KERNEL):
        assert found[measure, LORA] == found[measure, BASE]
        assert found[measure, "recordings trained on"] != found[measure, BASE]
    assert done == [(BASE, 5, 5), (LORA, 5, 5)] and model.loras is None
    rows = measure_forgetting(model, file, select_scenes(2), DetailClassifier.load())
    assert {row["value"] for row in rows if row["sound"] == LOSS} == {0.0}


def test_a_lora_changes_what_is_measured(model, tmp_path):
    file, clips = write(tmp_path / "random.safetensors", model, 1), small.clips(10)
    found = values(measure_gain(model, file, clips[:5], clips[5:], embed))
    assert found[lora.FRECHET, LORA] != found[lora.FRECHET, BASE]


def test_the_loss_is_the_difference_of_the_shares(model, tmp_path, monkeypatch):
    """With a classifier for which the base model is right in everything, and the LoRA in nothing but the class."""
    asked, answers = select_scenes(3), []

    class Answers:
        def __init__(self, right):
            self.found = {"class": np.ones(len(asked))}
            for detail in lora.DETAILS:
                self.found[detail] = np.full(sum(detail in named_details(a.caption) for a in asked), float(right))

        def correct(self):
            return dict(self.found)

    def classifier(*_):
        answers.append(Answers(right=not answers))
        return answers[-1]

    monkeypatch.setattr(lora, "classify_details", classifier)
    rows = measure_forgetting(model, write(tmp_path / "a.safetensors", model, 0), asked, None)
    found = values(rows)
    assert found["number", BASE] == 1 and found["number", LORA] == 0 and found["number", LOSS] == -1
    assert found["class", LOSS] == 0 and -1 < found["all details", LOSS] < 0
    named = np.array([len(named_details(a.caption)) for a in asked])
    assert found["all details", LORA] == pytest.approx((1 / (1 + named)).mean())


def test_a_set_has_no_distance_to_itself_and_one_of_other_clips_has():
    generator = np.random.default_rng(0)
    held_out, other = generator.normal(size=(20, 4)), generator.normal(2, size=(20, 4))
    found = values(distances({"same": held_out, "other": other}, held_out))
    assert abs(found[lora.FRECHET, "same"]) < 1e-9 < 1 < found[lora.FRECHET, "other"]
    assert found[lora.KERNEL, "same"] < found[lora.KERNEL, "other"]
