"""Where to compute and in which precision, decided in one place."""

import math
import os
import time
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


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


@lru_cache(maxsize=4)
def pick_precision(device_type: str) -> str:
    """The faster precision of a device, as Accelerate names it: "bf16" or "no" (float32).

    On a CPU it is measured, since some emulate bfloat16: "bf16" if a matrix product takes at most three quarters of
    float32's time. In hardware it takes about half.
    """
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
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


def pick_accelerator(device_type: str, precision: str | None = None) -> "Accelerator":
    """The Accelerator of this process; it keeps an earlier one's settings and the precision of `accelerate launch`.

    precision: that of the run to resume; None: `pick_precision`. Raises ValueError for fp16, whose losses would have to
    be scaled, and for FSDP, whose shards are not saved.
    """
    from accelerate import Accelerator
    from accelerate.state import is_initialized
    from accelerate.utils import DataLoaderConfiguration, DistributedType, InitProcessGroupKwargs

    settings = {}
    if not is_initialized():
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # set by accelerate launch
        precision = launched or precision or pick_precision(device_type)
        waits = InitProcessGroupKwargs(timeout=timedelta(days=1))  # while the main process renders the clips
        settings = {"cpu": device_type == "cpu", "mixed_precision": precision, "kwargs_handlers": [waits]}
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True), **settings)
    if accelerator.mixed_precision == "fp16":
        raise ValueError("training in fp16 is not supported: launch with --mixed_precision bf16 or no")
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "training with FSDP is not supported, its shards are not saved: take launch/bf16.yaml, since the published "
            "U-Net fits on every GPU"
        )
    return accelerator


def is_main_process() -> bool:
    """Whether this is the main process; true also of a process launched alone."""
    from accelerate.state import PartialState, is_initialized

    return not is_initialized() or PartialState().is_main_process
