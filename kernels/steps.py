"""The number of the step as a tensor that a program can use anywhere: ``pf.step``."""

from __future__ import annotations

from typing import Final

from tinygrad import Device, Tensor
from tinygrad.dtype import dtypes
from tinygrad.uop.ops import Ops, UOp

_steps: Final[dict[str, Tensor]] = {}


def step_tensor() -> Tensor:
    """An int32 of no dimensions, one for each default device: 0, and in a job the step's number."""
    device = Device.DEFAULT
    if device not in _steps:
        _steps[device] = Tensor([0], device=device, dtype=dtypes.int32).reshape(())
    return _steps[device]


def is_step(tensor: Tensor) -> bool:
    """Whether ``tensor`` is one of them."""
    return any(tensor is step for step in _steps.values())


def step_buffers() -> set[UOp]:
    """The buffers under them: a graph that reads one depends on the step."""
    found: set[UOp] = set()
    for step in _steps.values():
        found.update(node for node in step.uop.toposort() if node.op is Ops.BUFFER)
    return found
