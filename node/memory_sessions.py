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
from p2pflop.job.commands import (
    Allocate,
    AnyCommand,
    Bind,
    Copy,
    Data,
    Free,
    Place,
    Ran,
    Read,
    Run,
    Write,
)
from p2pflop.job.session import OpenGraph, open_graph
from p2pflop.kernels.frames import PART_BYTES


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
        self._memory_bytes = memory_bytes
        self._check = check
        self._buffers: dict[int, bytearray] = {}
        self._defined: dict[bytes, OpenGraph] = {}
        self._bound: dict[int, tuple[OpenGraph, tuple[Place, ...]]] = {}
        self._tell, self._told = trio.open_memory_channel[Ran | Data | Exception](2**20)

    async def open_session(self) -> None:
        """See SessionWorker."""
        await trio.lowlevel.checkpoint()
        self._check()

    async def define(self, graph_hash: bytes, plan: bytes) -> None:
        """See SessionWorker."""
        del plan
        await trio.lowlevel.checkpoint()
        self._defined[graph_hash] = open_graph(self._graphs[graph_hash])

    async def put(self, buffer: int, offset_bytes: int, data: bytes) -> None:
        """See SessionWorker."""
        await trio.lowlevel.checkpoint()
        self._write((buffer, offset_bytes), data)

    async def obey(self, commands: Sequence[AnyCommand]) -> None:
        """See SessionWorker."""
        kernels = flop = touched_bytes = 0
        for command in commands:
            self.reached = self._count
            self._count += 1
            await trio.lowlevel.checkpoint()
            try:
                self._check()
                self._obey(command)
            except Exception as error:  # noqa: BLE001 - it shows at the next report
                self._tell.send_nowait(error)
                return
            if isinstance(command, Run):
                if self.run_s:
                    await trio.sleep(self.run_s)
                graph, _ = self._bound[command.binding]
                kernels += 1
                flop += graph.cost.flop
                touched_bytes += graph.cost.touched_bytes
        self._tell.send_nowait(Ran(self._count, kernels, flop, touched_bytes, kernels))

    async def reports(self) -> AsyncIterator[Ran | Data]:
        """See SessionWorker."""
        async for report in self._told:
            if isinstance(report, Exception):
                raise report
            yield report

    def _obey(self, command: AnyCommand) -> None:
        match command:
            case Allocate(buffer, size_bytes):
                held_bytes = sum(map(len, self._buffers.values()))
                if held_bytes + size_bytes > self._memory_bytes:
                    raise JobError("the session ran out of memory")
                self._buffers[buffer] = bytearray(size_bytes)
            case Free(buffer):
                del self._buffers[buffer]
            case Write(buffer, offset_bytes, data):
                self._write((buffer, offset_bytes), data)
            case Bind(binding, name, places):
                self._bound[binding] = (self._defined[name], places)
            case Run(binding):
                self._run(*self._bound[binding])
            case Copy(target, source, size_bytes):
                self._write(target, self._read(source, size_bytes))
            case Read(buffer, offset_bytes, size_bytes):
                self._answer(self._read((buffer, offset_bytes), size_bytes))
            case _:
                raise AssertionError(f"a worker does not obey {command}")

    def _run(self, graph: OpenGraph, places: tuple[Place, ...]) -> None:
        digest = blake3(graph.hash)
        for place, size_bytes in zip(places, graph.sizes_bytes, strict=True):
            digest.update(self._read(place, size_bytes))
        for number, place in enumerate(places):
            if graph.written[number]:
                seed = blake3(digest.digest() + bytes([number % 256]))
                self._write(place, seed.digest(graph.sizes_bytes[number]))

    def _answer(self, data: bytes) -> None:
        starts = range(0, len(data), PART_BYTES) or [0]
        for start in starts:
            piece = data[start : start + PART_BYTES]
            self._tell.send_nowait(Data(self.reached, piece, start == starts[-1]))

    def _read(self, place: Place, size_bytes: int) -> bytes:
        buffer, at = place
        return bytes(self._buffers[buffer][at : at + size_bytes])

    def _write(self, place: Place, data: bytes) -> None:
        buffer, at = place
        self._buffers[buffer][at : at + len(data)] = data
