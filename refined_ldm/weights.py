"""Our own weights on disk: one safetensors file for each part, with its settings as JSON in the header."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from refined_ldm.files import atomic_write


def save_weights(path, module, config=None, dtype=torch.float32, **metadata):
    """Write a module's (or a dict's) tensors to `path` in `dtype`, with its settings as JSON in the file's header.

    A broken-off save leaves the earlier file as it was. 64-bit integers are stored in 16 bits where they fit;
    `read_weights` widens them again.
    """
    state = module if isinstance(module, dict) else module.state_dict()
    tensors = {k: _packed(v.detach(), dtype).cpu().contiguous() for k, v in state.items()}
    header = {"config": asdict(config) if config is not None else None, **metadata}
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors would let nobody else read the file
        save_file(tensors, temporary, metadata={k: json.dumps(v) for k, v in header.items()})
        temporary.chmod(mode)


def _packed(tensor, dtype):
    if tensor.is_floating_point():
        return tensor.to(dtype)
    fits = tensor.dtype == torch.int64 and tensor.numel() and tensor.abs().max() < 2**15
    return tensor.short() if fits else tensor


def _widened(tensor):
    return tensor.float() if tensor.is_floating_point() else tensor.long() if tensor.dtype == torch.int16 else tensor


def read_weights(path):
    """Read a file of `save_weights` -> (dict of tensors, floating ones as float32; dict of its metadata).

    Raises FileNotFoundError if there is none, ValueError if it is not a whole safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: train them (`refined-ldm train`) or give another path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
        tensors = load(path.read_bytes())  # safetensors 0.8 loses 30 bytes of memory for each get_tensor
    except (SafetensorError, json.JSONDecodeError) as fault:
        raise ValueError(f"{path} is not a whole safetensors file of ours ({fault}): copy or train it again") from fault
    return {k: _widened(v) for k, v in tensors.items()}, metadata


def is_ours(path):
    """Whether `save_weights` wrote this file: safetensors with settings in its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return "config" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load_into(module, state, source):
    """Copy `state` into `module`; missing and unexpected tensors are refused by name, never passed over."""
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    both = sorted(own.keys() & state.keys())
    wrong = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in both if own[k].shape != state[k].shape]
    other = [f"{k} {state[k].dtype} for {own[k].dtype}".replace("torch.", "") for k in both
             if own[k].is_floating_point() and not state[k].is_floating_point()]  # fmt: skip
    if missing or unexpected or wrong or other:
        faults = {"missing": missing, "unexpected": unexpected, "of another shape": wrong, "of another type": other}
        told = "; ".join(f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in faults.items() if names)
        raise ValueError(f"{source} does not fit {type(module).__name__}: {told}")
    module.load_state_dict(state)
    return module
