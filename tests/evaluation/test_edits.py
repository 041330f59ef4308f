import numpy as np
import pytest
import torch

from refined_ldm.evaluation import edits
from refined_ldm.evaluation.detail_classifier import DetailClassifier
from refined_ldm.evaluation.edits import CUTOFF, TASKS, counterfactuals, has, jump, overlap, row
from refined_ldm.text_to_audio import RefinedAudioLDM

WHOLE = 40_960  # samples of a scene


@pytest.fixture(scope="module")
def classifier():
    return DetailClassifier.load()


@pytest.fixture(scope="module")
def pairs():
    return counterfactuals(6)


def test_the_classifier_tells_a_scene_from_its_counterfactual(classifier, pairs):
    assert len({new for _, _, new in pairs}) > 3
    for before, after, new in pairs:
        assert has(classifier, after["waveform"], new) and not has(classifier, before["waveform"], new)
        assert has(classifier, before["waveform"], before["labels"][0])


def test_overlaps():
    assert overlap((0, 4), (0, 4)) == 1 and overlap((0, 4), (4, 8)) == 0 == overlap((0, 1), (3, 4))
    assert overlap((0, 4), (2, 6)) == pytest.approx(1 / 3) == overlap((2, 6), (0, 4))


def test_rows_of_shares_and_of_means():
    assert row("a", "b", "c", [True, True, False, True], 0.5) | {"low": 0, "high": 0} == {
        "task": "a", "method": "b", "strength": 0.5, "measure": "c", "value": 0.75, "low": 0, "high": 0, "clips": 4,
    }  # fmt: skip
    mean = row("a", "b", "c", [1.0, 2.0, 3.0])
    assert mean["value"] == 2 and 1 <= mean["low"] < 2 < mean["high"] <= 3


def test_a_click_is_a_jump(classifier):
    model = RefinedAudioLDM.from_preset("tiny")
    waveform = 0.1 * torch.sin(torch.arange(WHOLE) * 0.3)
    smooth = jump(model, waveform, 1.0)
    waveform[16_000:] = 0
    assert jump(model, waveform, 1.0) > 10 * smooth and jump(model, waveform, 2.0) < jump(model, waveform, 1.0)


class Perfect:
    """A model whose every result is the rendered answer."""

    device = torch.device("cpu")

    def __init__(self, pairs):
        whole = RefinedAudioLDM.from_preset("tiny")
        self.mel, self.config = whole.mel, whole.config
        self.answers = {after["caption"]: after["waveform"] for _, after, _ in pairs}

    def generate(self, captions, seed):
        return torch.stack([self.answers[caption] for caption in captions])

    def edit(self, waveform, caption, *arguments, **settings):
        return self.answers[caption]

    inpaint = edit


class Trivial:
    """A model that returns its input, repeats it, or makes silence with a click in it."""

    config, device = RefinedAudioLDM.from_preset("tiny").config, torch.device("cpu")

    def __init__(self):
        self.mel = RefinedAudioLDM.from_preset("tiny").mel

    def generate(self, captions, seed):
        return torch.zeros(len(captions), WHOLE).index_fill_(1, torch.tensor([0]), 0.5)

    def loop(self, caption, seed):
        return self.generate([caption], seed)[0]

    def extend(self, waveform, caption, seconds, seed):
        return waveform.repeat(2)

    def inpaint(self, waveform, *arguments, **settings):
        return waveform

    super_resolve = inpaint

    def variations(self, waveform, caption, seed):
        return waveform.expand(4, -1)

    def interpolate(self, one, other, seed):
        one, other = (self.generate([x], 0)[0] if isinstance(x, str) else x for x in (one, other))
        return torch.stack([one, one, one, other, other])


def of(task, classifier, count=2):
    """{(method, measure): value} of a task that is measured with `Trivial`."""
    return {(r["method"], r["measure"]): r["value"] for r in TASKS[task](Trivial(), classifier, count)}


def test_an_unchanged_gap_is_outside_the_mask_itself_and_lacks_the_event(classifier):
    value = of("inpaint", classifier)
    for measure in ("missing event", "largest difference outside the mask", "log-mel jump at the seam"):
        assert value["inpainting", measure] == value["input unchanged", measure]
    assert value["inpainting", "missing event"] == 0 == value["inpainting", "largest difference outside the mask"]
    assert (
        value["rendered", "missing event"] == 1 and value["caption alone", "largest difference outside the mask"] > 0.1
    )


def test_a_repeated_sound_goes_on_and_silence_with_a_click_joins_badly(classifier):
    value = of("extend", classifier)
    assert value["extend", "same class in the new half"] == value["input repeated", "same class in the new half"] > 0
    assert value["caption alone", "log-mel jump at the join"] > value["input repeated", "log-mel jump at the join"]


def test_a_click_at_a_loops_seam_is_a_larger_step_than_those_within(classifier):
    value = of("loop", classifier)
    assert value["loop", "log-mel jump at the seam"] > 0
    assert value["loop", "step at the seam no larger than those within"] == 1  # the click itself is within
    turned = Trivial().loop("", 0).roll(WHOLE // 2)
    assert value["loop", "log-mel jump at the seam"] == pytest.approx(jump(Trivial(), turned, WHOLE / 2 / 16_000))


def test_a_sound_without_high_frequencies_lacks_them_and_is_unchanged_below(classifier):
    value = of("upsample", classifier)
    above, below = f"log-mel L1 above {CUTOFF} Hz", f"relative change below {CUTOFF} Hz"
    assert value["rendered", above] == 0 < value["input unchanged", above] == value["super-resolution", above]
    assert value["rendered", below] < 1e-3 > value["super-resolution", below] < value["caption alone", below]


def test_variations_that_are_the_sound_itself_are_near_and_alike(classifier):
    value = of("variations", classifier)
    for measure in ("same class", "log-mel L1 to the sound", "log-mel L1 between two"):
        assert value["variations", measure] == value["input unchanged", measure]
    assert value["variations", "same class"] == 1 and value["variations", "log-mel L1 between two"] == 0
    assert value["caption alone", "log-mel L1 to the sound"] > 1 > value["variations", "log-mel L1 to the sound"]


def test_a_leap_from_one_sound_to_the_other_has_the_ends_and_one_step_of_four(classifier):
    value = of("interpolate", classifier, 3)
    assert value["sounds", "class of each end"] == value["sounds, mixed", "class of each end"] == 1
    assert value["captions", "class of each end"] < 1
    assert value["sounds", "steps towards the other class"] == 0.25
    assert value["sounds, mixed", "steps towards the other class"] > 0.7


def test_the_right_answer_scores_as_the_rendered_one_and_the_input_as_nothing(classifier, pairs, monkeypatch):
    monkeypatch.setattr(edits, "counterfactuals", lambda count: pairs)
    monkeypatch.setattr(edits, "differing_stretch", lambda model, sound, *_: (0, len(sound.waveform)))
    done = []
    rows = TASKS["edit"](Perfect(pairs), classifier, len(pairs), on_clips=lambda *step: done.append(step))
    value = {(r["method"], r["strength"], r["measure"]): r["value"] for r in rows}
    for measure in ("new event", "old event gone", "new and kept", "log-mel L1 of the kept stretch"):
        assert value["SDEdit", 0.6, measure] == value["rendered", None, measure]
    assert value["rendered", None, "new event"] == 1 and value["input unchanged", None, "new event"] == 0
    assert value["rendered", None, "log-mel L1 of the kept stretch"] == pytest.approx(0, abs=1e-3)
    assert 0.2 < value["DiffEdit", 0.9, "overlap of its stretch with the exchanged events"] < 0.8
    assert done[-1] == ("edit", 6, 6) and np.isfinite([r["value"] for r in rows]).all()
