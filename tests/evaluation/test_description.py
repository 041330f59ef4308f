"""What the classifier finds in a sound without a caption."""

import numpy as np
import pytest
import torch

from refined_ldm.evaluation.description import SECONDS, UNCOUNTED, describe
from refined_ldm.evaluation.detail_classifier import DetailClassifier
from refined_ldm.scenes.classes import CLASSES
from refined_ldm.scenes.dataset import SoundScenes


@pytest.fixture(scope="module")
def classifier():
    return DetailClassifier.load()


def test_rendered_scenes_are_described_by_their_own_events(classifier):
    scenes = SoundScenes("test", 12, kinds=("event",))
    found, count = 0, 0
    for scene in scenes:
        (event,), described = scene["events"], describe(classifier, scene["waveform"])
        count += len(described)
        for one in (one for one in described if one.name == event.name):
            found, sound = found + 1, CLASSES[event.name]
            assert one.probability > 0.5 and (one.number == "") == (event.count is None)
            assert bool(one.pitch) == bool(sound.low_high) and bool(one.pace) == bool(sound.slow_fast)
    assert found >= 10 and count <= 18  # and little else is


def test_the_second_of_two_pieces_begins_later(classifier):
    scene = SoundScenes("test", 1, kinds=("event",))[0]
    once = describe(classifier, scene["waveform"])
    twice = describe(classifier, scene["waveform"].repeat(2))
    assert len(twice) == 2 * len(once) > 0
    later = [one.second - SECONDS for one in twice[len(once) :]]
    assert later == pytest.approx([one.second for one in once], abs=1e-3)


def test_classes_without_a_count_are_those_that_are_rendered_without_one():
    counts = {name: sound.render(np.random.default_rng(0), 1.0).count for name, sound in CLASSES.items()}
    assert {name for name, count in counts.items() if count is None} == UNCOUNTED


@pytest.mark.parametrize("waveform, message", [
    (torch.zeros(16_000), "silent"), (torch.zeros(0), "must be"), (torch.ones(1, 16_000), "must be"),
])  # fmt: skip
def test_what_cannot_be_described_is_refused(classifier, waveform, message):
    with pytest.raises(ValueError, match=message):
        describe(classifier, waveform)
