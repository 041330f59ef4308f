"""The losses of the four stages. Every `train_*` is a generator, so that the caller owns the loop.

```python
for step in train_ldm(model, loader, max_steps=1000):
    print(step.index, step.loss)
```

Notebook: 03
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Unpack

import torch
from torch import nn
from torch.utils.data import DataLoader

from refined_ldm.clap import contrastive_loss
from refined_ldm.conditioning import drop_condition
from refined_ldm.config import Config, StageConfig
from refined_ldm.diffusion import diffusion_loss, noisy_timesteps, stratified_timesteps, uniform_timesteps
from refined_ldm.discriminators import discriminator_loss, generator_loss, stft_loss
from refined_ldm.randomness import RankGenerator, draw
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.loop import RunOptions, Step, _rows_of_all, optimise
from refined_ldm.vae import patch_loss, vae_loss


class StageOptions(RunOptions, total=False):
    """The arguments of every `train_*`."""

    max_steps: int | None  # None: the configuration's
    lr: float | None  # learning rate; None: the configuration's


def stage_settings(
    config: Config, stage: str, max_steps: int | None = None, lr: float | None = None, adversarial: bool = True
) -> StageConfig:
    """Return the settings of a stage, with `max_steps` and `lr` replaced where they are given.

    Without discriminators (`adversarial=False`) there is no second phase. Raises ValueError for impossible settings.
    """
    changes = {k: v for k, v in {"max_steps": max_steps, "lr": lr}.items() if v is not None}
    settings = replace(config.training[stage], **changes)
    return settings if adversarial else replace(settings, disc_start=settings.max_steps)


def _settings(model, stage, options, adversarial=True):
    """Return the settings of a stage, and leave those of `optimise` in `options`."""
    return stage_settings(model.config, stage, options.pop("max_steps", None), options.pop("lr", None), adversarial)


def _crops(waveform, frames, hop, generator):
    """Return a random crop of `frames` hops of each clip, aligned to the hops: (B, N) -> (B, frames * hop)."""
    spare = waveform.shape[1] // hop - frames
    if not frames or spare <= 0:
        return waveform
    starts = draw(partial(torch.randint, spare + 1), (len(waveform),), generator).tolist()
    return torch.stack([w[s * hop : (s + frames) * hop] for w, s in zip(waveform, starts, strict=True)])


def one_caption_each(captions: Sequence[Sequence[str]], generator: RankGenerator) -> list[str]:
    """Return one caption of each of B clips, drawn by the generator; captions: B sequences."""
    own = range(generator.rank * len(captions), (generator.rank + 1) * len(captions))  # rows of the whole batch
    rows = range(generator.world_size * len(captions))
    counts = [len(captions[row - own.start]) if row in own else 1 for row in rows]
    choice = [torch.randint(count, (), generator=generator).item() for count in counts]
    return [of[choice[row]] for of, row in zip(captions, own, strict=True)]


def train_vae(
    model: RefinedAudioLDM, loader: DataLoader, discriminator: nn.Module | None = None, **options: Unpack[StageOptions]
) -> Iterator[Step]:
    """Train `model.vae` on batches with "waveform" (B, N), cut to `crop_frames` frames each, and yield every Step.

    The loss is the mel distance and the KL term. After `disc_start` steps the `PatchDiscriminator` is trained beside
    the decoder; the encoder is then frozen, so that latents stay the same. Raises as `optimise` does.

    Notebook: 03
    """
    settings = _settings(model, "vae", options, adversarial=discriminator is not None)
    made = {}  # mels and reconstructions of this step, the discriminator's inputs

    def vae_losses(vae, batch, generator, index):
        crops = _crops(batch["waveform"], settings.crop_frames, model.config.mel.hop_length, generator)
        adversarial = index > settings.disc_start
        made["real"] = model.mel(crops.to(model.device, non_blocking=True))
        made["fake"], posterior = vae(made["real"], generator, freeze_encoder=adversarial and settings.disc_start > 0)
        scores = {k: discriminator(made[k].float()) for k in ("real", "fake")} if adversarial else {}
        weight = settings.adversarial_weight
        return vae_loss(made["real"], made["fake"].float(), posterior, **scores, adversarial_weight=weight)

    def patch_losses(discriminator, batch, generator, index):
        if index <= settings.disc_start:
            return {"loss": torch.zeros(())}
        return {"loss": patch_loss(discriminator(made["real"]), discriminator(made["fake"].detach().float()))}

    networks = {"vae": (model.vae, vae_losses)}
    if discriminator is not None:
        networks["patches"] = (discriminator, patch_losses)
    yield from optimise("vae", networks, loader, settings, device=model.device, **options)


def train_clap(model: RefinedAudioLDM, loader: DataLoader, **options: Unpack[StageOptions]) -> Iterator[Step]:
    """Train `model.clap` with the contrastive loss and yield every Step.

    Batches hold "waveform" (B, N) and "captions", of which one is drawn per clip, and "sample_rate" in Hz if it is not
    the model's (`inputs.Resampled`). Raises as `optimise` does.

    Notebook: 02
    """

    def losses(clap, batch, generator, index):
        captions = one_caption_each(batch["captions"], generator)
        rate = batch["sample_rate"][0] if "sample_rate" in batch else model.config.mel.sample_rate
        audio, text = clap(batch["waveform"].to(model.device, non_blocking=True), rate, captions)
        audio, text = (_rows_of_all(rows, generator) for rows in (audio, text))  # each row is compared with all others
        return {"loss": contrastive_loss(audio, text, model.clap.logit_scale)}

    settings, networks = _settings(model, "clap", options), {"clap": (model.clap, losses)}
    yield from optimise("clap", networks, loader, settings, device=model.device, **options)


def train_ldm(model: RefinedAudioLDM, loader: DataLoader, **options: Unpack[StageOptions]) -> Iterator[Step]:
    """Train `model.unet` on noised latents and yield every Step (Ho et al. 2020; Liu et al. 2023, eq. 3).

    Batches hold "latent" (B, C, T, F) and "embeddings" (B, K, D) from `cache_latents`, or "waveform" (B, N) and
    "captions". VAE, conditioner and latent scale are frozen. The condition of a clip is one of its captions or, in
    `audio_share` of the cases, its audio embedding: "audio_embedding" (B, D) of the batch, or that of its waveform.
    Raises as `optimise` does.

    Notebook: 03
    """
    settings = _settings(model, "ldm", options)
    networks = {"unet": (model.unet, ldm_losses(model, settings))}
    yield from optimise("ldm", networks, loader, settings, device=model.device, **options)


def ldm_losses(
    model: RefinedAudioLDM,
    settings: StageConfig,
    unconditional_probability: float | None = None,
    draw_timesteps: Callable[..., torch.Tensor] | None = None,
) -> Callable[..., dict[str, torch.Tensor]]:
    """Return the loss of the U-Net, as `Learner` takes it; batches as for `train_ldm`.

    unconditional_probability: of a clip without its caption, for guidance; None: the configuration's.
    draw_timesteps: (count, schedule, generator) -> (count,) timesteps; None: as the settings say.
    """
    config, schedule, blank = model.config, model.schedule, unconditional_probability
    blank = config.unconditional_probability if blank is None else blank
    model.unet.gradient_checkpointing = settings.gradient_checkpointing
    samplers = {"stratified": stratified_timesteps, "uniform": uniform_timesteps, "noisy": noisy_timesteps}
    draw_timesteps = draw_timesteps or samplers[settings.timesteps]
    with torch.no_grad():
        unconditional = model.clap.embed_text([""])[0]

    @torch.no_grad()
    def condition(batch, z_0, generator):
        if "embeddings" in batch:
            choice = draw(partial(torch.randint, batch["embeddings"].shape[1]), (len(z_0),), generator)
            embeddings = batch["embeddings"].to(z_0, non_blocking=True)
            choice = choice.to(z_0.device, non_blocking=True)
            c = embeddings[torch.arange(len(z_0), device=z_0.device), choice]
        else:
            c = model.clap.embed_text(one_caption_each(batch["captions"], generator))
        if settings.audio_share:
            audio = batch.get("audio_embedding")
            if audio is None:
                audio = model.clap.embed_audio(batch["waveform"].to(z_0, non_blocking=True), config.mel.sample_rate)
            use_audio = draw(torch.rand, (len(c),), generator) < settings.audio_share
            use_audio = use_audio[:, None].to(c.device, non_blocking=True)
            c = torch.where(use_audio, audio.to(c, non_blocking=True), c)
        if settings.conditioner_dropout:
            c = drop_condition(c, unconditional, settings.conditioner_dropout, generator)
        return drop_condition(c, unconditional, blank, generator)

    def losses(unet, batch, generator, index):
        with torch.no_grad():
            if "latent" in batch:
                z_0 = model.latent_scale * batch["latent"].to(model.device, non_blocking=True)
            else:
                z_0 = model.encode(batch["waveform"].to(model.device, non_blocking=True), generator)
        c = condition(batch, z_0, generator)
        t = draw_timesteps(len(z_0), schedule, generator).to(z_0.device, non_blocking=True)
        eps = draw(torch.randn, z_0.shape, generator).to(z_0, non_blocking=True)
        weight = None if settings.loss_weighting == "eps" else model.loss_weight(t)
        denoise = lambda z_t, t, c: model.denoise(z_t, t, c, unet)  # noqa: E731
        return {"loss": diffusion_loss(denoise, z_0, c, t, eps, schedule, weight)}

    return losses


def train_hifigan(
    model: RefinedAudioLDM, loader: DataLoader, discriminators: nn.Module | None = None, **options: Unpack[StageOptions]
) -> Iterator[Step]:
    """Train `model.vocoder` on batches with "waveform" (B, N), cut to `crop_frames` frames each, and yield every Step.

    The loss is that of HiFi-GAN (Kong et al. 2020), plus `stft_weight` times the multi-resolution STFT distance.
    `Discriminators` are trained beside the vocoder after `disc_start` steps; without them the loss has no adversarial
    terms. With `vae_mels` the inputs are the VAE's reconstructions of the mels, the targets still the original clips.
    Raises as `optimise` does.

    Notebook: 04
    """
    settings = _settings(model, "hifigan", options, adversarial=discriminators is not None)
    made = {}  # waveforms of this step, the discriminators' inputs

    def generator_losses(vocoder, batch, generator, index):
        crops = _crops(batch["waveform"], settings.crop_frames, model.config.mel.hop_length, generator)
        made["real"] = crops.to(model.device, non_blocking=True)
        mel = model.mel(made["real"])
        with torch.no_grad():
            given = model.vae.decode(model.vae.encode(mel).mean).float() if settings.vae_mels else mel
        made["fake"] = vocoder(given).float()
        adversarial = index > settings.disc_start
        real, fake = (discriminators(made[k]) if adversarial else [] for k in ("real", "fake"))
        loss, terms = generator_loss(real, fake, mel, model.mel(made["fake"]))
        if settings.stft_weight:
            terms["stft"] = stft_loss(made["fake"], made["real"])
            loss = loss + 45 * settings.stft_weight * terms["stft"]
        return {"loss": loss, **terms}

    def discriminator_losses(discriminators, batch, generator, index):
        if index <= settings.disc_start:
            return {"loss": torch.zeros(())}
        return {"loss": discriminator_loss(discriminators(made["real"]), discriminators(made["fake"].detach()))}

    networks = {"vocoder": (model.vocoder, generator_losses)}
    if discriminators is not None:
        networks["discriminators"] = (discriminators, discriminator_losses)
    yield from optimise("hifigan", networks, loader, settings, device=model.device, **options)


TRAINERS = {"vae": train_vae, "clap": train_clap, "ldm": train_ldm, "hifigan": train_hifigan}
