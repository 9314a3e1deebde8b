"""What a worker pool promises, be it processes in a sandbox or memory in a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from p2pflop.job.commands import AnyCommand, Data, Ran
from p2pflop.job.spec import ClassDescriptor


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What one worker may use. ``memory_bytes`` is the job's; the process's own comes on top.

    ``step_seconds`` is wall time: of one step, of the init graphs, of loading.
    """

    memory_bytes: int
    cpu_seconds: int
    step_seconds: float


@dataclass(frozen=True, slots=True)
class Rows:
    """Steps ``first_step`` to ``last_step`` ran; ``values`` are their traced scalars in order,
    as ``(step, phase, output, value)``. A step with very many may come in several Rows."""

    first_step: int
    last_step: int
    values: tuple[tuple[int, int, int, bytes], ...]


@dataclass(frozen=True, slots=True)
class Paused:
    """The worker stands still: the state is that after ``step`` steps of the work, so that
    ``step`` is the next one. ``ended``: this run is over; ``condition``: by the work's own stop.
    """

    step: int
    ended: bool = False
    condition: bool = False


WorkerEvent = Rows | Paused


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A pool at one moment. ``notes`` say why the level is not higher."""

    level: int
    notes: tuple[str, ...]
    workers: int
    lowering: int
    plans_lowered: int
    plans_reused: int
    crashes: int
    broken: bool
    process_ids: tuple[int, ...]


class Worker(Protocol):
    """One lease's computation. One call at a time, ``stop`` excepted.

    Every method may raise JobError (the job's fault: it faulted, ran out of memory or time) or
    ProviderError (the worker was lost or misbehaved). After either the worker is of no more use.
    """

    @property
    def alive(self) -> bool:
        """Whether it may still be used."""

    @property
    def held(self) -> frozenset[bytes]:
        """The graphs whose plans it has ready: those of the work that was loaded last."""

    async def load(self, work: bytes, plans: Mapping[bytes, bytes]) -> None:
        """Load an encoded Work and the plan of each of its graphs, by graph hash."""

    async def write(self, slot: int, offset_bytes: int, data: bytes) -> None:
        """Put ``data`` into a slot. Errors in it show at the next answer."""

    def run(self, first_step: int, steps: int, pause_every: int = 0) -> AsyncIterator[WorkerEvent]:
        """Run steps. Rows come at least every 50 ms or once a step, whichever is longer.

        Paused comes before every step that is a multiple of ``pause_every`` (0: none) or before
        which the work stands still (``spec.stands_still``), and at the end; the worker may be read
        and written until the iterator is advanced.
        """

    def read(self, slot: int) -> AsyncIterator[bytes]:
        """The bytes of a slot, in chunks of at most 1 MiB. Read it to the end."""

    def read_output(self, phase: int, output: int) -> AsyncIterator[bytes]:
        """The last value of a fresh output, likewise; nothing if its phase has not run."""

    def read_slots(self, slots: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """``(slot, chunk)`` of each of these slots in their order, in one exchange. Likewise. A
        slot of no bytes has no chunk."""

    async def pause(self) -> None:
        """Stand still after the current step: a Paused comes that nothing else had due. Does
        nothing where nothing runs."""

    async def stop(self) -> None:
        """End the run after the current step: its next Paused is the last."""


class SessionWorker(Protocol):
    """One lease's computation where graphs come one after the other (``job.commands``).

    Commands were checked before they come here. Every method may raise JobError or ProviderError
    as those of ``Worker`` do; what is wrong with something that is not answered shows at the next
    report.
    """

    @property
    def reached(self) -> int:
        """The place, from 0 and among all commands that were given to ``obey``, of the one that it
        is at; after a failure the one to blame."""

    async def open_session(self) -> None:
        """Begin, with no buffers; instead of ``load``."""

    async def define(self, graph_hash: bytes, plan: bytes) -> None:
        """Have the plan of a graph. Not answered."""

    async def put(self, buffer: int, offset_bytes: int, data: bytes) -> None:
        """Put a piece of a Load, of at most 1 MiB, into a buffer. Not answered."""

    async def obey(self, commands: Sequence[AnyCommand]) -> None:
        """Obey commands, no Define or Load among them. Answered by reports, which must be read at
        the same time: a worker that is not heard does not listen."""

    def reports(self) -> AsyncIterator[Ran | Data]:
        """What came of each ``obey``, in order: Data for each Read in it, then one Ran. Numbers in
        them are places as in ``reached``. One reader at a time."""


class Workers(Protocol):
    """A pool: lowers graphs, leases workers."""

    @property
    def descriptor(self) -> ClassDescriptor:
        """The determinism class of every worker here."""

    @property
    def class_id(self) -> bytes:
        """The hash of the descriptor."""

    @property
    def level(self) -> int:
        """The sandbox level, 1 to 3, as probed."""

    @property
    def broken(self) -> bool:
        """Whether it crashed too often and has given up."""

    async def start(self) -> None:
        """Become ready. Raises ConfigError if this machine cannot compute."""

    async def aclose(self) -> None:
        """End every worker and helper process."""

    async def lower(
        self,
        graph: bytes,
        progress: Callable[[int, int], None] | None = None,
        *,
        account: bytes | None = None,
    ) -> bytes:
        """The plan of an encoded graph, from the cache if it is there. Raises JobError,
        ProviderError. ``progress(done, total)`` counts kernels. Small graphs of one ``account``
        may be lowered one after the other in one process; their plans are for it alone."""

    def plan_at_hand(self, graph: bytes, account: bytes | None = None) -> bytes | None:
        """The plan of an encoded graph, if it is in memory."""

    def flop_of(self, plan: bytes) -> int:
        """What the kernels of a plan compute, recomputation included. Raises ProtocolError."""

    def worker(self, limits: WorkerLimits) -> AbstractAsyncContextManager[Worker]:
        """A fresh worker, which ends with the context. Raises ProviderError."""

    def statistics(self) -> PoolStatistics:
        """Counters and process ids."""
