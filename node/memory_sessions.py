"""A session's worker without a process: what it computes is made up, but by what it was given.

A Run sets each place that its graph writes to bytes that follow from the graph and from all that
was at its places before. So two workers that obeyed the same commands hold the same bytes, and one
that missed something, or obeyed it twice, does not.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import trio
from blake3 import blake3

from p2pflop.errors import JobError
from p2pflop.job.bools import check_bools
from p2pflop.job.commands import (
    Allocate,
    Bind,
    Check,
    Copy,
    Data,
    Free,
    Place,
    Ran,
    Read,
    Run,
    WorkedCommand,
    Write,
)
from p2pflop.job.session import OpenGraph, open_graph
from p2pflop.kernels.session_local import data_of


class DigestWorkspace:
    """``engine.Workspace``, whose plans are the encoded graphs themselves."""

    def __init__(self, memory_bytes: int) -> None:
        self.kernels = self.flop = self.touched_bytes = 0
        self._memory_bytes = memory_bytes
        self._buffers: dict[int, bytearray] = {}
        self._defined: dict[bytes, OpenGraph] = {}
        self._bound: dict[int, tuple[OpenGraph, tuple[Place, ...]]] = {}

    def define(self, graph: bytes, plan: bytes) -> None:
        """See Workspace."""
        self._defined[graph] = open_graph(plan)

    def put(self, buffer: int, offset_bytes: int, data: bytes | memoryview) -> None:
        """See Workspace."""
        self._buffers[buffer][offset_bytes : offset_bytes + len(data)] = data

    def obey(self, command: WorkedCommand) -> memoryview | None:
        """See Workspace."""
        match command:
            case Allocate(buffer, size_bytes):
                held_bytes = sum(map(len, self._buffers.values()))
                if held_bytes + size_bytes > self._memory_bytes:
                    raise JobError("the session ran out of memory")
                self._buffers[buffer] = bytearray(size_bytes)
            case Free(buffer):
                del self._buffers[buffer]
            case Write(buffer, offset_bytes, data):
                self.put(buffer, offset_bytes, data)
            case Bind(binding, name, places):
                self._bound[binding] = (self._defined[name], places)
            case Run(binding, values):
                self.run(*self._bound[binding], values)
            case Copy((target, at), source, size_bytes):
                self.put(target, at, self.read(source, size_bytes))
            case Read(buffer, offset_bytes, size_bytes):
                return memoryview(self.read((buffer, offset_bytes), size_bytes))
            case Check(buffer, offset_bytes, size_bytes):
                check_bools(self.read((buffer, offset_bytes), size_bytes))
            case _:
                raise AssertionError(f"a worker does not obey {command}")
        return None

    def run(
        self, graph: OpenGraph, places: tuple[Place, ...], values: tuple[int, ...] = ()
    ) -> None:
        """Run a graph at these places, with these values of its Variables."""
        digest = blake3(graph.hash + bytes(repr(values), "ascii"))
        for place, size_bytes in zip(places, graph.sizes_bytes, strict=True):
            digest.update(self.read(place, size_bytes))
        for number, (buffer, at) in enumerate(places):
            if graph.written[number]:
                seed = blake3(digest.digest() + bytes([number % 256]))
                made = seed.digest(graph.sizes_bytes[number])
                self.put(buffer, at, bytes(b & 1 for b in made) if graph.bools[number] else made)
        self.kernels += 1
        cost = graph.cost_of(values)
        self.flop += cost.flop
        self.touched_bytes += cost.touched_bytes

    def read(self, place: Place, size_bytes: int) -> bytes:
        """A copy of what is at a place."""
        buffer, at = place
        return bytes(self._buffers[buffer][at : at + size_bytes])


class MemorySession:
    """``worker_types.SessionWorker``. ``graphs`` has the encoded graphs that were lowered;
    ``check`` raises what a lost worker would."""

    def __init__(
        self, graphs: Mapping[bytes, bytes], memory_bytes: int, check: Callable[[], None]
    ) -> None:
        self.run_s = 0.0
        self.reached = 0
        self._count = 0
        self._graphs = graphs
        self._check = check
        self._space = DigestWorkspace(memory_bytes)
        self._tell, self._told = trio.open_memory_channel[Ran | Data | Exception](2**20)

    async def open_session(self) -> None:
        """See SessionWorker."""
        await trio.lowlevel.checkpoint()
        self._check()

    async def define(self, graph_hash: bytes, plan: bytes) -> None:
        """See SessionWorker."""
        del plan
        await trio.lowlevel.checkpoint()
        self._space.define(graph_hash, self._graphs[graph_hash])

    async def put(self, buffer: int, offset_bytes: int, data: bytes) -> None:
        """See SessionWorker."""
        await trio.lowlevel.checkpoint()
        self._space.put(buffer, offset_bytes, data)

    async def obey(self, commands: Sequence[WorkedCommand]) -> None:
        """See SessionWorker."""
        space = self._space
        kernels, flop, touched_bytes = space.kernels, space.flop, space.touched_bytes
        for command in commands:
            self.reached = self._count
            self._count += 1
            await trio.lowlevel.checkpoint()
            try:
                self._check()
                answer = space.obey(command)
            except Exception as error:  # noqa: BLE001 - it shows at the next report
                self._tell.send_nowait(error)
                return
            for data in () if answer is None else data_of(self.reached, answer):
                self._tell.send_nowait(data)
            if isinstance(command, Run) and self.run_s:
                await trio.sleep(self.run_s)
        kernels, flop = space.kernels - kernels, space.flop - flop
        touched_bytes = space.touched_bytes - touched_bytes
        self._tell.send_nowait(Ran(self._count, kernels, flop, touched_bytes, kernels))

    async def reports(self) -> AsyncIterator[Ran | Data]:
        """See SessionWorker."""
        async for report in self._told:
            if isinstance(report, Exception):
                raise report
            yield report
