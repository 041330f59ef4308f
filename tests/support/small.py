"""A whole model of a tenth of a million parameters beside its token table, and random clips for it: for fast tests."""

import torch
from torch import nn

from refined_ldm.clap import CLAP_PRESETS, ClapConfig
from refined_ldm.config import STAGES, Config, DistillConfig, StageConfig
from refined_ldm.discriminators import DiscriminatorsConfig
from refined_ldm.hifigan import HiFiGANConfig
from refined_ldm.mel import MelConfig
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.unet import UNetConfig
from refined_ldm.vae import VAEConfig

CLAP = ClapConfig(seconds=0.32, image_size=64, audio_width=8, audio_depths=(1, 1), audio_heads=(1, 2),
                  text_width=8, text_layers=1, text_heads=2, embedding_dim=12)  # fmt: skip
UNET = dict(latent_channels=2, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,),
            head_channels=8, attention_layers=1, embedding_dim=6, norm_groups=4)  # fmt: skip
STAGE = StageConfig(max_steps=6, batch_size=4, warmup_steps=2, save_every=3)


def config(**changes):
    """0.32 s clips: 5120 samples, mel 32 x 16, latent 2 x 8 x 4; a Gaussian block has 32 numbers."""
    settings = dict(
        name="small", clap="tiny-gpt2", seconds=0.32, clips=10, steps=3, parameterization="v",
        mel=MelConfig(n_mels=16),
        vae=VAEConfig(latent_channels=2, channels=8, num_res_blocks=1, norm_groups=4),
        unet=UNetConfig(**UNET | {"embedding_dim": 12}, embedding_gain=3.5, film_scale=True),
        hifigan=HiFiGANConfig(n_mels=16, channels=32, res_kernels=(3,), res_dilations=((1,),)),
        discriminators=DiscriminatorsConfig(width=4, periods=(2, 3), scales=2),
        training={stage: STAGE for stage in STAGES},
    )  # fmt: skip
    settings |= changes
    settings["training"] = {"distill": DistillConfig()} | settings["training"]
    return Config(**settings)


def use_small_clap(monkeypatch):
    """From now on, in this test, "tiny-gpt2" is small."""
    monkeypatch.setitem(CLAP_PRESETS, "tiny-gpt2", CLAP)


def awake(module):
    """A network whose zero-initialised layers are random too, so that every part has a say."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1, generator=generator)
    return module


def awake_model(monkeypatch, **changes):
    """A `RefinedAudioLDM` of this size with random weights whose U-Net says something."""
    use_small_clap(monkeypatch)
    model = RefinedAudioLDM(config(**changes), seed=3).eval()
    awake(model.unet)
    return model


def loud_model(monkeypatch, **changes):
    """The same with a VAE and a vocoder that make clear differences of small ones, and latents of unit variance."""
    model = awake_model(monkeypatch, **changes)
    with torch.no_grad():
        for part in (model.vae, model.vocoder):
            for p in part.parameters():
                p.mul_(2)
        model.scale.fill_(1 / model.encode(clips(1)[0]["waveform"][None]).std())
    return model


def clips(count=6, samples=5120):
    """A map-style data set of noise with two captions each."""
    noise = 0.2 * torch.randn(count, samples, generator=torch.Generator().manual_seed(0))
    return [{"waveform": w.clamp(-0.5, 0.5), "caption": f"sound {i}", "captions": (f"sound {i}", f"{i} times rain"),
             "id": f"clip-{i}"} for i, w in enumerate(noise)]  # fmt: skip


def latents(count):
    """The same for the U-Net: random latents, each with the embeddings of three captions."""
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "latent": torch.randn(2, 8, 4, generator=generator),
            "embeddings": nn.functional.normalize(torch.randn(3, 12, generator=generator)),
            "id": f"clip-{i}",
        }
        for i in range(count)
    ]


def unet_inputs(B=3, C=2, T=12, F=4, D=6):
    """Latents, timesteps and unit embeddings for a U-Net of the sizes in UNET."""
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(B, C, T, F, generator=generator),
        torch.arange(B) * 300,
        nn.functional.normalize(torch.randn(B, D, generator=generator)),
    )
