"""A worker: a locked process that holds one work, or session, in memory and runs it on command.

It answers one exchange at a time (``frames``). While it runs it looks for a ``Stop`` or ``Stand``
between two steps, and tells rows at most every ``ROWS_INTERVAL_SECONDS``, or when a frame of them
is full; a node that does not read them makes it wait on the pipe.
"""

from __future__ import annotations

import errno
import time
from typing import Final

from p2pflop.errors import JobError, P2PFlopError, ProtocolError
from p2pflop.job.spec import Work, ever_stands_still, graphs_of, stands_still
from p2pflop.kernels.engine import Engine, WorkSession
from p2pflop.kernels.frames import (
    MAX_PLANS_BYTES,
    MAX_ROW_VALUES,
    BlockingPipe,
    Continue,
    Done,
    Fault,
    Initialise,
    Load,
    LoadPlan,
    Obey,
    OpenSession,
    Paused,
    Progressed,
    Put,
    Read,
    ReadOutput,
    Ready,
    Run,
    Scalar,
    Stand,
    Stop,
    WorkerCommand,
    Write,
    parts,
    text,
    worker_command,
)
from p2pflop.kernels.session_serving import ServedSession
from p2pflop.wire import decode

ROWS_INTERVAL_SECONDS: Final = 0.05
OUT_OF_MEMORY: Final = "the job ran out of memory. Make its tensors or its batch smaller."


def serve(pipe: BlockingPipe, engine: Engine, mark: memoryview) -> None:
    """Obey the node until it closes the pipe. Raises EOFError or OSError then.

    ``mark``: see ``session_serving``.
    """
    pipe.send(Ready())
    try:
        _Worker(pipe, engine, mark).obey()
    except (EOFError, BrokenPipeError):
        raise
    except MemoryError:
        pipe.send(Fault(True, OUT_OF_MEMORY))
    except OSError as error:
        job = error.errno == errno.ENOMEM
        pipe.send(Fault(job, OUT_OF_MEMORY if job else text(repr(error))))
    except P2PFlopError as error:
        pipe.send(Fault(isinstance(error, JobError), text(error)))
    # The node must hear why, whatever it is, before this process ends.
    except Exception as error:  # noqa: BLE001
        pipe.send(Fault(False, text(f"the worker failed: {error!r}")))


class _Worker:
    def __init__(self, pipe: BlockingPipe, engine: Engine, mark: memoryview) -> None:
        self._pipe = pipe
        self._engine = engine
        self._mark = mark
        self._opened: ServedSession | None = None
        self._loaded: WorkSession | None = None
        self._plans: dict[bytes, bytes] = {}
        self._work: Work
        self._stands_still = False

    def obey(self) -> None:
        while True:
            self._answer(self._pipe.receive(worker_command))

    def _answer(self, command: WorkerCommand) -> None:
        match command:
            case Load():
                self._load(command)
            case Write():
                self._session.write(command.slot, command.offset_bytes, command.data)
            case Initialise():
                self._session.initialise()
                self._pipe.send(Done())
            case Run():
                self._run(command)
            case Read():
                self._send(*(self._session.read(slot) for slot in command.slots))
            case ReadOutput():
                view = self._session.read_output(command.phase, command.output)
                self._send(*(() if view is None else (view,)))
            case OpenSession():
                self._opened = ServedSession(self._pipe, self._engine.workspace(), self._mark)
            case Stop() | Stand():
                pass  # it crossed the end of the run that it was meant for
            case _:
                self._answer_in_session(command)

    def _answer_in_session(self, command: WorkerCommand) -> None:
        match command:
            case Obey() if self._opened:
                self._opened.obey(command)
            case Put(buffer, offset_bytes, data) if self._opened:
                self._opened.workspace.put(buffer, offset_bytes, data)
            case LoadPlan(graph) if self._opened:
                plan = self._pipe.receive_parts(worker_command, MAX_PLANS_BYTES)
                self._opened.workspace.define(graph, plan)
            case _:
                raise ProtocolError(f"{type(command).__name__} out of turn")

    @property
    def _session(self) -> WorkSession:
        if self._loaded is None:
            raise ProtocolError("no work is loaded")
        return self._loaded

    def _load(self, command: Load) -> None:
        plans = self._plans
        budget = MAX_PLANS_BYTES - sum(map(len, plans.values()))
        for _ in range(command.plans):
            start = self._pipe.receive(worker_command)
            if not isinstance(start, LoadPlan):
                raise ProtocolError(f"expected a plan, got {type(start).__name__}")
            plans[start.graph] = self._pipe.receive_parts(worker_command, budget)
            budget -= len(plans[start.graph])
        self._work = decode(Work, command.work)
        named = graphs_of(self._work)
        self._plans = {graph: plan for graph, plan in plans.items() if graph in named}
        self._stands_still = ever_stands_still(self._work)
        self._loaded = None  # its memory goes first
        self._loaded = self._engine.session(self._work, self._plans)

    def _send(self, *views: memoryview) -> None:
        for part in parts(*views):
            self._pipe.send(part)

    def _run(self, command: Run) -> None:
        session, rows = self._session, _Rows(self._pipe)
        step, end = command.first_step, command.first_step + command.steps
        stopped = condition = False
        while step < end and not (stopped or condition):
            session.step(step)
            rows.add(step, session.scalars())
            condition = session.should_stop(step)
            step += 1
            wanted = self._wanted() if self._pipe.waiting() else None
            stopped = isinstance(wanted, Stop)
            boundary = command.pause_every and step % command.pause_every == 0
            boundary = boundary or isinstance(wanted, Stand)
            boundary = boundary or (self._stands_still and stands_still(self._work, step))
            if boundary and step < end and not (stopped or condition):
                rows.flush()
                self._pipe.send(Paused(step, False, False))
                if self._given_up():
                    return
        rows.flush()
        self._pipe.send(Paused(step, True, condition))

    def _wanted(self) -> Stop | Stand:
        command = self._pipe.receive(worker_command)
        if not isinstance(command, Stop | Stand):
            raise ProtocolError(f"{type(command).__name__} during a run")
        return command

    def _given_up(self) -> bool:
        """Stand still and answer until told to go on (False) or to stop (True)."""
        while True:
            command = self._pipe.receive(worker_command)
            if isinstance(command, Continue | Stop):
                return isinstance(command, Stop)
            if isinstance(command, Run | Load):
                raise ProtocolError(f"{type(command).__name__} inside a run")
            self._answer(command)


class _Rows:
    """Traced scalars on their way out, batched."""

    def __init__(self, pipe: BlockingPipe) -> None:
        self._pipe = pipe
        self._values: list[Scalar] = []
        self._first: int | None = None
        self._last = 0
        self._due = time.monotonic() + ROWS_INTERVAL_SECONDS

    def add(self, step: int, scalars: list[tuple[int, int, bytes]]) -> None:
        if len(self._values) + len(scalars) > MAX_ROW_VALUES:
            self.flush()
        self._first = step if self._first is None else self._first
        self._last = step
        for phase, output, value in scalars:
            if len(self._values) == MAX_ROW_VALUES:
                self.flush()
                self._first = step
            self._values.append((step, phase, output, value))
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        self._due = time.monotonic() + ROWS_INTERVAL_SECONDS
        if self._first is None:
            return
        self._pipe.send(Progressed(self._first, self._last, tuple(self._values)))
        self._values, self._first = [], None
