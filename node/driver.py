"""Driving a lifecycle: its actions done in order, its rows on disk before anything leaves.

The lifecycle (``p2pflop.job.lifecycle``) decides, this drives. Events come from several tasks at
once (stream, worker, timer, user); one lock puts them in order. Rows are flushed before the first
``Send`` that follows them, together: until then a crash only takes back what nobody has seen. A
job that rests has nothing to send for long; its rows are flushed as it begins to. A bid alone is on
its way while its rows go to disk: it binds nobody, a fill that nobody confirms lapses, and the
confirm is not even signed before that write has ended. So a crash may lose a bid, and no more.

What a lifecycle has decided is done to its end, even if the task that reported the event is
cancelled meanwhile, say because its stream broke. If it cannot be done (the disk is full), memory
is ahead of the journal and the driver is of no more use: it is ``over`` with a ``failure``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, Protocol

import trio

from p2pflop.dht.turns import Turn
from p2pflop.errors import ProtocolError, ProviderError, StoreError
from p2pflop.job.events import (
    Event,
    Finish,
    Lost,
    Persist,
    Received,
    Send,
    SetTimer,
    Start,
    Stop,
    Timer,
)
from p2pflop.job.lifecycle import Lifecycle
from p2pflop.node.journal import JobRows, Row
from p2pflop.node.printable import printable
from p2pflop.units import NS_PER_S

LIFE_ROW: Final = "life:"
LOOK_AGAIN_NS: Final = 60 * NS_PER_S
"""Timers are times of day; a clock that was set, or a machine that slept, is noticed so soon."""

_log = logging.getLogger(__name__)


class Hands(Protocol):
    """What a driver's owner does for it. None of these may wait for long."""

    async def write(self) -> None:
        """Put the job's rows on disk, and with them what must be there before a record leaves."""

    async def send(self, action: Send) -> None:
        """Send a signed record to the other side; a failure is told as ``Lost``."""

    def keep(self, edge: str) -> None:
        """Add to the job's rows what goes to disk together with this edge's row."""

    def start(self, task: str) -> None:
        """Begin a task in the background."""

    def stop(self) -> None:
        """End every task and free what it holds."""

    async def finish(self, action: Finish) -> None:
        """The job is over on this side; the end state goes to disk with what this adds."""


class Driver:
    """One lifecycle at work. ``over`` is set at its end, and if it failed: then see ``failure``."""

    def __init__(
        self,
        lifecycle: Lifecycle[Any],
        rows: JobRows,
        hands: Hands,
        now_ns: Callable[[], int],
    ) -> None:
        self.lifecycle = lifecycle
        self.over = trio.Event()
        self.failure: Exception | None = None
        self._rows = rows
        self._hands = hands
        self._now_ns = now_ns
        self._lock = Turn()
        self._timers: dict[str, int] = {}
        self._wakes_ns = 0
        self._timers_changed = trio.Event()

    async def start(self) -> None:
        """Begin a new job."""
        async with self._lock:
            await self._do(self.lifecycle.start(self._now_ns()))

    async def resume(self, rows: list[Row]) -> None:
        """Take up a journalled job. Raises StoreError for a broken journal."""
        life = [(r.kind[len(LIFE_ROW) :], r.body) for r in rows if r.kind.startswith(LIFE_ROW)]
        async with self._lock:
            try:
                actions = self.lifecycle.resume(life, self._now_ns())
            except StoreError as error:
                self._fail(error)
                raise
            await self._do(actions)

    async def on(self, *events: Event) -> None:
        """Tell the lifecycle of events. Raises ProtocolError at the first that is not allowed now.

        The rows of events that are told together go to disk together. Raises what the hands raise,
        and ProviderError once the driver has failed.
        """
        async with self._lock:
            if self.failure is not None:
                raise ProviderError("this node has failed in the middle of the job")
            actions: list[Any] = []
            try:
                for event in events:
                    actions += self.lifecycle.on(event, self._now_ns())
            finally:
                await self._do(actions)

    async def hear(self, event: Event) -> str:
        """Tell of something that came from the peer.

        What is not allowed loses the peer: the answer is why, for the stream to be cut, or nothing.
        """
        try:
            await self.on(event)
        except ProtocolError as error:
            if self.failure is not None:
                raise
            kind = "a record" if isinstance(event, Received) else type(event).__name__
            why = printable(error.message)
            _log.info("%s from the peer refused: %s", kind, why)
            await self.on(Lost(why))
            return why or "it sent what is not allowed"
        return ""

    async def run_timers(self) -> None:
        """Report timers when they are due, until the job is over."""
        while not self.over.is_set():
            self._timers_changed = trio.Event()
            now_ns = self._now_ns()
            self._wakes_ns = min([*self._timers.values(), now_ns + LOOK_AGAIN_NS])
            wait_ns = self._wakes_ns - now_ns
            with trio.move_on_after(max(0.0, wait_ns / NS_PER_S)) as scope:
                await self._timers_changed.wait()
            if scope.cancelled_caught:
                now_ns = self._now_ns()
                for name in [name for name, at_ns in self._timers.items() if at_ns <= now_ns]:
                    # The first of two that are due may have taken the second one back.
                    if self._timers.pop(name, None) is not None:
                        await self.on(Timer(name))

    async def _do(self, actions: list[Any]) -> None:
        if not actions:
            return
        try:
            with trio.CancelScope(shield=True):
                await self._act(actions)
        except Exception as error:
            self._fail(error)
            raise

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self._timers.clear()
        self.over.set()

    def _keep(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Persist):
                self._rows.add(LIFE_ROW + action.kind, action.body)
                self._hands.keep(action.kind)

    async def _act(self, actions: list[Any]) -> None:
        self._keep(actions)
        for action in actions:
            if action == Start("rest"):
                await self._hands.write()
            match action:
                case Send("bid"):
                    await self._hands.send(action)
                    await self._hands.write()
                case Send():
                    await self._hands.write()
                    await self._hands.send(action)
                case Start():
                    self._hands.start(action.task)
                case Stop():
                    self._hands.stop()
                case SetTimer():
                    self._timers[action.name] = action.at_ns
                    if action.at_ns < self._wakes_ns:
                        self._timers_changed.set()
                case Finish():
                    self._timers.clear()
                    self._timers_changed.set()
                    await self._hands.finish(action)
                    self.over.set()
