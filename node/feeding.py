"""The shards of a job's feeds: fetched a few ahead of the steps that need them.

A feed is a collection of shards, which may be far more than memory holds. The collection comes
first and is checked; then shards come in the order of their use, at most ``READ_AHEAD`` further
than what the run has asked for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import trio

from p2pflop.dht.blobs import Store
from p2pflop.errors import JobError, ProtocolError
from p2pflop.job.collection import Collection, numbered, numbered_bytes
from p2pflop.job.file import CheckedJob
from p2pflop.job.spec import FeedSource, is_fed, shard_at, shards_of
from p2pflop.wire import decode

READ_AHEAD: Final = 4

Bring = Callable[[bytes, int], Awaitable[None]]
"""Have the blob of an address, of at most so many bytes, in the store."""

Hold = Callable[[list[bytes]], Awaitable[None]]
"""Keep blobs of these addresses in the store from now on."""


class Feeds:
    """The feeds of one job. ``open``, then ``run`` beside everything else."""

    def __init__(self, checked: CheckedJob, store: Store, bring: Bring, hold: Hold) -> None:
        self._checked = checked
        self._store = store
        self._bring = bring
        self._hold = hold
        self._shards: dict[int, list[bytes]] = {}
        self._size_bytes: dict[bytes, int] = {}
        self._place: dict[bytes, int] = {}
        self._here: dict[bytes, trio.Event] = {}
        self._asked_to = 0
        self._asked = trio.Event()

    async def open(self) -> None:
        """Fetch and check the collections. Raises JobError, ProviderError, StoreError."""
        for slot, source in self._checked.feeds:
            size_bytes = self._checked.slot_bytes(slot)
            collection_bytes = numbered_bytes(source.shards, size_bytes)
            await self._bring(source.collection, collection_bytes)
            data = await self._store.get(source.collection, collection_bytes)
            self._shards[slot] = open_feed(slot, source, size_bytes, data)
        for slot, shard in self._order():
            address = self._shards[slot][shard]
            self._place.setdefault(address, len(self._place))
            self._size_bytes[address] = self._checked.slot_bytes(slot)
            self._here[address] = trio.Event()
        await self._hold(list(self._here))

    async def run(self) -> None:
        """Fetch every shard once, in the order of first use."""
        for address, place in self._place.items():
            while place >= self._asked_to + READ_AHEAD:
                await self._asked.wait()
                self._asked = trio.Event()
            await self._bring(address, self._size_bytes[address])
            self._here[address].set()

    async def due(self, step: int, *, first: bool = False) -> AsyncIterator[tuple[int, bytes]]:
        """The slots that get another shard before ``step``, and its address once it is here."""
        for slot, source in self._checked.feeds:
            if first or is_fed(source, step):
                address = self._shards[slot][shard_at(source, step)]
                self._asked_to = max(self._asked_to, self._place[address] + 1)
                self._asked.set()
                await self._here[address].wait()
                yield slot, address

    def _order(self) -> list[tuple[int, int]]:
        """``(slot, shard)`` by the step of the first use."""
        job = self._checked.job
        uses = []
        for slot, source in self._checked.feeds:
            first_turn = job.first_step // source.steps
            for turn, shard in enumerate(shards_of(source, job.first_step, job.steps), first_turn):
                uses.append((turn * source.steps, slot, shard))
        return [(slot, shard) for _, slot, shard in sorted(uses)]


def open_feed(slot: int, source: FeedSource, size_bytes: int, data: bytes) -> list[bytes]:
    """The addresses of the shards in a feed's collection. Raises JobError if it is not one."""
    try:
        found = decode(Collection, data)
    except ProtocolError as error:
        raise JobError(f"the feed of slot {slot} is no collection: {error.message}") from error
    addresses = [entry.address for entry in found.entries]
    shards = range(source.shards)
    if len(addresses) != source.shards or numbered(shards, addresses, size_bytes) != found:
        raise JobError(
            f"the feed of slot {slot} is not {source.shards} shards of {size_bytes} bytes each",
            hint="Every shard must have the shape of the feed.",
        )
    return addresses
