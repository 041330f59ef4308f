import pytest
import torch

from refined_ldm.scenes.classes import CLASSES
from refined_ldm.scenes.unheard import CAPTION, frogs


def test_a_frog_is_always_the_same_sound_and_no_two_are_alike():
    items = frogs(6)
    assert torch.equal(frogs(2, first=3)[1]["waveform"], items[4]["waveform"])
    for i, item in enumerate(items):
        waveform = item["waveform"]
        assert waveform.shape == (40_960,) and waveform.dtype == torch.float32 and item["caption"] == CAPTION
        assert waveform.abs().max() == pytest.approx(0.5) and abs(float(waveform.mean())) < 1e-3
        assert all(not torch.equal(waveform, other["waveform"]) for other in items[:i])
    assert frogs(1, seconds=1.5)[0]["waveform"].shape == (24_000,)
    with pytest.raises(ValueError, match="count must be a whole number"):
        frogs(0)


def test_no_training_scene_is_a_frog():
    assert not any("frog" in phrase or "croak" in phrase for sound in CLASSES.values() for phrase in sound.phrases)
