"""Refined AudioLDM: captions become sound, one readable file for each concept of the paper.

Names are imported when first used, so that `import refined_ldm` loads neither torch nor any weights.
"""

import os
from importlib import import_module

# OpenMP reads this when torch is loaded. Threads that spin while they wait take the cores from whatever else runs here,
# and wait for it in turn: beside one busy process everything took six times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_HOME = {  # public name -> the module that is its one home
    "Config": "config", "PRESETS": "config", "preset": "config", "load_config": "config",
    "load_audio": "audio", "save_audio": "audio", "pad_or_trim": "audio",
    "SoundScenes": "scenes",
    "CaptionedAudio": "data", "cache_latents": "caches",
    "MelConfig": "mel", "LDM_MEL": "mel", "MelSpectrogram": "mel", "griffin_lim": "mel",
    "Clap": "clap", "CLAP_PRESETS": "clap", "contrastive_loss": "clap",
    "MelVAE": "vae", "vae_loss": "vae", "latent_scale": "vae",
    "drop_condition": "conditioning", "guided_noise": "conditioning",
    "UNet": "unet",
    "NoiseSchedule": "diffusion", "add_noise": "diffusion", "diffusion_loss": "diffusion",
    "ddim_sample": "diffusion", "dpmpp_sample": "diffusion",
    "GaussianDenoiser": "gaussian",
    "HiFiGAN": "hifigan", "Discriminators": "hifigan", "generator_loss": "hifigan", "discriminator_loss": "hifigan",
    "RefinedAudioLDM": "text_to_audio",
    "inspect_checkpoint": "checkpoints", "convert_checkpoint": "checkpoints", "fetch": "hub",
    "train_vae": "train", "train_clap": "train", "train_ldm": "train", "train_hifigan": "train",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
