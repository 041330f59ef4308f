"""The four stages: what each lowers. Every `train_*` is a generator, and whoever iterates owns the loop.

    for step in train_ldm(model, loader, max_steps=1000):
        print(step.index, step.loss)
"""

from dataclasses import replace
from functools import partial

import torch

from refined_ldm.clap import contrastive_loss
from refined_ldm.conditioning import drop_condition
from refined_ldm.diffusion import diffusion_loss, noisy_timesteps, stratified_timesteps, uniform_timesteps
from refined_ldm.discriminators import discriminator_loss, generator_loss, stft_loss
from refined_ldm.randomness import draw
from refined_ldm.training.loop import _rows_of_all, optimise
from refined_ldm.vae import patch_loss, vae_loss


def stage_settings(config, stage, max_steps=None, lr=None, judged=True):
    """The preset's settings of a stage, with what the caller gave; ValueError if no run can have them.

    Without discriminators (`judged`) there is no second phase.
    """
    changes = {k: v for k, v in {"max_steps": max_steps, "lr": lr}.items() if v is not None}
    settings = replace(config.training[stage], **changes)
    return settings if judged else replace(settings, disc_start=settings.max_steps)


def _crops(waveform, frames, hop, generator):
    """A random crop of `frames` hops from each clip, aligned to the hops: (B, N) -> (B, frames * hop)."""
    spare = waveform.shape[1] // hop - frames
    if not frames or spare <= 0:
        return waveform
    starts = draw(partial(torch.randint, spare + 1), (len(waveform),), generator).tolist()
    return torch.stack([w[s * hop : (s + frames) * hop] for w, s in zip(waveform, starts, strict=True)])


def one_caption_each(captions, generator):
    """[captions of a clip, …] -> one of each clip's, drawn by the generator."""
    own = range(generator.rank * len(captions), (generator.rank + 1) * len(captions))  # rows of the whole batch
    counts = [len(captions[row - own.start]) if row in own else 1 for row in range(generator.world_size * len(captions))]
    choice = [torch.randint(count, (), generator=generator).item() for count in counts]
    return [of[choice[row]] for of, row in zip(captions, own, strict=True)]


def train_vae(
    model, loader, max_steps=None, lr=None, seed=0, run_dir=None, resume=False, accelerator=None, discriminator=None
):
    """Train `model.vae` on batches with "waveform" (B, N), cut to `crop_frames` frames each.

    Mel distance and KL first. A `PatchDiscriminator` is trained beside the decoder once `disc_start` steps are
    done; the encoder then stays as it is, so that latents mean the same before and after.
    """
    settings = stage_settings(model.config, "vae", max_steps, lr, judged=discriminator is not None)
    made = {}  # mels and reconstructions of this step, which the discriminator then judges

    def vae_losses(vae, batch, generator, index):
        crops = _crops(batch["waveform"], settings.crop_frames, model.config.mel.hop_length, generator)
        judged = index > settings.disc_start
        made["real"] = model.mel(crops.to(model.device))
        made["fake"], posterior = vae(made["real"], generator, freeze_encoder=judged and settings.disc_start > 0)
        said = {k: discriminator(made[k].float()) for k in ("real", "fake")} if judged else {}
        return vae_loss(made["real"], made["fake"].float(), posterior, **said,
                        adversarial_weight=settings.adversarial_weight)  # fmt: skip

    def patch_losses(judge, batch, generator, index):
        if index <= settings.disc_start:
            return {"loss": torch.zeros(())}
        return {"loss": patch_loss(judge(made["real"]), judge(made["fake"].detach().float()))}

    networks = {"vae": (model.vae, vae_losses)}
    if discriminator is not None:
        networks["patches"] = (discriminator, patch_losses)
    yield from optimise("vae", networks, loader, settings, seed, run_dir, resume, accelerator, model.device)


def train_clap(model, loader, max_steps=None, lr=None, seed=0, run_dir=None, resume=False, accelerator=None):
    """Train `model.clap` contrastively on batches with "waveform" (B, N) and "captions" (one drawn per clip)."""
    rate = model.config.mel.sample_rate

    def losses(clap, batch, generator, index):
        captions = one_caption_each(batch["captions"], generator)
        audio, text = clap(batch["waveform"].to(model.device), rate, captions)
        audio, text = (_rows_of_all(rows, generator) for rows in (audio, text))  # each is compared with all others
        return {"loss": contrastive_loss(audio, text, model.clap.logit_scale)}

    settings = stage_settings(model.config, "clap", max_steps, lr)
    yield from optimise("clap", {"clap": (model.clap, losses)}, loader, settings, seed, run_dir, resume, accelerator,
                      model.device)  # fmt: skip


def train_ldm(model, loader, max_steps=None, lr=None, seed=0, run_dir=None, resume=False, accelerator=None):
    """Train `model.unet` on batches with "latent" and "embeddings" (`cache_latents`), or "waveform" and "captions".

    VAE, conditioner and latent scale stay as they are. A clip is steered by one of its captions or, in `audio_share` of
    the cases, by the embedding of its own sound: "audio_embedding" (B, D) of the batch, or that of its waveform.
    """
    config, schedule = model.config, model.schedule
    settings = stage_settings(model.config, "ldm", max_steps, lr)
    draw_timesteps = {
        "stratified": stratified_timesteps, "uniform": uniform_timesteps, "noisy": noisy_timesteps,
    }[settings.timesteps]  # fmt: skip
    with torch.no_grad():
        unconditional = model.clap.embed_text([""])[0]

    @torch.no_grad()
    def condition(batch, z_0, generator):
        if "embeddings" in batch:
            choice = draw(partial(torch.randint, batch["embeddings"].shape[1]), (len(z_0),), generator)
            c = batch["embeddings"][torch.arange(len(z_0)), choice].to(z_0)
        else:
            c = model.clap.embed_text(one_caption_each(batch["captions"], generator))
        if settings.audio_share:
            heard = batch.get("audio_embedding")
            if heard is None:
                heard = model.clap.embed_audio(batch["waveform"].to(z_0), config.mel.sample_rate)
            by_sound = draw(torch.rand, (len(c),), generator) < settings.audio_share
            c = torch.where(by_sound[:, None].to(c.device), heard.to(c), c)
        if settings.conditioner_dropout:
            c = drop_condition(c, unconditional, settings.conditioner_dropout, generator)
        return drop_condition(c, unconditional, config.unconditional_probability, generator)

    def losses(unet, batch, generator, index):
        with torch.no_grad():
            if "latent" in batch:
                z_0 = model.scale * batch["latent"].to(model.device)
            else:
                z_0 = model.encode(batch["waveform"].to(model.device), generator)
        c = condition(batch, z_0, generator)
        t = draw_timesteps(len(z_0), schedule, generator).to(z_0.device)
        eps = draw(torch.randn, z_0.shape, generator).to(z_0)
        weight = None if settings.loss_weighting == "eps" else model.loss_weight(t)
        denoise = lambda z_t, t, c: model.denoise(z_t, t, c, unet)  # noqa: E731
        return {"loss": diffusion_loss(denoise, z_0, c, t, eps, schedule, weight)}

    yield from optimise("ldm", {"unet": (model.unet, losses)}, loader, settings, seed, run_dir, resume, accelerator,
                      model.device)  # fmt: skip


def train_hifigan(
    model, loader, max_steps=None, lr=None, seed=0, run_dir=None, resume=False, accelerator=None, discriminators=None
):
    """Train `model.vocoder` on batches with "waveform" (B, N), cut to `config.crop_frames` frames each.

    The published objective, with `stft_weight` times the multi-resolution STFT distance beside that of the mels. A
    `Discriminators` is trained beside the vocoder and judges it once `disc_start` steps are done; without one, the
    distances are all there is. With `vae_mels` it is given the VAE's copies of the mels, and still has to make the
    clips they were made of.
    """
    settings = stage_settings(model.config, "hifigan", max_steps, lr, judged=discriminators is not None)
    made = {}  # the generator's output of this step, which the discriminators then judge

    def generator_losses(vocoder, batch, generator, index):
        made["real"] = _crops(batch["waveform"], settings.crop_frames, model.config.mel.hop_length, generator).to(
            model.device
        )
        mel = model.mel(made["real"])
        with torch.no_grad():
            given = model.vae.decode(model.vae.encode(mel).mean).float() if settings.vae_mels else mel
        made["fake"] = vocoder(given).float()
        judged = index > settings.disc_start
        real, fake = (discriminators(made[k]) if judged else [] for k in ("real", "fake"))
        loss, terms = generator_loss(real, fake, mel, model.mel(made["fake"]))
        if settings.stft_weight:
            terms["stft"] = stft_loss(made["fake"], made["real"])
            loss = loss + 45 * settings.stft_weight * terms["stft"]
        return {"loss": loss, **terms}

    def discriminator_losses(judges, batch, generator, index):
        if index <= settings.disc_start:
            return {"loss": torch.zeros(())}
        return {"loss": discriminator_loss(judges(made["real"]), judges(made["fake"].detach()))}

    networks = {"vocoder": (model.vocoder, generator_losses)}
    if discriminators is not None:
        networks["discriminators"] = (discriminators, discriminator_losses)
    yield from optimise("hifigan", networks, loader, settings, seed, run_dir, resume, accelerator, model.device)


TRAINERS = {"vae": train_vae, "clap": train_clap, "ldm": train_ldm, "hifigan": train_hifigan}
