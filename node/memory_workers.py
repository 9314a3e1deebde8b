"""A worker pool without processes: scripted sessions in memory, for tests of what stands above it.

``MemoryWorkerPool`` keeps to the same rules as ``workers.WorkerPool`` (one conformance suite runs
over both) but nothing is sandboxed, compiled or forked. What is computed is up to ``session``;
``CountingSession`` is the default: it needs no plan, and its states and outputs are easy to tell.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import trio

from p2pflop.errors import JobError, P2PFlopError, ProtocolError, ProviderError
from p2pflop.ids import content_hash
from p2pflop.job.graph import Dtype, graph_hash
from p2pflop.job.shapes import stored_bytes
from p2pflop.job.spec import (
    MODE_TRACE,
    ROLE_STATE,
    ClassDescriptor,
    InitSource,
    Work,
    class_id,
    graphs_of,
    is_due,
    stands_still,
)
from p2pflop.kernels.engine import WorkSession
from p2pflop.kernels.frames import PART_BYTES
from p2pflop.node.memory_sessions import MemorySession
from p2pflop.node.session_holder import SessionHolder
from p2pflop.node.worker_types import Paused, PoolStatistics, Rows, WorkerEvent, WorkerLimits
from p2pflop.wire import decode

MEMORY_CLASS = ClassDescriptor("memory", "none", "none", "none", "", "0", "")
ROWS_PER_EVENT = 16


class CountingSession:
    """Each step adds one to every byte (mod 256) of every state slot.

    Init slots are filled with the seed's low byte. An output, traced or not, is the number of the
    step that last gave it, as 8 little-endian bytes (a traced one 4). The work stops when asked to
    at the first multiple of ``stop.every``; that output is the flag, of one byte.
    """

    def __init__(self, work: Work, plans: Mapping[bytes, bytes]) -> None:
        missing = {phase.graph for phase in work.phases} - set(plans)
        if missing:
            raise ProtocolError(f"no plan for graph {min(missing).hex()}")
        self._work = work
        self._slots = [
            bytearray(stored_bytes(Dtype(param.dtype), param.shape)) for param in work.params
        ]
        self._last: dict[int, int] = {}
        self._step = -1

    def write(self, slot: int, offset_bytes: int, data: bytes | memoryview) -> None:
        self._slots[slot][offset_bytes : offset_bytes + len(data)] = data

    def initialise(self) -> None:
        for param, memory in zip(self._work.params, self._slots, strict=True):
            if isinstance(param.source, InitSource):
                memory[:] = bytes([self._work.seed % 256]) * len(memory)

    def step(self, number: int) -> None:
        for param, memory in zip(self._work.params, self._slots, strict=True):
            if param.role == ROLE_STATE:
                memory[:] = bytes((byte + 1) % 256 for byte in memory)
        self._step = number
        for index, phase in enumerate(self._work.phases):
            if is_due(phase, number):
                self._last[index] = number

    def scalars(self) -> list[tuple[int, int, bytes]]:
        return [
            (index, output, self._flag(index, output) or self._step.to_bytes(4, "little"))
            for index, phase in enumerate(self._work.phases)
            if self._last.get(index) == self._step
            for output, mode in enumerate(phase.modes)
            if mode == MODE_TRACE
        ]

    def should_stop(self, number: int) -> bool:
        stop = self._work.stop
        return stop is not None and (number + 1) % stop.every == 0

    def _flag(self, phase: int, output: int) -> bytes:
        stop = self._work.stop
        if stop is None or (stop.phase, stop.output) != (phase, output):
            return b""
        return bytes([self.should_stop(self._last[phase])])

    def read(self, slot: int) -> memoryview:
        return memoryview(self._slots[slot])

    def read_output(self, phase: int, output: int) -> memoryview | None:
        if phase not in self._last:
            return None
        if flag := self._flag(phase, output):
            return memoryview(flag)
        size = 4 if self._work.phases[phase].modes[output] == MODE_TRACE else 8
        return memoryview(self._last[phase].to_bytes(size, "little"))


class MemoryWorkerPool:
    """``worker_types.Workers`` in memory. ``session`` may raise what a job may; tests set
    ``failure`` to have everything raise it from then on, as a lost sandbox would."""

    def __init__(
        self,
        session: Callable[[Work, Mapping[bytes, bytes]], WorkSession] = CountingSession,
        *,
        descriptor: ClassDescriptor = MEMORY_CLASS,
        level: int = 3,
    ) -> None:
        self.descriptor = descriptor
        self.level = level
        self.broken = False
        self.failure: P2PFlopError | None = None
        self.lowered_flop = 0
        self.step_s = 0.0
        self.graphs: dict[bytes, bytes] = {}
        self._session = session
        self._plans: set[bytes] = set()
        self._workers = self._lowered = self._reused = 0

    @property
    def class_id(self) -> bytes:
        """The hash of the descriptor."""
        return class_id(self.descriptor)

    async def start(self, nursery: trio.Nursery | None = None) -> None:  # noqa: ARG002
        """Nothing to start."""
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Refuse everything from now on."""
        self.failure = self.failure or ProviderError("the pool is closed")
        await trio.lowlevel.checkpoint()

    async def lower(
        self,
        graph: bytes,
        progress: Callable[[int, int], None] | None = None,
        *,
        account: bytes | None = None,  # noqa: ARG002
    ) -> bytes:
        """A plan that only says which graph it is of. A graph of no bytes does not lower."""
        await trio.lowlevel.checkpoint()
        self.check()
        if not graph:
            raise JobError("the graph does not lower: it is empty")
        address = graph_hash(graph)
        self.graphs[address] = graph
        if address in self._plans:
            self._reused += 1
        else:
            self._plans.add(address)
            self._lowered += 1
            if progress is not None:
                progress(1, 1)
        return _plan_of(address)

    def plan_at_hand(
        self,
        graph: bytes,
        account: bytes | None = None,  # noqa: ARG002
    ) -> bytes | None:
        """The plan of a graph that was lowered before."""
        address = graph_hash(graph)
        if address not in self._plans:
            return None
        self._reused += 1
        return _plan_of(address)

    def flop_of(self, plan: bytes) -> int:
        """What a test has put into ``lowered_flop``."""
        del plan
        return self.lowered_flop

    @asynccontextmanager
    async def worker(self, limits: WorkerLimits) -> AsyncIterator[MemoryWorker]:
        """A fresh session. ``limits.memory_bytes`` bounds the slots of the work."""
        await trio.lowlevel.checkpoint()
        self.check()
        self._workers += 1
        try:
            yield MemoryWorker(self, self._session, limits)
        finally:
            self._workers -= 1

    def check(self) -> None:
        """Raise ``failure``, if there is one."""
        if self.failure is not None:
            raise type(self.failure)(self.failure.message, hint=self.failure.hint)

    def statistics(self) -> PoolStatistics:
        """Counters; there are no processes."""
        return PoolStatistics(
            level=self.level,
            notes=(),
            workers=self._workers,
            lowering=0,
            plans_lowered=self._lowered,
            plans_reused=self._reused,
            crashes=0,
            broken=self.broken,
            process_ids=(),
        )


class MemoryWorker(SessionHolder[MemorySession]):
    """``worker_types.Worker`` on a session in this process."""

    def __init__(
        self,
        pool: MemoryWorkerPool,
        session: Callable[[Work, Mapping[bytes, bytes]], WorkSession],
        limits: WorkerLimits,
    ) -> None:
        self._pool = pool
        self._make = session
        self._limits = limits
        self._work: Work | None = None
        self._loaded: WorkSession | None = None
        self._stopping = self._asked = False

    @property
    def alive(self) -> bool:
        """See ``Worker``."""
        return self._pool.failure is None

    @property
    def held(self) -> frozenset[bytes]:
        """See ``Worker``."""
        return frozenset() if self._work is None else graphs_of(self._work)

    async def load(self, work: bytes, plans: Mapping[bytes, bytes]) -> None:
        """See ``Worker``."""
        await self._answer()
        decoded = decode(Work, work)
        sizes = [stored_bytes(Dtype(param.dtype), param.shape) for param in decoded.params]
        if sum(sizes) > self._limits.memory_bytes:
            raise JobError("the job ran out of memory")
        try:
            self._loaded = self._make(decoded, plans)
        except ProtocolError as error:
            raise ProviderError(error.message) from error
        self._loaded.initialise()
        self._work = decoded

    async def write(self, slot: int, offset_bytes: int, data: bytes) -> None:
        """See ``Worker``. Raises ValueError if the data does not fit the slot."""
        await self._answer()
        if offset_bytes < 0 or offset_bytes + len(data) > len(self._session.read(slot)):
            raise ValueError(f"{len(data)} bytes at {offset_bytes} do not fit slot {slot}")
        self._session.write(slot, offset_bytes, data)

    async def run(
        self, first_step: int, steps: int, pause_every: int = 0
    ) -> AsyncIterator[WorkerEvent]:
        """See ``Worker``."""
        session = self._session
        self._stopping = self._asked = condition = False
        step, end = first_step, first_step + steps
        told = step
        values: list[tuple[int, int, int, bytes]] = []
        while step < end and not (self._stopping or condition):
            await self._answer()
            if self._pool.step_s:
                await trio.sleep(self._pool.step_s)
            session.step(step)
            values += [(step, *scalar) for scalar in session.scalars()]
            condition = session.should_stop(step)
            step += 1
            boundary = pause_every > 0 and step % pause_every == 0
            boundary = boundary or stands_still(self._loaded_work, step) or self._asked
            over = step == end or condition or self._stopping
            if boundary or over or step - told >= ROWS_PER_EVENT:
                yield Rows(told, step - 1, tuple(values))
                told, values = step, []
            if boundary and not over and not self._stopping:
                self._asked = False
                yield Paused(step)
                if self._stopping:
                    return
        if told < step:
            yield Rows(told, step - 1, tuple(values))
        yield Paused(step, True, condition)

    async def read(self, slot: int) -> AsyncIterator[bytes]:
        """See ``Worker``."""
        async for chunk in self._chunks(self._session.read(slot)):
            yield chunk

    async def read_output(self, phase: int, output: int) -> AsyncIterator[bytes]:
        """See ``Worker``."""
        async for chunk in self._chunks(self._session.read_output(phase, output)):
            yield chunk

    async def read_slots(self, slots: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """See ``Worker``."""
        for slot in slots:
            async for chunk in self.read(slot):
                yield slot, chunk

    async def pause(self) -> None:
        """See ``Worker``."""
        await trio.lowlevel.checkpoint()
        self._asked = True

    async def stop(self) -> None:
        """See ``Worker``."""
        await trio.lowlevel.checkpoint()
        self._stopping = True

    async def open_session(self) -> None:
        """See ``SessionWorker``."""
        pool = self._pool
        session = MemorySession(pool.graphs, self._limits.memory_bytes, pool.check)
        session.run_s = pool.step_s
        await self.begin(session)

    @property
    def _loaded_work(self) -> Work:
        if self._work is None:
            raise RuntimeError("no work is loaded")
        return self._work

    @property
    def _session(self) -> WorkSession:
        if self._loaded is None:
            raise RuntimeError("no work is loaded")
        return self._loaded

    async def _answer(self) -> None:
        await trio.lowlevel.checkpoint()
        self._pool.check()

    async def _chunks(self, view: memoryview | None) -> AsyncIterator[bytes]:
        data = bytes(view) if view is not None else b""
        for start in range(0, len(data), PART_BYTES):
            await self._answer()
            yield data[start : start + PART_BYTES]


def _plan_of(address: bytes) -> bytes:
    return content_hash(b"plan" + address)
