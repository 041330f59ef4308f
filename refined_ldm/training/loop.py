"""The training loop that all stages share: one optimisation step at a time, its learning rate and its checkpoints.

Every random number of a step (noise, timesteps, dropped captions, dropout) is drawn from a generator seeded by
(seed, step), and the k-th batch depends on (seed, k) alone. A checkpoint therefore holds weights, optimisers, averages
and the step number, and a resumed run equals an uninterrupted one. Accelerate places modules and gradients. Each
process takes its part of the batch, and of the random numbers that a single process would draw for the whole batch.

Notebook: 03
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
from accelerate import Accelerator
from accelerate.utils import gather, gather_object
from torch import nn
from torch.utils.data import DataLoader

from refined_ldm.base.integers import whole_seed
from refined_ldm.config import StageConfig
from refined_ldm.devices import pick_accelerator
from refined_ldm.durable.loss_guard import SpikeWatch
from refined_ldm.durable.run_state import drop_others, last_checkpoint, load_run, refuse_old, save_run
from refined_ldm.durable.signals import Stopped, defer_signals
from refined_ldm.randomness import RankGenerator, step_seed
from refined_ldm.training.muon import Muon, split_parameters

log = logging.getLogger(__name__)

DECAY_SHARE = 0.2  # of the steps, with "wsd"; a longer decay gains little (Hägele et al. 2024)
Losses = Callable[[nn.Module, dict, torch.Generator, int], dict[str, torch.Tensor]]  # see Learner


class RunOptions(TypedDict, total=False):
    """The arguments of every training beside its data and its settings."""

    seed: int  # of all random numbers (0)
    run_dir: str | Path | None  # folder of the checkpoints; None: there are none
    resume: bool  # continue from the last checkpoint (False)
    accelerator: Accelerator | None  # None: `pick_accelerator` of the device


@dataclass(frozen=True)
class Step:
    """The result of one optimisation step. Within `step.averaged()` the network has its averaged weights."""

    index: int  # from 1
    loss: float
    losses: dict[str, float]
    lr: float
    seconds: float
    waited: float = 0.0  # seconds of these spent loading the batch
    averaged: Callable = field(default=nullcontext, repr=False, compare=False)


class Learner:
    """One network under training: its optimisers, its running average and its loss.

    losses(network, batch, generator, index of the step) -> dict of scalars with the key "loss".
    """

    def __init__(self, name: str, network: nn.Module, losses: Losses, settings: StageConfig, accelerator: Accelerator):
        self.name, self.losses, self.settings = name, losses, settings
        self.bare = network
        self.network = accelerator.prepare_model(network)
        matrices, rest = split_parameters(network) if settings.optimizer == "muon" else ([], network.parameters())
        rest = list(rest)
        fused = all(p.device.type in ("cpu", "cuda") for p in rest)  # one pass over each tensor: a third of the time
        self.optimizers = [
            torch.optim.AdamW(rest, settings.lr, settings.betas, weight_decay=settings.weight_decay, fused=fused)
        ]
        if matrices:
            dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
            self.optimizers.append(Muon(matrices, settings.lr, weight_decay=settings.weight_decay, dtype=dtype))
        self.average = {k: v.detach().clone() for k, v in network.state_dict().items()} if settings.ema_decay else None
        half = accelerator.mixed_precision == "fp16"  # its small gradients would be 0: the loss is scaled up for them
        self.scaler, self.overflows = torch.amp.GradScaler(accelerator.device.type) if half else None, 0

    def begin_phase(self) -> None:
        """Continue from the averaged weights with fresh optimiser states, before the loss changes."""
        self.finish()
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def update(
        self, batch: dict, generator: torch.Generator, lr: float, index: int, accelerator: Accelerator
    ) -> dict[str, float]:
        """Take one optimisation step -> the losses before it, {name: mean over the processes}.

        In fp16 a step whose scaled gradient overflows is skipped and counted as "overflows", and the scale is halved.
        Raises FloatingPointError, before any weight changes, if the loss or its gradient is not finite otherwise.
        """
        with accelerator.autocast():
            losses = self.losses(self.network, batch, generator, index)
        if not losses["loss"].requires_grad:  # the network is not trained in this phase
            return _read(losses) | self._counted()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = lr
        accelerator.backward(losses["loss"] if self.scaler is None else self.scaler.scale(losses["loss"]))
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        norm = accelerator.clip_grad_norm_(self.bare.parameters(), self.settings.max_grad_norm or math.inf)
        metrics = _read({**losses, "gradient": norm}, accelerator)  # the only time that the CPU waits for the device
        overflow = self.scaler is not None and self._overflows(metrics)
        for name, value in metrics.items():
            if not (math.isfinite(value) or overflow):
                clips = ", ".join(map(str, gather_object(list(batch.get("id", ())))))
                raise FloatingPointError(f"the {self.name} {name} is {value} at step {index}, clips {clips}")
        del metrics["gradient"]
        if not overflow:  # GradScaler.step would skip it too, but wait for the device to say so
            for optimizer in self.optimizers:
                optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
        if self.average is not None and not overflow:  # Karras et al. 2024: the horizon grows with the run
            elapsed = index - phase(index, self.settings)[0]
            decay = min(self.settings.ema_decay, elapsed / (elapsed + 10))
            floating = {name: value for name, value in self.bare.state_dict().items() if value.is_floating_point()}
            torch._foreach_lerp_([self.average[name] for name in floating], [*floating.values()], 1 - decay)
        return metrics | self._counted()

    def _overflows(self, metrics):
        """Return whether only the gradient is not finite, and a smaller scale could make it so; such steps count."""
        found = all(math.isfinite(v) == (k != "gradient") for k, v in metrics.items()) and self.scaler.get_scale() > 1
        self.overflows += found
        return found

    def _counted(self):
        return {} if self.scaler is None else {"overflows": float(self.overflows)}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the network its averaged weights within the context, and those under training after it."""
        if self.average is None:
            yield
            return
        raw = {k: v.detach().clone() for k, v in self.bare.state_dict().items()}
        self.bare.load_state_dict(self.average)
        try:
            yield
        finally:
            self.bare.load_state_dict(raw)

    def finish(self) -> None:
        """Give the network its averaged weights for good."""
        if self.average is not None:
            self.bare.load_state_dict(self.average)


def phase(index: int, settings: StageConfig) -> tuple[int, int, float]:
    """Return (start, end, peak learning rate) of the phase of step `index`: before discriminators join, or after."""
    if index > settings.disc_start:
        return settings.disc_start, settings.max_steps, settings.disc_lr or settings.lr
    return 0, min(settings.disc_start, settings.max_steps), settings.lr


def stable_steps(steps: int) -> int:
    """Return how many of `steps` steps, warm-up included, come before the decay of "wsd"."""
    return steps - round(DECAY_SHARE * steps)


def learning_rate(index: int, settings: StageConfig) -> float:
    """Return the learning rate of step `index`: in each phase a linear warm-up, then as `lr_schedule` says.

    "cosine": half a cosine to zero (Loshchilov & Hutter 2017); "wsd", warmup-stable-decay: constant, then
    1 - sqrt(share of the decay) (Hu et al. 2024; Hägele et al. 2024). Before its decay a rate of "wsd" does not depend
    on the length of the run.
    """
    start, end, peak = phase(index, settings)
    elapsed = index - start
    warm = min(1.0, elapsed / max(1, settings.warmup_steps))
    if settings.lr_schedule == "constant":
        return peak * warm
    if settings.lr_schedule == "wsd":
        stable = stable_steps(end - start)
        fallen = max(0, elapsed - 1 - stable) / max(1, end - start - stable)
        return peak * warm * (1 - fallen**0.5)
    return peak * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, (elapsed - 1) / (end - start))))


def _read(metrics, accelerator=None):
    """Return {name: number} of scalars, with one wait; with an accelerator the means over its processes."""
    values = torch.stack([value.detach().float() for value in metrics.values()])
    if accelerator is not None and accelerator.num_processes > 1:
        values = accelerator.reduce(values, "mean")
    return dict(zip(metrics, values.tolist(), strict=True))


def _rows_of_all(own, generator):
    """Return the rows (B, D) of all processes stacked; only those of this process carry a gradient."""
    if generator.world_size == 1:
        return own
    rows = list(gather(own.detach()).chunk(generator.world_size))
    rows[generator.rank] = own.clone()
    rows[generator.rank].register_hook(lambda gradient: generator.world_size * gradient)  # undoes the mean taken later
    return torch.cat(rows)


def _any_signal(waiting, accelerator):
    """Return the signal that any process received since the last step, 0 without one."""
    number = max(waiting, default=0)
    waiting.clear()
    if accelerator.num_processes > 1:
        number = int(accelerator.reduce(torch.tensor(number, device=accelerator.device), "max"))
    return number


def optimise(
    stage: str,
    networks: dict[str, tuple[nn.Module, Callable]],
    loader: DataLoader,
    settings: StageConfig,
    seed: int = 0,
    run_dir: str | Path | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Step]:
    """Train the networks of a stage and yield every Step; a checkpoint is written after the Step is yielded.

    networks: {name: (module, losses)}, updated in this order in every step; losses as in `Learner`.
    Raises ValueError for a batch that the processes cannot share equally, FileExistsError for a run_dir with
    checkpoints of the stage without `resume`, FloatingPointError for a non-finite loss, `Stopped` after a signal.

    Notebook: 03
    """
    accelerator, seed = accelerator or pick_accelerator(device), whole_seed(seed)
    shares, main = accelerator.num_processes, accelerator.is_main_process
    if settings.batch_size % shares:
        raise ValueError(
            f"batch_size {settings.batch_size} cannot be shared by {shares} processes: "
            f"take {-(-settings.batch_size // shares) * shares}"
        )
    learners = [Learner(n, module.train(), losses, settings, accelerator) for n, (module, losses) in networks.items()]
    if run_dir and not resume:
        refuse_old(run_dir, stage)
    done = load_run(run_dir, stage, learners, seed) if run_dir and resume else 0
    if done and main:
        drop_others(run_dir, stage, done)  # a run that was killed right after saving did not remove them
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
                        metrics = learner.update(batch, generator, lr, index, accelerator)
                        prefix = "" if len(learners) == 1 else f"{learner.name}/"
                        losses |= {f"{prefix}{name}": value for name, value in metrics.items()}
                number = _any_signal(signals, accelerator)
            first = next(iter(losses.values())) if "loss" not in losses else losses["loss"]
            if (factor := spike(first)) and main:
                log.warning("%s: the loss of step %d, %.4g, is %.1f times the usual", stage, index, first, factor)
            due = run_dir and (index % settings.save_every == 0 or index == settings.max_steps or number)
            try:
                yield Step(index, first, losses, lr, time.perf_counter() - start, waited, learners[0].averaged)
            finally:  # saved after the yield, so that a log written by the caller reaches every checkpoint
                if due and main:
                    save_run(run_dir, stage, learners, index, about)
            if number:
                accelerator.wait_for_everyone()
                where = f", saved in {last_checkpoint(run_dir, stage)}" if run_dir else ""
                raise Stopped(number, f"stopped after step {index} of {stage}{where}")
        for learner in learners:
            learner.finish()
    except FloatingPointError as fault:
        good = last_checkpoint(run_dir, stage) or "none"
        raise FloatingPointError(
            f"{fault}; last good checkpoint: {good}. Lower the learning rate, or look at these clips"
        ) from fault
    finally:
        for learner in learners:
            accelerator.unwrap_model(learner.network, keep_fp32_wrapper=False)
            learner.bare.eval()
