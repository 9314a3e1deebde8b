"""The blobs that a session's Loads name, on the provider's side.

They are kept as a job's inputs are (``lease_blobs.py``): for the buyer's account, and for a while
after the lease, so that what it loads again is not sent again. No more of them at once than the
disk that the bid asked for: what the worker has already goes first, and what comes next waits.
"""

from __future__ import annotations

from collections import OrderedDict

import trio

from p2pflop.dht.blobs import Store
from p2pflop.dht.planes import Dialer
from p2pflop.errors import JobError
from p2pflop.job.commands import Load
from p2pflop.node.lease_blobs import LeaseBlobs
from p2pflop.node.supply import Supply


class LeaseLoads:
    """``session_work.Blobs`` from the buyer's node ``peer``, for its account ``owner``; of this
    node's own account, empty, all that is here may be used."""

    def __init__(
        self,
        store: Store,
        dialer: Dialer,
        blobs: LeaseBlobs,
        lease: bytes,
        peer: str,
        owner: bytes,
        disk_bytes: int,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._lease = lease
        self._owner = owner
        self._disk_bytes = disk_bytes
        self._supply = Supply(store, dialer, peer, owner, self._hold)
        self._waiting: dict[bytes, int] = {}
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        self._taken_bytes = 0
        self._news = trio.Event()

    async def bring(self, load: Load) -> None:
        """See Blobs."""
        await self._make_room(load)
        await self._hold([load.address])
        info = None if self._owner else await self._store.stat(load.address)
        if info is None:
            await self._supply.bring(load.address, load.size_bytes)
            info = await self._store.stat(load.address)
        if info is None or info.size_bytes != load.size_bytes:
            raise JobError(f"blob {load.address.hex()[:12]} has not {load.size_bytes} bytes")

    async def used(self, load: Load) -> None:
        """See Blobs."""
        self._waiting[load.address] -= 1
        if not self._waiting[load.address]:
            del self._waiting[load.address]
        self._sizes.move_to_end(load.address)
        self._news.set()
        self._news = trio.Event()

    async def _make_room(self, load: Load) -> None:
        if load.size_bytes > self._disk_bytes:
            raise JobError(f"a blob of {load.size_bytes} bytes is over the lease's disk")
        self._waiting[load.address] = self._waiting.get(load.address, 0) + 1
        while load.address not in self._sizes:
            if self._taken_bytes + load.size_bytes <= self._disk_bytes:
                self._sizes[load.address] = load.size_bytes
                self._taken_bytes += load.size_bytes
                return
            idle = next((each for each in self._sizes if each not in self._waiting), None)
            if idle is None:
                await self._news.wait()
            else:
                self._taken_bytes -= self._sizes.pop(idle)
                await self._blobs.drop(self._lease, [idle])

    async def _hold(self, addresses: list[bytes]) -> None:
        await self._blobs.hold(self._lease, addresses)
