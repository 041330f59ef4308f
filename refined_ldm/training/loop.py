"""One optimisation step at a time: the loop that all stages share, its learning rate, and what it saves.

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
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather, gather_object

from refined_ldm.devices import pick_accelerator
from refined_ldm.durable.loss_guard import SpikeWatch
from refined_ldm.durable.run_state import drop_others, last_checkpoint, load_run, refuse_old, save_run
from refined_ldm.durable.signals import Stopped, defer_signals
from refined_ldm.integers import whole_seed
from refined_ldm.randomness import RankGenerator, step_seed
from refined_ldm.training.muon import Muon, split_parameters

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
        norm = accelerator.clip_grad_norm_(self.bare.parameters(), self.settings.max_grad_norm or math.inf)
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
    if index > settings.disc_start:
        return settings.disc_start, settings.max_steps, settings.disc_lr or settings.lr
    return 0, min(settings.disc_start, settings.max_steps), settings.lr


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
    if generator.world_size == 1:
        return own
    rows = list(gather(own.detach()).chunk(generator.world_size))
    rows[generator.rank] = own.clone()
    rows[generator.rank].register_hook(lambda gradient: generator.world_size * gradient)  # of which the mean will be taken
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
    accelerator, seed = accelerator or pick_accelerator(torch.device(device).type), whole_seed(seed)
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
            with defer_signals() as signals:
                batch, lr = next(batches), learning_rate(index, settings)
                waited = time.perf_counter() - start
                if index == settings.disc_start + 1 > 1:
                    for learner in learners:
                        learner.begin_phase()
                with torch.random.fork_rng():
                    torch.manual_seed(step_seed(seed, index) + accelerator.process_index)  # of dropout
                    generator = RankGenerator(accelerator.process_index, shares).manual_seed(step_seed(seed, index))
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
