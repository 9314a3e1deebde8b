"""What a session needs of the hardware: memory, and plans bound to it.

Two kinds: ``cpu.CpuMachine`` links kernels into this process and calls them by address;
``device.DeviceMachine`` goes through tinygrad's device API, for GPUs and whatever else ``DEV``
names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from p2pflop.errors import JobError, ProtocolError
from p2pflop.kernels.plan import Plan, Region


class Memory(Protocol):
    """A run of zeroed bytes on the hardware, which lives as long as the object."""

    @property
    def size_bytes(self) -> int:
        """How many bytes it has; may be 0."""
        ...

    def write(self, offset_bytes: int, data: bytes | memoryview) -> None:
        """Put ``data`` there; it must fit."""

    def read(self, offset_bytes: int, size_bytes: int) -> memoryview:
        """Its bytes, as they are or a copy of them: they hold until the next step."""
        ...


class Bound(Protocol):
    """A plan on its hardware."""

    def run(self) -> None:
        """Call every kernel, in order."""

    def output(self, number: int) -> memoryview:
        """The bytes of a fresh output; they hold until the next run. Raises ProtocolError."""
        ...


class Machine(Protocol):
    """Where works run."""

    def memory(self, size_bytes: int) -> Memory:
        """New memory. Raises JobError if there is none."""
        ...

    def scratch(self, plans: Sequence[Plan]) -> Memory:
        """Scratch for plans that never run at the same time."""
        ...

    def bind(self, plan: Plan, slots: Sequence[Memory], scratch: Memory) -> Bound:
        """``plan`` on these memories. Raises ProtocolError if it does not fit or link."""
        ...


Calls = list[Callable[[], object]]
_MemoryT = TypeVar("_MemoryT", bound=Memory)


def slot_memory(slots: Sequence[_MemoryT], slot: int, size_bytes: int) -> _MemoryT:
    """The memory of a slot that a plan names. Raises ProtocolError if it does not fit."""
    if slot >= len(slots):
        raise ProtocolError(f"plan names slot {slot}, the work has {len(slots)}")
    memory = slots[slot]
    if memory.size_bytes != size_bytes:
        raise ProtocolError(
            f"plan takes slot {slot} for {size_bytes} bytes, the work has {memory.size_bytes}"
        )
    return memory


def output_region(outputs: Sequence[Region], number: int) -> Region:
    """Where output ``number`` lies. Raises ProtocolError."""
    if number >= len(outputs):
        raise ProtocolError(f"plan has no output {number}")
    return outputs[number]


def no_memory(size_bytes: int, error: Exception) -> JobError:
    """What is raised when a buffer cannot be had."""
    return JobError(
        f"no memory for a buffer of {size_bytes} bytes: {error}",
        hint="Ask for a provider with more memory, or make the tensors smaller.",
    )
