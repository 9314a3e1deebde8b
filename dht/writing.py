"""How bytes get into the store on disk: a writer for data that streams in, a partial for chunks
that arrive in any order. The order that makes both safe is told in ``store.py``."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Final

import trio

from p2pflop.dht import files
from p2pflop.dht.blobs import BlobInfo, Range, check_chunk, missing_ranges, over_limit
from p2pflop.dht.files import DataFile
from p2pflop.dht.index import Row
from p2pflop.dht.manifest import (
    CHUNK_BYTES,
    MAX_BLOB_BYTES,
    Buffer,
    Manifest,
    ManifestBuilder,
)
from p2pflop.errors import StoreError

if TYPE_CHECKING:
    from p2pflop.dht.store import FileStore

BATCH_CHUNKS: Final = 16
"""Chunks of a partial for one fdatasync and one commit; a crash loses at most so many."""


class FileWriter:
    """A BlobWriter of a FileStore. Data under one chunk never needs a file of its own."""

    def __init__(self, store: FileStore, public: bool, owner: bytes) -> None:
        self._store = store
        self._public = public
        self._owner = owner
        self._builder = ManifestBuilder()
        self._buffer = bytearray()
        self._file: DataFile | None = None
        self._reserved_bytes = 0
        self._done = False

    async def __aenter__(self) -> FileWriter:
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
        self._check_open()
        size_bytes = self._builder.size_bytes + len(self._buffer) + len(data)
        if size_bytes > MAX_BLOB_BYTES:
            raise over_limit(size_bytes, MAX_BLOB_BYTES)
        self._store.quota.reserve(len(data))
        self._reserved_bytes += len(data)
        try:
            if len(self._buffer) + len(data) < CHUNK_BYTES:
                self._buffer += data
                await trio.lowlevel.checkpoint()
            else:
                buffered, self._buffer = self._buffer, bytearray()
                await self._store.in_thread(self._append, buffered, data)
        except BaseException:
            self._abandon()  # Cancelled or failed, a piece may be lost: this can be no blob now.
            raise

    async def finish(self) -> BlobInfo:
        """See BlobWriter."""
        self._check_open()
        if self._file is None:
            data = bytes(self._buffer)
            self._abandon()
            return await self._store.put(data, public=self._public, owner=self._owner)
        await self._store.in_thread(self._close, self._file)
        self._done = True
        return await self._store.keep(
            self._builder.finish(), self._public, self._owner, file=self._file.name
        )

    def _check_open(self) -> None:
        if self._done:
            raise StoreError("this writer is finished")

    def _abandon(self) -> None:
        self._done = True
        self._store.quota.release(self._reserved_bytes)
        if self._file is not None:
            self._file.close()
            files.remove(self._store.folder, [self._file.name])

    def _append(self, *pieces: Buffer) -> None:
        if self._file is None:
            self._file = DataFile(self._store.folder)
        for piece in pieces:
            self._file.write(piece, self._builder.size_bytes)
            self._builder.update(piece)

    def _close(self, file: DataFile) -> None:
        self._append(self._buffer)
        file.sync()
        file.close()


class FilePartial:
    """A PartialBlob of a FileStore."""

    def __init__(
        self,
        store: FileStore,
        row: Row,
        manifest: Manifest,
        file: DataFile,
        held: bytes,
        public: bool,
    ) -> None:
        self.manifest = manifest
        self._store = store
        self._row = row
        self._file = file
        self._public = public
        self._held = bytearray(held)
        self._unsaved: set[int] = set()
        self._saving = trio.Lock()

    async def __aenter__(self) -> FilePartial:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with trio.CancelScope(shield=True):
                await self._save()
        except StoreError:
            if kind is None:  # Otherwise what is on its way out is the better explanation.
                raise
        finally:
            self._file.close()

    def missing(self) -> list[Range]:
        """See PartialBlob."""
        return missing_ranges(self._held, len(self.manifest.chunks))

    async def write_chunk(self, index: int, data: Buffer) -> None:
        """See PartialBlob."""
        await self._store.in_thread(self._write, index, data)
        self._held[index >> 3] |= 1 << (index & 7)
        self._unsaved.add(index)
        if len(self._unsaved) >= BATCH_CHUNKS:
            await self._save()

    async def finish(self) -> BlobInfo:
        """See PartialBlob."""
        if self.missing():
            raise StoreError("chunks of this blob are still missing")
        await self._save()
        return await self._store.promote(self._row, self._public)

    def _write(self, index: int, data: Buffer) -> None:
        check_chunk(self.manifest, index, data)
        self._file.write(data, index * CHUNK_BYTES)

    async def _save(self) -> None:
        """Commit the chunks written so far. If it fails they count as missing again."""
        async with self._saving:
            if not self._unsaved:
                return
            chunks, self._unsaved = self._unsaved, set()
            bits = bytearray(len(self._held))
            for index in chunks:
                bits[index >> 3] |= 1 << (index & 7)
            try:
                await self._store.in_thread(self._file.sync)
                await self._store.index.save_bits(self._row, bytes(bits))
            except BaseException:
                for index in chunks:
                    self._held[index >> 3] &= ~(1 << (index & 7))
                raise
