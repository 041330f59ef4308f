import pytest
import torch

from refined_ldm.linear_denoiser import ConditionalLinearDenoiser, GaussianDenoiser, shrinkage

CHANNELS, BINS, BLOCK = 2, 3, 4
SIZE = CHANNELS * BINS * BLOCK


def correlated(clips, frames=8, seed=0):
    """Latents whose blocks are Gaussian with a known mean and covariance."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(7)) / SIZE**0.5
    mean = torch.linspace(-1, 1, SIZE)
    blocks = mean + torch.randn(clips, frames // BLOCK, SIZE, generator=generator) @ root.T
    latents = blocks.view(clips, frames // BLOCK, CHANNELS, BLOCK, BINS).transpose(1, 2)
    return latents.reshape(clips, CHANNELS, frames, BINS), mean, root @ root.T


def fitted():
    return GaussianDenoiser(CHANNELS, BINS, BLOCK).fit(correlated(4000)[0])


def level(*alpha_bar):
    return torch.tensor(alpha_bar)[:, None, None, None]


def test_fit_finds_mean_and_covariance():
    _, mean, covariance = correlated(1)
    denoiser = fitted()
    torch.testing.assert_close(denoiser.mean, mean, atol=0.06, rtol=0)
    found = denoiser.basis @ denoiser.variance.diag() @ denoiser.basis.T
    torch.testing.assert_close(found, covariance, atol=0.1, rtol=0)


def test_noise_equals_the_formula_with_an_explicit_inverse():
    denoiser, z_t = fitted(), correlated(3, frames=12, seed=1)[0]
    alpha_bar = level(0.9, 0.5, 0.01)
    covariance = (denoiser.basis @ denoiser.variance.diag() @ denoiser.basis.T).double()
    found = denoiser.noise(z_t, alpha_bar)
    assert found.shape == z_t.shape
    for clip in range(3):
        a2 = alpha_bar[clip].item()
        for start in range(0, 12, BLOCK):
            block = z_t[clip, :, start : start + BLOCK].flatten().double()
            inverse = torch.linalg.inv(a2 * covariance + (1 - a2) * torch.eye(SIZE, dtype=torch.float64))
            expected = (1 - a2) ** 0.5 * inverse @ (block - a2**0.5 * denoiser.mean.double())
            here = found[clip, :, start : start + BLOCK].flatten().double()
            torch.testing.assert_close(here, expected, atol=1e-4, rtol=1e-4)


def test_nothing_linear_is_better_and_residual_is_what_is_left():
    denoiser, (z_0, _, _) = fitted(), correlated(8000, seed=2)
    eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(3))
    for alpha_bar in (0.99, 0.7, 0.2):
        z_t = alpha_bar**0.5 * z_0 + (1 - alpha_bar) ** 0.5 * eps
        level_t = torch.full((len(z_t), 1, 1, 1), alpha_bar)
        error = denoiser.noise(z_t, level_t) - eps
        left = (error**2).mean()
        torch.testing.assert_close(left, denoiser.residual(level_t)[0], rtol=0.03, atol=0)
        assert (error * z_t).mean().abs() < 0.02  # the error of the best guess is orthogonal to what was seen
        for gain in (0.9, 1.1):
            assert ((gain * denoiser.noise(z_t, level_t) - eps) ** 2).mean() > left


def test_block_layout_survives_the_way_there_and_back():
    denoiser, z = GaussianDenoiser(CHANNELS, BINS, BLOCK), torch.randn(5, CHANNELS, 20, BINS)
    assert torch.equal(denoiser._from_blocks(denoiser._to_blocks(z), z.shape), z)
    # Unit variance, zero mean: the formula is then the same number for every place, eps = sqrt(1 - alpha_bar) z_t.
    torch.testing.assert_close(denoiser.noise(z, torch.full((5, 1, 1, 1), 0.36)), 0.8 * z)


def likelihood(denoiser, latents):
    """Mean log likelihood of the blocks of latents, up to a constant."""
    left = (denoiser._to_blocks(latents).flatten(0, 1) - denoiser.mean) @ denoiser.basis
    return -(left.square() / denoiser.variance + denoiser.variance.log()).sum(1).mean()


@pytest.mark.parametrize("clips", [1, 3, 12, 15])
def test_few_clips_give_a_covariance_that_is_shrunk(clips):
    """24 blocks or fewer span less than the 24 dimensions: what they do not show is taken for average."""
    few = GaussianDenoiser(CHANNELS, BINS, BLOCK).fit(correlated(clips, seed=5)[0])
    assert few.variance.min() > 0.1
    others = correlated(500, seed=6)[0]
    ignorant = GaussianDenoiser(CHANNELS, BINS, BLOCK)
    ignorant.mean.copy_(few.mean), ignorant.variance.fill_(few.variance.mean())
    assert likelihood(few, others) >= likelihood(ignorant, others) - 1e-3 + (clips > 1)  # what they show helps
    noise = few.noise(others, torch.full((500, 1, 1, 1), 0.5))
    assert noise.isfinite().all() and (few.residual(level(0.999, 0.5)) > 0.01).all()


def test_shrinkage_is_sklearns_for_few_samples_and_vanishes_for_many():
    covariance = pytest.importorskip("sklearn.covariance")
    for count in (2, 10, 24):
        samples = torch.randn(count, 24, generator=torch.Generator().manual_seed(count)).double() * torch.arange(1, 25)
        centred = samples - samples.mean(0)
        found = shrinkage(torch.linalg.eigvalsh(centred.T @ centred / count), count)
        assert found == pytest.approx(covariance.oas(samples.numpy())[1], rel=1e-6)
    assert shrinkage(torch.arange(1.0, 25), 5000) < 1e-3


def test_a_single_block_and_one_that_repeats_are_fitted():
    one = GaussianDenoiser(CHANNELS, BINS, BLOCK).fit(torch.randn(1, CHANNELS, BLOCK, BINS))
    assert (one.variance == 1).all()  # as scaled latents have it
    same = GaussianDenoiser(CHANNELS, BINS, BLOCK).fit(torch.ones(3, CHANNELS, BLOCK, BINS))
    assert same.noise(torch.ones(1, CHANNELS, BLOCK, BINS), level(0.5)).isfinite().all()


def test_misshapen_data_are_refused():
    for shape in ((1, CHANNELS, 7, BINS), (1, CHANNELS, 8, BINS + 1)):
        with pytest.raises(ValueError, match="multiple of 4"):
            fitted().noise(torch.zeros(shape), level(0.5))


# --- around what captions lead to expect ---


def captioned(clips, frames=16, seed=0):
    """Latents whose mean and variance depend on a two-valued embedding: low and steady, or high and restless."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.arange(clips) % 2
    embeddings = torch.stack([which, 1 - which], 1).float()[:, None].repeat(1, 2, 1)  # (N, K = 2, D = 2)
    spread = torch.where(which == 0, 0.3, 1.2)[:, None, None, None]
    noise = torch.randn(clips, CHANNELS, frames, BINS, generator=generator)
    return which[:, None, None, None] * 2.0 - 1 + spread * noise, embeddings


def test_a_caption_gives_the_mean_and_the_variance():
    z, embeddings = captioned(3000)
    denoiser = ConditionalLinearDenoiser(CHANNELS, BINS, 2, 16, slow=4).fit(z, embeddings, ridge=1e-3)
    for row, (mean, spread) in enumerate(((-1.0, 0.3), (1.0, 1.2))):
        expected = torch.full((1, 16, CHANNELS * BINS), mean)
        torch.testing.assert_close(denoiser.conditional_mean(embeddings[row, :1], 16), expected, atol=0.1, rtol=0)
        assert denoiser._variances(embeddings[row, :1], 16).mean().sqrt() == pytest.approx(
            spread, rel=0.3
        )  # shares are kept from zero


def test_captions_bring_the_formula_nearer_to_the_noise():
    z, embeddings = captioned(2000)
    constant = embeddings.mean(0, keepdim=True).expand_as(embeddings)
    conditional, unconditional = (
        ConditionalLinearDenoiser(CHANNELS, BINS, 2, 16, slow=4).fit(z, e) for e in (embeddings, constant)
    )
    new, captions = captioned(1000, seed=5)
    eps = torch.randn(new.shape, generator=torch.Generator().manual_seed(1))
    for alpha_bar in (0.9, 0.5, 0.1):
        here = torch.full((len(new), 1, 1, 1), alpha_bar)
        z_t = alpha_bar**0.5 * new + (1 - alpha_bar) ** 0.5 * eps
        errors = [((d.noise(z_t, here, captions[:, 0]) - eps) ** 2).mean() for d in (conditional, unconditional)]
        assert errors[0] < 0.9 * errors[1]
        torch.testing.assert_close(errors[1], unconditional.residual(here)[0], rtol=0.05, atol=0)


def test_the_caption_formula_equals_an_explicit_inverse():
    z, embeddings = captioned(500)
    denoiser = ConditionalLinearDenoiser(CHANNELS, BINS, 2, 16, slow=4).fit(z, embeddings)
    c, z_t, alpha_bar = embeddings[1, :1], z[1:2], 0.6
    waves, width = denoiser._cosines(16, z).double(), CHANNELS * BINS
    full = torch.kron(waves, denoiser.basis.double())  # (T * CF, T * CF): rows of time, then of channel and bin
    covariance = full @ denoiser._variances(c, 16).double().flatten().diag() @ full.T
    mean = denoiser.conditional_mean(c, 16).double().flatten()
    left = denoiser._to_rows(z_t).double().flatten() - alpha_bar**0.5 * mean
    inverse = torch.linalg.inv(alpha_bar * covariance + (1 - alpha_bar) * torch.eye(16 * width, dtype=torch.double))
    expected = ((1 - alpha_bar) ** 0.5 * inverse @ left).view(1, 16, width).float()
    found = denoiser.noise(z_t, torch.full((1, 1, 1, 1), alpha_bar), c)
    torch.testing.assert_close(denoiser._to_rows(found), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("clips", [1, 3])
def test_the_caption_formula_is_fitted_to_few_clips(clips):
    z, embeddings = captioned(clips)
    denoiser = ConditionalLinearDenoiser(CHANNELS, BINS, 2, 16, slow=4).fit(z, embeddings)
    assert denoiser.variance.min() > 1e-3 and all(value.isfinite().all() for value in denoiser.state_dict().values())
    new, captions = captioned(50, seed=5)
    eps = torch.randn(new.shape, generator=torch.Generator().manual_seed(1))
    for alpha_bar in (0.99, 0.5):
        z_t = alpha_bar**0.5 * new + (1 - alpha_bar) ** 0.5 * eps
        here = torch.full((50, 1, 1, 1), alpha_bar)
        assert denoiser.noise(z_t, here, captions[:, 0]).isfinite().all() and denoiser.residual(here)[0] > 0.01


def test_the_caption_formula_takes_clips_of_any_length_and_refuses_others():
    z, embeddings = captioned(500)
    denoiser = ConditionalLinearDenoiser(CHANNELS, BINS, 2, 16, slow=4).fit(z, embeddings)
    for frames in (2, 8, 40):
        mean = denoiser.conditional_mean(embeddings[1, :1], frames)
        torch.testing.assert_close(mean.mean(), torch.tensor(1.0), atol=0.15, rtol=0)  # as loud at every length
        assert denoiser.noise(torch.randn(1, CHANNELS, frames, BINS), level(0.5), embeddings[1, :1]).isfinite().all()
    with pytest.raises(ValueError, match=r"C \* F = 6"):
        denoiser.noise(torch.zeros(1, CHANNELS, 16, BINS + 1), level(0.5), embeddings[1, :1])
    with pytest.raises(ValueError, match="as many as there are embeddings"):
        denoiser.fit(z[:10], embeddings)
    assert ConditionalLinearDenoiser(CHANNELS, BINS, 2, 8).slow == 8  # no more cosines than frames
