"""Choice of the device and the precision, in one place."""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator


SMALL = 2**35  # parameters x positions of latents below which one thread is faster: up to four clips of `tiny`
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the half precisions, as Accelerate names them


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name; "auto" is the first available of cuda, mps and cpu.

    Raises ValueError if this machine has no such device.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as fault:  # no such device, or torch was built without it
            raise ValueError(f"no device {name!r} here: choose auto, cpu, cuda or mps") from fault
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def machine_kind(device: torch.device) -> str:
    """The kind of a machine, as far as results depend on it: the name of its GPU, or what its CPU multiplies fast."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU {'with' if pick_precision('cpu') == 'bf16' else 'without'} fast bfloat16"
    return device.type


@lru_cache(maxsize=4)
def pick_precision(device_type: str) -> str:
    """The fastest precision of a device, as Accelerate names it: "bf16", "fp16" or "no" (float32).

    A GPU multiplies bfloat16 from compute capability 8.0 on (Ampere), and only float16 with 7.x (Volta, Turing: a T4).
    On a CPU it is measured, since some emulate bfloat16: "bf16" if a matrix product takes at most three quarters of
    float32's time. In hardware it takes about half.
    """
    if device_type == "cuda":
        major, _ = torch.cuda.get_device_capability()
        return "bf16" if major >= 8 else "fp16" if major == 7 else "no"
    if device_type != "cpu":
        return "no"

    best = {torch.bfloat16: math.inf, torch.float32: math.inf}  # seconds
    for _ in range(12):  # alternating, so that other load on the machine slows both
        for dtype in best:
            a = torch.ones(512, 512, dtype=dtype)
            start = time.perf_counter()
            a @ a
            best[dtype] = min(best[dtype], time.perf_counter() - start)
        if best[torch.bfloat16] > 10 * best[torch.float32]:  # emulated
            break
    return "bf16" if best[torch.bfloat16] < 0.75 * best[torch.float32] else "no"


def allow_tf32(device_type: str) -> None:
    """Let a GPU from Ampere on multiply float32 in TF32, which rounds to 10 bits and is up to 8 times as fast."""
    if device_type == "cuda":
        torch.set_float32_matmul_precision("high")  # convolutions may do so by default


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the context a GPU multiplies float32 without TF32: two ways to one result then agree to about 1e-5."""
    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def fitting_threads(network: nn.Module, positions: int, device: torch.device) -> Iterator[None]:
    """Within the context a CPU computes with one thread if the work is SMALL, else with all threads that torch has.

    The work is the number of parameters of `network` times the `positions` of all latents. It does not depend on what
    else the machine does, so the same seed gives the same sound. Measured in docs/speed.md.
    """
    threads = torch.get_num_threads()
    small = sum(p.numel() for p in network.parameters()) * positions < SMALL
    if device.type == "cpu" and small and threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def synchronize(device: torch.device | str) -> None:
    """Wait until a device has finished its work, before its clock is read or what it copies is used."""
    if (kind := torch.device(device).type) != "cpu":
        (torch.cuda if kind == "cuda" else torch.mps).synchronize()


def copy_to_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors to the CPU, contiguous, with one wait for all of them; those of the CPU are not copied."""
    copies = {k: v.detach().contiguous().to("cpu", non_blocking=True) for k, v in tensors.items()}
    for device in {v.device for v in tensors.values()}:
        synchronize(device)
    return copies


def feeding(device: torch.device) -> dict[str, int | bool]:
    """The settings with which a `DataLoader` feeds a device: a GPU from processes of its own, from pinned memory."""
    if device.type != "cuda":
        return {"num_workers": 0, "pin_memory": False}
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return {"num_workers": min(4, cores), "pin_memory": True}


def pick_accelerator(device: torch.device | str, precision: str | None = None) -> "Accelerator":
    """The Accelerator of this process; it keeps an earlier one's settings and the precision of `accelerate launch`.

    precision: that of the run to resume; None: `pick_precision`. In fp16 every `Learner` scales its own loss. Raises
    ValueError where Accelerate is configured to share the weights among processes: shards are not saved.
    """
    from accelerate import Accelerator
    from accelerate.state import is_initialized
    from accelerate.utils import DataLoaderConfiguration, DistributedType, InitProcessGroupKwargs

    device, settings = torch.device(device), {}
    allow_tf32(device.type)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Accelerate takes the current one
    if not is_initialized():
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # set by accelerate launch
        precision = launched or precision or pick_precision(device.type)
        waits = InitProcessGroupKwargs(timeout=timedelta(days=1))  # while the main process renders the clips
        settings = {"cpu": device.type == "cpu", "mixed_precision": precision, "kwargs_handlers": [waits]}
    batches = DataLoaderConfiguration(split_batches=True, non_blocking=True)
    accelerator = Accelerator(dataloader_config=batches, **settings)
    accelerator.scaler = None
    if accelerator.distributed_type in {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}:
        raise ValueError(
            f"training with {accelerator.distributed_type.value} is not supported, its shards are not saved: take "
            "launch/bf16.yaml, since the published U-Net fits on every GPU"
        )
    return accelerator


def is_main_process() -> bool:
    """Whether this is the main process; true also of a process launched alone."""
    from accelerate.state import PartialState, is_initialized

    return not is_initialized() or PartialState().is_main_process
