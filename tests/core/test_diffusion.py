from itertools import pairwise

import numpy as np
import pytest
import torch

from refined_ldm.diffusion import (
    NoiseSchedule,
    add_noise,
    clean_latent,
    ddim_sample,
    ddpm_inversion,
    diffusion_loss,
    dpmpp_sample,
    loss_weight,
    stratified_timesteps,
    to_noise,
)

SCHEDULE = NoiseSchedule.ldm()


def batch(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_schedule_equals_the_published_recursion():
    alpha_bar, kept = [], 1.0
    for beta in np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2:
        alpha_bar.append(kept := kept * (1 - beta))
    np.testing.assert_allclose(SCHEDULE.alpha_bar.numpy(), alpha_bar, rtol=1e-5)


def test_first_step_keeps_the_latent_and_the_last_is_almost_pure_noise():
    z_0 = torch.full((64, 8, 4, 4), 3.0)
    z_t = add_noise(z_0, batch(64, 8, 4, 4), torch.full((64,), 999), SCHEDULE)
    assert z_t.mean().abs() < 0.3 and (z_t.std() - 1).abs() < 0.05
    z_t = add_noise(z_0, batch(64, 8, 4, 4), torch.zeros(64).long(), SCHEDULE)
    assert (z_t.mean() - 3).abs() < 0.01 and z_t.std() < 0.05


def test_unit_variance_stays_unit_variance_at_every_step():
    t = torch.arange(0, 1000, 50).repeat_interleave(50)
    z_t = add_noise(batch(1000, 4, 5, 3), batch(1000, 4, 5, 3, seed=1), t, SCHEDULE)
    assert (z_t.view(20, -1).std(1) - 1).abs().max() < 0.06


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("length", [1, 7, 1000, 1001])
def test_timesteps_fall_from_noise_to_sound_for_every_number_of_steps(spacing, length):
    schedule = NoiseSchedule.ldm(length)
    for steps in range(1, length + 1):
        timesteps = schedule.timesteps(steps, spacing)
        assert len(timesteps) == steps and 0 <= timesteps[-1] and timesteps[0] < length
        assert all(a > b for a, b in pairwise(timesteps))
        assert timesteps[0] == length - 1 or (spacing == "leading" and length - timesteps[0] < length / steps)
        gaps = [a - b for a, b in pairwise(timesteps)]
        assert max(gaps, default=1) - min(gaps, default=1) <= 1  # even


def test_leading_is_audioldms_list_where_that_has_as_many_steps_as_were_asked_for():
    """`make_ddim_timesteps` of AudioLDM, "uniform": a single step begins at the clean end, 1000 leave the schedule."""
    equal = []
    for steps in range(2, 1000):
        theirs = [t + 1 for t in range(0, 1000, 1000 // steps)][::-1]
        ours = SCHEDULE.timesteps(steps, "leading")
        assert len(theirs) >= len(ours) and abs(theirs[0] - ours[0]) < 1000 / steps  # both go to the noisy end
        if len(theirs) == steps:
            equal.append(steps)
            assert ours == theirs
    assert equal == [2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500]


@pytest.mark.parametrize("steps", [3, 7, 60, 150, 300, 334, 501, 600, 667, 999, 1000])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_ddim_comes_near_the_solution_for_every_number_of_steps(steps, spacing):
    variance, (first, last) = 4.0, SCHEDULE.alpha_bar[[0, 999]].tolist()
    exact = ((first * variance + 1 - first) / (last * variance + 1 - last)) ** 0.5
    found = gain(ddim_sample, variance, steps, eta=0.0, spacing=spacing)
    assert abs(found / exact - 1) < 0.01 + 1.5 / steps
    assert abs(gain(dpmpp_sample, variance, steps, spacing=spacing) / exact - 1) < 0.01 + 1.5 / steps


def test_timesteps_known_by_hand_and_refused():
    assert SCHEDULE.timesteps(4) == [999, 749, 499, 249]
    assert SCHEDULE.timesteps(4, "leading") == [751, 501, 251, 1]
    assert SCHEDULE.timesteps(3, "linspace") == [999, 666, 333]
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="sampling steps must be a whole number between 1 and 1000"):
            SCHEDULE.timesteps(steps)
    with pytest.raises(ValueError, match="spacing"):
        SCHEDULE.timesteps(10, "even")


def test_every_parameterization_names_the_same_noise():
    z_0, eps, t = batch(6, 2, 3, 5), batch(6, 2, 3, 5, seed=1), torch.tensor([0, 5, 100, 500, 800, 999])
    z_t, alpha_bar = add_noise(z_0, eps, t, SCHEDULE), SCHEDULE.alpha_bar[t][:, None, None, None]
    predictions = {"eps": eps, "v": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z_0, "x0": z_0}
    for parameterization, prediction in predictions.items():
        found = to_noise(prediction, z_t, t, SCHEDULE, parameterization)
        torch.testing.assert_close(found, eps, atol=2e-4, rtol=1e-4)  # x0 at t = 0 divides by .04
    torch.testing.assert_close(clean_latent(z_t, eps, t, SCHEDULE), z_0, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="eps, v or x0, got 'score'"):
        to_noise(eps, z_t, t, SCHEDULE, "score")


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_weight_turns_the_error_in_eps_into_that_of_the_prediction(parameterization):
    t, z_t = torch.tensor([10, 400, 990]), batch(3, 2, 4, 4)
    prediction, error = batch(3, 2, 4, 4, seed=1), batch(3, 2, 4, 4, seed=2)
    in_eps = to_noise(prediction + error, z_t, t, SCHEDULE, parameterization) - to_noise(
        prediction, z_t, t, SCHEDULE, parameterization
    )
    weighted = loss_weight(t, SCHEDULE, parameterization) * (in_eps**2).flatten(1).mean(1)
    torch.testing.assert_close(weighted, (error**2).flatten(1).mean(1), rtol=1e-2, atol=0)


@pytest.mark.parametrize("count", [1, 3, 16, 64])
def test_stratified_timesteps_take_one_from_every_slice(count):
    t = stratified_timesteps(count, SCHEDULE, torch.Generator().manual_seed(0))
    edges = torch.arange(count + 1) * 1000 / count
    assert t.dtype == torch.int64 and (edges[:-1].floor() <= t.sort().values).all()
    assert (t.sort().values < edges[1:].ceil()).all()
    assert torch.equal(t, stratified_timesteps(count, SCHEDULE, torch.Generator().manual_seed(0)))


def test_loss_of_the_truth_is_zero_of_silence_one_and_weights_count():
    z_0, eps, t = batch(64, 2, 8, 8), batch(64, 2, 8, 8, seed=1), torch.arange(64) * 15
    assert diffusion_loss(lambda z_t, t, c: eps, z_0, None, t, eps, SCHEDULE) == 0
    silent = diffusion_loss(lambda z_t, t, c: torch.zeros_like(z_t), z_0, None, t, eps, SCHEDULE)
    torch.testing.assert_close(silent, (eps**2).mean())
    weight = torch.zeros(64)
    weight[3] = 64.0
    weighted = diffusion_loss(lambda z_t, t, c: torch.zeros_like(z_t), z_0, None, t, eps, SCHEDULE, weight)
    torch.testing.assert_close(weighted, (eps[3] ** 2).mean())


def knows(z_0):
    """The perfect denoiser of a data set with one latent."""

    def denoise(z_t, t, c):
        alpha_bar = SCHEDULE.at(t)
        return (z_t - alpha_bar.sqrt() * z_0) / (1 - alpha_bar).sqrt()

    return denoise


@pytest.mark.parametrize("steps", [2, 7, 50])
def test_samplers_arrive_where_a_perfect_denoiser_points(steps):
    z_0, z_T = batch(3, 2, 6, 4), batch(3, 2, 6, 4, seed=1)
    torch.testing.assert_close(dpmpp_sample(knows(z_0), z_T, None, SCHEDULE, steps), z_0, atol=1e-3, rtol=0)
    for eta in (0.0, 1.0):  # DDIM ends at alpha_bar_0, which holds .04 of noise
        found = ddim_sample(knows(z_0), z_T, None, SCHEDULE, steps, eta, torch.Generator().manual_seed(2))
        assert (found - z_0).abs().max() < 0.25 and (found - z_0).std() < 0.06


def wide(variance):
    """The optimal denoiser of Gaussian data with this variance, whose sampling equation has a closed solution."""

    def denoise(z_t, t, c):
        alpha_bar = SCHEDULE.at(t)
        return (1 - alpha_bar).sqrt() / (alpha_bar * variance + 1 - alpha_bar) * z_t

    return denoise


def gain(sampler, variance, steps, **settings):
    """By how much a sampler multiplies the noise: it is linear for a linear denoiser."""
    return sampler(wide(variance), torch.ones(1, 1, 1, 1), None, SCHEDULE, steps, **settings).item()


def test_samplers_converge_to_the_exact_solution():
    variance, (first, last) = 4.0, SCHEDULE.alpha_bar[[0, 999]].tolist()
    exact = ((first * variance + 1 - first) / (last * variance + 1 - last)) ** 0.5
    error = {n: abs(gain(ddim_sample, variance, n, eta=0.0, spacing="trailing") / exact - 1) for n in (25, 100, 500)}
    assert error[500] < error[100] / 3 < error[25] / 9 and error[500] < 0.01
    assert abs(gain(dpmpp_sample, variance, 25) / exact - 1) < error[25] / 3  # of second order: fewer steps will do


def test_dpmpp_follows_a_clean_latent_that_moves_evenly():
    """If z_0 moves linearly in half the log signal-to-noise ratio, its mean over a step is its value half way."""
    alpha_bar = SCHEDULE.alpha_bar.double()
    moving, seen = 0.5 * (alpha_bar / (1 - alpha_bar)).log(), []

    def denoise(z_t, t, c):
        seen.append(z_t.item())
        return (z_t - SCHEDULE.at(t).sqrt() * moving[t].float()) / (1 - SCHEDULE.at(t)).sqrt()

    timesteps = SCHEDULE.timesteps(5)
    dpmpp_sample(denoise, torch.ones(1, 1, 1, 1), None, SCHEDULE, 5)
    expected = [1.0]
    for k, (now, following) in enumerate(pairwise(timesteps)):
        h = moving[following] - moving[now]
        mean = moving[now] + (h / 2 if k else 0)  # the first step is of first order
        kept = ((1 - alpha_bar[following]) / (1 - alpha_bar[now])).sqrt()
        expected.append((kept * expected[-1] + alpha_bar[following].sqrt() * (1 - torch.exp(-h)) * mean).item())
    assert seen == pytest.approx(expected, abs=1e-4)


def test_ddim_with_eta_1_is_ddpm():
    """Every timestep visited, as in Ho et al. 2020: eq. 7 for mean and variance of z_(t-1) given z_t and z_0."""
    schedule = NoiseSchedule.ldm(steps=10, beta_start=0.05, beta_end=0.5)
    z_0, z_t = batch(3, 1, 4, 4), batch(3, 1, 4, 4, seed=1)

    def denoise(z_t, t, c):
        return (z_t - schedule.at(t).sqrt() * z_0) / (1 - schedule.at(t)).sqrt()

    found = ddim_sample(denoise, z_t, None, schedule, 10, 1.0, torch.Generator().manual_seed(2), spacing="trailing")
    generator = torch.Generator().manual_seed(2)
    for t in range(9, 0, -1):
        now, before = schedule.alpha_bar[t], schedule.alpha_bar[t - 1]
        alpha, beta = now / before, 1 - now / before
        mean = before.sqrt() * beta / (1 - now) * z_0 + alpha.sqrt() * (1 - before) / (1 - now) * z_t
        z_t = mean + ((1 - before) / (1 - now) * beta).sqrt() * torch.randn(z_t.shape, generator=generator)
    torch.testing.assert_close(found, z_t, atol=1e-4, rtol=1e-4)


def test_stochastic_ddim_gives_data_of_the_right_variance():
    z_T = batch(4000, 1, 1, 1)
    found = ddim_sample(wide(4.0), z_T, None, SCHEDULE, 100, eta=1.0, generator=torch.Generator().manual_seed(1))
    assert abs(found.std() - 2) < 0.12
    assert abs(torch.corrcoef(torch.stack([found.flatten(), z_T.flatten()]))[0, 1]) < 0.3  # the start is half forgotten


def test_samplers_are_reproducible_and_report_each_step():
    z_T, calls = batch(2, 2, 4, 4), []

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return ddim_sample(wide(1.0), z_T, None, SCHEDULE, 5, 1.0, generator, on_step=lambda k, n: calls.append((k, n)))

    one = sample(0)
    assert calls == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert torch.equal(one, sample(0)) and not torch.equal(one, sample(1))
    calls.clear()
    dpmpp_sample(wide(1.0), z_T, None, SCHEDULE, 3, on_step=lambda k, n: calls.append(k))
    assert calls == [1, 2, 3]


def test_the_condition_reaches_the_denoiser_with_the_timestep():
    c, seen = torch.arange(2.0), []

    def denoise(z_t, t, condition):
        seen.append((t.tolist(), condition is c))
        return z_t

    dpmpp_sample(denoise, batch(2, 1, 2, 2), c, SCHEDULE, 2)
    ddim_sample(denoise, batch(2, 1, 2, 2), c, SCHEDULE, 2)
    assert seen == [([999, 999], True), ([499, 499], True), ([501, 501], True), ([1, 1], True)]


def test_whole_floats_are_steps_and_other_numbers_are_refused():
    z_T = torch.randn(1, 2, 4, 4)
    for sample in (ddim_sample, dpmpp_sample):
        one, other = (sample(lambda z, t, c: z, z_T, None, SCHEDULE, steps) for steps in (3, 3.0))
        assert torch.equal(one, other)
        for wrong in (0, -1, 2.5, True, float("nan"), "3"):
            with pytest.raises(ValueError, match="sampling steps must be a whole number between 1 and 1000"):
                sample(lambda z, t, c: z, z_T, None, SCHEDULE, wrong)
    assert torch.equal(NoiseSchedule.ldm(10.0).alpha_bar, NoiseSchedule.ldm(10).alpha_bar)


def uncertain(z_t, t, c):
    """A denoiser that is wrong, and depends on everything."""
    return (z_t + 0.3 * z_t.roll(1, 2) + c[:, :, None, None]).tanh() * (1 + t[:, None, None, None] / 1000)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("start", [0, 4, 9])
def test_ddpm_inversion_replays_the_latent_from_any_step_and_another_condition_leads_elsewhere(spacing, start):
    z_0, c = batch(2, 3, 4, 5), batch(2, 3, seed=1)
    generator = torch.Generator().manual_seed(0)
    latents, noises = ddpm_inversion(uncertain, z_0, c, SCHEDULE, 10, generator, spacing)
    settings = {"steps": 10, "eta": 1.0, "spacing": spacing, "start": start, "noises": noises}
    replayed = ddim_sample(uncertain, latents[start], c, SCHEDULE, **settings)
    torch.testing.assert_close(replayed, z_0, atol=1e-3, rtol=0)
    assert (ddim_sample(uncertain, latents[start], c + 1, SCHEDULE, **settings) - z_0).abs().max() > 1e-2


def test_the_latents_of_an_inversion_are_noised_independently():
    z_0 = batch(1, 8, 32, 32)
    latents, _ = ddpm_inversion(uncertain, z_0, batch(1, 8), SCHEDULE, 10, torch.Generator().manual_seed(0))
    timesteps = SCHEDULE.timesteps(10, "trailing")
    alpha_bars = [SCHEDULE.alpha_bar[t] for t in timesteps]
    eps = [((z - a.sqrt() * z_0) / (1 - a).sqrt()).flatten() for z, a in zip(latents, alpha_bars, strict=False)]
    correlation = torch.corrcoef(torch.stack(eps)) - torch.eye(10)
    assert correlation.abs().max() < 0.06 and all(abs(e.std() - 1) < 0.05 for e in eps)


@pytest.mark.parametrize("sampler", [ddim_sample, dpmpp_sample])
def test_a_sampler_started_late_takes_the_last_steps_alone(sampler):
    seen = []

    def denoise(z_t, t, c):
        seen.append(int(t[0]))
        return z_t

    sampler(denoise, batch(1, 2, 3, 4), batch(1, 2), SCHEDULE, 10, spacing="trailing", start=7)
    assert seen == SCHEDULE.timesteps(10, "trailing")[7:]


def test_what_is_done_after_a_step_replaces_its_latent():
    z_0, seen = batch(1, 2, 3, 4), []

    def after_step(z, timestep):
        seen.append(timestep)
        return z_0 if timestep is None else z

    result = dpmpp_sample(uncertain, batch(1, 2, 3, 4, seed=2), batch(1, 2), SCHEDULE, 5, after_step=after_step)
    assert torch.equal(result, z_0) and seen == [*SCHEDULE.timesteps(5, "trailing")[1:], None]


@pytest.mark.parametrize("sampler, settings, message", [
    (ddim_sample, {"eta": -1}, "eta must be between 0 and 1, got -1"),
    (ddim_sample, {"eta": "x"}, "eta must be between 0 and 1, got 'x'"),
    (ddim_sample, {"start": 5}, "start must be a whole number between 0 and 4, got 5"),
    (dpmpp_sample, {"start": -1}, "start must be a whole number between 0 and 4, got -1"),
])  # fmt: skip
def test_settings_that_no_sampler_has_are_refused(sampler, settings, message):
    with pytest.raises(ValueError, match=message):
        sampler(uncertain, batch(1, 2, 3, 4), batch(1, 2), SCHEDULE, 4, **settings)
