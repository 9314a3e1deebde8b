"""Plans on any device of tinygrad, through its own device API: allocate, copy, call a program.

A device has queues: a call returns before it is done, and a read waits. Nothing here knows which
device it is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

from tinygrad import Device, dtypes
from tinygrad.device import Buffer, TinyELF

from p2pflop.errors import ProtocolError
from p2pflop.kernels.machine import (
    Calls,
    Memory,
    Slice,
    no_memory,
    output_region,
    slot_slice,
)
from p2pflop.kernels.plan import SCRATCH, Kernel, Plan, Region, align, scratch_bytes


class DeviceMemory:
    """A buffer of the device. An empty tensor gets one byte."""

    def __init__(self, device: str, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._device = device
        try:
            self.buffer = Buffer(device, max(size_bytes, 1), dtypes.uint8).allocate()
            self.write(0, bytes(max(size_bytes, 1)))
        # Each device has its own way to say that it is full.
        except Exception as error:
            raise no_memory(size_bytes, error) from error

    def write(self, offset_bytes: int, data: bytes | memoryview) -> None:
        """See Memory."""
        if len(data):
            part = self.opaque(offset_bytes, len(data))
            self.buffer.allocator._copyin(part, memoryview(bytearray(data)))

    def read(self, offset_bytes: int, size_bytes: int) -> memoryview:
        """See Memory. A copy."""
        if not size_bytes:
            return memoryview(b"")
        data = memoryview(bytearray(size_bytes))
        self.buffer.allocator._copyout(data, self.opaque(offset_bytes, size_bytes))
        return data

    def opaque(self, offset_bytes: int, size_bytes: int) -> Any:
        """What a program of the device takes for that part."""
        whole = self.buffer.get_buf(self._device)
        if offset_bytes == 0 and size_bytes == self.buffer.nbytes:
            return whole
        return self.buffer.allocator._offset(whole, size_bytes, offset_bytes)


class DeviceMachine:
    """See Machine."""

    def __init__(self, device: str) -> None:
        self._device = device

    def memory(self, size_bytes: int) -> DeviceMemory:
        """See Machine."""
        return DeviceMemory(self._device, size_bytes)

    def scratch(self, plans: Sequence[Plan]) -> DeviceMemory:
        """See Machine. All share one buffer."""
        return self.memory(max(scratch_bytes(plan) for plan in plans))

    def load(self, plan: Plan) -> _Loaded:
        """See Machine."""
        return _Loaded(self._device, plan)


class _Loaded:
    def __init__(self, device: str, plan: Plan) -> None:
        if any(not call.grid for call in plan.calls):
            raise ProtocolError("the plan is for another kind of device")
        if plan.ranges:
            raise ProtocolError("a plan with Variables is for a CPU")
        self._device = device
        self._plan = plan
        self._programs = [_program(device, kernel) for kernel in plan.kernels]

    def bind(self, slots: Sequence[Slice], scratch: Memory) -> _Bound:
        """See Loaded."""
        held = cast(Sequence[tuple[DeviceMemory, int]], slots)
        shared = cast(DeviceMemory, scratch)
        places: list[tuple[DeviceMemory, int]] = []
        used = 0
        for buffer in self._plan.buffers:
            if buffer.slot == SCRATCH:
                places.append((shared, used))
                used += align(buffer.size_bytes)
            elif buffer.slot >= 0:
                places.append(slot_slice(held, buffer.slot, buffer.size_bytes))
            else:
                places.append((DeviceMemory(self._device, buffer.size_bytes), 0))
        if used > shared.size_bytes:
            raise ProtocolError(f"plan takes {used} bytes of scratch for {shared.size_bytes}")
        return _Bound(self._plan, self._programs, places)


class _Bound:
    def __init__(
        self, plan: Plan, programs: Sequence[Any], places: list[tuple[DeviceMemory, int]]
    ) -> None:
        self._places = places
        self._outputs = plan.outputs
        self._calls: Calls = [
            functools.partial(
                programs[call.kernel],
                *[self._opaque(region) for region in call.regions],
                global_size=call.grid,
                local_size=call.block or None,
            )
            for call in plan.calls
        ]

    def run(self, values: Sequence[int] = ()) -> None:  # noqa: ARG002 - it has no Variables
        for call in self._calls:
            call()

    def output(self, number: int) -> memoryview:
        region = output_region(self._outputs, number)
        memory, offset = self._places[region.buffer]
        return memory.read(offset + region.offset_bytes, region.size_bytes)

    def _opaque(self, region: Region) -> Any:
        memory, offset = self._places[region.buffer]
        return memory.opaque(offset + region.offset_bytes, region.size_bytes)


def _program(device: str, kernel: Kernel) -> Any:
    opened = Device[device]
    signature = tuple((f"data{slot}", slot, dtypes.uint8, ()) for slot in range(kernel.arguments))
    try:
        return opened.runtime(
            TinyELF(kernel.binary, kernel.name, opened.renderer.target, signature)
        )
    # Each driver has its own way to refuse a binary.
    except Exception as error:
        raise ProtocolError(f"kernel {kernel.name[:80]} does not load: {error}") from error
