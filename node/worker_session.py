"""A session in a sandboxed worker, from the node's side: sent on unanswered, checked on return.

Commands, plans and data go down the pipe as they come; answers are read at the same time, by
whoever iterates ``reports``, and compared with what is due: number, size and order. One batch is
due at a time, and has its time: so much for each of its runs. What goes wrong is told there, even
if a call that sends met it first, since only the answers before it say how far the worker came.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

import trio

from p2pflop.errors import JobError, P2PFlopError, ProtocolError, ProviderError
from p2pflop.job.commands import (
    MAX_BATCH_COMMANDS,
    AnyCommand,
    Bind,
    Data,
    Define,
    Hold,
    Load,
    Ran,
    Read,
    Run,
    Write,
)
from p2pflop.kernels import frames
from p2pflop.kernels.frames import PART_BYTES, SessionCommand, worker_report
from p2pflop.node.crew import Child, fault_error
from p2pflop.node.pipes import EndOfPipe
from p2pflop.node.worker_types import WorkerLimits
from p2pflop.units import NS_PER_S

BATCH_SECONDS: Final = 30.0
"""For all of a batch that is no run, and for each plan that came before it to be linked."""
_COMMAND_BYTES: Final = 64  # at most, without data and places
_PLACE_BYTES: Final = 16


@dataclass(slots=True)
class _Due:
    """What is to come of commands ``first`` to ``end`` - 1 of all that were given: the bytes of
    each Read, as ``(number, size)``, in that order, then the end of the batch."""

    first: int
    end: int
    runs: int
    reads: deque[tuple[int, int]]
    seconds: float
    given: float
    received: int = 0


class ProcessSession:
    """``worker_types.SessionWorker`` over a child's pipe. ``open_session`` comes first."""

    def __init__(
        self, child: Child, limits: WorkerLimits, kill: Callable[[Child], Awaitable[None]]
    ) -> None:
        self.failure: P2PFlopError | None = None
        self._child = child
        self._limits = limits
        self._kill = kill
        self._count = 0
        self._plans = 0
        self._due: deque[_Due] = deque()
        self._waiting = trio.CancelScope()

    @property
    def reached(self) -> int:
        """See ``SessionWorker``: what the worker says, as far as it is possible."""
        least = self._due[0].first if self._due else self._count
        return max(least, min(self._child.reached(), self._count))

    async def open_session(self) -> None:
        """See ``SessionWorker``."""
        await self._send(frames.OpenSession())

    async def define(self, graph_hash: bytes, plan: bytes) -> None:
        """See ``SessionWorker``."""
        self._plans += 1
        await self._send(frames.LoadPlan(graph_hash), *frames.parts(plan))

    async def put(self, buffer: int, offset_bytes: int, data: bytes) -> None:
        """See ``SessionWorker``."""
        await self._send(frames.Put(buffer, offset_bytes, data))

    async def obey(self, commands: Sequence[AnyCommand]) -> None:
        """See ``SessionWorker``."""
        messages = tuple(_messages(commands))
        first, self._count = self._count, self._count + len(commands)
        reads = deque(
            (number, command.size_bytes)
            for number, command in enumerate(commands, first)
            if isinstance(command, Read)
        )
        runs = sum(isinstance(command, Run) for command in commands)
        seconds = BATCH_SECONDS * (1 + self._plans) + runs * self._limits.step_seconds
        self._plans = 0
        self._due.append(_Due(first, self._count, runs, reads, seconds, trio.current_time()))
        if len(self._due) == 1:
            self._waiting.deadline = self._deadline()
        await self._send(*messages)

    async def reports(self) -> AsyncIterator[Ran | Data]:
        """See ``SessionWorker``."""
        while True:
            yield await self._report()

    async def _send(self, *messages: frames.Message) -> None:
        self._check()
        # As long as the worker may be at what it has, it need not take more.
        seconds = BATCH_SECONDS * (1 + self._plans) + sum(due.seconds for due in self._due)
        try:
            with trio.fail_after(seconds):
                for message in messages:
                    await self._child.pipe.send(message)
        except EndOfPipe:
            self._check()  # else ``reports`` finds out why
        except trio.TooSlowError:
            await self._fail(ProviderError(f"the worker took nothing for {seconds:.0f} s"))
        except BaseException:
            self._break_off()
            raise

    async def _report(self) -> Ran | Data:
        self._check()
        error: P2PFlopError
        try:
            with trio.CancelScope(deadline=self._deadline()) as self._waiting:
                return self._answer(await self._child.pipe.receive(worker_report))
            error = self._late()
        except EndOfPipe:
            error = self.failure or await self._child.cause_of_death("worker")
        except ProtocolError as wrong:
            error = ProviderError(f"the worker broke the protocol: {wrong.message}")
        except (JobError, ProviderError) as fault:
            error = fault
        except BaseException:
            self._break_off()
            raise
        return await self._fail(error)

    def _answer(self, report: frames.WorkerReport) -> Ran | Data:
        """A report as what it answers. Raises ProtocolError if it is not what is due, and what a
        Fault stands for."""
        if isinstance(report, frames.Fault):
            raise fault_error(report)
        if not self._due:
            raise ProtocolError(f"{type(report).__name__} where nothing is due")
        due = self._due[0]
        if isinstance(report, frames.Part) and due.reads:
            return self._data(due, report)
        if not isinstance(report, frames.Obeyed) or due.reads:
            raise ProtocolError(f"{type(report).__name__} out of turn")
        self._due.popleft()
        busy_ns = min(report.busy_ns, int((trio.current_time() - due.given) * NS_PER_S))
        return Ran(due.end, report.kernels, report.flop, report.touched_bytes, busy_ns)

    def _data(self, due: _Due, part: frames.Part) -> Data:
        number, size_bytes = due.reads[0]
        due.received += len(part.data)
        if due.received > size_bytes or part.last != (due.received == size_bytes):
            raise ProtocolError(f"{due.received} bytes where {size_bytes} are due")
        if not part.data and not part.last:
            raise ProtocolError("an empty part")
        if part.last:
            due.reads.popleft()
            due.received = 0
        return Data(number, part.data, part.last)

    def _deadline(self) -> float:
        return trio.current_time() + self._due[0].seconds if self._due else math.inf

    def _late(self) -> P2PFlopError:
        due = self._due[0]
        if not due.runs:
            return ProviderError(f"the worker was silent for {due.seconds:.0f} s")
        message = f"{due.runs} runs took longer than {due.seconds:.0f} s"
        return JobError(message, hint="Have each realize do less.")

    def _check(self) -> None:
        if self.failure is not None:
            raise again(self.failure)

    async def _fail(self, error: P2PFlopError) -> NoReturn:
        """Raise the first error of this session, and end the worker."""
        if self.failure is None:
            self.failure = error
            await self._kill(self._child)
        raise again(self.failure)

    def _break_off(self) -> None:
        # Cancelled in the middle of a frame: the two ends no longer agree where one starts.
        self.failure = self.failure or ProviderError("the session was broken off")


def again(error: P2PFlopError) -> P2PFlopError:
    """The same error once more: one instance raised twice would grow its traceback."""
    return type(error)(error.message, hint=error.hint)


def _messages(commands: Sequence[AnyCommand]) -> Iterator[frames.Obey]:
    """Commands in frames that are not too large. Raises ValueError for what no worker obeys."""
    some: list[SessionCommand] = []
    room = PART_BYTES
    for command in commands:
        if isinstance(command, Define | Load | Hold):
            raise ValueError("a worker takes plans and data by ``define`` and ``put``")
        size_bytes = _COMMAND_BYTES
        if isinstance(command, Write):
            size_bytes += len(command.data)
        elif isinstance(command, Bind):
            size_bytes += _PLACE_BYTES * len(command.places)
        if size_bytes > room or len(some) == MAX_BATCH_COMMANDS:
            yield frames.Obey(tuple(some), False)
            some, room = [], PART_BYTES
        some.append(command)
        room -= size_bytes
    yield frames.Obey(tuple(some), True)
