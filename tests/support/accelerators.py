"""Accelerators for tests: a process has one, which keeps its first device and precision."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from refined_ldm.devices import pick_accelerator


def forget_accelerators() -> None:
    """The next Accelerator chooses device and precision anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def fp16_on_the_cpu() -> Iterator[Accelerator]:
    """An Accelerator that trains in fp16 on the CPU, which Accelerate itself allows on a GPU only."""
    forget_accelerators()
    try:
        accelerator = pick_accelerator("cpu", "no")
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        yield accelerator
    finally:
        forget_accelerators()
