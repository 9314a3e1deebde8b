"""A blob store in memory: for tests, and for nodes that keep nothing.

It keeps every promise of ``blobs.py`` that does not speak of a disk, hashes included.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import trio

from p2pflop.dht.blobs import (
    MAX_GET_BYTES,
    SMALL_BYTES,
    BlobInfo,
    PartialBlob,
    Quota,
    Range,
    Staged,
    StoreStatistics,
    check_chunk,
    check_grants,
    check_reader,
    deleted_meanwhile,
    missing_ranges,
    not_found,
    over_limit,
)
from p2pflop.dht.manifest import CHUNK_BYTES, MAX_BLOB_BYTES, Buffer, Manifest, manifest_of
from p2pflop.errors import StoreError, VerificationError

Chunks = dict[int, bytes]


class MemoryPartial:
    """A PartialBlob whose chunks wait in ``chunks``; ``keep`` makes them a blob."""

    def __init__(
        self,
        manifest: Manifest,
        chunks: Chunks,
        keep: Callable[[Mapping[int, bytes]], Awaitable[BlobInfo]],
    ) -> None:
        self.manifest = manifest
        self._chunks = chunks
        self._keep = keep

    async def __aenter__(self) -> MemoryPartial:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return

    def missing(self) -> list[Range]:
        """See PartialBlob."""
        count = len(self.manifest.chunks)
        held = bytearray((count + 7) // 8)
        for index in self._chunks:
            held[index >> 3] |= 1 << (index & 7)
        return missing_ranges(held, count)

    async def write_chunk(self, index: int, data: Buffer) -> None:
        """See PartialBlob."""
        await trio.lowlevel.checkpoint()
        check_chunk(self.manifest, index, data)
        self._chunks[index] = bytes(data)

    async def finish(self) -> BlobInfo:
        """See PartialBlob."""
        if self.missing():
            raise StoreError("chunks of this blob are still missing")
        return await self._keep(self._chunks)


class FinishedPartial:
    """A PartialBlob of a blob that is there already; ``own`` makes it its caller's too."""

    def __init__(self, manifest: Manifest, own: Callable[[], Awaitable[BlobInfo]]) -> None:
        self.manifest = manifest
        self._own = own

    async def __aenter__(self) -> FinishedPartial:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return

    def missing(self) -> list[Range]:
        """See PartialBlob."""
        return []

    async def write_chunk(self, index: int, data: Buffer) -> None:
        """See PartialBlob."""
        await trio.lowlevel.checkpoint()
        check_chunk(self.manifest, index, data)

    async def finish(self) -> BlobInfo:
        """See PartialBlob."""
        return await self._own()


class MemoryWriter:
    """A BlobWriter of a MemoryStore."""

    def __init__(self, store: MemoryStore, public: bool, owner: bytes) -> None:
        self._store = store
        self._public = public
        self._owner = owner
        self._buffer = bytearray()
        self._done = False

    async def __aenter__(self) -> MemoryWriter:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._done:
            self._abandon()

    async def write(self, data: Buffer) -> None:
        """See BlobWriter."""
        if self._done:
            raise StoreError("this writer is finished")
        self._store.quota.reserve(len(data))
        self._buffer += data
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self._abandon()  # As on disk, where a cancelled write may have lost a piece.
            raise

    async def finish(self) -> BlobInfo:
        """See BlobWriter."""
        if self._done:
            raise StoreError("this writer is finished")
        self._abandon()
        return await self._store.put(bytes(self._buffer), public=self._public, owner=self._owner)

    def _abandon(self) -> None:
        self._done = True
        self._store.quota.release(len(self._buffer))


@dataclass(slots=True)
class _Whole:
    info: BlobInfo
    manifest: Manifest
    chunks: Chunks


@dataclass(slots=True)
class _Part:
    manifest: Manifest
    chunks: Chunks
    public: bool
    created_ns: int


class MemoryStore:
    """A Store in memory. ``clock_ns`` gives the time that new blobs are stamped with."""

    def __init__(
        self, *, quota_bytes: int | None = None, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self.quota = Quota(quota_bytes)
        self._clock_ns = clock_ns
        self._whole: dict[bytes, _Whole] = {}
        self._parts: dict[tuple[bytes, bytes], _Part] = {}
        self._readers: dict[bytes, set[bytes]] = {}
        self._closed = False

    async def __aenter__(self) -> MemoryStore:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def put(self, data: Buffer, *, public: bool = False, owner: bytes = b"") -> BlobInfo:
        """See Store."""
        await self._enter()
        check_reader(owner)
        if len(data) > MAX_BLOB_BYTES:
            raise over_limit(len(data), MAX_BLOB_BYTES)
        manifest = manifest_of(data)
        self.quota.reserve(len(data))
        with memoryview(data) as view:
            chunks = {
                index: bytes(view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
                for index in range(len(manifest.chunks))
            }
        return self._keep(manifest, chunks, public, owner, self._clock_ns())

    def stage(self, blobs: Sequence[bytes]) -> Staged:
        """See Store. Kept in memory while ``keep`` runs, whatever becomes of its transaction."""
        self.quota.check(sum(map(len, blobs)))
        now_ns = self._clock_ns()

        def keep(_: sqlite3.Connection) -> None:
            for data in blobs:
                self.quota.used_bytes += len(data)
                chunks = {0: data} if data else {}
                self._keep(manifest_of(data), chunks, False, b"", now_ns)

        return Staged(keep, trio.lowlevel.checkpoint)

    def writer(self, *, public: bool = False, owner: bytes = b"") -> MemoryWriter:
        """See Store."""
        check_reader(owner)
        return MemoryWriter(self, public, owner)

    async def get(self, address: bytes, max_bytes: int = MAX_GET_BYTES) -> bytes:
        """See Store."""
        await self._enter()
        whole = self._require(address)
        if whole.info.size_bytes > max_bytes:
            raise over_limit(whole.info.size_bytes, max_bytes)
        return b"".join(self._verified(whole, index) for index in range(len(whole.chunks)))

    async def read_chunk(self, address: bytes, index: int) -> bytes:
        """See Store."""
        await self._enter()
        whole = self._require(address)
        whole.manifest.chunk_length(index)
        return self._verified(whole, index)

    async def manifest(self, address: bytes) -> Manifest:
        """See Store."""
        await self._enter()
        return self._require(address).manifest

    async def begin(
        self, manifest: Manifest, *, public: bool = False, owner: bytes = b""
    ) -> PartialBlob:
        """See Store."""
        await self._enter()
        check_reader(owner)
        address = manifest.address
        whole = self._whole.get(address)
        if whole is not None and self._may_use(whole.info, owner):

            async def own() -> BlobInfo:
                await self._enter()
                return self._own(self._require(address), public, owner)

            return FinishedPartial(manifest, own)
        part = self._parts.get((address, owner))
        if part is None:
            self.quota.reserve(manifest.size_bytes)
            part = _Part(manifest, {}, public, self._clock_ns())
            self._parts[address, owner] = part
        return self._partial(address, owner, part, public)

    async def resume(self, address: bytes, owner: bytes = b"") -> PartialBlob | None:
        """See Store."""
        await self._enter()
        part = self._parts.get((address, owner))
        return None if part is None else self._partial(address, owner, part, public=False)

    async def stat(self, address: bytes) -> BlobInfo | None:
        """See Store."""
        await self._enter()
        whole = self._whole.get(address)
        return None if whole is None else whole.info

    async def list(self) -> tuple[BlobInfo, ...]:
        """See Store."""
        await self._enter()
        infos = (whole.info for whole in self._whole.values())
        return tuple(sorted(infos, key=lambda info: info.created_ns))

    async def set_public(self, address: bytes, public: bool = True) -> BlobInfo:
        """See Store."""
        await self._enter()
        whole = self._require(address)
        whole.info = replace(whole.info, public=public)
        return whole.info

    async def grant(self, address: bytes, reader: bytes) -> None:
        """See Store."""
        await self._enter()
        check_reader(reader)
        self._require(address)
        self._grant(address, reader)

    async def revoke(self, address: bytes, reader: bytes) -> None:
        """See Store."""
        await self._enter()
        self._readers.get(address, set()).discard(reader)

    async def may_read(self, address: bytes, reader: bytes) -> bool:
        """See Store."""
        await self._enter()
        whole = self._whole.get(address)
        if whole is None or not reader:
            return whole is not None and whole.info.public
        return self._may_use(whole.info, reader)

    async def delete(self, address: bytes, *, owner: bytes | None = None) -> bool:
        """See Store."""
        await self._enter()
        if owner is not None:
            held = self._whole.get(address)
            if held is None or held.info.public or held.info.owner != owner:
                return False
        parts = [key for key in self._parts if key[0] == address]
        whole = self._whole.pop(address, None)
        for key in parts:
            self._drop_part(key)
        if whole is not None:
            self.quota.release(whole.info.size_bytes)
        self._readers.pop(address, None)
        return whole is not None or bool(parts)

    async def forget_partials(self, before_ns: int, keep: Collection[bytes] = ()) -> int:
        """See Store."""
        await self._enter()
        stale = [
            (address, owner)
            for (address, owner), part in self._parts.items()
            if owner and part.created_ns < before_ns and address not in keep
        ]
        for key in stale:
            self.quota.release(self._parts.pop(key).manifest.size_bytes)
        return len(stale)

    def statistics(self) -> StoreStatistics:
        """See Store."""
        return StoreStatistics(
            len(self._whole), len(self._parts), self.quota.used_bytes, self.quota.quota_bytes
        )

    async def aclose(self) -> None:
        """See Store."""
        self._closed = True
        await trio.lowlevel.checkpoint()

    async def _enter(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise StoreError("the store is closed")

    def _require(self, address: bytes) -> _Whole:
        whole = self._whole.get(address)
        if whole is None:
            raise not_found(address)
        return whole

    def _may_use(self, info: BlobInfo, owner: bytes) -> bool:
        if info.public or owner in (b"", info.owner):
            return True
        return owner in self._readers.get(info.address, ())

    def _grant(self, address: bytes, reader: bytes) -> None:
        readers = self._readers.setdefault(address, set())
        check_grants(address, len(readers - {reader}))
        readers.add(reader)

    def _own(self, whole: _Whole, public: bool, owner: bytes) -> BlobInfo:
        if owner not in (b"", whole.info.owner):
            self._grant(whole.info.address, owner)
        if not owner and whole.info.owner:
            self._grant(whole.info.address, whole.info.owner)
            whole.info = replace(whole.info, owner=b"")
        whole.info = replace(whole.info, public=whole.info.public or public)
        return whole.info

    def _keep(
        self, manifest: Manifest, chunks: Chunks, public: bool, owner: bytes, created_ns: int
    ) -> BlobInfo:
        """Make chunks whose bytes are reserved a blob."""
        address = manifest.address
        self._drop_part((address, owner))
        whole = self._whole.get(address)
        if whole is None:
            info = BlobInfo(address, manifest.size_bytes, public, owner, created_ns)
            self._whole[address] = _Whole(info, manifest, chunks)
            return info
        self.quota.release(manifest.size_bytes)
        whole.chunks = chunks
        return self._own(whole, public, owner)

    def _drop_part(self, key: tuple[bytes, bytes]) -> None:
        part = self._parts.pop(key, None)
        if part is not None:
            self.quota.release(part.manifest.size_bytes)

    def _partial(self, address: bytes, owner: bytes, part: _Part, public: bool) -> MemoryPartial:
        async def keep(chunks: Mapping[int, bytes]) -> BlobInfo:
            await self._enter()
            if self._parts.get((address, owner)) is part:
                del self._parts[address, owner]  # What it reserved is the blob's now.
                return self._keep(
                    part.manifest, dict(chunks), part.public or public, owner, part.created_ns
                )
            whole = self._whole.get(address)
            if whole is None or not self._may_use(whole.info, owner):
                raise deleted_meanwhile(address)
            return self._own(whole, public, owner)

        return MemoryPartial(part.manifest, part.chunks, keep)

    def _verified(self, whole: _Whole, index: int) -> bytes:
        data = whole.chunks[index]
        if whole.manifest.is_chunk(index, data):
            return data
        info = whole.info
        key = (info.address, info.owner)
        del self._whole[info.address]
        if info.size_bytes <= SMALL_BYTES or key in self._parts:
            self.quota.release(info.size_bytes)
        else:
            del whole.chunks[index]
            self._parts[key] = _Part(whole.manifest, whole.chunks, info.public, info.created_ns)
        raise VerificationError(
            f"blob {info.address.hex()} is damaged in memory: chunk {index} is not what was put",
            hint="Fetch it or put it again; if this repeats, the memory is failing.",
        )
