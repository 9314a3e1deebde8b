"""A lowered graph as data: kernel binaries, a buffer table, a call list. Never leaves its node.

A plan is what remains of a graph once it is scheduled and compiled: to run it is to call the
kernels one after the other on fixed addresses. A buffer is a slot of the work's param table, a
fresh output, or scratch, which may be shared with every other plan of the worker. ``decode_plan``
checks every number that is not machine code; the code itself is trusted only inside the sandbox.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, ClassVar, Final, Literal

import msgspec

from p2pflop.errors import ProtocolError
from p2pflop.job.limits import MAX_VARIABLES
from p2pflop.job.symbolic import Range
from p2pflop.units import MIB
from p2pflop.wire import U63, Record, decode, encode

PLAN_VERSION: Final = 5
MAX_PLAN_BYTES: Final = 256 * MIB
MAX_KERNELS: Final = 16_384
MAX_KERNEL_BYTES: Final = 16 * MIB
MAX_ARGUMENTS: Final = 62
MAX_BUFFERS: Final = 16_384
MAX_CALLS: Final = 65_536
MAX_THREADS: Final = 1_024
MAX_GRID: Final = 2**31 - 1
MAX_BLOCK: Final = 1_024
MAX_BUFFER_BYTES: Final = 2**40

SCRATCH: Final = -1
FRESH: Final = -2

THREAD: Final = -1
"""Among the scalars of a kernel: the number of the thread."""

Index = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Extent = Annotated[int, msgspec.Meta(ge=1, le=MAX_GRID)]
Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_BUFFER_BYTES)]
Scalar = Annotated[int, msgspec.Meta(ge=THREAD, lt=MAX_VARIABLES)]


class Kernel(Record, frozen=True):
    """One binary of the plan's device with a single function of ``arguments`` pointers.

    For a CPU a relocatable ELF object, or machine code that can run anywhere. After the pointers it
    takes ``scalars``: the values of these Variables of the plan, or the number of the thread
    (``THREAD``), in this order.
    """

    name: Annotated[str, msgspec.Meta(max_length=1024)]
    binary: Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_KERNEL_BYTES)]
    arguments: Annotated[int, msgspec.Meta(ge=1, le=MAX_ARGUMENTS)]
    scalars: Annotated[tuple[Scalar, ...], msgspec.Meta(max_length=MAX_VARIABLES + 1)] = ()

    @property
    def threaded(self) -> bool:
        """Whether it takes the number of a thread."""
        return THREAD in self.scalars


class PlanBuffer(Record, frozen=True):
    """Memory of ``size_bytes``: ``slot`` of the param table, or ``SCRATCH``, or ``FRESH``."""

    slot: Annotated[int, msgspec.Meta(ge=FRESH, le=65_535)]
    size_bytes: Size


class Region(Record, frozen=True):
    """``size_bytes`` of a buffer from ``offset_bytes``."""

    buffer: Index
    offset_bytes: U63
    size_bytes: Size


class Call(Record, frozen=True):
    """Kernel number ``kernel`` on these regions, once for each of ``threads`` (in any order).

    On a device that is no CPU: on a ``grid`` of three dimensions of blocks of ``block`` threads
    each, if it has blocks.
    """

    kernel: Index
    regions: Annotated[tuple[Region, ...], msgspec.Meta(max_length=MAX_ARGUMENTS)]
    threads: Annotated[int, msgspec.Meta(ge=1, le=MAX_THREADS)] = 1
    grid: Annotated[tuple[Extent, ...], msgspec.Meta(max_length=3)] = ()
    block: Annotated[tuple[Extent, ...], msgspec.Meta(max_length=3)] = ()


class Plan(Record, frozen=True):
    """``outputs`` are the fresh outputs in order. ``flop`` and ``touched_bytes`` are what the
    compiled kernels do, recomputation included: the side to compare with the meter. ``ranges`` are
    those of its Variables, for whose highest values these are."""

    MAX_BYTES: ClassVar[int] = MAX_PLAN_BYTES

    version: Literal[5]
    kernels: Annotated[tuple[Kernel, ...], msgspec.Meta(max_length=MAX_KERNELS)]
    buffers: Annotated[tuple[PlanBuffer, ...], msgspec.Meta(max_length=MAX_BUFFERS)]
    calls: Annotated[tuple[Call, ...], msgspec.Meta(max_length=MAX_CALLS)]
    outputs: Annotated[tuple[Region, ...], msgspec.Meta(max_length=MAX_BUFFERS)]
    flop: U63
    touched_bytes: U63
    ranges: Annotated[tuple[Range, ...], msgspec.Meta(max_length=MAX_VARIABLES)] = ()


def encode_plan(plan: Plan) -> bytes:
    """The one encoding of ``plan``. Raises ProtocolError if it breaks a rule of ``decode_plan``."""
    _check(plan)
    return encode(plan)


def decode_plan(data: bytes) -> Plan:
    """A plan whose every index, offset and size fits. Raises ProtocolError."""
    plan = decode(Plan, data)
    _check(plan)
    return plan


def scratch_bytes(plan: Plan) -> int:
    """Memory for the scratch buffers of ``plan``, each rounded up to ``SCRATCH_ALIGN_BYTES``."""
    return sum(align(buffer.size_bytes) for buffer in plan.buffers if buffer.slot == SCRATCH)


SCRATCH_ALIGN_BYTES: Final = 256


def align(size_bytes: int) -> int:
    """``size_bytes`` rounded up to ``SCRATCH_ALIGN_BYTES``."""
    return -(-size_bytes // SCRATCH_ALIGN_BYTES) * SCRATCH_ALIGN_BYTES


def _check(plan: Plan) -> None:
    slots = [buffer.slot for buffer in plan.buffers if buffer.slot >= 0]
    if len(slots) != len(set(slots)):
        raise ProtocolError("plan names a slot twice")
    for kernel in plan.kernels:
        if any(scalar >= len(plan.ranges) for scalar in kernel.scalars):
            raise ProtocolError("a kernel takes a Variable that the plan does not have")
    for number, call in enumerate(plan.calls):
        _check_call(plan, number, call)
    for region in plan.outputs:
        _check_region(plan, region)
        if plan.buffers[region.buffer].slot == SCRATCH:
            raise ProtocolError("plan leaves an output in scratch memory")


def _check_call(plan: Plan, number: int, call: Call) -> None:
    if call.kernel >= len(plan.kernels):
        raise ProtocolError(f"call {number} names kernel {call.kernel}, which is not there")
    kernel = plan.kernels[call.kernel]
    if len(call.regions) != kernel.arguments:
        raise ProtocolError(f"call {number} gives {len(call.regions)} of {kernel.arguments}")
    if call.threads > 1 and not kernel.threaded:
        raise ProtocolError(f"call {number} runs a kernel of one thread {call.threads} times")
    if len(call.grid) not in (0, 3) or len(call.block) not in (0, len(call.grid)):
        raise ProtocolError(f"call {number} has a grid of {len(call.grid)} dimensions")
    if prod(call.block) > MAX_BLOCK:
        raise ProtocolError(f"call {number} has blocks of over {MAX_BLOCK} threads")
    for region in call.regions:
        _check_region(plan, region)


def _check_region(plan: Plan, region: Region) -> None:
    if region.buffer >= len(plan.buffers):
        raise ProtocolError(f"plan names buffer {region.buffer}, which is not there")
    if region.offset_bytes + region.size_bytes > plan.buffers[region.buffer].size_bytes:
        raise ProtocolError(f"plan reaches past the end of buffer {region.buffer}")
