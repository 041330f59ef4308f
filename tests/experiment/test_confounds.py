from types import SimpleNamespace

import pytest
import torch

from refined_ldm.diffusion import NoiseSchedule
from refined_ldm.experiment.confounds import ten_ways
from refined_ldm.experiment.protocol import GRID, noise_errors
from tests.support.pretended_device import pretend


class Gaussian:
    """A perfect denoiser of latents with variance 1 (after the scale): eps = sqrt(1 - alpha_bar) z_t."""

    schedule, scale = NoiseSchedule.ldm(), torch.tensor(0.5)
    weight = torch.zeros(3)  # of a caption's embedding

    class clap:
        @staticmethod
        def embed_text(captions):
            return torch.zeros(len(captions), 3)

    def denoise(self, z_t, t, c):
        return (1 - self.schedule.at(t)).sqrt() * z_t + (c @ self.weight)[:, None, None, None]


def data(seed, clips=32):
    return 2 * torch.randn(clips, 2, 8, 4, generator=torch.Generator().manual_seed(seed)), torch.ones(clips, 3)


def test_a_model_that_is_what_it_was_has_another_loss_in_every_way():
    (latents, c), (seen, d) = data(0), data(1)
    rows = ten_ways(Gaussian(), latents, c, seen, d, c, [0.4, 0.7])
    factor = {row["way"].split(".")[0]: row["factor"] for row in rows}
    assert len(rows) == 11 and rows[0]["factor"] == pytest.approx(1)
    assert factor["1"] < 1 < factor["2"] or factor["2"] < 1 < factor["1"]
    assert factor["3"] == factor["4"] == pytest.approx(1)  # this denoiser does not listen
    assert factor["6"] < 0.5 and factor["8"] > 1 and factor["9"] < 1 and factor["10"] < 1


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_on_a_gpu_and_on_a_mac_the_losses_are_those_of_the_cpu(kind):
    (latents, c), (seen, d) = data(0), data(1)
    expected = ten_ways(Gaussian(), latents, c, seen, d, c, [0.4])
    with pretend(kind):
        there = Gaussian()
        there.weight = Gaussian.weight.to(kind)
        there.clap = SimpleNamespace(embed_text=lambda captions: torch.zeros(len(captions), 3, device=kind))
        rows = ten_ways(there, latents.to(kind), c, seen, d, c, [0.4])
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-4)


def test_the_error_of_the_perfect_denoiser_is_as_in_theory():
    latents, c = data(2, 400)
    model = Gaussian()
    errors = noise_errors(model, 0.5 * latents, c).mean(1)
    torch.testing.assert_close(errors, model.schedule.alpha_bar[list(GRID)], rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("factor", [0.8, 1.5])
def test_another_scale_is_noised_as_its_run_would(factor):
    latents, c = data(3, 400)
    rows = ten_ways(Gaussian(), latents, c, latents, c, c, [0.5 * factor])
    every = torch.arange(25, 1000, 50)
    alpha_bar = Gaussian.schedule.alpha_bar[every]
    # the same perfect guess for latents `factor` times as large, which it knows: a^2 f^2 / (a^2 f^2 + s^2)
    expected = (alpha_bar * factor**2 / (alpha_bar * factor**2 + 1 - alpha_bar)).mean()
    assert rows[1]["loss"] == pytest.approx(float(expected), rel=0.03)
