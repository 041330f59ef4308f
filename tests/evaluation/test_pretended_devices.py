"""What measures a model, on a GPU and on a Mac that are pretended."""

from dataclasses import replace

import pytest
import torch

from refined_ldm.clap import Clap
from refined_ldm.evaluation.adherence import evaluate_copied, evaluate_generated, fit_probe, rendered_clips
from refined_ldm.evaluation.budget import error_budget
from refined_ldm.evaluation.embeddings.registry import Embedding
from refined_ldm.evaluation.folders import _embed
from refined_ldm.evaluation.metrics import frechet_distance
from tests.support import small
from tests.support.pretended_device import pretend

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
def test_judges_probes_and_the_error_budget(kind, monkeypatch, tmp_path):
    model = small.awake_model(monkeypatch, seconds=1.28)
    items = rendered_clips(6, seconds=1.28)
    with pretend(kind), torch.no_grad():
        judge = model.to(kind).clap.embed_audio
        listener = fit_probe(judge, 8, seconds=1.28)
        for result in (evaluate_copied(listener, model, items), evaluate_generated(listener, model, items, steps=2)):
            assert result.embeddings.shape == (6, 12)
        recordings = torch.stack([item["waveform"] for item in items])
        costs = error_budget(model, judge, recordings=recordings)
        assert {cost.way for cost in costs} >= {"vocoder", "vae_griffin_lim_32"}
        assert model.mel.window.device.type == kind  # where it was before
        assert frechet_distance(judge(recordings, 16_000), torch.randn(6, 12)) > 0
        embedder = Embedding("small", "", 16_000, lambda waveform: (judge(waveform, 16_000), None))
        monkeypatch.setattr("refined_ldm.evaluation.folders._load", lambda *given: recordings[:1])
        assert _embed([tmp_path / "a.wav"], tmp_path, embedder, None, lambda: None).stacked().shape == (1, 12)
