"""A lock that costs nothing while nobody else wants it.

``trio.Lock`` lets every other task run before it is given, which is fair to them, and keeps account
of its owner; both cost more than most of what is guarded here, and a purchase takes some thirty of
them. Who has to wait waits as there, first come, first served.
"""

from __future__ import annotations

import trio


class Turn:
    """``async with turn:`` runs alone. Whoever has the turn must not ask for it again."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._is_taken:
            await self._waiting.park()  # it is handed over taken
        else:
            self._is_taken = True

    async def __aexit__(self, *_: object) -> None:
        if self._waiting:
            self._waiting.unpark()
        else:
            self._is_taken = False
