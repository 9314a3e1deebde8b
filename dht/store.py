"""The blob store on disk.

An index knows every blob (``index.py``): bytes up to ``SMALL_BYTES`` are in it, larger ones in one
sparse file each under ``blobs/`` (``files.py``). It is in a database that is shared with others, so
that what is small can be kept in one commit with what is said of it, or in ``index.db``. The order
of every change is: write the data, fdatasync, commit the row. So a row never promises bytes that a
crash could take back, and a file without a row is nobody's. Chunks of a partial are committed
``BATCH_CHUNKS`` at a time: a crash costs a fetch at most those.

Reading trusts nothing: each chunk is hashed before a byte of it is handed out. One process at a
time holds the store, by a lock on ``lock``. Hashing and disk run in threads, except for small
blobs, where the hop costs more than the work.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar, TypeVarTuple

import trio

from p2pflop.dht import files
from p2pflop.dht.blobs import (
    MAX_GET_BYTES,
    SMALL_BYTES,
    BlobInfo,
    BlobWriter,
    PartialBlob,
    Quota,
    Staged,
    Store,
    StoreStatistics,
    check_reader,
    not_found,
    over_limit,
)
from p2pflop.dht.database import Database
from p2pflop.dht.files import DamagedChunk, DataFile
from p2pflop.dht.index import Change, Copy, Index, Row, keep_row, open_index
from p2pflop.dht.manifest import (
    MAX_BLOB_BYTES,
    Buffer,
    Manifest,
    ManifestCache,
    address_of,
    chunk_count,
    manifest_of,
)
from p2pflop.dht.memory import FinishedPartial, MemoryPartial
from p2pflop.dht.writing import FilePartial, FileWriter
from p2pflop.errors import BlobNotFoundError, ProtocolError, StoreError, StoreFullError
from p2pflop.units import MIB, NS_PER_S

__all__ = ["BlobInfo", "BlobWriter", "FileStore", "PartialBlob", "Store", "StoreStatistics"]

PARTIAL_LIFETIME_NS: Final = 7 * 86_400 * NS_PER_S
"""A fetch that nobody resumed for so long is given up at the next start."""

MAX_THREADS: Final = 8
RESERVE_BYTES: Final = 2 * MIB

_log = logging.getLogger(__name__)

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class FileStore:
    """A Store in the folder ``path``, which is made if need be.

    The index is in ``database``, which outlives the store, or in a file of its own. ``clock_ns``
    gives the time that new blobs are stamped with. Raises StoreError if the folder cannot be used
    or another process has it.
    """

    def __init__(
        self,
        path: Path,
        database: Database | None = None,
        *,
        quota_bytes: int | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.path = path
        self._own_database: Database | None = None
        self.folder = path / "blobs"
        self._clock_ns = clock_ns
        self._threads = trio.CapacityLimiter(MAX_THREADS)
        self._manifests = ManifestCache()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = files.lock(path / "lock")
        except OSError as error:
            raise files.disk_error(error, path) from error
        try:
            if database is None:
                database = self._own_database = open_index(path / "index.db")
            self.index = Index(database)
        except StoreError:
            os.close(self._lock)
            raise
        files.sweep(self.folder, self.index.files())
        self.quota = Quota(quota_bytes, self.index.count()[2])
        self._reserve = files.Reserve(path / "reserve", RESERVE_BYTES)
        self._reserve.take()

    async def __aenter__(self) -> FileStore:
        stale_ns = self._clock_ns() - PARTIAL_LIFETIME_NS
        await self.settle(await self.index.delete_stale_partials(stale_ns))
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
        check_reader(owner)
        if len(data) > MAX_BLOB_BYTES:
            raise over_limit(len(data), MAX_BLOB_BYTES)
        if len(data) <= SMALL_BYTES:
            manifest = manifest_of(data)
            self.quota.reserve(manifest.size_bytes)
            return await self.keep(manifest, public, owner, data=bytes(data))
        manifest = await self.in_thread(manifest_of, data)
        old = self.index.whole(manifest.address)
        if old is not None and old.file and await self._is_sound(old, manifest):
            change = await self.index.own(manifest.address, public, owner)
            await self.settle(change)
            if change.info is not None:
                return change.info
        self.quota.reserve(manifest.size_bytes)
        try:
            name = await self.in_thread(files.write_new, self.folder, data)
        except BaseException:
            self.quota.release(manifest.size_bytes)
            raise
        return await self.keep(manifest, public, owner, file=name)

    def stage(self, blobs: Sequence[bytes]) -> Staged:
        """See Store."""
        size_bytes, now_ns = sum(map(len, blobs)), self._clock_ns()
        self.quota.check(size_bytes)
        copies = [
            Copy(manifest, manifest.address, False, b"", now_ns, data=data)
            for manifest, data in zip(map(manifest_of, blobs), blobs, strict=True)
        ]
        changes: list[Change] = []

        def keep(connection: sqlite3.Connection) -> None:
            changes[:] = [keep_row(connection, copy) for copy in copies]

        async def settle() -> None:
            self.quota.used_bytes += size_bytes
            for change in changes:
                await self.settle(change)

        return Staged(keep, settle)

    def writer(self, *, public: bool = False, owner: bytes = b"") -> FileWriter:
        """See Store."""
        check_reader(owner)
        return FileWriter(self, public, owner)

    async def get(self, address: bytes, max_bytes: int = MAX_GET_BYTES) -> bytes:
        """See Store."""
        row = self._require(address)
        if row.info.size_bytes > max_bytes:
            raise over_limit(row.info.size_bytes, max_bytes)
        return await self._read(row, 0, chunk_count(row.info.size_bytes))

    async def read_chunk(self, address: bytes, index: int) -> bytes:
        """See Store."""
        row = self._require(address)
        if not 0 <= index < chunk_count(row.info.size_bytes):
            raise IndexError(f"chunk {index} of a blob of {row.info.size_bytes} bytes")
        return await self._read(row, index, index + 1)

    async def manifest(self, address: bytes) -> Manifest:
        """See Store."""
        await trio.lowlevel.checkpoint_if_cancelled()
        row = self._require(address)
        try:
            return self._manifest(row)
        except DamagedChunk as damage:
            await self._demote(row, damage)
            raise not_found(address) from damage

    async def begin(
        self, manifest: Manifest, *, public: bool = False, owner: bytes = b""
    ) -> PartialBlob:
        """See Store."""
        check_reader(owner)
        await trio.lowlevel.checkpoint_if_cancelled()
        address = manifest.address

        async def own() -> BlobInfo:
            change = await self.index.own(address, public, owner)
            await self.settle(change)
            if change.info is None:
                raise not_found(address)
            return change.info

        async def keep(chunks: Mapping[int, bytes]) -> BlobInfo:
            return await self.put(chunks.get(0, b""), public=public, owner=owner)

        partial: PartialBlob | None = None
        while partial is None:  # Again if another task began or finished the same meanwhile.
            if self._may_use(self.index.whole(address), owner):
                partial = FinishedPartial(manifest, own)
            elif manifest.size_bytes <= SMALL_BYTES:
                partial = MemoryPartial(manifest, {}, keep)
            elif self.index.partial(address, owner) is not None:
                partial = await self._open_partial(address, owner, public)
            else:
                partial = await self._new_partial(manifest, public, owner)
        return partial

    async def resume(self, address: bytes, owner: bytes = b"") -> PartialBlob | None:
        """See Store."""
        await trio.lowlevel.checkpoint_if_cancelled()
        return await self._open_partial(address, owner, public=False)

    async def stat(self, address: bytes) -> BlobInfo | None:
        """See Store."""
        await trio.lowlevel.checkpoint_if_cancelled()
        row = self.index.whole(address)
        return row.info if row is not None else None

    async def list(self) -> tuple[BlobInfo, ...]:
        """See Store."""
        await trio.lowlevel.checkpoint_if_cancelled()
        return tuple(row.info for row in self.index.all_whole())

    async def set_public(self, address: bytes, public: bool = True) -> BlobInfo:
        """See Store."""
        return await self.index.set_public(address, public)

    async def grant(self, address: bytes, reader: bytes) -> None:
        """See Store."""
        check_reader(reader)
        await self.index.grant(address, reader)

    async def revoke(self, address: bytes, reader: bytes) -> None:
        """See Store."""
        await self.index.revoke(address, reader)

    async def may_read(self, address: bytes, reader: bytes) -> bool:
        """See Store."""
        await trio.lowlevel.checkpoint_if_cancelled()
        row = self.index.whole(address)
        if row is None or not reader:
            return row is not None and row.info.public
        return self._may_use(row, reader)

    async def delete(self, address: bytes, *, owner: bytes | None = None) -> bool:
        """See Store."""
        self._manifests.drop(address)
        try:
            change = await self.index.delete(address, owner)
        except StoreFullError:
            if not self._reserve.give():
                raise
            change = await self.index.delete(address, owner)
        await self.settle(change)
        if change.unused:
            await self.in_thread(self._reserve.take)
        return bool(change.unused)

    async def forget_partials(self, before_ns: int, keep: Collection[bytes] = ()) -> int:
        """See Store."""
        changes = await self.index.delete_strangers_partials(before_ns, keep)
        for change in changes:
            await self.settle(change)
        return len(changes)

    def statistics(self) -> StoreStatistics:
        """See Store."""
        blobs, partials, _ = self.index.count()
        return StoreStatistics(blobs, partials, self.quota.used_bytes, self.quota.quota_bytes)

    async def aclose(self) -> None:
        """See Store."""
        if self._own_database is not None:
            await self._own_database.aclose()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # For writers and partials of this store.

    async def in_thread(self, function: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        """Run a blocking ``function``. Raises StoreError for its OSError."""
        try:
            return await trio.to_thread.run_sync(function, *arguments, limiter=self._threads)
        except OSError as error:
            raise files.disk_error(error, self.path) from error

    async def keep(
        self,
        manifest: Manifest,
        public: bool,
        owner: bytes,
        *,
        file: str = "",
        data: bytes | None = None,
    ) -> BlobInfo:
        """Make bytes that are reserved for, and on disk if in a file, a blob."""
        copy = Copy(manifest, manifest.address, public, owner, self._clock_ns(), file, data)
        try:
            change = await self.index.keep(copy)
        except BaseException:
            self.quota.release(manifest.size_bytes)
            files.remove(self.folder, [file] if file else [])
            raise
        await self.settle(change)
        return change.kept

    async def settle(self, change: Change) -> None:
        """Free what a committed change has put out of use."""
        self.quota.release(change.freed_bytes)
        names = [name for name in change.unused if name]
        if names:
            with trio.CancelScope(shield=True):
                await self.in_thread(files.remove, self.folder, names)

    async def promote(self, row: Row, public: bool) -> BlobInfo:
        """Make a partial a blob. Raises StoreError if chunks are missing or it was deleted."""
        change = await self.index.promote(row, public)
        await self.settle(change)
        return change.kept

    # Inside.

    def _require(self, address: bytes) -> Row:
        row = self.index.whole(address)
        if row is None:
            raise not_found(address)
        return row

    def _may_use(self, row: Row | None, owner: bytes) -> bool:
        """Whether ``owner`` has the blob already. The node itself has all that it keeps."""
        if row is None:
            return False
        if row.info.public or owner in (b"", row.info.owner):
            return True
        return self.index.is_granted(row.info.address, owner)

    def _manifest(self, row: Row) -> Manifest:
        address = row.info.address
        manifest = self._manifests.get(address)
        if manifest is None:
            try:
                manifest = self.index.manifest(row)
            except ProtocolError as error:
                raise DamagedChunk(None) from error
            if manifest is None:
                raise not_found(address)
            if manifest.address != address:
                raise DamagedChunk(None)
            self._manifests.add(address, manifest)
        return manifest

    async def _read(self, row: Row, first: int, end: int) -> bytes:
        """Chunks ``first`` to ``end``, verified, though the copy be replaced meanwhile."""
        while True:
            try:
                if row.file:
                    manifest = self._manifest(row)
                    return await self.in_thread(
                        files.read_chunks, self.folder, row.file, manifest, first, end
                    )
                return await self._read_small(row)
            except DamagedChunk as damage:
                await self._demote(row, damage)
            row = self._require(row.info.address)

    async def _read_small(self, row: Row) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        data = self.index.data(row)
        if data is None or address_of(data) != row.info.address:
            raise DamagedChunk(None)
        return data

    async def _demote(self, row: Row, damage: DamagedChunk) -> None:
        """Raises VerificationError, unless the copy was replaced or deleted since ``row``."""
        change = await self.index.demote(row, damage.index)
        if change is None:
            return
        self._manifests.drop(row.info.address)
        await self.settle(change)
        error = files.damage_error(row.info.address, damage)
        _log.warning("%s", error)
        raise error from damage

    async def _is_sound(self, row: Row, manifest: Manifest) -> bool:
        try:
            await self.in_thread(files.verify, self.folder, row.file, manifest)
        except DamagedChunk:
            return False
        return True

    async def _open_partial(self, address: bytes, owner: bytes, public: bool) -> FilePartial | None:
        found = self.index.partial(address, owner)
        if found is None:
            return None
        row, bitmap = found
        try:
            manifest = self._manifest(row)
            file = await self.in_thread(files.open_existing, self.folder, row.file)
        except DamagedChunk:
            await self.settle(await self.index.forget_partial(row))
            return None
        except BlobNotFoundError:  # Another task has finished or deleted it since the look-up.
            return None
        return FilePartial(self, row, manifest, file, bitmap, public)

    async def _new_partial(
        self, manifest: Manifest, public: bool, owner: bytes
    ) -> FilePartial | None:
        """A new partial; None if another task has begun the same one meanwhile."""
        size_bytes = manifest.size_bytes
        self.quota.reserve(size_bytes)
        file: DataFile | None = None
        try:
            file = await self.in_thread(files.new_sparse, self.folder, size_bytes)
            copy = Copy(manifest, manifest.address, public, owner, self._clock_ns(), file.name)
            row, bitmap = await self.index.begin(copy)
        except BaseException:
            self.quota.release(size_bytes)
            if file is not None:
                file.close()
                files.remove(self.folder, [file.name])
            raise
        if row.file != file.name:
            file.close()
            await self.settle(Change(None, (file.name,), size_bytes))
            return None
        return FilePartial(self, row, manifest, file, bitmap, public)
