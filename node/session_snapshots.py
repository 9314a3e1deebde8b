"""Bringing the bytes of a session's buffers home: where each goes as it is read."""

from __future__ import annotations

from contextlib import AsyncExitStack

from p2pflop.dht.blobs import BlobWriter, Store
from p2pflop.node.session_log import Kept, is_small


class Keeper:
    """``session_lease.Answer`` that keeps a buffer: small ones in memory, others as blobs.

    The blobs are ``owner``'s, this node's own account, as those of a stranger's lease are that
    stranger's: so they are swept if the node dies, and what its user has put is not touched.
    """

    def __init__(self, store: Store, size_bytes: int, owner: bytes, stack: AsyncExitStack) -> None:
        self.kept: Kept | None = None
        self._store = store
        self._size_bytes = size_bytes
        self._owner = owner
        self._stack = stack
        self._small = bytearray()
        self._writer: BlobWriter | None = None

    async def take(self, data: bytes, *, last: bool) -> None:
        """See Answer. Raises StoreError."""
        if is_small(self._size_bytes):
            self._small += data
            if last:
                self.kept = Kept(self._size_bytes, data=bytes(self._small))
            return
        if self._writer is None:
            self._writer = await self._stack.enter_async_context(
                self._store.writer(owner=self._owner)
            )
        await self._writer.write(data)
        if last:
            info = await self._writer.finish()
            self.kept = Kept(self._size_bytes, address=info.address, ours=True)
