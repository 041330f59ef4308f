"""From a configuration to trained weights: the stages in the order their results feed each other.

Clips are rendered or decoded once, then the VAE, the conditioner and the vocoder learn from them; the U-Net learns from
latents and caption embeddings that the first two compute once. Everything is written below one run folder, and a
finished stage is a safetensors file there which later stages read.
"""

import hashlib
from pathlib import Path

import torch

from refined_ldm.data import CaptionedAudio, cache_clips, cache_latents, loader
from refined_ldm.hifigan import Discriminators
from refined_ldm.scenes import SoundScenes
from refined_ldm.train import train_clap, train_hifigan, train_ldm, train_vae
from refined_ldm.vae import latent_scale

STAGES = ("vae", "clap", "ldm", "hifigan")


def open_data(config, split="train", size=None):
    """The data set a configuration names: SoundScenes, or recordings from a CSV file or a folder."""
    if config.data == "scenes":
        return SoundScenes(split, size or config.clips, config.seconds)
    path = Path(config.data)
    reader = CaptionedAudio.from_folder if path.is_dir() else CaptionedAudio.from_csv
    return reader(path, config.seconds)


def train_stage(model, stage, run_dir, seed=0, resume=False, max_steps=None, lr=None, adversarial=True, on_clips=None):
    """Train one stage, write its part of the model into run_dir, and yield every Step on the way.

    Stages that feed this one are read from run_dir if they are there. Raises ValueError for an unknown stage,
    FileNotFoundError if the U-Net is to be trained before VAE and conditioner.
    """
    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}: choose from {', '.join(STAGES)}")
    run_dir, config = Path(run_dir), model.config
    settings = config.training[stage]
    clips = cached_clips(model.config, run_dir, on_clips=on_clips)
    common = {"max_steps": max_steps, "lr": lr, "seed": seed, "run_dir": run_dir / "checkpoints", "resume": resume}
    if stage == "ldm":
        for part in ("vae", "clap"):
            model.load_part(part, run_dir)
        latents = prepare_latents(model, clips, run_dir, on_clips)
        yield from train_ldm(model, loader(latents, settings.batch_size, seed), **common)
    else:
        batches = loader(clips, settings.batch_size, seed)
        if stage == "vae":
            yield from train_vae(model, batches, **common)
        elif stage == "clap":
            yield from train_clap(model, batches, **common)
            if config.clap.startswith("tiny"):  # trained from nothing, so most of its vocabulary was never seen
                model.clap.share_unseen_tokens(c for item in clips.rest for c in item["captions"])
        else:
            judges = Discriminators(config.discriminators).to(model.device) if adversarial else None
            yield from train_hifigan(model, batches, discriminators=judges, **common)
    model.save_part(stage, run_dir)
    config.save(run_dir / "config.yaml")


def cached_clips(config, run_dir, split="train", size=None, on_clips=None):
    """The clips of a configuration, rendered or decoded once into run_dir."""
    data = open_data(config, split, size)
    return cache_clips(Path(run_dir) / f"clips-{split}", data, {"data": data.fingerprint()}, on_clips)


@torch.no_grad()
def prepare_latents(model, clips, run_dir, on_clips=None):
    """Encode clips and captions once, measure the latent scale on the first 512 and fit the linear denoiser."""
    model.eval()

    def encode(waveform):
        return model.vae.encode(model.mel(waveform.to(model.device))).mean

    def embed(captions):
        return model.clap.embed_text(captions)

    made_of = {**clips.made_of, "vae": _digest(model.vae), "clap": _digest(model.clap)}
    latents = cache_latents(Path(run_dir) / "latents-train", clips, encode, embed, made_of, on_clips)
    fixed = torch.stack([clips[i]["waveform"] for i in range(min(512, len(clips)))])
    model.scale.fill_(latent_scale(model.vae, (model.mel(w.to(model.device)) for w in fixed.split(32))))
    if model.gaussian is not None:
        known = torch.stack([latents[i]["latent"] for i in range(min(4000, len(latents)))])
        model.gaussian.cpu().fit(known * model.scale.cpu()).to(model.device)
    return latents


def _digest(module):
    """A short name of a module's weights, by content."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
