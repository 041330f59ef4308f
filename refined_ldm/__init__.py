"""Refined AudioLDM: text-to-audio generation, with one readable file for each concept of the paper.

Names are imported when first used, so that `import refined_ldm` loads neither torch nor any weights.
"""

import os

import lazy_loader

# OpenMP reads this when torch is loaded. Threads that spin while they wait take the cores from other processes: beside
# one, a clip takes 2 to 5 times as long as with sleeping threads. Small models use one (devices.fitting_threads).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["display"],
    submod_attrs={
        "audio": ["load_audio", "pad_or_trim", "save_audio"],
        "mel": ["LDM_MEL", "MelConfig", "MelSpectrogram", "griffin_lim"],
        "clap": ["CLAP_PRESETS", "Clap", "contrastive_loss"],
        "vae": ["MelVAE", "latent_scale", "vae_loss"],
        "conditioning": ["drop_condition", "guided_noise"],
        "unet": ["UNet"],
        "diffusion": ["NoiseSchedule", "add_noise", "ddim_sample", "diffusion_loss", "dpmpp_sample"],
        "linear_denoiser": ["GaussianDenoiser"],
        "hifigan": ["HiFiGAN"],
        "discriminators": ["Discriminators", "discriminator_loss", "generator_loss"],
        "text_to_audio": ["RefinedAudioLDM"],
        "config": ["Config", "PRESETS", "load_config", "preset"],
        "scenes": ["SoundScenes"],
        "data": ["CaptionedAudio", "cache_latents"],
        "training": ["train_clap", "train_hifigan", "train_ldm", "train_vae"],
        "published": ["convert_checkpoint", "fetch", "inspect_checkpoint"],
    },
)
