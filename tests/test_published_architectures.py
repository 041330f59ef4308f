"""Our networks and samplers beside diffusers' and AudioLDM's own, carrying the same random weights at a small size.

Both are optional (`pip install diffusers`, `pip install --no-deps audioldm einops`); what is missing is not tested.
"""

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from refined_ldm.checkpoints import load_into
from refined_ldm.diffusion import NoiseSchedule, ddim_sample, dpmpp_sample
from refined_ldm.hifigan import HiFiGAN, HiFiGANConfig
from refined_ldm.published_ldm import audioldm_parts, unet_config, unet_from_diffusers, vae_config, vae_from_diffusers
from refined_ldm.unet import UNet
from refined_ldm.vae import MelVAE, VAEConfig


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def audioldm():
    """AudioLDM's package without what its own __init__ imports."""
    found = importlib.util.find_spec("audioldm")
    if found is None or importlib.util.find_spec("einops") is None:
        pytest.skip("audioldm is not installed")
    package = types.ModuleType("audioldm")
    package.__path__ = list(found.submodule_search_locations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "audioldm", package)
        patch.setitem(sys.modules, "audioldm.utils", types.SimpleNamespace(instantiate_from_config=None))
        yield package


def randomised(module, seed=0):
    """No weight is zero or one any more, so that every tensor has to be in its place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return module.eval()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CONDITION = nn.functional.normalize(noise(2, 24, seed=3))
TIMESTEPS = torch.tensor([7, 801])


def diffusers_unet(diffusers, **changes):
    widths = (32, 64, 96)
    settings = dict(
        in_channels=4, out_channels=4, block_out_channels=widths, layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=widths, attention_head_dim=tuple(width // 16 for width in widths),  # heads, not their width
        class_embed_type="simple_projection", class_embeddings_concat=True, projection_class_embeddings_input_dim=24,
    )  # fmt: skip
    torch.manual_seed(0)
    return randomised(diffusers.UNet2DConditionModel(**settings | changes))


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {},
    {"layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
     "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")},
])  # fmt: skip
def test_unet_equals_diffusers(diffusers, changes):
    theirs = diffusers_unet(diffusers, **changes)
    state = unet_from_diffusers(theirs.state_dict())
    ours = load_into(UNet(unet_config(state, head_channels=16)), state, "diffusers").eval()
    latent = noise(2, 4, 20, 8)
    expected = theirs(latent, TIMESTEPS, encoder_hidden_states=None, class_labels=CONDITION).sample
    torch.testing.assert_close(ours(latent, TIMESTEPS, CONDITION), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.05


@torch.no_grad()
def test_vae_equals_diffusers(diffusers):
    torch.manual_seed(0)
    theirs = randomised(diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(16, 32, 64), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8,
    ))  # fmt: skip
    state = vae_from_diffusers(theirs.state_dict())
    assert vae_config(state) == VAEConfig(4, 16, (1, 2, 4), 2)
    ours = load_into(MelVAE(VAEConfig(4, 16, (1, 2, 4), 2, norm_groups=8)), state, "diffusers").eval()
    mel = noise(2, 1, 28, 12)
    expected, found = theirs.encode(mel).latent_dist, ours.encode(mel)
    torch.testing.assert_close(found.mean, expected.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.log_var, expected.logvar, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.decode(found.mean), theirs.decode(expected.mean).sample, atol=1e-4, rtol=1e-4)


def test_published_sizes_equal_those_of_diffusers(diffusers):
    with torch.device("meta"):
        theirs = [
            diffusers_published_unet(diffusers),
            diffusers.AutoencoderKL(
                in_channels=1, out_channels=1, latent_channels=8, block_out_channels=(128, 256, 512),
                layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
            ),
        ]  # fmt: skip
        ours = [UNet(), MelVAE()]
    for state, network in zip((unet_from_diffusers(theirs[0].state_dict()), vae_from_diffusers(theirs[1].state_dict())),
                              ours, strict=True):  # fmt: skip
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    assert unet_config(unet_from_diffusers(theirs[0].state_dict())) == UNet().config
    assert vae_config(vae_from_diffusers(theirs[1].state_dict())) == VAEConfig()


def diffusers_published_unet(diffusers):
    widths = (128, 256, 384, 640)
    return diffusers.UNet2DConditionModel(
        in_channels=8, out_channels=8, block_out_channels=widths, layers_per_block=2, cross_attention_dim=widths,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"), attention_head_dim=tuple(w // 32 for w in widths),
        class_embed_type="simple_projection", class_embeddings_concat=True, projection_class_embeddings_input_dim=512,
    )  # fmt: skip


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
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=lambda told, k=step: f"step {k}: {told}")


@pytest.mark.parametrize("spacing, offset", [("leading", 1), ("trailing", 0)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50, 200])
def test_ddim_equals_diffusers_step_by_step(diffusers, steps, eta, spacing, offset):
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
def test_dpmpp_equals_diffusers_step_by_step(diffusers, steps, spacing):
    z_T, c = noise(2, 2, 4, 4), torch.tensor([0.5, -0.5])
    scheduler = diffusers.DPMSolverMultistepScheduler(**PUBLISHED, timestep_spacing=spacing)
    expected = stepwise(scheduler, steps, z_T, c)
    assert_same_path(seen_by_the_denoiser(dpmpp_sample, z_T, c, steps=steps, spacing=spacing), expected)


AUDIOLDM_UNET = dict(image_size=64, extra_film_condition_dim=24, extra_film_use_concat=True, in_channels=4,
                     out_channels=4, model_channels=32, attention_resolutions=[4, 2], num_res_blocks=2,
                     channel_mult=[1, 2, 3], num_head_channels=16, use_spatial_transformer=True)  # fmt: skip
AUDIOLDM_VAE = dict(double_z=True, z_channels=4, resolution=32, downsample_time=False, in_channels=1, out_ch=1, ch=32,
                    ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[], dropout=0.0)  # fmt: skip


class AudioLDM(nn.Module):
    """AudioLDM's own modules under the names that its checkpoints have."""

    def __init__(self):
        super().__init__()
        from audioldm.latent_diffusion.ema import LitEma
        from audioldm.latent_diffusion.openaimodel import UNetModel
        from audioldm.variational_autoencoder.modules import Decoder, Encoder

        torch.manual_seed(0)
        self.model, self.first_stage_model, self.cond_stage_model = nn.Module(), nn.Module(), nn.Module()
        self.model.diffusion_model = randomised(UNetModel(**AUDIOLDM_UNET))
        self.model_ema = LitEma(self.model)
        randomised(self.model, seed=5)  # the weights go on, the average stays
        first_stage = self.first_stage_model
        first_stage.encoder = randomised(Encoder(**AUDIOLDM_VAE))
        first_stage.decoder = randomised(Decoder(**AUDIOLDM_VAE))
        first_stage.quant_conv, first_stage.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)
        first_stage.vocoder = HiFiGAN(HiFiGANConfig(channels=32))
        self.cond_stage_model.model = nn.Linear(2, 2)
        self.register_buffer("scale_factor", torch.tensor(0.8))
        self.register_buffer("betas", torch.zeros(1000))


@pytest.fixture(scope="module")
def checkpoint(audioldm):
    pytest.importorskip("audioldm.latent_diffusion.openaimodel")
    model = AudioLDM()
    return model, model.state_dict()


@torch.no_grad()
@pytest.mark.parametrize("average", [True, False])
def test_unet_equals_audioldm(checkpoint, average):
    model, published = checkpoint
    state = audioldm_parts(published, average)["unet"]
    ours = load_into(UNet(unet_config(state, head_channels=16)), state, "AudioLDM").eval()
    theirs, latent = model.model.diffusion_model, noise(2, 4, 12, 8)
    if average:
        model.model_ema.store(model.model.parameters())
        model.model_ema.copy_to(model.model)
    expected = theirs(latent, TIMESTEPS, y=CONDITION)
    if average:
        model.model_ema.restore(model.model.parameters())
    torch.testing.assert_close(ours(latent, TIMESTEPS, CONDITION), expected, atol=1e-4, rtol=1e-4)
    other = unet_config(state, head_channels=32)
    assert (load_into(UNet(other), state, "").eval()(latent, TIMESTEPS, CONDITION) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_vae_equals_audioldm(checkpoint):
    model, published = checkpoint
    state, theirs = audioldm_parts(published)["vae"], model.first_stage_model
    ours = load_into(MelVAE(vae_config(state)), state, "AudioLDM").eval()
    mel, latent = noise(2, 1, 12, 8), noise(2, 4, 6, 4)
    moments = theirs.quant_conv(theirs.encoder(mel))
    found = ours.encode(mel)
    torch.testing.assert_close(torch.cat([found.mean, found.log_var], 1), moments, atol=1e-4, rtol=1e-4)
    expected = theirs.decoder(theirs.post_quant_conv(latent))
    torch.testing.assert_close(ours.decode(latent), expected, atol=1e-4, rtol=1e-4)


def test_every_part_of_an_audioldm_checkpoint_is_found(checkpoint):
    _, published = checkpoint
    parts = audioldm_parts(published)
    assert set(parts) == {"unet", "vae", "hifigan", "clap", "scale"} and parts["scale"][""] == torch.tensor(0.8)
    load_into(HiFiGAN(HiFiGANConfig(channels=32)), parts["hifigan"], "AudioLDM")
    assert set(parts["clap"]) == {"weight", "bias"}
    assert set(audioldm_parts({"scale_factor": torch.ones(())})) == {"scale"}
