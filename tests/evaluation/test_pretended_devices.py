"""What measures a model, on a GPU and on a Mac that are pretended."""

from dataclasses import replace

import pytest
import torch

from refined_ldm.clap import Clap
from refined_ldm.evaluation.adherence import evaluate_copied, evaluate_generated, fit_probe, rendered_clips
from refined_ldm.evaluation.budget import error_budget
from refined_ldm.evaluation.detail_classifier import ClassifierConfig, DetailClassifier
from refined_ldm.evaluation.details import classify_details, select_scenes, twin_choices
from refined_ldm.evaluation.edits import TASKS
from refined_ldm.evaluation.embeddings.registry import Embedding
from refined_ldm.evaluation.folders import _embed
from refined_ldm.evaluation.metrics import frechet_distance
from tests.support import small
from tests.support.pretended_device import pretend

SMALL = ClassifierConfig((4, 4, 4, 4), 8)
DEVICES = pytest.mark.parametrize("kind", ["cuda", "mps"])
ROBERTA = {"text_tower": "roberta", "tokenizer": "small-roberta", "vocab_size": 50_261, "text_positions": 79}


@DEVICES
def test_conditioners_of_both_kinds(kind):
    waveform, captions = torch.rand(2, 9000) - 0.5, ["a dog barks", "rain"]
    for config in (small.CLAP, replace(small.CLAP, **ROBERTA, int16=True, fill="repeat-pad")):
        clap = Clap(config).eval()
        with torch.no_grad():
            expected = clap(waveform, 48_000, captions)
            with pretend(kind):
                found = [x.cpu() for x in clap.to(kind)(waveform, 48_000, captions)]
        for ours, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, wanted)


@DEVICES
def test_embeddings_probes_and_the_error_budget(kind, monkeypatch, tmp_path):
    model = small.awake_model(monkeypatch, seconds=1.28)
    items = rendered_clips(6, seconds=1.28)
    with pretend(kind), torch.no_grad():
        embed = model.to(kind).clap.embed_audio
        probed = fit_probe(embed, 8, seconds=1.28)
        for result in (evaluate_copied(probed, model, items), evaluate_generated(probed, model, items, steps=2)):
            assert result.embeddings.shape == (6, 12)
        recordings = torch.stack([item["waveform"] for item in items])
        costs = error_budget(model, embed, recordings=recordings)
        assert {cost.way for cost in costs} >= {"vocoder", "vae_griffin_lim_32"}
        assert model.mel.window.device.type == kind  # where it was before
        assert frechet_distance(embed(recordings, 16_000), torch.randn(6, 12)) > 0
        embedder = Embedding("small", "", 16_000, lambda waveform: (embed(waveform, 16_000), None))
        monkeypatch.setattr("refined_ldm.evaluation.folders._load", lambda *given: recordings[:1])
        assert _embed([tmp_path / "a.wav"], tmp_path, embedder, None, lambda: None).stacked().shape == (1, 12)


@pytest.fixture(scope="module")
def scenes():
    return select_scenes(1)[:3]


@DEVICES
def test_the_detail_classifier_answers_as_on_the_cpu(kind, scenes, monkeypatch):
    model, classifier = (small.awake_model(monkeypatch, seconds=2.56), DetailClassifier(SMALL).eval())
    captions, waveforms = [s.caption for s in scenes], torch.stack([s.item["waveform"] for s in scenes])
    expected, choices = classify_details(classifier, waveforms, captions), twin_choices(model.clap, scenes)
    with pretend(kind):
        classifier.to(kind), model.to(kind)
        for place in ("cpu", kind):  # rendered sounds, and those of a model
            found = classify_details(classifier, waveforms.to(place), captions)
            assert found.by_class == expected.by_class and abs(found.logits - expected.logits).max() < 1e-4
        assert twin_choices(model.clap, scenes) == choices


@pytest.mark.parametrize("task", ["edit", "inpaint", "extend", "loop", "variations", "interpolate"])
def test_edits_are_measured_with_a_classifier_on_the_cpu_or_the_device(task, monkeypatch):
    model, classifier = (small.awake_model(monkeypatch, seconds=2.56, steps=2), DetailClassifier(SMALL))
    settings = {"inversion_steps": 2} if task == "edit" else {}
    with pretend("cuda"):
        model.to("cuda")
        rows = TASKS[task](model, classifier.eval(), 1, **settings)
        if task == "loop":
            assert TASKS[task](model, classifier.to("cuda"), 1, **settings) == rows
    assert all(row["task"] == task and row["clips"] >= 1 for row in rows)
