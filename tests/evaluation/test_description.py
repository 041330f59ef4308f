"""What the judge finds in a sound without a caption."""

import numpy as np
import pytest
import torch

from refined_ldm.evaluation.description import SECONDS, UNCOUNTED, describe
from refined_ldm.evaluation.detail_judge import DetailJudge
from refined_ldm.scenes.classes import CLASSES
from refined_ldm.scenes.dataset import SoundScenes


@pytest.fixture(scope="module")
def judge():
    return DetailJudge.load()


def test_rendered_scenes_are_described_by_their_own_events(judge):
    scenes = SoundScenes("test", 12, kinds=("event",))
    found, count = 0, 0
    for scene in scenes:
        (event,), described = scene["events"], describe(judge, scene["waveform"])
        count += len(described)
        for one in (one for one in described if one.name == event.name):
            found, sound = found + 1, CLASSES[event.name]
            assert one.probability > 0.5 and (one.number == "") == (event.count is None)
            assert bool(one.pitch) == bool(sound.low_high) and bool(one.pace) == bool(sound.slow_fast)
    assert found >= 10 and count <= 18  # and little else is


def test_the_second_of_two_pieces_begins_later(judge):
    scene = SoundScenes("test", 1, kinds=("event",))[0]
    once = describe(judge, scene["waveform"])
    twice = describe(judge, scene["waveform"].repeat(2))
    assert len(twice) == 2 * len(once) > 0
    later = [one.second - SECONDS for one in twice[len(once) :]]
    assert later == pytest.approx([one.second for one in once], abs=1e-3)


def test_classes_without_a_count_are_those_that_are_rendered_without_one():
    counts = {name: sound.render(np.random.default_rng(0), 1.0).count for name, sound in CLASSES.items()}
    assert {name for name, count in counts.items() if count is None} == UNCOUNTED


@pytest.mark.parametrize("waveform, message", [
    (torch.zeros(16_000), "silent"), (torch.zeros(0), "must be"), (torch.ones(1, 16_000), "must be"),
])  # fmt: skip
def test_what_cannot_be_judged_is_refused(judge, waveform, message):
    with pytest.raises(ValueError, match=message):
        describe(judge, waveform)
