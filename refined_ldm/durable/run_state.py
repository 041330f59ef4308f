"""The state of a training run on disk: weights, averages, optimiser and step, whole or not at all."""

import json
import re
import shutil
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from refined_ldm.base.files import atomic_write, remove_leftovers, sha256
from refined_ldm.devices import copy_to_cpu
from refined_ldm.weights import load_into, present_names, read_weights

HOLDS = r"state\.json|.+\.safetensors"  # the files of a checkpoint
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)  # of a checkpoint that is read
SCALE_FILE = "checkpoints/ldm/scale.safetensors"  # in a run folder: the latent scale of its U-Net
KEPT = 2  # checkpoints of a run: the last, and the one before in case the last is damaged


def save_run(run_dir: str | Path, stage: str, learners: Sequence[Any], index: int, metadata: dict[str, Any]) -> Path:
    """Write run_dir/stage/step-NNNNNNN/, whole or not at all, and remove the oldest checkpoint -> its path.

    learners: `training.loop.Learner`s. index: the step. metadata: further keys of state.json. Raises FloatingPointError
    for non-finite values, which are not saved, and OSError if it cannot be written.
    """
    folder = Path(run_dir) / stage
    files = {name: copy_to_cpu(tensors) for learner in learners for name, tensors in _tensors(learner).items()}
    odd = [f"{name} {k}" for name, tensors in files.items() for k, v in tensors.items() if not v.isfinite().all()]
    if odd:
        raise FloatingPointError(f"NaN or infinity in {', '.join(odd[:3])} after step {index}, which was not saved")
    with atomic_write(folder / f"step-{index:07d}", HOLDS) as temporary:
        temporary.mkdir()
        digests = {}
        for name, tensors in files.items():
            path = temporary / f"{name}.safetensors"
            save_file(tensors, path)
            digests[name] = sha256(path)
        state = {"step": index, "files": list(files), "sha256": digests, **metadata}
        if scalers := {of.name: of.scaler.state_dict() | {"overflows": of.overflows} for of in learners if of.scaler}:
            state["scalers"] = scalers
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
    drop_others(run_dir, stage, index)
    return folder / f"step-{index:07d}"


def drop_others(run_dir: str | Path, stage: str, index: int) -> None:
    """Remove all checkpoints but that of step `index` and the one before it, and what a killed run left of one."""
    remove_leftovers(Path(run_dir) / stage)
    found = _checkpoints(run_dir, stage)
    kept = [path for path in found if path.name <= f"step-{index:07d}"][-KEPT:]
    for path in set(found) - set(kept):
        shutil.rmtree(path)


def last_checkpoint(run_dir: str | Path | None, stage: str) -> Path | None:
    """The folder of the newest checkpoint, or None."""
    return max(_checkpoints(run_dir, stage), default=None) if run_dir else None


def _checkpoints(run_dir, stage):
    """The folders step-NNNNNNN of a stage, the oldest first; folders of other names do not count."""
    found = (Path(run_dir) / stage).glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{7,}", path.name))


def has_whole_checkpoint(run_dir: str | Path, stage: str) -> bool:
    """Whether a stage has an undamaged checkpoint to resume from."""
    for folder in _checkpoints(run_dir, stage):
        with suppress(*DAMAGE):
            return bool(_read_checkpoint(folder))
    return False


def precision_of(run_dir: str | Path) -> str | None:
    """The precision that a run was trained in; None if no checkpoint records it."""
    for path in Path(run_dir).glob("*/step-*/state.json"):
        with suppress(*DAMAGE):
            if precision := json.loads(path.read_text()).get("precision"):
                return precision
    return None


def refuse_old(run_dir: str | Path, stage: str) -> None:
    """Raise FileExistsError if run_dir/stage holds checkpoints, which a run from the start would mix with its own."""
    if old := last_checkpoint(run_dir, stage):
        raise FileExistsError(
            f"{old} is there already: resume that run (--resume), remove its folder, or give another --run"
        )


def load_run(run_dir: str | Path, stage: str, learners: Sequence[Any], seed: int | None = None) -> int:
    """Load the newest undamaged checkpoint of run_dir/stage into the learners -> its step, 0 if there is none.

    Damaged checkpoints are skipped with a warning. Raises ValueError for other sizes, settings or another seed.
    """
    for folder in reversed(_checkpoints(run_dir, stage)):
        try:
            state, found = _read_checkpoint(folder)
        except DAMAGE as fault:
            warnings.warn(f"{folder} is damaged ({fault}); trying the checkpoint before it", stacklevel=2)
            continue
        wanted = [name for learner in learners for name in _names(learner)]
        if wanted != state["files"]:
            raise ValueError(
                f"{folder} holds {', '.join(state['files'])}, these settings need {', '.join(wanted)}: "
                "resume with the settings the run was started with, or start another run"
            )
        if seed is not None and state.get("seed", seed) != seed:
            raise ValueError(f"{folder} is of seed {state['seed']}, not {seed}: a run goes on with its own")
        for learner in learners:
            _restore(learner, found, folder)
            if learner.scaler and (scaler := state.get("scalers", {}).get(learner.name)):
                learner.overflows = scaler.pop("overflows")
                learner.scaler.load_state_dict(scaler)
        return state["step"]
    return 0


def _read_checkpoint(folder):
    """-> its state, {name of a file: tensors}; one of DAMAGE unless all of it is there, as it was written."""
    state = json.loads((folder / "state.json").read_text())
    return state, {name: _read(folder / f"{name}.safetensors", state) for name in state["files"]}


def _read(path, state):
    """The tensors of a file; ValueError unless it is, byte for byte, the one that was written."""
    digest = state.get("sha256", {}).get(path.stem)  # checkpoints of earlier versions have none
    if digest and digest != sha256(path):
        raise ValueError(f"{path.name} is not what was written: its sha256 is another")
    return present_names(load_file(path))


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


def load_scale(model: Any, run_dir: str | Path) -> bool:
    """Load the latent scale and the linear denoiser of a run's U-Net into the model -> whether the run has them."""
    path = Path(run_dir) / SCALE_FILE
    if not path.is_file():
        return False
    state, _ = read_weights(path)
    model.scale.copy_(state.pop("scale"))
    if model.gaussian is not None:
        load_into(model.gaussian, {name.removeprefix("gaussian."): tensor for name, tensor in state.items()}, path)
    return True
