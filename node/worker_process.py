"""A worker in a sandboxed process, from the node's side.

The worker runs a stranger's code, so each of its answers is checked against what was asked: rows
must be exactly the traced scalars of exactly the next steps, a pause must stand where a pause is
due, a slot must have its own size. Whatever does not fit ends the worker and is a ProviderError.
Silence is limited too: a step, a load and an answer each have their time.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from p2pflop.errors import JobError, P2PFlopError, ProtocolError, ProviderError
from p2pflop.job.graph import Dtype
from p2pflop.job.shapes import stored_bytes
from p2pflop.job.spec import Work, graphs_of
from p2pflop.kernels import frames
from p2pflop.kernels.frames import PART_BYTES, worker_report
from p2pflop.kernels.worker import ROWS_INTERVAL_SECONDS
from p2pflop.node.crew import Child, fault_error
from p2pflop.node.pipes import EndOfPipe
from p2pflop.node.row_check import RowCheck
from p2pflop.node.session_holder import SessionHolder
from p2pflop.node.worker_session import ProcessSession, again
from p2pflop.node.worker_types import Paused, WorkerEvent, WorkerLimits
from p2pflop.wire import decode

ANSWER_SECONDS: Final = 30.0
# Above a step's own limit: telling the rows, and a machine with more to do than this.
STEP_SLACK_SECONDS: Final = 1.0 + ROWS_INTERVAL_SECONDS
_JOB_WORK: Final = ("a step", "initialising")


class ProcessWorker(SessionHolder[ProcessSession]):
    """``worker_types.Worker`` and ``SessionWorker`` over a child's pipe, from ``WorkerPool``."""

    def __init__(
        self, child: Child, limits: WorkerLimits, kill: Callable[[Child], Awaitable[None]]
    ) -> None:
        self._child = child
        self._limits = limits
        self._kill = kill
        self._work: Work | None = None
        self._held: frozenset[bytes] = frozenset()
        self._failure: P2PFlopError | None = None
        self._busy = ""
        self._running = False
        self._standing = False
        self._stopping = False
        self._asked = False

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """See ``Worker``."""
        failed = self._failure or (self._begun and self._begun.failure)
        return failed is None and not self._child.ended.is_set()

    @property
    def held(self) -> frozenset[bytes]:
        """See ``Worker``."""
        return self._held

    async def load(self, work: bytes, plans: Mapping[bytes, bytes]) -> None:
        """See ``Worker``."""
        decoded = decode(Work, work)
        fresh = {graph: plan for graph, plan in plans.items() if graph not in self._held}
        async with self._exchange("initialising", self._limits.step_seconds + ANSWER_SECONDS):
            await self._child.pipe.send(frames.Load(work, len(fresh)))
            for graph, plan in fresh.items():
                await self._child.pipe.send(frames.LoadPlan(graph))
                await self._child.pipe.send_parts(plan)
            await self._child.pipe.send(frames.Initialise())
            await self._done()
        self._work, self._held = decoded, graphs_of(decoded)

    async def write(self, slot: int, offset_bytes: int, data: bytes) -> None:
        """See ``Worker``. Raises ValueError if the data does not fit the slot."""
        if offset_bytes < 0 or offset_bytes + len(data) > self._slot_bytes(slot):
            raise ValueError(f"{len(data)} bytes at {offset_bytes} do not fit slot {slot}")
        for start in range(0, len(data), PART_BYTES):
            chunk = data[start : start + PART_BYTES]
            async with self._exchange("writing", ANSWER_SECONDS):
                await self._child.pipe.send(frames.Write(slot, offset_bytes + start, chunk))

    async def run(
        self, first_step: int, steps: int, pause_every: int = 0
    ) -> AsyncIterator[WorkerEvent]:
        """See ``Worker``."""
        progress = RowCheck(self._loaded, first_step, steps)
        limit = self._limits.step_seconds + STEP_SLACK_SECONDS
        async with self._exchange("running", ANSWER_SECONDS):
            if self._standing:  # the last run was left at a pause: end it
                await self._child.pipe.send(frames.Stop())
            await self._child.pipe.send(frames.Run(first_step, steps, pause_every))
        self._running, self._stopping, self._standing = True, False, False
        while True:
            async with self._exchange("a step", limit):
                event = await self._event(progress, pause_every)
            if isinstance(event, Paused):
                self._running = False
                self._standing = not (event.ended or self._stopping)
            yield event
            if not isinstance(event, Paused):
                continue
            if event.ended or self._stopping:
                return
            async with self._exchange("running", ANSWER_SECONDS):
                await self._child.pipe.send(frames.Continue())
            self._running, self._standing = True, False

    async def read(self, slot: int) -> AsyncIterator[bytes]:
        """See ``Worker``."""
        size = self._slot_bytes(slot)
        async for chunk in self._parts(frames.Read((slot,)), size, size):
            yield chunk

    async def read_slots(self, slots: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """See ``Worker``."""
        for first in range(0, len(slots), frames.MAX_READ_SLOTS):
            some = slots[first : first + frames.MAX_READ_SLOTS]
            sizes = [self._slot_bytes(slot) for slot in some]
            whole = sum(sizes)
            place, left = 0, sizes[0]
            async for chunk in self._parts(frames.Read(tuple(some)), whole, whole):
                data = memoryview(chunk)
                while data:
                    while not left:
                        place += 1
                        left = sizes[place]
                    piece = data[:left]
                    yield some[place], bytes(piece)
                    data, left = data[len(piece) :], left - len(piece)

    async def read_output(self, phase: int, output: int) -> AsyncIterator[bytes]:
        """See ``Worker``."""
        request = frames.ReadOutput(phase, output)
        async for chunk in self._parts(request, 0, self._limits.memory_bytes):
            yield chunk

    async def pause(self) -> None:
        """See ``Worker``."""
        if self._failure is None and self._running and not self._stopping:
            self._asked = True
            with contextlib.suppress(EndOfPipe):  # likewise
                await self._child.pipe.send(frames.Stand())

    async def stop(self) -> None:
        """See ``Worker``."""
        if self._failure is None and self._work is not None and not self._stopping:
            self._stopping, self._standing = True, False
            with contextlib.suppress(EndOfPipe):  # whoever waits for the run learns why
                await self._child.pipe.send(frames.Stop())

    async def open_session(self) -> None:
        """See ``SessionWorker``."""
        await self.begin(ProcessSession(self._child, self._limits, self._kill))

    @property
    def _loaded(self) -> Work:
        if self._work is None:
            raise RuntimeError("no work is loaded")
        return self._work

    def _slot_bytes(self, slot: int) -> int:
        param = self._loaded.params[slot]
        return stored_bytes(Dtype(param.dtype), param.shape)

    async def _done(self) -> None:
        report = await self._report()
        if not isinstance(report, frames.Done):
            raise ProtocolError(f"{type(report).__name__} instead of an acknowledgement")

    async def _report(self) -> frames.WorkerReport:
        report: frames.WorkerReport = await self._child.pipe.receive(worker_report)
        if isinstance(report, frames.Fault):
            raise fault_error(report)
        return report

    async def _event(self, progress: RowCheck, pause_every: int) -> WorkerEvent:
        report = await self._report()
        if isinstance(report, frames.Progressed):
            return progress.rows(report)
        if not isinstance(report, frames.Paused):
            raise ProtocolError(f"{type(report).__name__} during a run")
        asked, self._asked = self._asked, False
        return progress.pause(report, pause_every, self._stopping, asked=asked)

    async def _parts(
        self, request: frames.Message, min_bytes: int, max_bytes: int
    ) -> AsyncIterator[bytes]:
        received = 0
        last = False
        self._claim("reading")
        try:
            async with self._guard("reading", ANSWER_SECONDS):
                await self._child.pipe.send(request)
            while not last:
                async with self._guard("reading", ANSWER_SECONDS):
                    part = await self._report()
                    if not isinstance(part, frames.Part):
                        raise ProtocolError(f"{type(part).__name__} instead of data")
                    received += len(part.data)
                    last = part.last
                    if received > max_bytes or (last and received < min_bytes):
                        raise ProtocolError(f"{received} bytes where {max_bytes} are due")
                    if not last and not part.data:
                        raise ProtocolError("an empty part")
                if part.data:
                    yield part.data
        finally:
            self._busy = ""
            if not last and self._failure is None:
                self._failure = ProviderError("a reading of this worker was broken off")

    def _claim(self, what: str) -> None:
        if self._failure is not None:
            raise again(self._failure)
        if self._busy or self._running:
            raise RuntimeError(f"{what}: the worker is still {self._busy or 'running'}")
        self._busy = what

    @asynccontextmanager
    async def _exchange(self, what: str, limit_seconds: float) -> AsyncIterator[None]:
        if not self._running:
            self._claim(what)
        elif self._failure is not None:
            raise again(self._failure)
        try:
            async with self._guard(what, limit_seconds):
                yield
        finally:
            self._busy = ""

    @asynccontextmanager
    async def _guard(self, what: str, limit_seconds: float) -> AsyncIterator[None]:
        """Turn whatever goes wrong into an error to raise, and end the worker then."""
        try:
            with trio.fail_after(limit_seconds):
                yield
        except trio.TooSlowError as error:
            message = f"{what} took longer than {limit_seconds:.0f} s"
            late = JobError(message, hint="Have it do less at a time.")
            self._failure = late if what in _JOB_WORK else ProviderError(message)
            await self._kill(self._child)
            raise again(self._failure) from error
        except EndOfPipe as error:
            self._failure = await self._child.cause_of_death("worker")
            raise again(self._failure) from error
        except ProtocolError as error:
            self._failure = ProviderError(f"the worker broke the protocol: {error.message}")
            await self._kill(self._child)
            raise again(self._failure) from error
        except (JobError, ProviderError) as error:
            self._failure = error
            await self._kill(self._child)
            raise
        except BaseException:
            # Cancelled in the middle of a frame: the two ends no longer agree where one starts.
            self._failure = ProviderError(f"{what} was broken off")
            raise
