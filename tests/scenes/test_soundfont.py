import subprocess
import sys
import time

import numpy as np
import pytest

from refined_ldm.scenes import soundfont
from refined_ldm.scenes.procedural import SAMPLE_RATE
from refined_ldm.scenes.soundfont import SoundFont, find_soundfont

pytest.importorskip("pretty_midi", reason="carries the SoundFont")


@pytest.fixture(scope="module")
def font():
    return SoundFont(find_soundfont())


def fundamental(waveform):
    """Frequency in Hz whose harmonics 1..4 hold the most energy."""
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)), 1 << 18))
    candidates = np.arange(100, 1200, 0.25)
    bins = np.rint(np.outer(candidates, (1, 2, 3, 4)) * (1 << 18) / SAMPLE_RATE).astype(int)
    return candidates[np.argmax((spectrum[bins] ** 0.5 * (1, 0.9, 0.8, 0.7)).sum(axis=1))]


@pytest.mark.parametrize("program", [0, 40, 56, 73])  # piano, violin, trumpet, flute
@pytest.mark.parametrize("key", [60, 67.5, 74])
def test_a_note_has_the_pitch_of_its_key(font, program, key):
    waveform = font.note(program, key, 1.0)[1600:14_400]
    cents = 1200 * np.log2(fundamental(waveform) / (440 * 2 ** ((key - 69) / 12)))
    assert abs(cents) < 25  # the recorded players are off by up to this much


def test_a_note_lasts_as_long_as_it_is_held_and_louder_is_louder(font):
    held = font.note(56, 65, 1.5)
    assert np.abs(held[20_000:23_000]).max() > 0.2 * np.abs(held).max()
    released = font.note(56, 65, 0.3)
    assert np.abs(released[10_000:]).max() < 0.02 * np.abs(released).max()
    assert np.abs(font.note(56, 65, 1.5, velocity=60)).max() < 0.5 * np.abs(held).max()


def test_a_note_above_its_sample_does_not_alias(font):
    waveform = font.note(80, 96, 1.0)[1600:14_400]  # a square wave, all of whose partials are known
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    f = np.fft.rfftfreq(len(waveform), 1 / SAMPLE_RATE)
    f0 = f[np.argmax(spectrum)]
    partial = np.abs(f / f0 - np.rint(f / f0)) * f0 < 0.03 * f0
    assert (spectrum[~partial] ** 2).sum() < 1e-3 * (spectrum**2).sum()


def test_vibrato_bends_the_pitch_both_ways(font):
    steady, bent = (font.note(73, 81, 1.0, vibrato=cents)[6400:14_400] for cents in (0, 60))
    width = [(np.abs(np.fft.rfft(w * np.hanning(len(w)))) > 0.1 * len(w) * 0.02).sum() for w in (steady, bent)]
    assert width[1] > width[0]


def test_rendering_is_fast_enough(font):
    keys = np.linspace(50, 80, 40)
    for key in keys:
        font.note(24, key, 0.5)  # the band-limited samples are made once
    start = time.process_time()
    for key in keys:
        font.note(24, key, 0.5)
    assert len(keys) / (time.process_time() - start) > 100  # several hundred on an idle core


@pytest.mark.parametrize("name", ["piano", "guitar", "violin", "flute", "trumpet", "organ", "xylophone", "choir",
                                  "drums", "cymbal", "telephone"])  # fmt: skip
@pytest.mark.parametrize("seconds", [0.4, 2.3])
def test_every_sound_is_finite_audible_and_no_longer_than_asked(name, seconds):
    for seed in range(3):
        sound = getattr(soundfont, name)(np.random.default_rng(seed), seconds)
        assert np.isfinite(sound.waveform).all() and np.abs(sound.waveform).max() > 1e-4
        assert len(sound.waveform) <= round(seconds * SAMPLE_RATE)


def test_a_missing_program_and_a_file_that_is_no_soundfont_are_refused(font, tmp_path):
    with pytest.raises(ValueError, match="no program 5 in bank 77"):
        font.note(5, 60, 1.0, bank=77)
    (tmp_path / "x.sf2").write_bytes(b"RIFF1234WAVEfmt ")
    with pytest.raises(ValueError, match="not a SoundFont 2 file"):
        SoundFont(tmp_path / "x.sf2")


def test_a_missing_font_says_what_to_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match='pip install pretty_midi.*sources="procedural"'):
        find_soundfont()


def test_the_font_is_found_without_importing_pretty_midi():
    code = (
        "import sys; from refined_ldm.scenes import soundfont as s; "
        "s.soundfont(); assert 'pretty_midi' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
