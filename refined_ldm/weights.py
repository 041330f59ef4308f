"""Weights on disk: one safetensors file for each part of the model, with its settings as JSON in the header."""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from refined_ldm.base.files import atomic_write
from refined_ldm.devices import copy_to_cpu

STEP = ":step"  # suffix of the name of a matrix in 8 bits: the float32 tensor that multiplies its rows
EARLIER_NAMES = {  # pattern: name now
    r"\.reading(?=\.|_norm\.)": ".cross_attention", r"\.nothing$": ".null_token",
    r"^heard(?=\.)": "classifier", r"^narrow(?=\.)": "projection", r"^whole(?=\.)": "context",  # the detail classifier
}  # fmt: skip


def present_names(state: dict[str, Any]) -> dict[str, Any]:
    """Rename, in place, the tensors of a state dict that earlier versions stored under other names -> the dict."""
    for earlier, present in EARLIER_NAMES.items():
        for name in [name for name in state if re.search(earlier, name)]:
            state[re.sub(earlier, present, name)] = state.pop(name)
    return state


def save_weights(
    path: str | Path,
    module: nn.Module | dict[str, Tensor],
    config: Any = None,
    dtype: torch.dtype = torch.float32,
    **metadata: Any,
) -> None:
    """Write the tensors of a module or a dict to `path` in `dtype`, with its settings as JSON in the header.

    config: the part's dataclass of settings; metadata: further entries of the header. An interrupted save leaves the
    earlier file intact. dtype torch.int8: matrices in 8 bits with a step for each row, the rest in float16. 64-bit
    integers are stored in 16 bits where they fit; `read_weights` widens them again. ValueError for another dtype.
    """
    if not (dtype.is_floating_point or dtype == torch.int8):
        raise ValueError(f"dtype must be a floating-point type or torch.int8, got {dtype}")
    state = module if isinstance(module, dict) else module.state_dict()
    tensors = _packed(copy_to_cpu(state), dtype)
    header = {"config": asdict(config) if config is not None else None, **metadata}
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask says; safetensors would make the file private
        save_file(tensors, temporary, metadata={k: json.dumps(v) for k, v in header.items()})
        temporary.chmod(mode)


def rounded(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors that `read_weights` will find in a file of `save_weights`."""
    return _unpacked(_packed(state, dtype))


def _packed(state, dtype):
    """Return the tensors as they are stored. In 8 bits, a row of a matrix is a step of its own times integers."""
    packed = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        if not tensor.is_floating_point():
            fits = tensor.dtype == torch.int64 and tensor.numel() and tensor.abs().max() < 2**15
            packed[name] = tensor.short() if fits else tensor
        elif dtype == torch.int8 and tensor.ndim > 1:
            largest = tensor.float().flatten(1).abs().amax(1).clamp(min=1e-12).view(-1, *(1 for _ in tensor.shape[1:]))
            packed[name] = (127 * tensor.float() / largest).round().to(torch.int8)
            packed[name + STEP] = largest / 127
        else:
            packed[name] = tensor.to(torch.float16 if dtype == torch.int8 else dtype)
    return packed


def _unpacked(tensors):
    """Return stored tensors as they are used: floating-point ones as float32, 16-bit integers as 64-bit ones."""
    state = {}
    for name, tensor in tensors.items():
        if name.endswith(STEP):
            continue
        if (step := tensors.get(name + STEP)) is not None:
            tensor = tensor * step
        wide = tensor.float() if tensor.is_floating_point() else tensor
        state[name] = wide.long() if wide.dtype == torch.int16 else wide
    return state


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_weights` -> (tensors by name, floating-point ones as float32; the header's entries).

    Raises FileNotFoundError if there is no file, ValueError if it is no complete safetensors file.
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
    return present_names(_unpacked(tensors)), metadata


def is_ours(path: str | Path) -> bool:
    """Whether `save_weights` wrote this file: safetensors with settings in its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return "config" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


class SkipInit(TorchFunctionMode):
    """Within this context modules are built without drawing weights: for those whose weights are then loaded."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def load_into(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> nn.Module:
    """Copy a state dict into a module -> the module.

    Raises ValueError naming `source` and the tensors that are missing, unexpected or of another shape.
    """
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    both = sorted(own.keys() & state.keys())
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in both if own[k].shape != state[k].shape]
    integers = [k for k in both if own[k].is_floating_point() and not state[k].is_floating_point()]
    types = [f"{k} {state[k].dtype} for {own[k].dtype}".replace("torch.", "") for k in integers]
    types += [f"{k} without numbers (meta)" for k in both if state[k].is_meta]
    types += [f"{k} sparse for dense" for k in both if state[k].layout != torch.strided]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "of another type": types}
    if any(faults.values()):
        parts = [f"{len(names)} {fault}: {', '.join(names[:5])}" for fault, names in faults.items() if names]
        raise ValueError(f"{source} does not fit {type(module).__name__}: {'; '.join(parts)}")
    module.load_state_dict(state)
    return module


def weights_digest(module: nn.Module | dict[str, Tensor]) -> str:
    """Return a digest of the weights of a module or a state dict, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    state = module if isinstance(module, dict) else module.state_dict()
    for name, value in sorted(copy_to_cpu(state).items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:16]
