"""Spectrograms show the right place in the right unit."""

import numpy as np
import pytest
import torch

from refined_ldm import display
from refined_ldm.mel import LDM_MEL, MelConfig, MelSpectrogram
from tests.support.tones import sine


@pytest.mark.parametrize("config", [LDM_MEL, MelConfig(22_050, 1024, 256, 80, 0, 8000)], ids=["16k", "22k"])
@pytest.mark.parametrize("hz", [500, 2000, 4000])
def test_a_tone_is_drawn_at_its_tick_and_over_its_seconds(hz, config):
    samples = 64 * config.hop_length
    mel = MelSpectrogram(config)(sine(hz, 1, config.sample_rate)[:, :samples])
    ax = display.plot_mel(mel, config)
    (image,) = ax.images
    brightest = np.asarray(image.get_array()).mean(axis=1).argmax()
    tick = dict(zip([t.get_text() for t in ax.get_yticklabels()], ax.get_yticks(), strict=True))
    assert abs(brightest - tick[f"{hz // 1000}k" if hz >= 1000 else str(hz)]) < 1
    assert image.get_extent()[1] == pytest.approx(samples / config.sample_rate)


def test_decibels_count_from_the_floor():
    mel = torch.full((1, 1, 8, 64), LDM_MEL.floor).log()
    mel[..., 3, 10] += np.log(100.0)
    (image,) = display.plot_mel(mel).images
    values = np.asarray(image.get_array())
    assert values[10, 3] == pytest.approx(40, abs=1e-3) and values[0, 0] == pytest.approx(0, abs=1e-3)


def test_a_batch_shares_one_colour_scale_and_has_no_empty_axes():
    mels = torch.stack([MelSpectrogram()(sine(440) * gain)[0] for gain in (1, 0.1, 0.01)])
    figure = display.plot_mels(mels, ["loud", "soft", "softer"], columns=2)
    drawn = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title(loc="left") for ax in drawn] == ["loud", "soft", "softer"]
    assert len({ax.images[0].get_clim() for ax in drawn}) == 1
    with pytest.raises(ValueError, match="plot_mels draws several"):
        display.plot_mel(mels)


def test_a_stretch_is_framed_at_its_seconds_and_at_the_ticks_of_its_band():
    ax = display.plot_mel(MelSpectrogram()(sine(440))[:, :, :64])
    display.mark_stretch(ax, (0.1, 0.3), (1000, 4000))
    display.mark_stretch(ax, (0.2, 0.4))
    framed, whole = ax.patches
    tick = dict(zip([t.get_text() for t in ax.get_yticklabels()], ax.get_yticks(), strict=True))
    assert (framed.get_x(), framed.get_width()) == pytest.approx((0.1, 0.2))
    assert (framed.get_y(), framed.get_y() + framed.get_height()) == pytest.approx((tick["1k"], tick["4k"]))
    assert (whole.get_y(), whole.get_height()) == (-0.5, 64)
