"""Our U-Net, VAE and samplers beside those of diffusers, carrying the same random weights."""

import pytest
import torch
from torch import nn

from refined_ldm.diffusion import NoiseSchedule, ddim_sample, dpmpp_sample
from refined_ldm.published.audioldm_names import unet_from_diffusers, vae_from_diffusers
from refined_ldm.published.audioldm_weights import unet_config, vae_config
from refined_ldm.unet import UNet
from refined_ldm.vae import MelVAE, VAEConfig
from refined_ldm.weights import load_into
from tests.benchmark.baselines import diffusers_unet, diffusers_vae
from tests.support.peers import noise, randomised

diffusers = pytest.importorskip("diffusers", reason="diffusers is not here: pip install diffusers")
CLOSE = dict(atol=1e-4, rtol=1e-4)
TIMESTEPS = torch.tensor([7, 801])


def small_unet(**changes):
    widths = (32, 64, 96)
    settings = dict(
        in_channels=4, out_channels=4, block_out_channels=widths, layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=widths, attention_head_dim=tuple(width // 16 for width in widths),  # heads, not their width
        class_embed_type="simple_projection", class_embeddings_concat=True, projection_class_embeddings_input_dim=24,
    )  # fmt: skip
    return diffusers.UNet2DConditionModel(**settings | changes)


def assert_same_unet(theirs, latent, head_channels):
    state = unet_from_diffusers(theirs.state_dict())
    ours = load_into(UNet(unet_config(state, head_channels)), state, "diffusers").eval()
    condition = nn.functional.normalize(noise(2, ours.config.embedding_dim, seed=3))
    with torch.no_grad():
        expected = theirs(latent, TIMESTEPS, encoder_hidden_states=None, class_labels=condition).sample
        torch.testing.assert_close(ours(latent, TIMESTEPS, condition), expected, **CLOSE)
        assert (ours(latent, TIMESTEPS, condition.flip(0)) - expected).abs().max() > 1e-3  # the condition counts
    assert expected.std() > 0.05
    return state, condition, expected


def assert_same_vae(theirs, ours, mel):
    with torch.no_grad():
        expected, found = theirs.encode(mel).latent_dist, ours.encode(mel)
        torch.testing.assert_close(found.mean, expected.mean, **CLOSE)
        torch.testing.assert_close(found.log_var, expected.logvar, **CLOSE)
        torch.testing.assert_close(ours.decode(found.mean), theirs.decode(expected.mean).sample, **CLOSE)
    assert expected.mean.std() > 0.05


@pytest.mark.parametrize("film_dim", [512, 1024])  # LAION-CLAP's, MS-CLAP's
def test_unet_of_published_size(film_dim):
    torch.manual_seed(0)
    assert_same_unet(randomised(diffusers_unet(film_dim), scale=0.01), noise(2, 8, 24, 16), head_channels=32)


@pytest.mark.parametrize("changes", [
    {},
    {"layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
     "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")},
])  # fmt: skip
def test_unet_of_another_shape(changes):
    torch.manual_seed(0)
    latent = noise(2, 4, 20, 8)
    state, condition, expected = assert_same_unet(randomised(small_unet(**changes)), latent, head_channels=16)
    wider_heads = load_into(UNet(unet_config(state, head_channels=32)), state, "diffusers").eval()
    with torch.no_grad():  # their width cannot be read off the tensors, and counts
        assert (wider_heads(latent, TIMESTEPS, condition) - expected).abs().max() > 1e-3


def test_vae_of_published_size():
    torch.manual_seed(0)
    theirs = randomised(diffusers_vae(), scale=0.01)
    state = vae_from_diffusers(theirs.state_dict())
    assert vae_config(state) == VAEConfig()
    assert_same_vae(theirs, load_into(MelVAE(), state, "diffusers").eval(), noise(1, 1, 60, 64))


def test_vae_of_another_shape():
    torch.manual_seed(0)
    theirs = randomised(diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(16, 32, 64), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8,
    ))  # fmt: skip
    state = vae_from_diffusers(theirs.state_dict())
    assert vae_config(state) == VAEConfig(4, 16, (1, 2, 4), 2)
    ours = load_into(MelVAE(VAEConfig(4, 16, (1, 2, 4), 2, norm_groups=8)), state, "diffusers").eval()
    assert_same_vae(theirs, ours, noise(2, 1, 28, 12))


def test_the_sizes_that_are_read_off_the_tensors_are_ours():
    with torch.device("meta"):
        theirs, ours = [diffusers_unet(), diffusers_vae()], [UNet(), MelVAE()]
    states = unet_from_diffusers(theirs[0].state_dict()), vae_from_diffusers(theirs[1].state_dict())
    for state, network in zip(states, ours, strict=True):
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    assert unet_config(states[0]) == UNet().config and vae_config(states[1]) == VAEConfig()


# --- samplers, step by step ---

SCHEDULE = NoiseSchedule.ldm()
PUBLISHED = dict(num_train_timesteps=1000, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")


def toy(z_t, t, c):
    """A denoiser that is neither linear nor the same at every timestep."""
    return torch.tanh(z_t * (1 + t[:, None, None, None] / 500)) + 0.1 * c[:, None, None, None]


def stepwise(scheduler, steps, z_t, c, **settings):
    """Sample with a scheduler of diffusers -> the latent after every step."""
    scheduler.set_timesteps(steps)
    path = []
    for t in scheduler.timesteps:
        eps = toy(z_t, t.repeat(len(z_t)), c)
        extra = {k: v() for k, v in settings.items()}
        z_t = scheduler.step(eps, t, z_t, **extra).prev_sample
        path.append(z_t)
    return path


def seen_by_the_denoiser(sampler, z_T, c, **settings):
    """Sample with ours -> the latent after every step: what the denoiser sees next, and the result."""
    path = []

    def denoise(z_t, t, c):
        path.append(z_t)
        return toy(z_t, t, c)

    result = sampler(denoise, z_T, c, SCHEDULE, **settings)
    return [*path[1:], result]


def assert_same_path(found, expected):
    assert len(found) == len(expected)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda message, k=step: f"step {k}: {message}")


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_of_every_number_of_steps(spacing):
    """diffusers rounds in floating point, which moves a timestep half way between two by one, and may add one below 0.

    Its leading list is cut off at the noisy end where 1000 is no multiple of the steps.
    """
    kind = diffusers.DPMSolverMultistepScheduler if spacing == "linspace" else diffusers.DDIMScheduler
    settings = {"steps_offset": 1, "set_alpha_to_one": False} if spacing == "leading" else {}
    scheduler = kind(**PUBLISHED, timestep_spacing=spacing, **settings)
    for steps in range(2, 1000):
        if spacing == "leading" and 1000 % steps:
            continue
        scheduler.set_timesteps(steps)
        theirs, ours = scheduler.timesteps[:steps], torch.tensor(SCHEDULE.timesteps(steps, spacing))
        assert (theirs - ours).abs().max() <= (spacing != "leading"), steps
        assert (theirs != ours).float().mean() < 0.26, steps


@pytest.mark.parametrize("spacing, offset", [("leading", 1), ("trailing", 0)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50, 200])
def test_ddim_step_by_step(steps, eta, spacing, offset):
    z_T, c = noise(2, 2, 4, 4), torch.tensor([0.5, -0.5])
    scheduler = diffusers.DDIMScheduler(
        **PUBLISHED, clip_sample=False, set_alpha_to_one=False, timestep_spacing=spacing, steps_offset=offset
    )
    theirs, ours = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    expected = stepwise(scheduler, steps, z_T, c, eta=lambda: eta,
                        variance_noise=lambda: torch.randn(z_T.shape, generator=theirs))  # fmt: skip
    found = seen_by_the_denoiser(ddim_sample, z_T, c, steps=steps, eta=eta, generator=ours, spacing=spacing)
    assert_same_path(found, expected)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 10, 25, 100])
def test_dpmpp_step_by_step(steps, spacing):
    z_T, c = noise(2, 2, 4, 4), torch.tensor([0.5, -0.5])
    scheduler = diffusers.DPMSolverMultistepScheduler(**PUBLISHED, timestep_spacing=spacing)
    expected = stepwise(scheduler, steps, z_T, c)
    assert_same_path(seen_by_the_denoiser(dpmpp_sample, z_T, c, steps=steps, spacing=spacing), expected)
