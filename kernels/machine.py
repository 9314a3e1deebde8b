"""What a session needs of the hardware: memory, and plans bound to it.

Two kinds: ``cpu.CpuMachine`` links kernels into this process and calls them by address;
``device.DeviceMachine`` goes through tinygrad's device API, for GPUs and whatever else ``DEV``
names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Protocol, TypeVar

from p2pflop.errors import JobError, ProtocolError
from p2pflop.kernels.plan import Plan, Region, decode_plan


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


Slice = tuple[Memory, int]
"""Some memory from so many bytes on."""


class Bound(Protocol):
    """A plan on its hardware."""

    def run(self) -> None:
        """Call every kernel, in order."""

    def output(self, number: int) -> memoryview:
        """The bytes of a fresh output; they hold until the next run. Raises ProtocolError."""
        ...


class Loaded(Protocol):
    """A plan whose kernels are where they can be called."""

    def bind(self, slots: Sequence[Slice], scratch: Memory) -> Bound:
        """It on these memories, which costs little. Raises ProtocolError if it does not fit."""
        ...


class Machine(Protocol):
    """Where works run."""

    def memory(self, size_bytes: int) -> Memory:
        """New memory. Raises JobError if there is none."""
        ...

    def scratch(self, plans: Sequence[Plan]) -> Memory:
        """Scratch for plans that never run at the same time."""
        ...

    def load(self, plan: Plan) -> Loaded:
        """``plan`` made ready. Raises ProtocolError if it does not link here."""
        ...


class Shelf:
    """Plans that are ready on a machine: those of one work, for the next may have some of them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._ready: dict[bytes, tuple[Plan, Loaded]] = {}

    def take(
        self, graphs: Set[bytes], plans: Mapping[bytes, bytes]
    ) -> dict[bytes, tuple[Plan, Loaded]]:
        """The plan of each of ``graphs``, made ready; ``plans`` has them encoded.

        Raises ProtocolError if one is missing, malformed or does not link.
        """
        missing = graphs - plans.keys()
        if missing:
            raise ProtocolError(f"no plan for graph {min(missing).hex()}")
        needed = {plans[graph] for graph in graphs}
        self._ready = {encoded: kept for encoded, kept in self._ready.items() if encoded in needed}
        for encoded in needed - self._ready.keys():
            plan = decode_plan(encoded)
            self._ready[encoded] = plan, self.machine.load(plan)
        return {graph: self._ready[plans[graph]] for graph in graphs}


Calls = list[Callable[[], object]]
_MemoryT = TypeVar("_MemoryT", bound=Memory)


def slot_slice(
    slots: Sequence[tuple[_MemoryT, int]], slot: int, size_bytes: int
) -> tuple[_MemoryT, int]:
    """Where a slot that a plan names lies. Raises ProtocolError if it does not fit."""
    if slot >= len(slots):
        raise ProtocolError(f"plan names slot {slot}, there are {len(slots)}")
    memory, offset_bytes = slots[slot]
    if offset_bytes + size_bytes > memory.size_bytes:
        raise ProtocolError(
            f"plan takes slot {slot} for {size_bytes} bytes, there are "
            f"{memory.size_bytes - offset_bytes}"
        )
    return memory, offset_bytes


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
