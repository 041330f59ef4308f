import pytest
import torch

from refined_ldm.long_sounds import decode, encode, in_windows, multidiffusion, raised_cosine, vocode
from tests.support import small

CAPTIONS = ["a dog barks", "rain falls"]


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        return small.loud_model(patch)


@pytest.mark.parametrize("frames, window, overlap, circular", [
    (8, 8, 4, False), (9, 8, 4, False), (40, 8, 4, False), (41, 8, 1, False), (8, 8, 4, True), (21, 8, 4, True),
])  # fmt: skip
@pytest.mark.parametrize("scale", [1, 3])
def test_what_every_window_agrees_on_is_the_result(frames, window, overlap, circular, scale):
    x, sizes = torch.randn(2, 3, frames, 5), []

    def function(part):
        sizes.append(part.shape[2])
        return 2 * part.repeat_interleave(scale, dim=2)

    result = in_windows(function, x, window, overlap, scale, circular)
    torch.testing.assert_close(result, function(x))
    assert set(sizes[:-1]) == {min(window, frames)}  # never more than a window


def test_one_window_is_the_function_itself_and_windows_differ_smoothly():
    x = torch.randn(1, 1, 8, 1)
    assert in_windows(lambda part: part, x, 8, 4) is x
    counter = iter(range(100))
    steps = in_windows(lambda part: torch.full_like(part, next(counter)), torch.zeros(1, 1, 40, 1), 8, 4)[0, 0, :, 0]
    assert steps.diff().min() >= 0 and steps.diff().max() < 0.5 and (steps[0], steps[-1]) == (0, 8)


def test_windows_without_a_frame_that_is_needed_are_left_out():
    needed, seen = torch.zeros(40, dtype=torch.bool), []
    needed[13] = True
    x = torch.randn(1, 1, 40, 1)
    result = in_windows(lambda part: (seen.append(1), part)[1], x, 8, 4, needed=needed)
    assert len(seen) == 2
    torch.testing.assert_close(result[0, 0, 13], x[0, 0, 13])


def test_one_window_of_multidiffusion_is_the_denoiser_and_captions_have_their_own_frames():
    z, t, c = torch.randn(2, 1, 8, 4), torch.tensor([5, 5]), torch.tensor([[[1.0], [9.0]]]).expand(2, 2, 1)
    assert torch.equal(multidiffusion(lambda z, t, c: z * t[0] + c[:, None, None], 8)(z, t, c), 5 * z + 1)
    regions = torch.arange(40) < 17
    several = multidiffusion(lambda z, t, c: z + c[:, None, None], 8, torch.stack([regions, ~regions]))
    z = torch.randn(2, 1, 40, 4)
    torch.testing.assert_close((several(z, t, c) - z)[0, 0, :, 0], torch.where(regions, 1.0, 9.0))


def test_a_ring_has_no_beginning():
    """Turned by the distance of its windows, a ring is denoised to the same, turned."""

    def denoise(z, t, c):
        return z.cumsum(2)  # depends on the place within the window

    ring, t, c = multidiffusion(denoise, 8, circular=True), torch.tensor([5]), torch.zeros(1, 1, 1)
    z = torch.randn(1, 1, 16, 2)
    torch.testing.assert_close(ring(z.roll(4, 2), t, c), ring(z, t, c).roll(4, 2))
    line = multidiffusion(denoise, 8)
    assert (line(z.roll(4, 2), t, c) - line(z, t, c).roll(4, 2)).abs().max() > 0.1


@torch.no_grad()
def test_encoding_decoding_and_vocoding_of_one_window_are_those_of_the_model(model):
    waveform = small.clips(2)[0]["waveform"][None]
    mel = model.mel(waveform)
    latent = model.encode(waveform)
    assert torch.equal(encode(model, mel), latent)
    assert torch.equal(decode(model, latent, ["a"]), model.decode(latent))
    assert torch.equal(vocode(model, mel, ["a"]), model.to_waveform(mel))


@torch.no_grad()
def test_long_sounds_are_encoded_decoded_and_vocoded_to_their_length(model, monkeypatch):
    monkeypatch.setattr("refined_ldm.long_sounds.VOCODED", 64)
    mel = model.mel(torch.cat([clip["waveform"] for clip in small.clips(6)])[None])  # 6 windows
    latent = encode(model, mel)
    assert latent.shape == (1, 2, 48, 4)
    assert decode(model, latent, ["a"]).shape == mel.shape
    assert vocode(model, mel, ["a"]).shape == (1, 6 * 5120)


def test_a_raised_cosine_is_a_smooth_step():
    x = torch.linspace(-1, 2, 301)
    y = raised_cosine(x)
    assert (y[x <= 0] == 0).all() and (y[x >= 1] == 1).all() and y.diff().min() >= 0
    torch.testing.assert_close(y + raised_cosine(1 - x), torch.ones(301))


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
