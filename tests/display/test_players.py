"""Players play the samples they were given, unchanged."""

import base64
import io
import re

import numpy as np
import scipy.io.wavfile

from refined_ldm import display
from tests.support.tones import sine


def test_a_player_plays_the_samples_it_was_given(shown):
    waveform = sine(440) * 0.02  # soft, and soft it must stay
    display.play(waveform, title="a <soft> tone")
    (page,) = [item.data for item in shown]
    rate, data = scipy.io.wavfile.read(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])))
    assert rate == 16_000 and "a &lt;soft&gt; tone" in page
    np.testing.assert_allclose(data / 32767, waveform[0], atol=1e-4)


def test_compare_has_a_picture_and_a_player_for_each(shown):
    figure = display.compare([sine(440)[0], sine(880)[0]], ["low", "high"])
    assert sum(bool(ax.images) for ax in figure.axes) == 2 and shown[0].data.count("<audio") == 2
