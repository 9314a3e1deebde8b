"""Blobs that are here for strangers' leases, and their end.

Inputs, checkpoints and results of a lease are stored under the buyer's account, not as this node's
own. They, and what was fetched of inputs that never came whole, are held while the lease lasts and
for an hour after it; what nobody holds by then is deleted. What the node's user has put is the
node's own, and what is public is public: neither is touched, and a blob that was a stranger's
becomes the node's own when its user puts or buys it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final

import trio

from p2pflop.dht.blobs import Store
from p2pflop.dht.turns import Turn
from p2pflop.errors import P2PFlopError
from p2pflop.units import NS_PER_S

GRACE_NS: Final = 3600 * NS_PER_S
SWEEP_S: Final = 600.0

_log = logging.getLogger(__name__)


class LeaseBlobs:
    """Who holds what. After a restart, whatever is not held anew is only as old as it is."""

    def __init__(self, store: Store, now_ns: Callable[[], int]) -> None:
        self._store = store
        self._now_ns = now_ns
        self._held: dict[bytes, set[bytes]] = {}
        self._until_ns: dict[bytes, int] = {}
        self._deleting = Turn()

    async def hold(self, lease: bytes, addresses: Iterable[bytes]) -> None:
        """``lease`` needs these blobs, which may not be here yet."""
        async with self._deleting:
            self._held.setdefault(lease, set()).update(addresses)
            self._until_ns.pop(lease, None)

    async def drop(self, lease: bytes, addresses: Iterable[bytes]) -> None:
        """``lease`` goes on without these blobs; what nobody else holds is deleted now.

        Raises StoreError.
        """
        self._held.get(lease, set()).difference_update(addresses)
        for address in addresses:
            info = await self._store.stat(address)
            if info is None or not info.owner or info.public:
                continue
            async with self._deleting:
                if not any(address in held for held in self._held.values()):
                    await self._store.delete(address, owner=info.owner)

    def holds(self, lease: bytes, address: bytes) -> bool:
        """Whether ``lease`` needs that blob, or did until a while ago."""
        return address in self._held.get(lease, ())

    def needs(self, address: bytes) -> bool:
        """Whether a lease that is not over needs that blob."""
        open_leases = self._held.keys() - self._until_ns.keys()
        return any(address in self._held[lease] for lease in open_leases)

    def let_go(self, lease: bytes) -> None:
        """``lease`` is over."""
        if lease in self._held:
            self._until_ns.setdefault(lease, self._now_ns() + GRACE_NS)

    async def sweep(self) -> int:
        """Delete what nobody needs; how many blobs. Raises StoreError."""
        now_ns = self._now_ns()
        for lease in [key for key, until_ns in self._until_ns.items() if until_ns <= now_ns]:
            del self._until_ns[lease], self._held[lease]
        keep = set().union(*self._held.values())
        deleted = await self._store.forget_partials(now_ns - GRACE_NS, keep)
        for info in await self._store.list():
            if not info.owner or info.public or info.created_ns > now_ns - GRACE_NS:
                continue
            async with self._deleting:
                if not any(info.address in held for held in self._held.values()):
                    deleted += await self._store.delete(info.address, owner=info.owner)
        return deleted

    async def run(self) -> None:
        """Sweep now and then, until cancelled."""
        while True:
            try:
                deleted = await self.sweep()
                if deleted:
                    _log.info("%d blobs of leases that are over were deleted", deleted)
            except P2PFlopError as error:
                _log.warning("blobs of old leases are still here: %s", error)
            await trio.sleep(SWEEP_S)
