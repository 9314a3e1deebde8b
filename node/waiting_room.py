"""Runs of this node that wait until a provider has room for them.

Who waits is woken in turn as room is freed, by a run that ends or a worker of this node, and now
and then by its own timer. A newcomer that wants as much as somebody who waits already queues behind
instead of asking everybody again: a sweep over a few slots would else be refused several times a
job. It queues for ``QUEUE_S`` at most before it asks for itself.
"""

from __future__ import annotations

from typing import Final, Protocol

import trio

from p2pflop.node.guard import survive
from p2pflop.node.orders import Order

QUEUE_S: Final = 2.0
FULL_S: Final = 1.0
"""How long an account that had no room for a run is taken to have none for others."""


class Waiting(Protocol):
    """A run that waits."""

    @property
    def wants_room_for(self) -> Order | None:
        """What it wants, if all that it lacks is somebody with a free slot."""

    async def try_again(self) -> None:
        """Somebody may have room now. Never raises."""


class WaitingRoom:
    """Who waits, by the id of its run, longest first."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._waiting: dict[str, Waiting] = {}
        self._full: dict[bytes, float] = {}

    def enter(self, run_id: str, waiting: Waiting) -> None:
        """Wait from now on."""
        self._waiting[run_id] = waiting

    def leave(self, run_id: str) -> None:
        """It goes on, or is over."""
        self._waiting.pop(run_id, None)

    def wake(self, run_id: str) -> None:
        """Let a run try again, if it waits."""
        waiting = self._waiting.pop(run_id, None)
        if waiting is not None:
            self._nursery.start_soon(survive, waiting.try_again)

    def note_full(self, account: bytes) -> None:
        """An account has said that it has no room now."""
        now_s = trio.current_time()
        self._full = {each: until_s for each, until_s in self._full.items() if until_s > now_s}
        self._full[account] = now_s + FULL_S

    @property
    def full(self) -> frozenset[bytes]:
        """The accounts that said so lately, and at which no run of this node has ended since."""
        now_s = trio.current_time()
        return frozenset(each for each, until_s in self._full.items() if until_s > now_s)

    def room_freed(self, account: bytes | None = None) -> None:
        """Somebody, that account if it is known, has room again: let the run try that has waited
        longest."""
        if account is not None:
            self._full.pop(account, None)
        if self._waiting:
            self.wake(next(iter(self._waiting)))

    def is_hopeless(self, order: Order) -> bool:
        """Whether somebody waits for room who wants no more than ``order``."""
        wanted = (waiting.wants_room_for for waiting in self._waiting.values())
        return any(other is not None and order.wants_as_much_as(other) for other in wanted)

    async def queue(self, run_id: str, order: Order) -> None:
        """Return once it is the turn of a newcomer, or after ``QUEUE_S``."""
        newcomer = _Newcomer(order)
        self.enter(run_id, newcomer)
        with trio.move_on_after(QUEUE_S):
            await newcomer.turn.wait()
        if self._waiting.get(run_id) is newcomer:
            self.leave(run_id)


class _Newcomer:
    def __init__(self, order: Order) -> None:
        self.turn = trio.Event()
        self.wants_room_for: Order | None = order

    async def try_again(self) -> None:
        self.turn.set()
        await trio.lowlevel.checkpoint()
