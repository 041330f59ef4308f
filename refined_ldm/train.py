"""Training, one optimisation step at a time: each `train_*` is a generator, and whoever iterates owns the loop.

    for step in train_ldm(model, loader, max_steps=1000):
        print(step.index, step.loss)

Every random number of a step (noise, timesteps, dropped captions, dropout) is drawn from a generator seeded by
(seed, step), and the k-th batch depends on (seed, k) alone. So weights, optimiser, averages and the step number are all
there is to save: a resumed run is the run that was never broken off. Accelerate places modules and gradients; each
process takes its share of the batch and of the random numbers that one process would have drawn for it.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from accelerate.utils import gather, gather_object

from refined_ldm.clap import contrastive_loss
from refined_ldm.conditioning import drop_condition
from refined_ldm.devices import pick_accelerator
from refined_ldm.diffusion import diffusion_loss, noisy_timesteps, random_timesteps, uniform_timesteps
from refined_ldm.hifigan import discriminator_loss, generator_loss, stft_loss
from refined_ldm.interruption import Stopped, held_back
from refined_ldm.muon import Muon, split_parameters
from refined_ldm.randomness import ShareGenerator, draw, step_seed
from refined_ldm.run_state import drop_others, last_checkpoint, load_run, refuse_old, save_run
from refined_ldm.sanity import SpikeWatch
from refined_ldm.vae import patch_loss, vae_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What one optimisation step did; `index` counts from 1. Within `step.averaged()` the network is its average."""

    index: int
    loss: float
    losses: dict[str, float]
    lr: float
    seconds: float
    waited: float = 0.0  # seconds of these in which the batch was loaded
    averaged: Callable = field(default=nullcontext, repr=False, compare=False)


class Learner:
    """One network under training: its optimisers, its running average, and the loss it lowers.

    losses(network, batch, generator, index of the step) -> dict of scalars with the key "loss".
    """

    def __init__(self, name, network, losses, settings, accelerator):
        self.name, self.losses, self.settings = name, losses, settings
        self.bare = network
        self.network = accelerator.prepare_model(network)
        matrices, rest = split_parameters(network) if settings.optimizer == "muon" else ([], network.parameters())
        rest = list(rest)
        fused = all(p.device.type in ("cpu", "cuda") for p in rest)  # one pass over each tensor: a third of the time
        self.optimizers = [torch.optim.AdamW(rest, settings.lr, settings.betas, weight_decay=settings.weight_decay,
                                             fused=fused)]  # fmt: skip
        if matrices:
            dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
            self.optimizers.append(Muon(matrices, settings.lr, weight_decay=settings.weight_decay, dtype=dtype))
        self.average = {k: v.detach().clone() for k, v in network.state_dict().items()} if settings.ema_decay else None

    def begin_phase(self):
        """Go on from the average, with optimisers that remember nothing: the loss is about to be another one."""
        self.finish()
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def update(self, batch, generator, lr, index, accelerator):
        """Lower the loss by one step -> what it was, {name: mean over the processes}.

        Raises FloatingPointError, before anything has changed, if the loss or its gradient is no finite number.
        """
        with accelerator.autocast():
            losses = self.losses(self.network, batch, generator, index)
        told = {k: v.item() for k, v in losses.items()}
        if not losses["loss"].requires_grad:  # a network that waits for its turn
            return told
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = lr
        accelerator.backward(losses["loss"])
        norm = accelerator.clip_grad_norm_(self.bare.parameters(), self.settings.clip_norm or math.inf)
        told = _mean_of_all(told, accelerator)
        for name, value in {**told, "gradient": norm.item()}.items():
            if not math.isfinite(value):
                clips = ", ".join(map(str, gather_object(list(batch.get("id", ())))))
                raise FloatingPointError(f"the {self.name} {name} is {value} at step {index}, clips {clips}")
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


def _mean_of_all(told, accelerator):
    """{name: number} -> the means over all processes."""
    if accelerator.num_processes == 1:
        return told
    mean = accelerator.reduce(torch.tensor([*told.values()], device=accelerator.device), "mean")
    return dict(zip(told, mean.tolist(), strict=True))


def _rows_of_all(own, generator):
    """The rows (B, D) of all processes one below the other, the own ones with their gradient."""
    if generator.shares == 1:
        return own
    rows = list(gather(own.detach()).chunk(generator.shares))
    rows[generator.share] = own.clone()
    rows[generator.share].register_hook(lambda gradient: generator.shares * gradient)  # of which the mean will be taken
    return torch.cat(rows)


def _signal_of_any(waiting, accelerator):
    """The signal that came to this process or to another one since the last step, 0 if none did."""
    number = max(waiting, default=0)
    waiting.clear()
    if accelerator.num_processes > 1:
        number = int(accelerator.reduce(torch.tensor(number, device=accelerator.device), "max"))
    return number


def optimise(stage, networks, loader, settings, seed, run_dir, resume, accelerator, device):
    """The loop all stages share. networks: {name: (module, losses)}, updated in this order in every step."""
    accelerator = accelerator or pick_accelerator(torch.device(device).type)
    shares, main = accelerator.num_processes, accelerator.is_main_process
    if settings.batch_size % shares:
        raise ValueError(f"batch_size {settings.batch_size} cannot be shared by {shares} processes: "
                         f"take {-(-settings.batch_size // shares) * shares}")  # fmt: skip
    learners = [Learner(n, module.train(), losses, settings, accelerator) for n, (module, losses) in networks.items()]
    if run_dir and not resume:
        refuse_old(run_dir, stage)
    done = load_run(run_dir, stage, learners, seed) if run_dir and resume else 0
    if done and main:
        drop_others(run_dir, stage, done)  # a run killed after it had saved did not come to it
    loader.batch_sampler.start_step = done
    batches = iter(accelerator.prepare_data_loader(loader))
    about = {"seed": seed, "precision": accelerator.mixed_precision, "settings": settings.__dict__}
    spike = SpikeWatch()
    try:
        for index in range(done + 1, settings.max_steps + 1):
            start, losses = time.perf_counter(), {}
            with held_back() as signals:
                batch, lr = next(batches), learning_rate(index, settings)
                waited = time.perf_counter() - start
                if index == settings.adversary_start + 1 > 1:
                    for learner in learners:
                        learner.begin_phase()
                with torch.random.fork_rng():
                    torch.manual_seed(step_seed(seed, index) + accelerator.process_index)  # of dropout
                    generator = ShareGenerator(accelerator.process_index, shares).manual_seed(step_seed(seed, index))
                    for learner in learners:
                        of = learner.update(batch, generator, lr, index, accelerator)
                        losses |= of if len(learners) == 1 else {f"{learner.name}/{k}": v for k, v in of.items()}
                number = _signal_of_any(signals, accelerator)
            first = next(iter(losses.values())) if "loss" not in losses else losses["loss"]
            if (factor := spike(first)) and main:
                log.warning("%s: the loss of step %d, %.4g, is %.1f times the usual", stage, index, first, factor)
            kept = run_dir and (index % settings.save_every == 0 or index == settings.max_steps or number)
            try:
                yield Step(index, first, losses, lr, time.perf_counter() - start, waited, learners[0].averaged)
            finally:  # told first and saved then, so that whoever keeps a curve has it up to any checkpoint
                if kept and main:
                    save_run(run_dir, stage, learners, index, about)
            if number:
                accelerator.wait_for_everyone()
                where = f", saved in {last_checkpoint(run_dir, stage)}" if run_dir else ""
                raise Stopped(number, f"stopped after step {index} of {stage}{where}")
        for learner in learners:
            learner.finish()
    except FloatingPointError as fault:
        good = last_checkpoint(run_dir, stage) or "none"
        raise FloatingPointError(f"{fault}; last good checkpoint: {good}. Lower the learning rate, or look at "
                                 "these clips") from fault  # fmt: skip
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
    starts = draw(partial(torch.randint, spare + 1), (len(waveform),), generator).tolist()
    return torch.stack([w[s * hop : (s + frames) * hop] for w, s in zip(waveform, starts, strict=True)])


def one_caption_each(captions, generator):
    """[captions of a clip, …] -> one of each clip's, drawn by the generator."""
    own = range(generator.share * len(captions), (generator.share + 1) * len(captions))  # rows of the whole batch
    counts = [len(captions[row - own.start]) if row in own else 1 for row in range(generator.shares * len(captions))]
    choice = [torch.randint(count, (), generator=generator).item() for count in counts]
    return [of[choice[row]] for of, row in zip(captions, own, strict=True)]


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
    yield from optimise("vae", networks, loader, settings, seed, run_dir, resume, accelerator, model.device)


def train_clap(model, loader, max_steps=None, lr=None, seed=0, run_dir=None, resume=False, accelerator=None):
    """Train `model.clap` contrastively on batches with "waveform" (B, N) and "captions" (one drawn per clip)."""
    rate = model.config.mel.sample_rate

    def losses(clap, batch, generator, index):
        captions = one_caption_each(batch["captions"], generator)
        audio, text = clap(batch["waveform"].to(model.device), rate, captions)
        audio, text = (_rows_of_all(rows, generator) for rows in (audio, text))  # each is compared with all others
        return {"loss": contrastive_loss(audio, text, model.clap.logit_scale)}

    settings = stage_settings(model, "clap", max_steps, lr)
    yield from optimise("clap", {"clap": (model.clap, losses)}, loader, settings, seed, run_dir, resume, accelerator,
                      model.device)  # fmt: skip


def train_ldm(model, loader, max_steps=None, lr=None, seed=0, run_dir=None, resume=False, accelerator=None):
    """Train `model.unet` on batches with "latent" and "embeddings" (`cache_latents`), or "waveform" and "captions".

    VAE, conditioner and latent scale stay as they are. A clip is steered by one of its captions or, in `audio_share` of
    the cases, by the embedding of its own sound: "audio_embedding" (B, D) of the batch, or that of its waveform.
    """
    config, schedule = model.config, model.schedule
    settings = stage_settings(model, "ldm", max_steps, lr)
    draw_timesteps = {
        "stratified": random_timesteps, "uniform": uniform_timesteps, "noisy": noisy_timesteps,
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
        if settings.extra_drop:
            c = drop_condition(c, unconditional, settings.extra_drop, generator)
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
        weight = None if settings.weighting == "eps" else model.loss_weight(t)
        denoise = lambda z_t, t, c: model.denoise(z_t, t, c, unet)  # noqa: E731
        return {"loss": diffusion_loss(denoise, z_0, c, t, eps, schedule, weight)}

    yield from optimise("ldm", {"unet": (model.unet, losses)}, loader, settings, seed, run_dir, resume, accelerator,
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
    yield from optimise("hifigan", networks, loader, settings, seed, run_dir, resume, accelerator, model.device)


TRAINERS = {"vae": train_vae, "clap": train_clap, "ldm": train_ldm, "hifigan": train_hifigan}
