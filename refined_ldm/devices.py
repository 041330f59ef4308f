"""Where to compute and in which precision, decided in one place."""

import math
import os
import time
from datetime import timedelta
from functools import lru_cache

import torch


def pick_device(name="auto"):
    """"auto" takes the first there is of cuda, mps, cpu; any other name must be a device of this machine."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as fault:  # no such device, or torch was built without it
            raise ValueError(f"no device {name!r} here: choose auto, cpu, cuda or mps") from fault
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@lru_cache(maxsize=4)
def pick_precision(device_type):
    """"bf16" where the device multiplies it well, else "no" (float32): Accelerate's names for mixed precision.

    On a CPU that is measured, since some emulate bfloat16: it must take at most three quarters of float32's time. Where
    it is computed in hardware that is about half, less in a quiet moment and more in a busy one.
    """
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device_type != "cpu":
        return "no"

    best = {torch.bfloat16: math.inf, torch.float32: math.inf}  # seconds
    for _ in range(12):  # in turn, so that a busy moment does not fall on one of them alone
        for dtype in best:
            a = torch.ones(512, 512, dtype=dtype)
            start = time.perf_counter()
            a @ a
            best[dtype] = min(best[dtype], time.perf_counter() - start)
        if best[torch.bfloat16] > 10 * best[torch.float32]:  # emulated: no busy moment is so long
            break
    return "bf16" if best[torch.bfloat16] < 0.75 * best[torch.float32] else "no"


def pick_accelerator(device_type, precision=None):
    """The Accelerator of this process; an earlier one's settings are kept, and the precision of `accelerate launch`.

    precision: that of a run which goes on, None to measure. Raises ValueError for fp16, whose losses would have to be
    scaled, and for FSDP, whose shards `run_state` would have to gather.
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
        raise ValueError("fp16 is not trained in: launch with --mixed_precision bf16 or no")
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("FSDP is not trained with yet, its shards are not saved: take launch/bf16.yaml, since the "
                         "published U-Net fits on every GPU")  # fmt: skip
    return accelerator


def is_main_process():
    """Whether this process speaks for all, true also of one that was not launched with others."""
    from accelerate.state import PartialState, is_initialized

    return not is_initialized() or PartialState().is_main_process
