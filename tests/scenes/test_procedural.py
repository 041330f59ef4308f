import numpy as np
import pytest

from refined_ldm.scenes import procedural
from refined_ldm.scenes.classes import CLASSES, FROM_FONT
from refined_ldm.scenes.synthesis import SAMPLE_RATE, Sound, noise, place, resonate, rhythm, strike, swell, tone

SOUNDS = sorted(set(CLASSES) - FROM_FONT)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", SOUNDS)
@pytest.mark.parametrize("seconds", [0.4, 2.3])
def test_every_sound_is_finite_audible_and_no_longer_than_asked(name, seconds):
    for seed in range(8):
        sound = getattr(procedural, name)(rng(seed), seconds)
        assert isinstance(sound, Sound)
        assert np.isfinite(sound.waveform).all() and np.abs(sound.waveform).max() > 1e-4
        assert len(sound.waveform) <= round(seconds * SAMPLE_RATE)
        assert sound.count is None or sound.count >= 1


@pytest.mark.parametrize("name", SOUNDS)
def test_a_sound_follows_its_seed_and_varies_with_it(name):
    render = getattr(procedural, name)
    first, again, other = (render(rng(seed), 1.5).waveform for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    n = min(len(first), len(other))
    assert not np.allclose(first[:n], other[:n], atol=1e-3)


@pytest.mark.parametrize("name", ["knock", "whistle", "dog", "horn"])
def test_count_is_the_number_of_bursts(name):
    for seed in range(12):
        sound = getattr(procedural, name)(rng(seed), 2.4)
        power = (sound.waveform[: len(sound.waveform) // 160 * 160].reshape(-1, 160) ** 2).mean(axis=1)
        on = np.concatenate([[False], power > 0.01 * power.max()])
        assert (np.diff(on.astype(int)) == 1).sum() == sound.count


def test_tone_has_its_pitch_and_leaves_out_what_would_alias():
    spectrum = np.abs(np.fft.rfft(tone(np.full(SAMPLE_RATE, 3000.0), (1, 1, 1))))
    assert sorted(np.argsort(spectrum)[-2:]) == [3000, 6000]
    assert spectrum[7600:].max() < 1e-3 * spectrum.max()


def test_strike_decays_with_its_time_constant():
    hit = strike(rng(), 1.0, (400,), (0.1,), (1,))
    early, late = (np.abs(hit[int(at * SAMPLE_RATE) :][:800]).max() for at in (0.1, 0.2))
    assert late / early == pytest.approx(np.exp(-1), rel=0.05)


def test_noise_stays_in_its_band():
    power = np.abs(np.fft.rfft(noise(rng(), 4 * SAMPLE_RATE, 1000, 2000))) ** 2
    f = np.fft.rfftfreq(4 * SAMPLE_RATE, 1 / SAMPLE_RATE)
    assert power[(f > 700) & (f < 2500)].sum() > 0.9 * power.sum()


def test_resonance_has_unit_gain_at_its_frequency():
    for frequency in (200, 1000, 5000):
        out = resonate(tone(np.full(SAMPLE_RATE, float(frequency))), frequency, 50)
        assert np.abs(out[-4000:]).max() == pytest.approx(1, rel=0.1)


def test_swell_stays_between_its_limits():
    curve = swell(rng(), SAMPLE_RATE, 5, 0.7)
    assert curve.shape == (SAMPLE_RATE,) and curve.min() >= 0.3 and curve.max() <= 1


def test_rhythm_leaves_room_for_the_last_hit():
    for seed in range(50):
        onsets = rhythm(rng(seed), 2.0, 4.0, 0.3, 1, 6, jitter=0.2)
        assert 1 <= len(onsets) <= 6 and onsets[0] == 0 and onsets[-1] + 0.3 <= 2.0
    assert len(rhythm(rng(), 0.2, 4.0, 0.3, 3, 6)) == 1  # one hit when none would fit


def test_place_cuts_at_the_end_without_a_click():
    total = place([np.ones(SAMPLE_RATE, np.float32)], np.array([0.5]), 1.0)
    assert len(total) == SAMPLE_RATE and total[SAMPLE_RATE // 2] == 1 and total[-1] == 0
