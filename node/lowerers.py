"""Processes that lower graphs: one for each graph, or one for the small graphs of an account.

A lowerer that a hostile graph has taken over can answer whatever it likes to the next graph, so it
sees graphs of one account alone, and what it answers is kept for that account alone. A graph that
is large is seconds of work: to fork costs nothing beside it, and its plan is for everybody. Small
ones come by the hundred, from a script that runs operation by operation, and take a lowerer that
is kept for them: warm, with its compile server, until it has nothing to do or has done its share.
A fault of one that had other graphs before says little, so a fresh one has the last word.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from p2pflop.errors import JobError, P2PFlopError, ProtocolError, ProviderError
from p2pflop.kernels.frames import LOWERER, Fault, Lower, Part, Progress, lowerer_report
from p2pflop.kernels.plan import MAX_PLAN_BYTES
from p2pflop.node.crew import Child, Crew, fault_error
from p2pflop.node.pipes import EndOfPipe
from p2pflop.units import GIB, KIB

if TYPE_CHECKING:
    from trio_typing import TaskStatus

LOWER_SECONDS: Final = 900.0
LOWER_CPU_SECONDS: Final = 600
LOWER_MEMORY_BYTES: Final = 4 * GIB
MAX_PROGRESS_FRAMES: Final = 65_536
SMALL_GRAPH_BYTES: Final = 2 * KIB
"""Up to here a graph may go to a lowerer that is kept."""
MAX_KEPT_GRAPHS: Final = 256
"""What a lowerer does before it ends: tinygrad's memory of what it saw grows."""
MAX_IDLE_LOWERERS: Final = 6
"""Those that run (``workers.MAX_LOWERERS``) and these have a compile server each."""
IDLE_S: Final = 10.0
KEPT_MEMORY_BYTES: Final = GIB


class Lowering:
    """A graph being lowered, and everybody who waits for it."""

    def __init__(self, key: bytes, graph: bytes, account: bytes | None = None) -> None:
        self.key = key
        self.graph = graph
        self.account = account
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.plan: bytes | None = None
        self.error: P2PFlopError | None = None
        self._listeners: list[Callable[[int, int], None] | None] = []

    @property
    def abandoned(self) -> bool:
        """Whether it is being ended because nobody waits for it."""
        return self.scope.cancel_called

    def tell(self, done: int, total: int) -> None:
        """Pass progress on."""
        for listener in self._listeners:
            if listener is not None:
                listener(done, total)

    async def wait(self, progress: Callable[[int, int], None] | None) -> bytes:
        """The plan. Raises JobError, ProviderError."""
        self._listeners.append(progress)
        try:
            await self.done.wait()
        finally:
            self._listeners.remove(progress)
            if not self._listeners and not self.done.is_set():
                self.scope.cancel()
        if self.plan is not None:
            return self.plan
        error = self.error or ProviderError("the lowering was broken off")
        raise type(error)(error.message, hint=error.hint)


@dataclass(slots=True, eq=False)
class _Kept:
    """A lowerer of an account; ``scope`` ends it."""

    account: bytes
    child: Child
    scope: trio.CancelScope
    graphs: int = 0

    @property
    def is_usable(self) -> bool:
        return not self.scope.cancel_called and not self.child.ended.is_set()


def is_shared(graph: bytes, account: bytes | None) -> bool:
    """Whether the plan of ``graph`` is made by a process of its own, and so for everybody."""
    return account is None or len(graph) > SMALL_GRAPH_BYTES


@dataclass(slots=True)
class Lowerers:
    """Lowers what it is given; ``crew`` gives one that is warm."""

    crew: Callable[[], Awaitable[Crew]]
    _idle: list[_Kept] = field(default_factory=list)

    async def lower(self, lowering: Lowering, nursery: trio.Nursery) -> bytes:
        """The plan. A lowerer that is kept lives in ``nursery``. Raises JobError, ProviderError."""
        if lowering.account is None or is_shared(lowering.graph, lowering.account):
            return await self._lower_alone(lowering)
        kept = self._take(lowering.account) or await self._start(lowering.account, nursery)
        try:
            plan = await _exchange(kept.child, lowering)
        except P2PFlopError:
            if not kept.graphs:
                raise
            return await self._lower_alone(lowering)
        else:
            self._give_back(kept)
            return plan
        finally:
            if kept not in self._idle:
                kept.scope.cancel()

    async def _lower_alone(self, lowering: Lowering) -> bytes:
        crew = await self.crew()
        async with crew.child(LOWERER, LOWER_MEMORY_BYTES, LOWER_CPU_SECONDS) as child:
            return await _exchange(child, lowering)

    async def _start(self, account: bytes, nursery: trio.Nursery) -> _Kept:
        kept: _Kept = await nursery.start(self._keep, account)
        return kept

    async def _keep(self, account: bytes, task_status: TaskStatus[_Kept]) -> None:
        """A lowerer from its start to its end, which harms nobody."""
        crew = await self.crew()
        async with crew.child(LOWERER, KEPT_MEMORY_BYTES, LOWER_CPU_SECONDS) as child:
            with trio.CancelScope() as scope:
                kept = _Kept(account, child, scope)
                task_status.started(kept)
                await child.ended.wait()
            if kept in self._idle:
                self._idle.remove(kept)

    def _take(self, account: bytes) -> _Kept | None:
        for kept in reversed(self._idle):
            if kept.account == account and kept.is_usable:
                self._idle.remove(kept)
                kept.scope.deadline = math.inf
                return kept
        return None

    def _give_back(self, kept: _Kept) -> None:
        kept.graphs += 1
        if kept.graphs >= MAX_KEPT_GRAPHS:
            return
        kept.scope.deadline = trio.current_time() + IDLE_S
        self._idle.append(kept)
        if len(self._idle) > MAX_IDLE_LOWERERS:
            self._idle.pop(0).scope.cancel()


async def _exchange(child: Child, lowering: Lowering) -> bytes:
    try:
        with trio.fail_after(LOWER_SECONDS):
            await child.pipe.send(Lower())
            await child.pipe.send_parts(lowering.graph)
            return await _receive_plan(child, lowering)
    except trio.TooSlowError as error:
        raise JobError(f"lowering took longer than {LOWER_SECONDS:.0f} s") from error
    except EndOfPipe as error:
        raise await child.cause_of_death("lowerer") from error
    except ProtocolError as error:
        raise ProviderError(f"the lowerer broke the protocol: {error.message}") from error


async def _receive_plan(child: Child, lowering: Lowering) -> bytes:
    plan = bytearray()
    for _ in range(MAX_PROGRESS_FRAMES):
        report = await child.pipe.receive(lowerer_report)
        match report:
            case Progress():
                lowering.tell(report.done, report.total)
            case Fault():
                raise fault_error(report)
            case Part():
                plan += report.data
                if len(plan) > MAX_PLAN_BYTES:
                    raise JobError(f"the plan is over the limit of {MAX_PLAN_BYTES} bytes")
                if report.last:
                    return bytes(plan)
            case _:
                raise ProtocolError(f"{type(report).__name__} instead of a plan")
    raise ProtocolError(f"more than {MAX_PROGRESS_FRAMES} frames")
