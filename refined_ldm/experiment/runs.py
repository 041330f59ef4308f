"""Carry out a run of the plan: train its arm, evaluate its sounds, and write both tables beside those of other runs.

Notebook: 06
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from refined_ldm.base.files import atomic_write
from refined_ldm.data.batches import loader
from refined_ldm.devices import synchronize
from refined_ldm.durable.csv_log import CsvLogger
from refined_ldm.evaluation.metrics import share
from refined_ldm.experiment.arms import BRANCH, Arm, Run
from refined_ldm.experiment.protocol import GRID, Experiment
from refined_ldm.experiment.statistics import mean_errors
from refined_ldm.training.loop import Step, stable_steps
from refined_ldm.training.pipeline import accelerator_of
from refined_ldm.training.stages import train_ldm


def eval_steps(max_steps: int, count: int = 12) -> set[int]:
    """Iterations at which the noise error is measured: nearly even in their logarithm, the last one included."""
    return set(np.geomspace(max(1, max_steps // 100), max_steps, count).round().astype(int).tolist())


def run_arm(
    experiment: Experiment,
    run: Run,
    out: str | Path,
    resume: bool = False,
    evaluate: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> dict:
    """Train and evaluate one run -> its record, which is written to out/NAME.json beside the run's tables.

    NAME-steps.csv: the training loss, mean of every 10 iterations; NAME.csv: the noise error at GRID, at `eval_steps`
    (of a branch: at its end); NAME-classes.csv: the classes found in every clip; NAME-details.csv: the share of
    captions with each detail right. A finished run is not repeated, an interrupted one continues from its checkpoint,
    and one with the schedule "wsd" branches off the longest trunk of its arm and seed. Where only the guidance of its
    arm has changed, its sounds are made and evaluated again. Raises ValueError where the record is of another arm.
    """
    name, arm, seed, max_steps = run.name, run.arm, run.seed, run.iterations
    out, run_dir = Path(out), experiment.folder / "runs" / name
    kept = out / f"{name}.json"
    if kept.is_file():
        record = json.loads(kept.read_text())
        _check_same_training(record, arm, kept)
        if evaluate and arm.guidance != record["arm"]["guidance"]:
            record |= {"arm": asdict(arm), **_evaluate_sounds(experiment, experiment.trained(run), out / name)}
            _write_record(record, kept)
        return record
    out.mkdir(parents=True, exist_ok=True)
    if arm.lr_schedule == "wsd" and not (run_dir / "ldm").is_dir():
        _branch_off(experiment, run, run_dir, on_step)
        resume = True
    model, rows, seconds = _trained(experiment, run, run_dir, resume, on_step)
    record = {"name": name, "label": run.label, "part": run.part, "seed": seed, "iterations": max_steps,
              "seconds": round(seconds, 1), **mean_errors(pd.DataFrame(rows[-len(GRID):])),
              "arm": asdict(arm), "card": asdict(experiment.card(run, model))}  # fmt: skip
    if evaluate:
        record |= _evaluate_sounds(experiment, model, out / name)
    model.save_part("ldm", run_dir)
    if max_steps:
        _write(_thinned(pd.read_csv(run_dir / "steps.csv")), out / f"{name}-steps.csv")
    _write(pd.DataFrame(rows), out / f"{name}.csv")
    _write_record(record, kept)
    return record


def iteration_seconds(experiment: Experiment, arms: dict[str, Arm], rounds: int = 20, warm: int = 3) -> list[dict]:
    """Time iterations of several arms in turn, so that a disturbance affects all of them -> rows for a table.

    A row an arm: {"label", "seconds", "times_the_first"}, medians of `rounds` after `warm` others.
    """
    steps = {}
    for label, arm in arms.items():
        model, examples = experiment.model(arm, 0, warm + rounds)
        steps[label] = train_ldm(model, loader(examples, model.config.training["ldm"].batch_size, 0), seed=0)
    times = []
    for _ in range(warm + rounds):
        row = {}
        for label, iterations in steps.items():
            synchronize(experiment.device)
            begin = time.perf_counter()
            next(iterations)
            synchronize(experiment.device)  # the update of the weights included
            row[label] = time.perf_counter() - begin
        times.append(row)
    table = pd.DataFrame(times[warm:])
    factors = table.div(table.iloc[:, 0], axis=0).median()
    return [{"label": label, "seconds": float(table[label].median()), "times_the_first": float(factors[label])}
            for label in arms]  # fmt: skip


def _check_same_training(record, arm, path):
    """Raise ValueError, naming the differences, unless a record is of this arm, with any guidance."""
    was = asdict(replace(Arm.from_record(record["arm"]), guidance=arm.guidance))
    if different := [f"{k}: {was[k]} there, {v} here" for k, v in asdict(arm).items() if was[k] != v]:
        raise ValueError(f"{path} is of an arm with other settings ({'; '.join(different)}): move its files away, or "
                         "write to another folder")  # fmt: skip


def _evaluate_sounds(experiment, model, stem):
    """Evaluate the sounds of a model, and write the classes found in every clip and the details as CSV -> measures."""
    begin = time.perf_counter()
    measures, result = experiment.quality(model)
    classes = pd.DataFrame(result.rows)[["id", "kind", "labels", "predicted", "recall"]]
    _write(classes, stem.with_name(f"{stem.name}-classes.csv"))
    details = [{"detail": name, **share(right)} for name, right in experiment.details(model).items() if len(right)]
    _write(pd.DataFrame(details), stem.with_name(f"{stem.name}-details.csv"))
    return measures | {"judged": len(result.rows), "judging_seconds": round(time.perf_counter() - begin, 1)}


def _write_record(record, path):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1))


def _branch_off(experiment, run, run_dir, on_step):
    """Train a run up to its decay, from the longest trunk that is not longer, and copy the trunk to run_dir.

    Until its rate falls, a run is the same at every length: the runs of one arm and seed share their beginnings.
    """
    stable = stable_steps(run.iterations)
    trunks = experiment.folder / "trunks" / f"{run.label}-{run.seed}".replace(", ", "-")
    trunk = trunks / f"{stable:07d}"
    shorter = sorted(path for path in trunks.glob("[0-9]*") if path.name < trunk.name)
    if shorter and not trunk.is_dir():
        _copy(shorter[-1], trunk)
    steady = replace(run, arm=replace(run.arm, lr_schedule="constant"), iterations=stable)
    _trained(experiment, steady, trunk, True, on_step)
    _copy(trunk, run_dir)


def _copy(source, target):
    with atomic_write(target, holds=".*") as temporary:
        shutil.copytree(source, temporary)


def _trained(experiment, run, run_dir, resume, on_step):
    """Train the model of a run -> the model, the noise errors on the way and at the end, seconds."""
    accelerator = accelerator_of(run_dir, experiment.device, resume)
    model, examples = experiment.model(run.arm, run.seed, run.iterations)
    errors = run_dir / "errors.csv"
    rows = pd.read_csv(errors).to_dict("records") if resume and errors.is_file() else []
    if not rows and model.gaussian is not None:  # the U-Net's last layer begins at zero: the linear denoiser alone
        rows = _error_rows(experiment.noise_error(model), 0, 0.0)
    if not run.iterations:
        return model, rows, 0.0
    at = set() if run.label.endswith(BRANCH) else eval_steps(run.iterations)
    seconds = rows[-1]["seconds"] if rows else 0.0
    batches = loader(examples, model.config.training["ldm"].batch_size, run.seed)
    steps = train_ldm(model, batches, seed=run.seed, run_dir=run_dir, resume=resume, accelerator=accelerator)
    with CsvLogger(run_dir / "steps.csv", resume) as write:
        for step in steps:
            write(step)
            rows = [row for row in rows if row["step"] < step.index]  # those after the checkpoint are measured again
            seconds += step.seconds
            if step.index in at and step.index < run.iterations:
                with step.averaged():
                    rows += _error_rows(experiment.noise_error(model), step.index, seconds)
                model.unet.train()
                _write(pd.DataFrame(rows), run_dir / "errors.csv")
            if on_step:
                on_step(step)
    seconds = float(pd.read_csv(run_dir / "steps.csv")["seconds"].sum())
    return model, rows + _error_rows(experiment.noise_error(model), run.iterations, seconds), seconds


def _error_rows(errors, step, seconds):
    return [{"step": step, "seconds": round(seconds, 2), "t": t, "error": float(f"{e:.6g}")}
            for t, e in zip(GRID, errors, strict=True)]  # fmt: skip


def _thinned(table, every=10):
    """Means over `every` iterations, which is enough for a curve."""
    groups = (table["step"] - 1) // every
    step, loss, seconds = (table[column].groupby(groups) for column in ("step", "loss", "seconds"))
    return pd.DataFrame({"step": step.max(), "loss": loss.mean().round(6), "seconds": seconds.sum().round(3)})


def _write(table, path):
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False)
