"""AudioLDM's own modules at their own published sizes, under the names of its checkpoints, beside ours."""

import importlib
import types

import pytest
import torch
from torch import nn

from refined_ldm.conditioning import guided_noise
from refined_ldm.diffusion import NoiseSchedule, ddim_sample
from refined_ldm.hifigan import HiFiGAN, HiFiGANConfig, fold_weight_norm
from refined_ldm.mel import MelSpectrogram
from refined_ldm.published.audioldm_names import unet_from_audioldm
from refined_ldm.published.audioldm_weights import audioldm_parts, unet_config, vae_config
from refined_ldm.unet import UNet, UNetConfig
from refined_ldm.vae import MelVAE, VAEConfig
from refined_ldm.weights import load_into
from tests.support.peers import audioldm_package, noise, randomised

CLOSE = dict(atol=1e-4, rtol=1e-4)
TIMESTEPS = torch.tensor([7, 801])


@pytest.fixture(scope="module")
def audioldm():
    """name -> module of AudioLDM's package."""
    with audioldm_package():
        yield lambda name: importlib.import_module(f"audioldm.{name}")


def published(audioldm, size="s"):
    """The parameters of AudioLDM's own configuration: of the U-Net, of the first stage."""
    parameters = audioldm("utils").default_audioldm_config(f"audioldm-{size}-full")["model"]["params"]
    return parameters["unet_config"]["params"], parameters["first_stage_config"]["params"]


class AudioLDM(nn.Module):
    """The parts of `LatentDiffusion` that a checkpoint keeps, built as it builds them."""

    def __init__(self, audioldm):
        super().__init__()
        unet, first_stage = published(audioldm)
        torch.manual_seed(0)
        self.model, self.cond_stage_model = nn.Module(), nn.Module()
        self.model.diffusion_model = randomised(audioldm("latent_diffusion.openaimodel").UNetModel(**unet), scale=0.01)
        self.model_ema = audioldm("latent_diffusion.ema").LitEma(self.model)
        randomised(self.model, scale=0.01, seed=5)  # the weights go on, the average stays
        autoencoder = audioldm("variational_autoencoder.autoencoder").AutoencoderKL
        self.first_stage_model = randomised(autoencoder(**first_stage), scale=0.01)
        self.cond_stage_model.model = nn.Linear(2, 2)
        self.register_buffer("scale_factor", torch.tensor(0.8))
        self.register_buffer("betas", torch.zeros(1000))


@pytest.fixture(scope="module")
def checkpoint(audioldm):
    model = AudioLDM(audioldm)
    return model, model.state_dict()


@torch.no_grad()
@pytest.mark.parametrize("average", [True, False])
def test_unet(checkpoint, average):
    model, tensors = checkpoint
    state = audioldm_parts(tensors, average)["unet"]
    assert unet_config(state) == UNetConfig()
    ours = load_into(UNet(), state, "AudioLDM").eval()
    latent, condition = noise(2, 8, 24, 16), nn.functional.normalize(noise(2, 512, seed=3))
    if average:
        model.model_ema.store(model.model.parameters())
        model.model_ema.copy_to(model.model)
    expected = model.model.diffusion_model(latent, TIMESTEPS, y=condition)
    if average:
        model.model_ema.restore(model.model.parameters())
    torch.testing.assert_close(ours(latent, TIMESTEPS, condition), expected, **CLOSE)
    assert expected.std() > 0.05


@torch.no_grad()
def test_vae(checkpoint):
    model, tensors = checkpoint
    state, theirs = audioldm_parts(tensors)["vae"], model.first_stage_model
    assert vae_config(state) == VAEConfig()
    ours = load_into(MelVAE(), state, "AudioLDM").eval()
    expected, found = theirs.encode(noise(1, 1, 60, 64)), ours.encode(noise(1, 1, 60, 64))
    torch.testing.assert_close(found.mean, expected.mean, **CLOSE)
    torch.testing.assert_close(found.log_var, expected.logvar, **CLOSE)
    torch.testing.assert_close(ours.decode(expected.mean), theirs.decode(expected.mean), **CLOSE)


@torch.no_grad()
def test_vocoder_without_and_with_weight_norm(checkpoint, audioldm):
    model, tensors = checkpoint
    ours = load_into(HiFiGAN(), audioldm_parts(tensors)["hifigan"], "AudioLDM").eval()
    mel = 2 * noise(1, 1, 12, 64) - 5
    expected = model.first_stage_model.vocoder(mel[:, 0].transpose(1, 2))[:, 0]
    torch.testing.assert_close(ours(mel), expected[:, : 12 * 160], **CLOSE)
    assert expected.shape == (1, 12 * 160 + 32) and expected.std() > 1e-3  # 32 samples more: see HiFiGAN

    sizes = audioldm("hifigan").AttrDict(
        audioldm("hifigan.utilities").HIFIGAN_16K_64 | {"upsample_initial_channel": 64}
    )
    trained = randomised(audioldm("hifigan").Generator(sizes), scale=0.2)  # as {"generator": …} of its authors
    ours = load_into(HiFiGAN(HiFiGANConfig(channels=64)), fold_weight_norm(trained.state_dict()), "HiFi-GAN").eval()
    expected = trained(mel[:, 0].transpose(1, 2))[:, 0, : 12 * 160]
    torch.testing.assert_close(ours(mel), expected, **CLOSE)
    assert any(name.endswith("weight_g") for name in trained.state_dict()) and expected.std() > 1e-3


def test_every_part_of_a_checkpoint_is_found(checkpoint):
    _, tensors = checkpoint
    parts = audioldm_parts(tensors)
    assert set(parts) == {"unet", "vae", "hifigan", "clap", "scale"} and parts["scale"][""] == torch.tensor(0.8)
    assert set(parts["clap"]) == {"weight", "bias"}
    assert set(audioldm_parts({"scale_factor": torch.ones(())})) == {"scale"}


def unet_pair(audioldm, size, device):
    """AudioLDM's U-Net of a size, and ours with its tensors."""
    sizes, _ = published(audioldm, size)
    with torch.device(device):
        theirs = audioldm("latent_diffusion.openaimodel").UNetModel(**sizes).eval()
        state = unet_from_audioldm(theirs.state_dict())
        ours = UNet(unet_config(state, sizes["num_head_channels"])).eval()
    return theirs, ours, state


@pytest.mark.parametrize("size, parameters", [("s", 185), ("m", 416), ("l", 739)])
def test_every_published_size_has_the_tensors_of_ours(audioldm, size, parameters):
    _, ours, state = unet_pair(audioldm, size, "meta")
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == expected
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6) == parameters


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("size", ["m", "l"])
def test_unet_of_the_larger_sizes(audioldm, size):
    torch.manual_seed(0)
    theirs, ours, _ = unet_pair(audioldm, size, "cpu")
    load_into(ours, unet_from_audioldm(randomised(theirs, scale=0.01).state_dict()), "AudioLDM")
    latent, condition = noise(2, 8, 16, 16), nn.functional.normalize(noise(2, 512, seed=3))
    expected = theirs(latent, TIMESTEPS, y=condition)
    torch.testing.assert_close(ours(latent, TIMESTEPS, condition), expected, **CLOSE)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_ddim_with_guidance(audioldm, eta, guidance, monkeypatch):
    def denoise(z_t, t, c):
        return torch.tanh(z_t * (1 + t[:, None, None, None] / 500)) + 0.1 * c.sum(1)[:, None, None, None]

    betas = torch.tensor(audioldm("latent_diffusion.util").make_beta_schedule("linear", 1000, 0.0015, 0.0195))
    alpha_bar = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1), alpha_bar[:-1]])
    model = types.SimpleNamespace(num_timesteps=1000, betas=betas.float(), alphas_cumprod=alpha_bar.float(),
                                  alphas_cumprod_prev=before.float(), device="cpu", apply_model=denoise)  # fmt: skip
    sampler = audioldm("latent_diffusion.ddim").DDIMSampler
    monkeypatch.setattr(sampler, "register_buffer", lambda *named: setattr(*named))  # its own moves all to CUDA
    torch.testing.assert_close(NoiseSchedule.ldm().alpha_bar, alpha_bar.float())

    z_T, c = noise(2, 2, 4, 4), noise(2, 3, seed=4)
    torch.manual_seed(2)
    expected, _ = sampler(model).sample(
        200, 2, (2, 4, 4), c, eta=eta, x_T=z_T, unconditional_guidance_scale=guidance,
        unconditional_conditioning=torch.zeros_like(c), verbose=False,
    )  # fmt: skip

    def guided(z_t, t, c):
        return guided_noise(denoise, z_t, t, c, torch.zeros(3), guidance)

    ours = ddim_sample(guided, z_T, c, NoiseSchedule.ldm(), 200, eta, torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_mel_is_theirs_half_a_hop_later(audioldm):
    """Its inference code centres a frame on k hops; training, HiFi-GAN and we, half a hop (80 samples) later."""
    waveform = 0.3 * noise(1, 16_000).clamp(-1, 1)
    theirs, _, _ = audioldm("audio.stft").TacotronSTFT(1024, 160, 1024, 64, 16_000, 0, 8000).mel_spectrogram(waveform)
    later = nn.functional.pad(waveform, (80, 0))[:, :16_000]
    ours = MelSpectrogram()(later)[0, 0].T
    inside = slice(5, 95)  # away from the padding
    torch.testing.assert_close(ours[:, inside], theirs[0][:, inside], **CLOSE)
    assert (MelSpectrogram()(waveform)[0, 0].T - theirs[0][:, :100])[:, inside].abs().max() > 0.1
