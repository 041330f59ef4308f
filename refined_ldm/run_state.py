"""The state of a training run on disk: weights, averages, optimiser and step, whole or not at all."""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

KEPT = 2  # checkpoints of a run: the last, and the one before in case the last is damaged


def save_run(run_dir, stage, learners, index, told):
    """Write run_dir/stage/step-NNNNNNN/ under a temporary name, flush it to disk, rename it, and drop the oldest."""
    folder = Path(run_dir) / stage
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"step-{index:07d}", folder / f"writing-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for learner in learners:
        for name, tensors in _tensors(learner).items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": index, **told}, indent=1))
    for path in temporary.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    for left in folder.glob("writing-*"):  # of a run that was killed while saving
        shutil.rmtree(left, ignore_errors=True)


def refuse_old(run_dir, stage):
    """Raise FileExistsError if run_dir/stage holds checkpoints, which a run from the start would mix with its own."""
    old = sorted((Path(run_dir) / stage).glob("step-*"))
    if old:
        raise FileExistsError(f"{old[-1]} is there already: resume that run, remove its folder, or take another one")


def load_run(run_dir, stage, learners):
    """Put the newest whole checkpoint of run_dir/stage into the learners -> its step, 0 if there is none."""
    for folder in sorted((Path(run_dir) / stage).glob("step-*"), reverse=True):
        try:
            step = json.loads((folder / "state.json").read_text())["step"]
            found = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
            for learner in learners:
                _restore(learner, found)
        except (OSError, ValueError, KeyError, SafetensorError) as fault:
            print(f"{folder} is damaged ({fault}); trying the checkpoint before it")
            continue
        return step
    return 0


def _tensors(learner):
    """{file name: {key: tensor}}: the network, its average, and each optimiser's state as "parameter.key"."""
    files = {learner.name: learner.bare.state_dict()}
    if learner.average is not None:
        files[f"{learner.name}-average"] = learner.average
    for number, optimizer in enumerate(learner.optimizers):
        state = optimizer.state_dict()["state"]
        files[f"{learner.name}-optimizer{number}"] = {f"{p}.{k}": v for p, s in state.items() for k, v in s.items()}
    return files


def _restore(learner, found):
    learner.bare.load_state_dict(found[learner.name])
    if learner.average is not None:
        learner.average = {k: v.to(learner.average[k].device) for k, v in found[f"{learner.name}-average"].items()}
    for number, optimizer in enumerate(learner.optimizers):
        state = {}
        for name, value in found[f"{learner.name}-optimizer{number}"].items():
            parameter, key = name.split(".", 1)
            state.setdefault(int(parameter), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
