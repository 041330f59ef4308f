"""The state of a training run on disk: weights, averages, optimiser and step, whole or not at all."""

import json
import os
import shutil
import warnings
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from refined_ldm.checkpoints import load_into

KEPT = 2  # checkpoints of a run: the last, and the one before in case the last is damaged


def save_run(run_dir, stage, learners, index, told):
    """Write run_dir/stage/step-NNNNNNN/ under a temporary name, flush it to disk, rename it, and drop the oldest."""
    folder = Path(run_dir) / stage
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"step-{index:07d}", folder / f"writing-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    files = {name: tensors for learner in learners for name, tensors in _tensors(learner).items()}
    for name, tensors in files.items():
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": index, "files": list(files), **told}, indent=1))
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
    """Put the newest whole checkpoint of run_dir/stage into the learners -> its step, 0 if there is none.

    A damaged one is passed over with a warning. Raises ValueError if it is whole but of other sizes or settings.
    """
    for folder in sorted((Path(run_dir) / stage).glob("step-*"), reverse=True):
        try:
            state = json.loads((folder / "state.json").read_text())
            found = {name: load_file(folder / f"{name}.safetensors") for name in state["files"]}
        except (OSError, ValueError, KeyError, SafetensorError) as fault:
            warnings.warn(f"{folder} is damaged ({fault}); trying the checkpoint before it", stacklevel=2)
            continue
        wanted = [name for learner in learners for name in _names(learner)]
        if wanted != state["files"]:
            raise ValueError(
                f"{folder} holds {', '.join(state['files'])}, these settings need {', '.join(wanted)}: "
                "resume with the settings the run was started with, or start another run"
            )
        for learner in learners:
            _restore(learner, found, folder)
        return state["step"]
    return 0


def _names(learner):
    """The files of a learner: the network, its average, and each optimiser."""
    average = [] if learner.average is None else [f"{learner.name}-average"]
    return [learner.name, *average, *(f"{learner.name}-optimizer{n}" for n in range(len(learner.optimizers)))]


def _tensors(learner):
    """{file name: {key: tensor}}; an optimiser's state has the keys "parameter.key"."""
    states = [] if learner.average is None else [learner.average]
    for optimizer in learner.optimizers:
        state = optimizer.state_dict()["state"]
        states.append({f"{p}.{k}": v for p, s in state.items() for k, v in s.items()})
    return dict(zip(_names(learner), [learner.bare.state_dict(), *states], strict=True))


def _restore(learner, found, folder):
    load_into(learner.bare, found[learner.name], folder / f"{learner.name}.safetensors")
    if learner.average is not None:
        learner.average = {k: v.to(learner.average[k].device) for k, v in found[f"{learner.name}-average"].items()}
    for number, optimizer in enumerate(learner.optimizers):
        state = {}
        for name, value in found[f"{learner.name}-optimizer{number}"].items():
            parameter, key = name.split(".", 1)
            state.setdefault(int(parameter), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
