import pytest
import torch

from refined_ldm.variations import slerp
from tests.support import small


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        return small.loud_model(patch)


def test_slerp_keeps_the_norm_and_moves_by_equal_angles():
    a, b = torch.nn.functional.normalize(torch.randn(2, 8, 4).flatten(1)).view(2, 8, 4)
    between = slerp(a, b, torch.linspace(0, 1, 5))
    assert torch.equal(between[0], a) and torch.equal(between[-1], b)
    torch.testing.assert_close(between.flatten(1).norm(dim=1), torch.ones(5))
    cosines = (between[:-1] * between[1:]).flatten(1).sum(1)
    torch.testing.assert_close(cosines, cosines[:1].expand(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.3])), a[None])


def test_captions_are_interpolated_between_the_sounds_that_generate_makes(model):
    ends = [model.generate([caption], seed=3)[0] for caption in ("a dog barks", "rain falls")]
    path = model.interpolate("a dog barks", "rain falls", 3.0, seed=3)
    assert path.shape == (3, 5120)
    torch.testing.assert_close(path[0], ends[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(path[2], ends[1], atol=1e-4, rtol=0)
    assert all((path[1] - end).abs().max() > 1e-3 for end in ends)


def test_sounds_are_interpolated_between_what_edit_makes_of_them(model):
    one, other = (clip["waveform"] for clip in small.clips(2))
    path = model.interpolate(one, other[:4000], 3.0, "rain", 0.6, seed=3)
    assert path.shape == (3, 4000)
    torch.testing.assert_close(path[0], model.edit(one[:4000], "rain", 0.6, seed=3), atol=1e-5, rtol=0)
    assert (path[1] - path[0]).abs().max() > 1e-4 < (path[2] - path[1]).abs().max()


def test_variations_differ_and_are_near_the_sound(model):
    sound = small.clips(1)[0]["waveform"]
    near, far = (model.variations(sound, "rain", 3, strength, seed=1, steps=10) for strength in (0.2, 1.0))
    assert near.shape == (3, 5120)
    kept = model.edit(sound, "rain", 0.0)
    assert ((near - kept).norm(dim=1) < (far - kept).norm(dim=1)).all()
    assert (near[0] - near[1]).abs().max() > 1e-4
    torch.testing.assert_close(near[0], model.edit(sound, "rain", 0.2, seed=1, steps=10), atol=1e-5, rtol=0)
