import pytest
import torch

from refined_ldm.windows import decode, encode, in_windows, multidiffusion, raised_cosine, vocode
from tests.support import small


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        return small.awake_model(patch)


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
    assert len(seen) == 2 and result[0, 0, 13] == x[0, 0, 13]


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
    monkeypatch.setattr("refined_ldm.windows.VOCODED", 64)
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
