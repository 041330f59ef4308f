"""Training, one optimisation step at a time: each `train_*` is a generator, and whoever iterates owns the loop.

    for step in train_ldm(model, loader, max_steps=1000):
        print(step.index, step.loss)

Every random number of a step (noise, timesteps, dropped captions, dropout) is drawn from a generator seeded by
(seed, step), and the k-th batch depends on (seed, k) alone. So weights, optimiser, averages and the step number are all
there is to save: a resumed run is the run that was never broken off. Accelerate places modules and gradients.
"""

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized

from refined_ldm.clap import contrastive_loss
from refined_ldm.conditioning import drop_condition
from refined_ldm.devices import pick_precision
from refined_ldm.diffusion import diffusion_loss, loss_weight, random_timesteps
from refined_ldm.hifigan import discriminator_loss, generator_loss, stft_loss
from refined_ldm.muon import Muon, split_parameters
from refined_ldm.run_state import load_run, refuse_old, save_run
from refined_ldm.vae import patch_loss, vae_loss


@dataclass(frozen=True)
class Step:
    """What one optimisation step did; `index` counts from 1."""

    index: int
    loss: float
    losses: dict[str, float]
    lr: float
    seconds: float


class Learner:
    """One network under training: its optimisers, its running average, and the loss it lowers.

    losses(network, batch, generator, index of the step) -> dict of scalars with the key "loss".
    """

    def __init__(self, name, network, losses, settings, accelerator):
        self.name, self.losses, self.settings = name, losses, settings
        self.bare = network
        self.network = accelerator.prepare_model(network)
        matrices, rest = split_parameters(network) if settings.optimizer == "muon" else ([], network.parameters())
        self.optimizers = [torch.optim.AdamW(rest, settings.lr, settings.betas, weight_decay=settings.weight_decay)]
        if matrices:
            self.optimizers.append(Muon(matrices, settings.lr, weight_decay=settings.weight_decay))
        self.average = {k: v.detach().clone() for k, v in network.state_dict().items()} if settings.ema_decay else None

    def begin_phase(self):
        """Go on from the average, with optimisers that remember nothing: the loss is about to be another one."""
        self.finish()
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def update(self, batch, generator, lr, index, accelerator):
        with accelerator.autocast():
            losses = self.losses(self.network, batch, generator, index)
        if not losses["loss"].isfinite():
            raise FloatingPointError(
                f"the {self.name} loss is {losses['loss'].item()} at step {index}, clips {batch.get('id')}: "
                "lower the learning rate, or resume from the last checkpoint"
            )
        told = {k: v.item() for k, v in losses.items()}
        if not losses["loss"].requires_grad:  # a network that waits for its turn
            return told
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = lr
        accelerator.backward(losses["loss"])
        if self.settings.clip_norm:
            accelerator.clip_grad_norm_(self.bare.parameters(), self.settings.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:  # Karras et al. 2024: the horizon grows with the run, so the start is forgotten
            into = index - phase(index, self.settings)[0]
            decay = min(self.settings.ema_decay, into / (into + 10))
            for name, value in self.bare.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - decay)
        return told

    @contextmanager
    def averaged(self):
        """Inside, the network has its averaged weights; outside, those under training."""
        if self.average is None:
            yield
            return
        raw = {k: v.detach().clone() for k, v in self.bare.state_dict().items()}
        self.bare.load_state_dict(self.average)
        try:
            yield
        finally:
            self.bare.load_state_dict(raw)

    def finish(self):
        """From now on the network is its average."""
        if self.average is not None:
            self.bare.load_state_dict(self.average)


def phase(index, settings):
    """(start, end, peak rate) of the part of the run that step `index` is in: before discriminators join, or after."""
    if index > settings.adversary_start:
        return settings.adversary_start, settings.max_steps, settings.adversary_lr or settings.lr
    return 0, min(settings.adversary_start, settings.max_steps), settings.lr


def learning_rate(index, settings):
    """Linear warm-up, then a half cosine to zero (Loshchilov & Hutter 2017) or constant, in each phase of the run."""
    start, end, peak = phase(index, settings)
    into = index - start
    warm = min(1.0, into / max(1, settings.warmup_steps))
    if settings.lr_schedule == "constant":
        return peak * warm
    return peak * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, (into - 1) / (end - start))))


def step_seed(seed, index):
    """A seed for all randomness of one step, far from those of its neighbours."""
    return (seed * 1_000_003 + index) * 2_654_435_761 % 2**63


def _accelerator(device_type):
    """The Accelerator of this process; its precision is set once, so an earlier one's is kept."""
    if is_initialized():
        return Accelerator()
    return Accelerator(cpu=device_type == "cpu", mixed_precision=pick_precision(device_type))


def _train(stage, networks, loader, settings, seed, run_dir, resume, accelerator, device):
    """The loop all stages share. networks: {name: (module, losses)}, updated in this order in every step."""
    accelerator = accelerator or _accelerator(torch.device(device).type)
    learners = [Learner(n, module.train(), losses, settings, accelerator) for n, (module, losses) in networks.items()]
    if run_dir and not resume:
        refuse_old(run_dir, stage)
    done = load_run(run_dir, stage, learners) if run_dir and resume else 0
    loader.batch_sampler.start_step = done
    batches = iter(accelerator.prepare_data_loader(loader))
    try:
        for index in range(done + 1, settings.max_steps + 1):
            start, losses = time.perf_counter(), {}
            batch, lr = next(batches), learning_rate(index, settings)
            if index == settings.adversary_start + 1 > 1:
                for learner in learners:
                    learner.begin_phase()
            with torch.random.fork_rng():
                torch.manual_seed(step_seed(seed, index))
                generator = torch.Generator().manual_seed(step_seed(seed, index))
                for learner in learners:
                    told = learner.update(batch, generator, lr, index, accelerator)
                    losses |= told if len(learners) == 1 else {f"{learner.name}/{k}": v for k, v in told.items()}
            if run_dir and (index % settings.save_every == 0 or index == settings.max_steps):
                if accelerator.is_main_process:
                    save_run(run_dir, stage, learners, index, {"seed": seed, "settings": settings.__dict__})
            first = next(iter(losses.values())) if "loss" not in losses else losses["loss"]
            yield Step(index, first, losses, lr, time.perf_counter() - start)
        for learner in learners:
            learner.finish()
    finally:
        for learner in learners:
            accelerator.unwrap_model(learner.network, keep_fp32_wrapper=False)
            learner.bare.eval()


def stage_settings(model, stage, max_steps=None, lr=None, judged=True):
    """The preset's settings of a stage, with what the caller gave; ValueError if no run can have them.

    Without discriminators (`judged`) there is no second phase.
    """
    changes = {k: v for k, v in {"max_steps": max_steps, "lr": lr}.items() if v is not None}
    settings = replace(model.config.training[stage], **changes)
    return settings if judged else replace(settings, adversary_start=settings.max_steps)


def _crops(waveform, frames, hop, generator):
    """A random crop of `frames` hops from each clip, aligned to the hops: (B, N) -> (B, frames * hop)."""
    spare = waveform.shape[1] // hop - frames
    if not frames or spare <= 0:
        return waveform
    starts = torch.randint(spare + 1, (len(waveform),), generator=generator).tolist()
    return torch.stack([w[s * hop : (s + frames) * hop] for w, s in zip(waveform, starts, strict=True)])


def train_vae(
    model, loader, max_steps=None, lr=None, seed=0, run_dir=None, resume=False, accelerator=None, discriminator=None
):
    """Train `model.vae` on batches with "waveform" (B, N), cut to `crop_frames` frames each.

    Mel distance and KL first. A `PatchDiscriminator` is trained beside the decoder once `adversary_start` steps are
    done; the encoder then stays as it is, so that latents mean the same before and after.
    """
    settings = stage_settings(model, "vae", max_steps, lr, judged=discriminator is not None)
    made = {}  # mels and reconstructions of this step, which the discriminator then judges

    def vae_losses(vae, batch, generator, index):
        crops = _crops(batch["waveform"], settings.crop_frames, model.config.mel.hop_length, generator)
        judged = index > settings.adversary_start
        made["real"] = model.mel(crops.to(model.device))
        made["fake"], posterior = vae(made["real"], generator, settled=judged and settings.adversary_start > 0)
        said = {k: discriminator(made[k].float()) for k in ("real", "fake")} if judged else {}
        return vae_loss(made["real"], made["fake"].float(), posterior, **said,
                        adversarial_weight=settings.adversarial_weight)  # fmt: skip

    def patch_losses(judge, batch, generator, index):
        if index <= settings.adversary_start:
            return {"loss": torch.zeros(())}
        return {"loss": patch_loss(judge(made["real"]), judge(made["fake"].detach().float()))}

    networks = {"vae": (model.vae, vae_losses)}
    if discriminator is not None:
        networks["patches"] = (discriminator, patch_losses)
    yield from _train("vae", networks, loader, settings, seed, run_dir, resume, accelerator, model.device)


def train_clap(model, loader, max_steps=None, lr=None, seed=0, run_dir=None, resume=False, accelerator=None):
    """Train `model.clap` contrastively on batches with "waveform" (B, N) and "captions" (one drawn per clip)."""
    rate = model.config.mel.sample_rate

    def losses(clap, batch, generator, index):
        captions = [of[torch.randint(len(of), (), generator=generator)] for of in batch["captions"]]
        audio, text = clap(batch["waveform"].to(model.device), rate, captions)
        return {"loss": contrastive_loss(audio, text, model.clap.logit_scale)}

    settings = stage_settings(model, "clap", max_steps, lr)
    yield from _train("clap", {"clap": (model.clap, losses)}, loader, settings, seed, run_dir, resume, accelerator,
                      model.device)  # fmt: skip


def train_ldm(model, loader, max_steps=None, lr=None, seed=0, run_dir=None, resume=False, accelerator=None):
    """Train `model.unet` on batches with "latent" and "embeddings" (`cache_latents`), or "waveform" and "captions".

    VAE, conditioner and latent scale stay as they are. Timesteps are stratified over the batch; a squared error counts
    in the units of what the U-Net predicts.
    """
    config, schedule = model.config, model.schedule
    with torch.no_grad():
        unconditional = model.clap.embed_text([""])[0]

    def losses(unet, batch, generator, index):
        with torch.no_grad():
            if "latent" in batch:
                z_0 = model.scale * batch["latent"].to(model.device)
            else:
                z_0 = model.encode(batch["waveform"].to(model.device), generator)
            if "embeddings" in batch:
                choice = torch.randint(batch["embeddings"].shape[1], (len(z_0),), generator=generator)
                c = batch["embeddings"][torch.arange(len(z_0)), choice].to(z_0)
            else:
                captions = [of[torch.randint(len(of), (), generator=generator)] for of in batch["captions"]]
                c = model.clap.embed_text(captions)
        c = drop_condition(c, unconditional, config.unconditional_probability, generator)
        t = random_timesteps(len(z_0), schedule, generator).to(z_0.device)
        eps = torch.randn(z_0.shape, generator=generator).to(z_0)
        if model.gaussian is None:
            weight = loss_weight(t, schedule, config.parameterization)
        else:
            weight = 1 / model.gaussian.residual(schedule.at(t))
        denoise = lambda z_t, t, c: model.denoise(z_t, t, c, unet)  # noqa: E731
        return {"loss": diffusion_loss(denoise, z_0, c, t, eps, schedule, weight)}

    settings = stage_settings(model, "ldm", max_steps, lr)
    yield from _train("ldm", {"unet": (model.unet, losses)}, loader, settings, seed, run_dir, resume, accelerator,
                      model.device)  # fmt: skip


def train_hifigan(
    model, loader, max_steps=None, lr=None, seed=0, run_dir=None, resume=False, accelerator=None, discriminators=None
):
    """Train `model.vocoder` on batches with "waveform" (B, N), cut to `config.crop_frames` frames each.

    The published objective, with `stft_weight` times the multi-resolution STFT distance beside that of the mels. A
    `Discriminators` is trained beside the vocoder and judges it once `adversary_start` steps are done; without one, the
    distances are all there is. With `vae_mels` it is given the VAE's copies of the mels, and still has to make the
    clips they were made of.
    """
    settings = stage_settings(model, "hifigan", max_steps, lr, judged=discriminators is not None)
    made = {}  # the generator's output of this step, which the discriminators then judge

    def generator_losses(vocoder, batch, generator, index):
        made["real"] = _crops(batch["waveform"], settings.crop_frames, model.config.mel.hop_length, generator).to(
            model.device
        )
        mel = model.mel(made["real"])
        with torch.no_grad():
            given = model.vae.decode(model.vae.encode(mel).mean).float() if settings.vae_mels else mel
        made["fake"] = vocoder(given).float()
        judged = index > settings.adversary_start
        real, fake = (discriminators(made[k]) if judged else [] for k in ("real", "fake"))
        loss, terms = generator_loss(real, fake, mel, model.mel(made["fake"]))
        if settings.stft_weight:
            terms["stft"] = stft_loss(made["fake"], made["real"])
            loss = loss + 45 * settings.stft_weight * terms["stft"]
        return {"loss": loss, **terms}

    def discriminator_losses(judges, batch, generator, index):
        if index <= settings.adversary_start:
            return {"loss": torch.zeros(())}
        return {"loss": discriminator_loss(judges(made["real"]), judges(made["fake"].detach()))}

    networks = {"vocoder": (model.vocoder, generator_losses)}
    if discriminators is not None:
        networks["discriminators"] = (discriminators, discriminator_losses)
    yield from _train("hifigan", networks, loader, settings, seed, run_dir, resume, accelerator, model.device)


TRAINERS = {"vae": train_vae, "clap": train_clap, "ldm": train_ldm, "hifigan": train_hifigan}
