"""What a blob store is: the types that its callers see, and the Protocols both stores keep.

**Who may read.** A blob is readable by its owner, by readers it was granted to, and by anybody if
it is public. To become an owner one puts the bytes, or fetches all of them: knowing an address or
a manifest proves nothing, so a fetch for one account never builds on chunks that only another
account has delivered. The node's own blobs have the owner ``b""``; one that was another owner's
becomes the node's own when the node puts or fetches it, and the other may still read it.

**What is held.** Only whole blobs are seen by ``stat``, ``list``, ``get`` and ``read_chunk``. What
a fetch has got so far waits in a *partial*, one for each owner, until all of it is there.

**Verified on read.** A chunk that no longer matches its hash is never handed out: the read fails
with VerificationError, and the blob becomes a partial that lacks this chunk, so that fetching it
again, or putting it, mends it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol

from p2pflop.dht.manifest import Buffer, Manifest
from p2pflop.errors import BlobNotFoundError, StoreError, StoreFullError, VerificationError
from p2pflop.units import GIB, KIB

MAX_GET_BYTES: Final = GIB
MAX_READER_BYTES: Final = 64
MAX_GRANTS: Final = 1024
SMALL_BYTES: Final = 64 * KIB
"""Up to here a blob is hashed on the event loop and, on disk, kept inside the index."""

Range = tuple[int, int]
"""Chunks from the first index up to, not including, the second."""


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """A whole blob in the store."""

    address: bytes
    size_bytes: int
    public: bool
    owner: bytes
    created_ns: int


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """``used_bytes`` counts partials and puts under way at what they will need."""

    blobs: int
    partials: int
    used_bytes: int
    quota_bytes: int | None


class BlobWriter(Protocol):
    """Takes a blob in pieces. Leaving ``async with`` without ``finish`` drops it."""

    async def __aenter__(self) -> BlobWriter: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    async def write(self, data: Buffer) -> None:
        """Append ``data``, which may be changed afterwards; one call at a time.

        Raises StoreError. After a call that failed or was cancelled the writer is of no more use.
        """

    async def finish(self) -> BlobInfo:
        """Make it a blob, on disk before this returns. Raises StoreError."""


class PartialBlob(Protocol):
    """A blob of which chunks are still missing. Leaving ``async with`` keeps what is there."""

    @property
    def manifest(self) -> Manifest:
        """What the blob will be."""

    async def __aenter__(self) -> PartialBlob: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def missing(self) -> list[Range]:
        """Chunks that are not there, ascending."""

    async def write_chunk(self, index: int, data: Buffer) -> None:
        """Keep chunk ``index``; from many tasks at once if need be.

        Raises VerificationError if ``data`` is not that chunk, StoreError if it cannot be kept.
        """

    async def finish(self) -> BlobInfo:
        """Make it a blob, on disk before this returns. Raises StoreError if chunks are missing."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Small blobs of the node's own on their way into a store, in a transaction of somebody else's.

    ``keep`` is done in it, on the database that has the store's index; ``settle`` once it is
    committed.
    """

    keep: Callable[[sqlite3.Connection], None]
    settle: Callable[[], Awaitable[None]]


class Store(Protocol):
    """Blobs by address. All methods raise StoreError if the disk or the index fails."""

    async def put(self, data: Buffer, *, public: bool = False, owner: bytes = b"") -> BlobInfo:
        """Keep ``data``, on disk before this returns. It must not change meanwhile.

        Putting what is there adds an owner and can make it public; it never makes it private.
        Raises StoreError over the quota.
        """

    def stage(self, blobs: Sequence[bytes]) -> Staged:
        """What keeps ``blobs``, of ``SMALL_BYTES`` each at most, together with something else.

        Raises StoreFullError over the quota.
        """

    def writer(self, *, public: bool = False, owner: bytes = b"") -> BlobWriter:
        """For a blob that arrives in pieces or is larger than memory."""

    async def get(self, address: bytes, max_bytes: int = MAX_GET_BYTES) -> bytes:
        """All of a blob. Raises BlobNotFoundError, VerificationError, StoreError if larger."""

    async def read_chunk(self, address: bytes, index: int) -> bytes:
        """One chunk. Raises BlobNotFoundError, VerificationError, IndexError."""

    async def manifest(self, address: bytes) -> Manifest:
        """What a blob is made of. Raises BlobNotFoundError."""

    async def begin(
        self, manifest: Manifest, *, public: bool = False, owner: bytes = b""
    ) -> PartialBlob:
        """Start or resume a partial. Nothing is missing from it if ``owner`` may read the blob."""

    async def resume(self, address: bytes, owner: bytes = b"") -> PartialBlob | None:
        """The partial of ``owner`` that an earlier ``begin`` left, or None."""

    async def stat(self, address: bytes) -> BlobInfo | None:
        """A whole blob, or None."""

    async def list(self) -> tuple[BlobInfo, ...]:
        """All whole blobs, oldest first."""

    async def set_public(self, address: bytes, public: bool = True) -> BlobInfo:
        """Let anybody read it, or not any more. Raises BlobNotFoundError."""

    async def grant(self, address: bytes, reader: bytes) -> None:
        """Let an account or a peer read it. Raises BlobNotFoundError."""

    async def revoke(self, address: bytes, reader: bytes) -> None:
        """Take a grant back."""

    async def may_read(self, address: bytes, reader: bytes) -> bool:
        """Whether a reader may have it. ``b""`` is an unknown one, who gets public blobs only."""

    async def delete(self, address: bytes, *, owner: bytes | None = None) -> bool:
        """Forget the blob, its partials and its grants. False if there was none.

        With ``owner``, only a blob that belongs to that owner and is not public.
        """

    async def forget_partials(self, before_ns: int, keep: Collection[bytes] = ()) -> int:
        """Drop what fetches for owners other than ``b""`` began before that time, but for the
        addresses in ``keep``; how many."""

    def statistics(self) -> StoreStatistics:
        """Counts for status pages."""

    async def aclose(self) -> None:
        """Close. Using the store after this raises StoreError."""


async def delete_own(store: Store, address: bytes) -> BlobInfo:
    """Delete a blob of the node's own; what it was. Raises BlobNotFoundError, StoreError."""
    info = await store.stat(address)
    if info is None:
        raise not_found(address)
    if info.owner:
        raise StoreError(
            f"blob {address.hex()} is here for a lease of another account",
            hint="The node deletes it by itself, an hour after the lease.",
        )
    await store.delete(address)
    return info


class Quota:
    """Counts what a store holds and has promised to hold. Only the event loop touches it."""

    def __init__(self, quota_bytes: int | None, used_bytes: int = 0) -> None:
        self.quota_bytes = quota_bytes
        self.used_bytes = used_bytes

    def check(self, size_bytes: int) -> None:
        """Raises StoreFullError if ``size_bytes`` more would go over the quota."""
        if self.quota_bytes is not None and self.used_bytes + size_bytes > self.quota_bytes:
            raise StoreFullError(
                f"{size_bytes} bytes more would go over the store's quota of {self.quota_bytes};"
                f" {self.used_bytes} are in use",
                hint="Delete blobs that are not needed (p2pflop rm HASH), or raise the quota.",
            )

    def reserve(self, size_bytes: int) -> None:
        """Count ``size_bytes`` more. Raises StoreFullError over the quota."""
        self.check(size_bytes)
        self.used_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Count ``size_bytes`` less."""
        self.used_bytes -= size_bytes


def check_reader(reader: bytes) -> None:
    """Raises ValueError for an owner or reader that is over ``MAX_READER_BYTES``."""
    if len(reader) > MAX_READER_BYTES:
        raise ValueError(f"an owner or reader of {len(reader)} bytes is over {MAX_READER_BYTES}")


def check_chunk(manifest: Manifest, index: int, data: Buffer) -> None:
    """Raises VerificationError unless ``data`` is chunk ``index``."""
    if not manifest.is_chunk(index, data):
        raise VerificationError(
            f"these {len(data)} bytes are not chunk {index} of blob {manifest.address.hex()}"
        )


def check_grants(address: bytes, others: int) -> None:
    """Raises StoreError if a blob with ``others`` readers may have no more."""
    if others >= MAX_GRANTS:
        raise StoreError(
            f"blob {address.hex()} has {others} readers, which is the most",
            hint="Revoke some, or make the blob public.",
        )


def deleted_meanwhile(address: bytes) -> StoreError:
    """The error for a partial whose blob was deleted."""
    return StoreError(f"blob {address.hex()} was deleted while it was being fetched")


def not_found(address: bytes) -> BlobNotFoundError:
    """The error for a blob that is not here as a whole."""
    return BlobNotFoundError(
        f"no whole blob {address.hex()} in the store",
        hint="Fetch it with p2pflop get, or put the file again.",
    )


def over_limit(size_bytes: int, max_bytes: int) -> StoreError:
    """The error for a blob that is larger than what was asked for or can be kept."""
    return StoreError(
        f"a blob of {size_bytes} bytes is over the limit of {max_bytes}",
        hint="Raise the limit, or split the data into several blobs.",
    )


def missing_ranges(held: Buffer, chunks: int) -> list[Range]:
    """Ranges of the chunks whose bit in the bitmap ``held`` (least significant first) is 0."""
    ranges: list[Range] = []
    for index in range(chunks):
        if held[index >> 3] >> (index & 7) & 1:
            continue
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return ranges
