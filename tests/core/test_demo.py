"""The captions of `make demo` come out right: the regression test of what the shipped weights are shown with."""

import re
from pathlib import Path

import pytest

from refined_ldm.evaluation.detail_classifier import DetailClassifier
from refined_ldm.text_to_audio import RefinedAudioLDM
from tests.benchmark.captions import DEMO, right_by_seed


def test_the_demo_has_these_captions():
    recipe = (Path(__file__).parents[2] / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\n")[0]
    assert re.findall(r'"([^"]+)"', recipe) == [str(caption) for caption in DEMO]


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 20), marks=pytest.mark.slow)])
def test_sounds_of_the_demo_are_right_in_every_detail(seeds):
    model, classifier = RefinedAudioLDM.from_preset("tiny"), DetailClassifier.load()
    for caption in DEMO:
        right = right_by_seed(model, classifier, caption, seeds)
        assert right.mean() >= 0.8 or right.sum() >= len(right) - 1, f"{caption}: {right.sum()} of {len(right)}"
