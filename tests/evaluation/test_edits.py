import numpy as np
import pytest
import torch

from refined_ldm.evaluation import edits
from refined_ldm.evaluation.detail_judge import DetailJudge
from refined_ldm.evaluation.edits import TASKS, counterfactuals, has, jump, row
from refined_ldm.text_to_audio import RefinedAudioLDM

WHOLE = 40_960  # samples of a scene


@pytest.fixture(scope="module")
def judge():
    return DetailJudge.load()


@pytest.fixture(scope="module")
def pairs():
    return counterfactuals(6)


def test_the_judge_tells_a_scene_from_its_counterfactual(judge, pairs):
    assert len({new for _, _, new in pairs}) > 3
    for before, after, new in pairs:
        assert has(judge, after["waveform"], new) and not has(judge, before["waveform"], new)
        assert has(judge, before["waveform"], before["labels"][0])


def test_rows_of_shares_and_of_means():
    assert row("a", "b", "c", [True, True, False, True], 0.5) | {"low": 0, "high": 0} == {
        "task": "a", "method": "b", "strength": 0.5, "measure": "c", "value": 0.75, "low": 0, "high": 0, "clips": 4,
    }  # fmt: skip
    mean = row("a", "b", "c", [1.0, 2.0, 3.0])
    assert mean["value"] == 2 and 1 <= mean["low"] < 2 < mean["high"] <= 3


def test_a_click_is_a_jump(judge):
    model = RefinedAudioLDM.from_preset("tiny")
    waveform = 0.1 * torch.sin(torch.arange(WHOLE) * 0.3)
    smooth = jump(model, waveform, 1.0)
    waveform[16_000:] = 0
    assert jump(model, waveform, 1.0) > 10 * smooth and jump(model, waveform, 2.0) < jump(model, waveform, 1.0)


class Perfect:
    """A model whose every result is the rendered answer."""

    def __init__(self, pairs):
        self.mel = RefinedAudioLDM.from_preset("tiny").mel
        self.answers = {after["caption"]: after["waveform"] for _, after, _ in pairs}

    def generate(self, captions, seed):
        return torch.stack([self.answers[caption] for caption in captions])

    def edit(self, waveform, caption, *arguments, **settings):
        return self.answers[caption]

    inpaint = edit


def test_the_right_answer_scores_as_the_rendered_one_and_the_input_as_nothing(judge, pairs, monkeypatch):
    monkeypatch.setattr(edits, "counterfactuals", lambda count: pairs)
    done = []
    rows = TASKS["edit"](Perfect(pairs), judge, len(pairs), on_clips=lambda *step: done.append(step))
    value = {(r["method"], r["strength"], r["measure"]): r["value"] for r in rows}
    for measure in ("new event", "old event gone", "new and kept", "log-mel L1 of the kept stretch"):
        assert value["SDEdit", 0.6, measure] == value["rendered", None, measure]
    assert value["rendered", None, "new event"] == 1 and value["input unchanged", None, "new event"] == 0
    assert value["rendered", None, "log-mel L1 of the kept stretch"] == pytest.approx(0, abs=1e-3)
    assert done[-1] == ("edit", 6, 6) and np.isfinite([r["value"] for r in rows]).all()
