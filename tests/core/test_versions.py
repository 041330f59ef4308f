"""The same seed gives the same sound on every supported set of versions, within rounding.

`tests/support/sound.npz` was made with the tested set: python -m tests.core.test_versions. CI runs this on the oldest
and the newest set too.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np

from refined_ldm.text_to_audio import RefinedAudioLDM

REFERENCE = Path(__file__).parents[1] / "support" / "sound.npz"
CAPTIONS = ["a dog barks twice"]


def sound():
    """-> (1, 40960) in [-1, 1]"""
    return RefinedAudioLDM.from_preset("tiny").generate(CAPTIONS, steps=10, seed=0).numpy()


def test_the_sound_of_a_seed_is_that_of_the_tested_set():
    kept = np.load(REFERENCE)
    made = sound()
    step = 1 / 32_767  # of the 16 bits that are kept
    difference = np.abs(made - kept["waveform"] * step).max()
    assert difference < 1e-3, f"{difference:.1e} of full scale from torch {kept['torch']}, here {version('torch')}"
    assert np.abs(made).max() > 0.05


if __name__ == "__main__":
    np.savez_compressed(REFERENCE, waveform=np.round(sound() * 32_767).astype(np.int16), torch=version("torch"))
