import math

import pytest
import torch

from refined_ldm import editing
from refined_ldm.audio import save_audio
from refined_ldm.editing import WIDENED, differing_stretch, read_sound
from refined_ldm.long_sounds import FADE
from tests.support import small
from tests.support.tones import sine

RATE = 16_000
FADED = round(FADE * RATE)


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        return small.loud_model(patch)


@pytest.fixture(scope="module")
def sound():
    waveform = small.clips(1)[0]["waveform"]
    return waveform * 0.5 / waveform.abs().max()


@torch.no_grad()
def reconstruction(model, waveform):
    return model.to_waveform(model.decode(model.encode(waveform[None])))[0]


@pytest.mark.parametrize("method", ["sdedit", "inversion"])
def test_strength_0_is_the_sound_through_vae_and_vocoder(model, sound, method):
    edited = model.edit(sound, "rain", 0.0, method)
    torch.testing.assert_close(edited, reconstruction(model, sound), atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"candidates": 3}, {"negative_caption": "wind", "guidance_scale": 3.0}])
def test_strength_1_is_generate(model, sound, settings):
    expected = model.generate(["a dog barks"], seed=4, **settings)[0]
    torch.testing.assert_close(model.edit(sound, "a dog barks", 1.0, seed=4, **settings), expected, atol=1e-5, rtol=0)


def test_an_edit_keeps_less_the_stronger_it_is(model, sound):
    kept = reconstruction(model, sound)
    distances = [(model.edit(sound, "rain", s, steps=10) - kept).norm() for s in (0.1, 0.5, 1.0)]
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_inversion_replays_the_sound_without_guidance_under_the_same_caption(model, sound, strength):
    settings = {"strength": strength, "method": "inversion", "source_caption": "rain", "guidance_scale": 1.0}
    replayed = model.edit(sound, "rain", **settings)
    torch.testing.assert_close(replayed, reconstruction(model, sound), atol=1e-3, rtol=0)
    assert (model.edit(sound, "a dog barks", **settings) - replayed).abs().max() > 1e-3


def localised(model, monkeypatch, first, last):
    """Let the predictions depend on the caption in latent frames `first` to `last` alone, of one window of 24."""

    def denoise(z_t, t, embedding):
        eps = 0.5 * z_t
        eps[:, :, first:last] += embedding[:, :1, None, None]
        return eps

    monkeypatch.setattr(model, "denoise", denoise)
    monkeypatch.setattr(editing, "trained_frames", lambda model: 24)


def test_diffedit_finds_where_the_captions_differ_and_keeps_the_rest(model, monkeypatch):
    waveform = torch.cat([clip["waveform"] for clip in small.clips(3)])  # 24 latent frames of 40 ms
    localised(model, monkeypatch, 9, 14)
    sound = read_sound(model, waveform, None)
    assert differing_stretch(model, sound, "a dog barks", "rain") == ((9 - WIDENED) * 640, (14 + WIDENED) * 640)
    for strength in (0.4, 1.0):
        edited = model.edit(waveform, "a dog barks", strength, "diffedit", "rain", steps=5)
        changed = (edited - waveform).abs() > 0
        assert not changed[: (9 - WIDENED) * 640].any() and not changed[(14 + WIDENED) * 640 :].any()
        assert changed[9 * 640 : 14 * 640].float().mean() > 0.9


@pytest.mark.parametrize("strength", [0.0, 0.6])
def test_diffedit_of_a_whole_sound_is_inversion(model, sound, monkeypatch, strength):
    monkeypatch.setattr(editing, "differing_stretch", lambda *_: (0, len(sound)))
    methods = "diffedit", "inversion"
    edited, inverted = (model.edit(sound, "a dog barks", strength, m, "rain", seed=3, steps=5) for m in methods)
    torch.testing.assert_close(edited, inverted, atol=1e-5, rtol=0)


def test_an_edit_depends_on_seed_and_caption_alone(model, sound):
    one = model.edit(sound, "rain", 0.7, seed=1)
    torch.manual_seed(99)
    assert torch.equal(one, model.edit(sound, "rain", 0.7, seed=1))
    assert not torch.equal(one, model.edit(sound, "rain", 0.7, seed=2))


def test_level_rate_and_channels_are_the_callers(model, sound):
    quiet = model.edit(sound / 4, "rain", 0.7)
    torch.testing.assert_close(quiet, model.edit(sound, "rain", 0.7) / 4, atol=1e-5, rtol=0)
    assert torch.equal(model.edit(torch.stack([sound, sound]), "rain", 0.7), model.edit(sound, "rain", 0.7))
    assert len(model.edit(sound.numpy(), "rain", 0.7, sample_rate=8000)) == 2 * len(sound)
    assert len(model.edit(sound[:999], "rain", 0.7)) == 999
    assert len(model.edit(sound.repeat(5), "rain", 0.7)) == 5 * len(sound)


@pytest.mark.parametrize("start, end", [(0.1, 0.2), (None, 0.1), (0.2, None), (0.1234, 0.1357), (0.0, 0.32)])
def test_outside_the_stretch_the_sound_is_kept_sample_by_sample(model, sound, start, end):
    painted = model.inpaint(sound, "rain", start, end)
    first, last = round((start or 0) * RATE), round((end or 0.32) * RATE)
    assert painted.shape == sound.shape and painted.abs().max() <= 1
    assert torch.equal(painted[:first], sound[:first]) and torch.equal(painted[last:], sound[last:])
    assert (painted - sound)[first:last].abs().max() > 0.05
    if first:  # the cross-fade begins at the sound itself
        assert (painted - sound)[first].abs() < 1e-3
    if last < len(sound):
        assert (painted - sound)[last - 1].abs() < 1e-3


def test_what_is_kept_continues_in_what_is_drawn(model, sound):
    """The same stretch in another sound is redrawn otherwise: the sampler knows what surrounds it."""
    other = small.clips(2)[1]["waveform"]
    stretch = slice(round(0.15 * RATE), round(0.25 * RATE))
    mixed = torch.cat([other[: stretch.start], sound[stretch], other[stretch.stop :]])
    one, two = (model.inpaint(w, "rain", 0.15, 0.25)[stretch] for w in (sound, mixed))
    assert (one - two).abs().max() > 1e-3


def test_outside_the_band_the_spectrum_is_kept(model, sound):
    painted = model.inpaint(sound, "rain", band=(2000, 4000))
    change, hz = torch.fft.rfft(painted - sound).abs(), torch.fft.rfftfreq(len(sound), 1 / RATE)
    outside = (hz < 2000) | (hz > 4000)
    assert change[outside].max() < 1e-4 * change.max() and change.max() > 0.1
    both = model.inpaint(sound, "rain", 0.1, 0.2, band=(2000, 4000))
    assert torch.equal(both[:1600], sound[:1600]) and torch.equal(both[3200:], sound[3200:])


def test_a_continued_sound_begins_with_the_sound_and_joins_without_a_step(model):
    waveform = sine(440, 0.32)[0]
    longer = model.extend(waveform, "rain", 0.5)
    assert len(longer) == len(waveform) + 8000 and torch.equal(longer[: len(waveform)], waveform)
    steps = longer.diff().abs()
    assert steps[len(waveform) - 1] <= steps.max() and longer[len(waveform) :].std() > 1e-4
    assert steps[len(waveform) - 1] < 0.1


def test_super_resolution_draws_above_the_cutoff_alone(model, sound):
    low = sound[::2]
    high = model.super_resolve(low, "rain", sample_rate=8000)
    again = model.super_resolve(low, "rain", 3600, sample_rate=8000)
    assert len(high) == 2 * len(low) and torch.equal(high, again)
    kept = model.inpaint(low, "rain", band=(7900, 8000), sample_rate=8000)  # resampled, and nearly nothing drawn
    change, hz = torch.fft.rfft(high - kept).abs(), torch.fft.rfftfreq(len(high), 1 / RATE)
    assert change[hz < 3600].max() < 1e-4 * change.max()


def test_a_loop_of_a_sound_keeps_its_middle(model, sound):
    looped = model.loop("rain", waveform=sound)
    eighth = len(sound) // 8
    assert torch.equal(looped[eighth:-eighth], sound[eighth:-eighth]) and len(looped) == len(sound)
    assert (looped - sound)[:eighth].abs().max() > 1e-3
    assert (looped[0] - looped[-1]).abs() <= looped.diff().abs().max()


@pytest.mark.parametrize("waveform, message", [
    (torch.zeros(0), "waveform is empty"), (torch.zeros(5120), "waveform is silent"),
    (torch.full((5120,), math.nan), "holds NaN"), (torch.full((5120,), 1.5), r"must lie in \[-1, 1\], its peak is 1.5"),
    (torch.ones(5120, 2), "with 1 to 32 channels"), (torch.ones(1, 1, 5), "must be"), (torch.ones(0, 5), "channels"),
])  # fmt: skip
@pytest.mark.parametrize("function", ["edit", "inpaint", "extend", "super_resolve", "variations"])
def test_unusable_sounds_are_refused(model, function, waveform, message):
    arguments = {"extend": {"caption": "rain", "seconds": 1}, "super_resolve": {"cutoff": 4000}, "variations": {},
                 "inpaint": {"caption": "rain", "start": 0.1}, "edit": {"caption": "rain"}}[function]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        getattr(model, function)(waveform, **arguments)


@pytest.mark.parametrize("call, message", [
    (lambda m, w: m.edit(w, "rain", 1.1), "strength must be between 0 and 1, got 1.1"),
    (lambda m, w: m.edit(w, "rain", math.nan), "strength must be"),
    (lambda m, w: m.edit(w, "rain", "0.5"), "strength must be between 0 and 1, got '0.5'"),
    (lambda m, w: m.variations(w, strength=True), "strength must be between 0 and 1, got True"),
    (lambda m, w: m.inpaint(w, "rain", "0.1"), r"start and end \(s\) must be a finite number, got '0.1'"),
    (lambda m, w: m.inpaint(w, "rain", band=("2000", 4000)), r"band \(Hz\) must be a finite number, got '2000'"),
    (lambda m, w: m.extend(w, "rain", "1"), "seconds must be a finite number, got '1'"),
    (lambda m, w: m.super_resolve(w, "rain", "4000"), "cutoff must be a finite number, got '4000'"),
    (lambda m, w: m.loop("rain", "1"), "seconds must be between .* got '1'"),
    (lambda m, w: m.generate_long("rain", "1"), "seconds must be between 0.01 and 3600, got '1'"),
    (lambda m, w: m.variations(w, strength=-0.1), "strength must be"),
    (lambda m, w: m.edit(w, "rain", method="magic"), "method must be one of sdedit, inversion, diffedit"),
    (lambda m, w: m.edit(w, "rain", method="diffedit", source_caption=" rain"), "source_caption must differ"),
    (lambda m, w: m.edit(w, "rain", source_caption="dog"), "goes with inversion and diffedit, got 'dog' with sdedit"),
    (lambda m, w: m.edit(w, "rain", sample_rate=3), "sample_rate"),
    (lambda m, w: m.inpaint(w, "rain"), "say what to redraw"),
    (lambda m, w: m.inpaint(w, "rain", 0.2, 0.1), "start and end must lie within the sound, 0 to 0.32 s"),
    (lambda m, w: m.inpaint(w, "rain", -0.1, 0.1), "start and end"),
    (lambda m, w: m.inpaint(w, "rain", 0.1, 0.4), "start and end"),
    (lambda m, w: m.inpaint(w, "rain", math.nan, 0.2), "start and end"),
    (lambda m, w: m.inpaint(w, "rain", 0.2, 0.20001), "a sample or more apart: got 0.2, 0.20001"),
    (lambda m, w: m.inpaint(w, "rain", end=1e-9), "a sample or more apart"),
    (lambda m, w: m.inpaint(w, "rain", band=(4000, 2000)), "band must be"),
    (lambda m, w: m.inpaint(w, "rain", band=(4000, 9000)), "band must be"),
    (lambda m, w: m.extend(w, "rain", 0), "seconds, by which"),
    (lambda m, w: m.extend(w, "rain", 1e9), "seconds, by which"),
    (lambda m, w: m.super_resolve(w, "rain", sample_rate=48_000), "a sound of 16000 Hz or more .* give the cutoff"),
    (lambda m, w: m.super_resolve(w, "rain", 9000), "cutoff must be between 0 and 8000"),
    (lambda m, w: m.loop("rain", 1.0, w), "not both"),
    (lambda m, w: m.edit(w, [(0, "rain"), (0.1, "wind")]), "a caption must be a string"),
    (lambda m, w: m.inpaint(w, ["rain", "wind"], 0.1), "a caption must be a string"),
    (lambda m, w: m.loop([(0, "rain"), (1, "wind")], 2.0), "a caption must be a string"),
    (lambda m, w: m.variations(w, [(0, "rain")]), "a caption must be a string"),
    (lambda m, w: m.interpolate(w, w, caption=None), "a caption must be a string"),
    (lambda m, w: m.interpolate("rain", w), "two captions or two sounds"),
    (lambda m, w: m.interpolate(w, w, count=1), "count must be"),
    (lambda m, w: m.variations(w, count=0), "count must be"),
])  # fmt: skip
def test_impossible_wishes_are_refused_before_any_work(model, sound, monkeypatch, call, message):
    monkeypatch.setattr(model, "denoise", None)
    with pytest.raises(ValueError, match=message):
        call(model, sound)


def test_settings_of_another_name_are_refused(model, sound):
    with pytest.raises(TypeError, match="loudness"):
        model.edit(sound, "rain", loudness=3)


def test_what_is_kept_survives_a_wav_file(model, sound, tmp_path):
    """In the file, as in memory: of 16 bits each."""
    one, two = (save_audio(tmp_path / f"{k}.wav", w).read_bytes()[44:]
                for k, w in enumerate((sound, model.inpaint(sound, "rain", 0.2))))  # fmt: skip
    assert one[:6400] == two[:6400] and one != two


@pytest.mark.parametrize("strength, method, counts", [
    (0.5, "sdedit", range(6, 11)), (0.2, "inversion", (*range(1, 11), 9, 10)),
    (0.2, "diffedit", (*range(1, 11), 9, 10)),
])  # fmt: skip
def test_progress_counts_the_steps_that_are_taken(model, sound, strength, method, counts):
    seen = []
    model.edit(sound, "rain", strength, method, steps=10, on_step=lambda *step: seen.append(step))
    assert seen == [(k, 10) for k in counts]
