import pytest
import torch

from tests.support import small

CAPTIONS = ["a dog barks", "rain falls"]


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        return small.loud_model(patch)


@pytest.mark.parametrize("seconds", [0.32, 0.25])
def test_one_caption_in_one_window_is_generate(model, seconds):
    for settings in ({}, {"negative_caption": "wind", "guidance_scale": 3.0}, {"candidates": 3}):
        expected = model.generate(CAPTIONS[:1], seconds, seed=4, **settings)[0]
        torch.testing.assert_close(model.generate_long(CAPTIONS[0], seconds, seed=4, **settings), expected)


def test_long_sounds_never_denoise_or_decode_more_than_a_window(model, monkeypatch):
    sizes = []
    for part in (model.unet, model.vae.decoder):
        forward = part.forward
        monkeypatch.setattr(part, "forward", lambda z, *a, f=forward: (sizes.append(z.shape), f(z, *a))[1])
    assert model.generate_long(CAPTIONS[0], 2.0, steps=1).shape == (32_000,)
    assert {shape[2] for shape in sizes} == {8} and {shape[0] for shape in sizes} <= {1, 2}


def test_a_caption_changes_its_own_part_alone(model):
    one = model.generate_long([(0, "rain"), (1.6, "rain falls")], 3.2, seed=1, steps=1)
    same = model.generate_long([(0, "rain"), (1.6, "rain falls")], 3.2, seed=1, steps=1)
    assert torch.equal(one, same) and not torch.equal(one, model.generate_long("rain\nrain falls", 3.2, steps=1))


@pytest.mark.parametrize("captions, message", [
    ([(0, "rain"), (0, "wind")], "one after the other"), ([(0, "rain"), (2, "wind"), (1, "fire")], "one after the"),
    ([(1, "rain")], "must begin at 0 s"), ([(0, "rain"), (3.2, "wind")], "before the end at"), ([], "got none"),
    ([(0, "rain"), (float("nan"), "wind")], "one after the other"), (["rain", "wind"], "must be a string or"),
    ([(0, 3)], "must be a string or"),
])  # fmt: skip
def test_captions_that_overlap_or_leave_a_gap_are_refused(model, captions, message):
    with pytest.raises(ValueError, match=message):
        model.generate_long(captions, 3.2)


@pytest.mark.parametrize("settings, message", [
    ({"seconds": 0}, "seconds must be"), ({"seconds": 1e5}, "seconds must be"), ({"steps": 0}, "steps must be"),
    ({"seed": -1}, "seed must be"), ({"candidates": 0}, "candidates must be"),
    ({"guidance_scale": float("inf")}, "guidance_scale must be"),
])  # fmt: skip
def test_impossible_settings_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate_long("rain", **{"seconds": 1.0} | settings)


@pytest.mark.parametrize("seconds, samples", [(None, 5120), (0.4, 6400), (0.97, 15_360), (0.1, 1280)])
def test_a_loop_has_a_whole_number_of_latent_frames_and_no_step_at_its_seam(model, seconds, samples):
    waveform = model.loop(CAPTIONS[1], seconds, seed=2)
    assert waveform.shape == (samples,) and waveform.std() > 1e-4
    steps = waveform.diff().abs()
    assert (waveform[0] - waveform[-1]).abs() <= steps.max()


@pytest.mark.parametrize("seconds", [0.01, 1e9, float("nan")])
def test_loops_of_impossible_lengths_are_refused(model, seconds):
    with pytest.raises(ValueError, match="seconds must be between 0.08 and 3600"):
        model.loop("rain", seconds)
