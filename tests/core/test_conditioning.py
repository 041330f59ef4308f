import pytest
import torch

from refined_ldm.conditioning import FiLM, drop_condition, guided_noise


def test_film_equals_the_formula_place_by_place():
    torch.manual_seed(0)
    film, h, condition = FiLM(6, 5), torch.randn(3, 6, 7, 2), torch.randn(3, 5)
    out = film(h, condition)
    assert out.shape == h.shape
    parameters = film.project.weight @ (condition / (1 + torch.exp(-condition))).T + film.project.bias[:, None]
    for clip in range(3):
        for channel in range(6):
            scale, shift = parameters[channel, clip], parameters[6 + channel, clip]
            torch.testing.assert_close(out[clip, channel], h[clip, channel] * (1 + scale) + shift)


def test_film_without_scale_only_shifts():
    torch.manual_seed(0)
    film, h, condition = FiLM(6, 5, scale=False), torch.randn(3, 6, 7, 2), torch.randn(3, 5)
    moved = film(h, condition) - h
    torch.testing.assert_close(moved, moved[:, :, :1, :1].expand_as(moved))  # the same at every place
    torch.testing.assert_close(film(2 * h, condition) - 2 * h, moved)  # whatever the features
    assert moved.std() > 0.1


def test_film_of_zeros_is_the_identity():
    film, h = FiLM(4, 3), torch.randn(2, 4, 5, 5)
    torch.nn.init.zeros_(film.project.weight), torch.nn.init.zeros_(film.project.bias)
    torch.testing.assert_close(film(h, torch.randn(2, 3)), h)


def test_a_film_layer_learns_a_scale_per_condition():
    torch.manual_seed(0)
    film, h, condition = FiLM(2, 8), torch.randn(4, 2, 6, 6), torch.randn(4, 8)
    target = h * torch.tensor([0.5, 2.0, -1.0, 3.0])[:, None, None, None] + 1
    optimizer = torch.optim.Adam(film.parameters(), 0.2)
    for _ in range(80):
        loss = ((film(h, condition) - target) ** 2).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 1e-2


def test_drop_condition_drops_whole_clips_at_its_rate():
    embedding, unconditional = torch.randn(4000, 3), torch.tensor([1.0, 2.0, 3.0])
    out = drop_condition(embedding, unconditional, 0.1, torch.Generator().manual_seed(0))
    dropped = (out == unconditional).all(1)
    assert torch.equal(out[~dropped], embedding[~dropped])
    assert 0.08 < dropped.float().mean() < 0.12
    again = drop_condition(embedding, unconditional, 0.1, torch.Generator().manual_seed(0))
    assert torch.equal(out, again)


def test_drop_condition_at_its_ends():
    embedding, unconditional = torch.randn(5, 3), torch.zeros(3)
    assert torch.equal(drop_condition(embedding, unconditional, 0.0), embedding)
    assert torch.equal(drop_condition(embedding, unconditional, 1.0), torch.zeros(5, 3))
    for probability in (-0.1, 1.1):
        with pytest.raises(ValueError, match="probability"):
            drop_condition(embedding, unconditional, probability)


def record(calls):
    """A denoiser whose answer is the condition's mean at every place; it notes the size of each batch."""

    def denoise(z_t, t, c):
        calls.append(len(z_t))
        assert len(t) == len(c) == len(z_t)
        return z_t + c.mean(1)[:, None, None, None]

    return denoise


@pytest.mark.parametrize("scale, batch", [(0, 3), (1, 3), (2.5, 6), (-1, 6)])
def test_guidance_goes_along_the_line_from_unconditional_to_conditional(scale, batch):
    z_t, t, calls = torch.randn(3, 2, 4, 4), torch.tensor([5, 6, 7]), []
    embedding, unconditional = torch.randn(3, 8), torch.randn(8)
    out = guided_noise(record(calls), z_t, t, embedding, unconditional, scale)
    without, with_caption = z_t + unconditional.mean(), z_t + embedding.mean(1)[:, None, None, None]
    torch.testing.assert_close(out, without + scale * (with_caption - without))
    assert calls == [batch]  # one call, and of half the size where half is enough


@pytest.mark.parametrize("interval, batch", [((0, 4), 3), ((6, 9), 3), ((0, 5), 6), ((5, 5), 6), (None, 6)])
def test_outside_its_interval_there_is_no_guidance(interval, batch):
    z_t, t, calls = torch.randn(3, 2, 4, 4), torch.full((3,), 5), []
    embedding = torch.randn(3, 8)
    out = guided_noise(record(calls), z_t, t, embedding, torch.randn(8), 2.5, interval)
    assert calls == [batch]
    assert torch.equal(out, z_t + embedding.mean(1)[:, None, None, None]) == (batch == 3)


def test_guidance_takes_a_negative_caption_for_each_clip():
    z_t, t = torch.zeros(2, 1, 1, 1), torch.zeros(2).long()
    embedding, negative = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [7.0]])
    out = guided_noise(record([]), z_t, t, embedding, negative, 2.0).flatten()
    assert out.tolist() == [2 * 1 - 3, 2 * 2 - 7]
