"""A lock that costs nothing while nobody else wants it.

``trio.Lock`` lets every other task run before it is given, which is fair to them and costs more
than most of what is guarded here; a purchase takes some thirty of them. Who has to wait waits as
there, first come, first served.
"""

from __future__ import annotations

import trio


class Turn:
    """``async with turn:`` runs alone."""

    def __init__(self) -> None:
        self._lock = trio.Lock()

    async def __aenter__(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()
