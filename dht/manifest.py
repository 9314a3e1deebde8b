"""Manifests: what a blob is made of, and so what it is called.

A blob is cut into chunks of ``CHUNK_BYTES``, the last one shorter. Its manifest is the record
``[1, size, chunk_size, [chunk_hash...]]`` and its **address** is the BLAKE3 of the manifest's one
encoding, so whoever holds an address can check the manifest, and with that each chunk alone, in
any order, from any peer. Version 1 knows one chunk size, because the same bytes must not have two
addresses.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, ClassVar, Final, Literal

import msgspec
from blake3 import blake3

from p2pflop.ids import HASH_BYTES, content_hash
from p2pflop.units import GIB, MIB
from p2pflop.wire import U32, U63, Hash, Record, encode

MANIFEST_VERSION: Final = 1
CHUNK_BYTES: Final = MIB
MAX_BLOB_BYTES: Final = 256 * GIB
MAX_CHUNKS: Final = MAX_BLOB_BYTES // CHUNK_BYTES
MAX_CACHED_MANIFESTS: Final = 256

_CHUNK_ENTRY_BYTES: Final = HASH_BYTES + 2
_MANIFEST_HEAD_BYTES: Final = 32

Buffer = bytes | bytearray | memoryview


def chunk_count(size_bytes: int) -> int:
    """How many chunks a blob of ``size_bytes`` has; none if it is empty."""
    return -(-size_bytes // CHUNK_BYTES)


def max_manifest_bytes(max_blob_bytes: int) -> int:
    """No manifest of a blob of at most ``max_blob_bytes`` has a longer encoding than this."""
    return _MANIFEST_HEAD_BYTES + _CHUNK_ENTRY_BYTES * chunk_count(max_blob_bytes)


class Manifest(Record, frozen=True):
    """Size and chunk hashes of one blob. ValueError (ProtocolError on decode) if they disagree."""

    MAX_BYTES: ClassVar[int] = max_manifest_bytes(MAX_BLOB_BYTES)

    version: Literal[1]
    size_bytes: U63
    chunk_bytes: U32
    chunks: Annotated[tuple[Hash, ...], msgspec.Meta(max_length=MAX_CHUNKS)]

    def __post_init__(self) -> None:
        if self.size_bytes > MAX_BLOB_BYTES:
            raise ValueError(f"blob of {self.size_bytes} bytes is over {MAX_BLOB_BYTES}")
        if self.chunk_bytes != CHUNK_BYTES:
            raise ValueError(f"chunks of {self.chunk_bytes} bytes, not {CHUNK_BYTES}")
        if len(self.chunks) != chunk_count(self.size_bytes):
            raise ValueError(f"{len(self.chunks)} chunks do not make {self.size_bytes} bytes")

    @property
    def address(self) -> bytes:
        """The blob's address: 32 bytes."""
        return content_hash(encode(self))

    def chunk_length(self, index: int) -> int:
        """Bytes in chunk ``index``. Raises IndexError outside the blob."""
        if not 0 <= index < len(self.chunks):
            raise IndexError(f"chunk {index} of a blob of {len(self.chunks)}")
        return min(CHUNK_BYTES, self.size_bytes - index * CHUNK_BYTES)

    def is_chunk(self, index: int, data: Buffer) -> bool:
        """Whether ``data`` is chunk ``index``."""
        return len(data) == self.chunk_length(index) and content_hash(data) == self.chunks[index]


class ManifestBuilder:
    """Builds the manifest of data that arrives in pieces of any size."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._chunks: list[bytes] = []
        self._hasher = blake3()

    def update(self, data: Buffer) -> None:
        """Append ``data``. Raises ValueError if the blob grows over ``MAX_BLOB_BYTES``."""
        if self.size_bytes + len(data) > MAX_BLOB_BYTES:
            raise ValueError(f"a blob has at most {MAX_BLOB_BYTES} bytes")
        with memoryview(data) as view:
            start = 0
            while start < len(view):
                room = CHUNK_BYTES - self.size_bytes % CHUNK_BYTES
                piece = view[start : start + room]
                self._hasher.update(piece)
                self.size_bytes += len(piece)
                start += len(piece)
                if len(piece) == room:
                    self._chunks.append(self._hasher.digest())
                    self._hasher.reset()

    def finish(self) -> Manifest:
        """The manifest of everything so far."""
        chunks = list(self._chunks)
        if self.size_bytes % CHUNK_BYTES:
            chunks.append(self._hasher.digest())
        return Manifest(MANIFEST_VERSION, self.size_bytes, CHUNK_BYTES, tuple(chunks))


def manifest_of(data: Buffer) -> Manifest:
    """The manifest of ``data``. Raises ValueError over ``MAX_BLOB_BYTES``."""
    builder = ManifestBuilder()
    builder.update(data)
    return builder.finish()


def address_of(data: Buffer) -> bytes:
    """The address of ``data`` as a blob: 32 bytes."""
    return manifest_of(data).address


class ManifestCache:
    """The manifests used last, at most ``MAX_CACHED_MANIFESTS`` and ``MAX_CHUNKS`` hashes."""

    def __init__(self) -> None:
        self._manifests: OrderedDict[bytes, Manifest] = OrderedDict()
        self._chunks = 0

    def get(self, address: bytes) -> Manifest | None:
        """The manifest of ``address``, if it is still here."""
        manifest = self._manifests.get(address)
        if manifest is not None:
            self._manifests.move_to_end(address)
        return manifest

    def add(self, address: bytes, manifest: Manifest) -> None:
        """Keep a manifest and drop what was not used for longest."""
        self.drop(address)
        self._manifests[address] = manifest
        self._chunks += len(manifest.chunks)
        while len(self._manifests) > MAX_CACHED_MANIFESTS or self._chunks > MAX_CHUNKS:
            self.drop(next(iter(self._manifests)))

    def drop(self, address: bytes) -> None:
        """Forget a manifest, if it is here."""
        manifest = self._manifests.pop(address, None)
        if manifest is not None:
            self._chunks -= len(manifest.chunks)
