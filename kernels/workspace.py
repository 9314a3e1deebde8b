"""What a session has in a machine: numbered buffers, and plans bound to places in them.

Buffers, graphs and bindings were counted and bounded by whoever keeps the session's books
(``job.session.SessionTable``). What is checked here is that nothing reaches outside of memory that
is there. Plans run one after the other, so they share one scratch area, as large as the largest of
them needs; a plan is put on its places when it first runs there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2pflop.errors import JobError, ProtocolError
from p2pflop.job.bools import check_bools
from p2pflop.job.commands import (
    Allocate,
    Bind,
    Check,
    Copy,
    Free,
    Place,
    Read,
    Run,
    WorkedCommand,
    Write,
)
from p2pflop.job.symbolic import Range, check_values
from p2pflop.kernels.frames import MAX_PLANS_BYTES, PART_BYTES
from p2pflop.kernels.machine import Bound, Loaded, Machine, Memory
from p2pflop.kernels.plan import Plan, decode_plan, scratch_bytes


@dataclass(frozen=True, slots=True)
class _Graph:
    loaded: Loaded
    ranges: tuple[Range, ...]
    kernels: int
    flop: int
    touched_bytes: int


@dataclass(slots=True)
class _Binding:
    graph: _Graph
    places: tuple[Place, ...]
    bound: Bound | None = None


class MachineWorkspace:
    """The memory of one session. Not thread-safe.

    ``kernels``, ``flop`` and ``touched_bytes`` count what has run, recomputation included. A fault
    of the compiled code (SIGFPE, SIGSEGV) kills the process.
    """

    def __init__(self, machine: Machine) -> None:
        self.kernels = self.flop = self.touched_bytes = 0
        self._machine = machine
        self._buffers: dict[int, Memory] = {}
        self._graphs: dict[bytes, _Graph] = {}
        self._bindings: dict[int, _Binding] = {}
        self._naming: dict[int, set[int]] = {}
        self._scratch = machine.memory(0)
        self._plans_bytes = 0

    def define(self, graph: bytes, plan: bytes) -> None:
        """Have the plan of a graph, named by its hash. Raises ProtocolError, JobError."""
        if graph in self._graphs:
            return
        self._plans_bytes += len(plan)
        if self._plans_bytes > MAX_PLANS_BYTES:
            raise JobError(f"plans of over {MAX_PLANS_BYTES} bytes", hint="Have fewer graphs.")
        decoded = decode_plan(plan)
        self._reserve(decoded)
        self._graphs[graph] = _Graph(
            self._machine.load(decoded),
            decoded.ranges,
            len(decoded.calls),
            decoded.flop,
            decoded.touched_bytes,
        )

    def put(self, buffer: int, offset_bytes: int, data: bytes | memoryview) -> None:
        """Put ``data`` into a buffer. Raises ProtocolError if it does not fit."""
        self._holding(buffer, offset_bytes, len(data)).write(offset_bytes, data)

    def obey(self, command: WorkedCommand) -> memoryview | None:
        """Obey a command; for a Read its answer, which holds until the next command.

        Not for Define and Load: those are ``define`` and ``put``. Raises ProtocolError if it does
        not fit, JobError if there is no memory, or a Check fails.
        """
        match command:
            case Run(binding, values):
                self._run(binding, values)
            case Write(buffer, offset_bytes, data):
                self.put(buffer, offset_bytes, data)
            case Bind(binding, graph, places):
                self._bind(binding, graph, places)
            case Read(buffer, offset_bytes, size_bytes):
                return self._holding(buffer, offset_bytes, size_bytes).read(
                    offset_bytes, size_bytes
                )
            case Copy((target, at), (source, start), size_bytes):
                view = self._holding(source, start, size_bytes).read(start, size_bytes)
                self.put(target, at, view)
            case Allocate(buffer, size_bytes):
                if buffer in self._buffers:
                    raise ProtocolError(f"buffer {buffer} exists")
                self._buffers[buffer] = self._machine.memory(size_bytes)
            case Free(buffer):
                self._free(buffer)
            case Check(buffer, offset_bytes, size_bytes):
                self._check(buffer, offset_bytes, size_bytes)
            case _:
                raise ProtocolError(f"a worker does not obey {type(command).__name__}")
        return None

    def _run(self, number: int, values: Sequence[int]) -> None:
        binding = self._bindings.get(number)
        if binding is None:
            raise ProtocolError(f"there is no binding {number}")
        graph = binding.graph
        try:
            check_values(graph.ranges, values)
        except JobError as error:
            raise ProtocolError(error.message) from error
        if binding.bound is None:
            slices = [(self._memory(buffer), at) for buffer, at in binding.places]
            binding.bound = graph.loaded.bind(slices, self._scratch)
        binding.bound.run(values)
        self.kernels += graph.kernels
        self.flop += graph.flop
        self.touched_bytes += graph.touched_bytes

    def _check(self, buffer: int, offset_bytes: int, size_bytes: int) -> None:
        memory, end = self._holding(buffer, offset_bytes, size_bytes), offset_bytes + size_bytes
        for start in range(offset_bytes, end, PART_BYTES):
            check_bools(memory.read(start, min(PART_BYTES, end - start)))

    def _bind(self, number: int, name: bytes, places: tuple[Place, ...]) -> None:
        graph = self._graphs.get(name)
        if graph is None:
            raise ProtocolError(f"there is no plan of graph {name.hex()[:12]}")
        self._unbind(number)
        self._bindings[number] = _Binding(graph, places)
        for buffer, _ in places:
            self._naming.setdefault(buffer, set()).add(number)

    def _unbind(self, number: int) -> None:
        binding = self._bindings.pop(number, None)
        for buffer, _ in () if binding is None else binding.places:
            self._naming[buffer].discard(number)

    def _free(self, buffer: int) -> None:
        self._memory(buffer)
        for binding in tuple(self._naming.get(buffer, ())):
            self._unbind(binding)
        self._naming.pop(buffer, None)
        del self._buffers[buffer]

    def _reserve(self, plan: Plan) -> None:
        """Have scratch for a plan. Where there was too little, all are bound anew to more."""
        if scratch_bytes(plan) <= self._scratch.size_bytes:
            return
        for binding in self._bindings.values():
            binding.bound = None
        self._scratch = self._machine.memory(0)  # the old one goes before the new one comes
        self._scratch = self._machine.scratch([plan])

    def _holding(self, buffer: int, offset_bytes: int, size_bytes: int) -> Memory:
        """The memory of a buffer that has those bytes. Raises ProtocolError."""
        memory = self._memory(buffer)
        if offset_bytes < 0 or offset_bytes + size_bytes > memory.size_bytes:
            raise ProtocolError(f"{size_bytes} bytes at {offset_bytes} do not fit buffer {buffer}")
        return memory

    def _memory(self, buffer: int) -> Memory:
        memory = self._buffers.get(buffer)
        if memory is None:
            raise ProtocolError(f"there is no buffer {buffer}")
        return memory
