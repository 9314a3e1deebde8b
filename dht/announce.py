"""Telling the DHT who has which public blob, and asking it.

A blob is announced under a hash of its address, so that the DHT's keys are ours alone and a node
that stores an announcement does not learn an address that it was not told. Only blobs put as
public are announced, and whether one still is, is asked again before each announcement.

Peers accept ten announcements in ten seconds from one peer and drop the rest in silence, so the
announcer keeps below that itself: new blobs are due at once, known ones again after
``REPEAT_S`` (records live for a day or two), failed ones after ``RETRY_S``, and whatever is due
first goes first. Nothing about announcements is kept on disk: after a restart all is due.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from p2pflop.dht.store import Store
from p2pflop.errors import ProviderError
from p2pflop.ids import content_hash

WINDOW_S: Final = 10.0
MAX_IN_WINDOW: Final = 8
"""Two below what peers accept, because their windows do not begin where ours do."""

REPEAT_S: Final = 12 * 3600.0
RETRY_S: Final = 30.0
RESCAN_S: Final = 3600.0
MAX_ANNOUNCED: Final = 32_768
"""What ``MAX_IN_WINDOW`` can repeat within ``REPEAT_S``, rounded down to a power of two."""

MAX_SOURCES: Final = 16


class Directory(Protocol):
    """Who provides what: the DHT, or a table in memory."""

    async def provide(self, key: bytes) -> None:
        """Say that this node provides ``key``. Raises ProviderError if nobody took it."""

    async def find(self, key: bytes) -> list[str]:
        """Peers that provide ``key``, best first; not this node. Raises ProviderError."""


@dataclass(frozen=True, slots=True)
class AnnouncerStatistics:
    """``scheduled`` blobs wait for their turn; the rest counts since the start."""

    scheduled: int
    announced: int
    failed: int
    refused: int


def announcement_key(address: bytes) -> bytes:
    """The DHT key of a blob: 32 bytes."""
    return content_hash(b"p2pflop/1/blob\0" + address)


async def locate(directory: Directory, address: bytes) -> list[str]:
    """At most ``MAX_SOURCES`` peers that say they have the blob. Raises ProviderError."""
    peers = await directory.find(announcement_key(address))
    return list(dict.fromkeys(peers))[:MAX_SOURCES]


class Announcer:
    """Announces the public blobs of a store while ``run`` runs."""

    def __init__(self, store: Store, directory: Directory) -> None:
        self._store = store
        self._directory = directory
        self._due: dict[bytes, float] = {}
        self._heap: list[tuple[float, bytes]] = []
        self._sent_at: deque[float] = deque(maxlen=MAX_IN_WINDOW)
        self._news = trio.Event()
        self._announced = self._failed = self._refused = 0

    def announce(self, address: bytes) -> bool:
        """Announce ``address`` as soon as the rate allows. False if too many wait already."""
        known = address in self._due
        if not known and len(self._due) >= MAX_ANNOUNCED:
            self._refused += 1
            return False
        now = trio.current_time()
        if not known or self._due[address] > now:
            self._schedule(address, now)
            self._news.set()
        return True

    async def locate(self, address: bytes) -> list[str]:
        """At most ``MAX_SOURCES`` peers that say they have the blob. Raises ProviderError."""
        return await locate(self._directory, address)

    def statistics(self) -> AnnouncerStatistics:
        """Counts for status pages."""
        return AnnouncerStatistics(len(self._due), self._announced, self._failed, self._refused)

    async def run(self) -> None:
        """Announce until cancelled. Raises StoreError if the store fails."""
        rescan_at = trio.current_time()
        while True:
            if trio.current_time() >= rescan_at:
                await self._rescan()
                rescan_at = trio.current_time() + RESCAN_S
            due_at = self._next_due()
            if due_at <= trio.current_time():
                await self._announce_first()
                continue
            self._news = trio.Event()
            with trio.move_on_at(min(due_at, rescan_at)):
                await self._news.wait()

    async def _rescan(self) -> None:
        for info in await self._store.list():
            if info.public and info.address not in self._due:
                self.announce(info.address)

    async def _announce_first(self) -> None:
        _, address = heapq.heappop(self._heap)
        info = await self._store.stat(address)
        if info is None or not info.public:
            del self._due[address]
            return
        if len(self._sent_at) == MAX_IN_WINDOW:
            await trio.sleep_until(self._sent_at[0] + WINDOW_S)
        self._sent_at.append(trio.current_time())
        try:
            await self._directory.provide(announcement_key(address))
        except ProviderError:
            self._failed += 1
            self._schedule(address, trio.current_time() + RETRY_S)
        else:
            self._announced += 1
            self._schedule(address, trio.current_time() + REPEAT_S)

    def _schedule(self, address: bytes, due_at: float) -> None:
        """An entry of the heap counts only while ``_due`` agrees with it."""
        self._due[address] = due_at
        heapq.heappush(self._heap, (due_at, address))

    def _next_due(self) -> float:
        while self._heap:
            due_at, address = self._heap[0]
            if self._due.get(address) == due_at:
                return due_at
            heapq.heappop(self._heap)
        return float("inf")
