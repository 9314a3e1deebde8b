"""Bringing the bytes of a session's buffers home: where each goes as it is read."""

from __future__ import annotations

from contextlib import AsyncExitStack

from p2pflop.dht.blobs import BlobWriter, Store
from p2pflop.node.session_log import Kept, is_small


class Keeper:
    """``session_lease.Answer`` that keeps a buffer: small ones in memory, others as blobs.

    A blob that was in the store before ``began_ns`` is not the snapshot's to delete.
    """

    def __init__(self, store: Store, size_bytes: int, began_ns: int, stack: AsyncExitStack) -> None:
        self.kept: Kept | None = None
        self._store = store
        self._size_bytes = size_bytes
        self._began_ns = began_ns
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
            self._writer = await self._stack.enter_async_context(self._store.writer())
        await self._writer.write(data)
        if last:
            info = await self._writer.finish()
            ours = info.created_ns >= self._began_ns
            self.kept = Kept(self._size_bytes, address=info.address, ours=ours)
