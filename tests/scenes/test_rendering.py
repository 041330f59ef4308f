"""A change of rendered sounds or captions must come with a new `RENDERING`, on which caches of scenes depend."""

import json
from pathlib import Path

import pytest
import torch

from refined_ldm.scenes.dataset import RENDERING, SPLIT_KINDS, SoundScenes

STORED = json.loads((Path(__file__).parents[1] / "support" / "renderings.json").read_text())


@pytest.mark.parametrize("split", SPLIT_KINDS)
def test_scenes_equal_those_stored_for_this_rendering(split):
    assert STORED["rendering"] == RENDERING, "store the captions and levels of the new rendering in renderings.json"
    dataset = SoundScenes(split, size=3)
    for i in range(3):
        item = dataset[i]
        stored, waveform = STORED["scenes"][item["id"]], item["waveform"].double()
        assert list(item["captions"]) == stored["captions"], "raise RENDERING"
        quarters = torch.stack([part.pow(2).mean().sqrt() for part in waveform.chunk(4)])  # rms of each quarter
        levels = torch.cat([quarters, waveform.aminmax().min[None], waveform.aminmax().max[None]])
        assert levels.tolist() == pytest.approx([*stored["rms"], *stored["range"]], abs=1e-4), "raise RENDERING"
