"""Fetching blobs from peers and serving them: the blob protocol (``transfer.py``) on streams.

``fetch`` asks one source after the other and keeps every verified chunk, so the next source, or
the next fetch after a restart, goes on where this one stopped. While a chunk is hashed and written
in a thread the next one is already being received; ``READ_AHEAD`` bounds how many wait. A source
that lies, breaks off or falls silent is noted and left; only the store's own failure, and a
blob that is truly too large, end a fetch early.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

import trio

from p2pflop.dht.blobs import BlobInfo, PartialBlob, Range, Store, over_limit
from p2pflop.dht.manifest import MAX_BLOB_BYTES, Manifest
from p2pflop.dht.planes import Dialer, EndOfStream, Stream
from p2pflop.dht.slots import Slot, Slots
from p2pflop.dht.transfer import (
    BLOB_PROTOCOL,
    WHOLE_BLOB,
    Absent,
    Chunk,
    Download,
    Event,
    Request,
    answer_absent,
    answer_busy,
    answer_found,
)
from p2pflop.errors import (
    BlobNotFoundError,
    P2PFlopError,
    ProtocolError,
    ProviderError,
    StoreError,
    VerificationError,
)
from p2pflop.wire import decode, encode

OPEN_TIMEOUT_S: Final = 15.0
FRAME_TIMEOUT_S: Final = 60.0
"""For one frame, first byte to last. A server that others wait for is less patient."""

CLOSE_TIMEOUT_S: Final = 2.0
MAX_SOURCES: Final = 16
READ_AHEAD: Final = 4
WRITERS: Final = 2
"""One writes chunks while the other waits for a batch to be on disk."""

REQUEST_TIMEOUT_S: Final = 10.0
"""From the opening of a stream to its request: only then is it known who is to come first."""
MAX_STREAMS_PER_PEER: Final = 8

Progress = Callable[[int, int], None]
"""Called with the verified bytes here and the bytes of the whole blob."""

Fault = Callable[[str, P2PFlopError], None]
"""Called with a peer and what it did, for its reputation."""

Authorise = Callable[[str, bytes, bytes], Awaitable[bool]]
"""``(peer, token, address)``: whether a peer may read a blob that is not public."""


async def nobody(peer: str, token: bytes, address: bytes) -> bool:  # noqa: ARG001
    """The Authorise of a node that serves public blobs only."""
    await trio.lowlevel.checkpoint()
    return False


async def fetch(
    store: Store,
    address: bytes,
    sources: Sequence[str],
    dialer: Dialer,
    *,
    max_bytes: int = MAX_BLOB_BYTES,
    token: bytes = b"",
    owner: bytes = b"",
    public: bool = False,
    progress: Progress | None = None,
    on_fault: Fault | None = None,
) -> BlobInfo:
    """The blob at ``address``: from the store if ``owner`` may read it there, or from ``sources``.

    At most ``MAX_SOURCES`` are asked, in order, and shown ``token``; ``public`` lets anybody read
    it here. Raises BlobNotFoundError if
    none of them has it, ProviderError if one had it but none gave all of it, StoreError if it is
    over ``max_bytes`` or cannot be kept.
    """
    held = await held_for(store, address, owner)
    if held is not None:
        if held.size_bytes > max_bytes:
            raise over_limit(held.size_bytes, max_bytes)
        return await store.set_public(address) if public and not held.public else held
    async with AsyncExitStack() as stack:
        job = _Fetch(store, address, dialer, stack, max_bytes, token, owner, public, progress)
        partial = await store.resume(address, owner)
        if partial is not None:
            await job.open(partial)
        for source in sources[:MAX_SOURCES]:
            try:
                await job.ask(source)
            except (ProtocolError, VerificationError, ProviderError) as error:
                job.failures.append(f"{source}: {error.message}")
                if on_fault is not None:
                    on_fault(source, error)
            if job.partial is not None and not job.partial.missing():
                return await job.partial.finish()
        raise job.failure()


async def held_for(store: Store, address: bytes, owner: bytes) -> BlobInfo | None:
    """The blob in the store, if ``owner`` may read it there: another's copy is none of its."""
    held = await store.stat(address)
    if held is not None and owner and not await store.may_read(address, owner):
        return None
    return held


@dataclass(slots=True)
class _Fetch:
    store: Store
    address: bytes
    dialer: Dialer
    stack: AsyncExitStack
    max_bytes: int
    token: bytes
    owner: bytes
    public: bool
    progress: Progress | None
    partial: PartialBlob | None = None
    done_bytes: int = 0
    failures: list[str] = field(default_factory=list)

    async def open(self, partial: PartialBlob) -> None:
        """Fetch into ``partial`` from now on. Raises StoreError if the blob is over the limit."""
        await self.stack.enter_async_context(partial)
        manifest = partial.manifest
        if manifest.size_bytes > self.max_bytes:
            raise over_limit(manifest.size_bytes, self.max_bytes)
        self.partial = partial
        missing_bytes = sum(
            min(end * manifest.chunk_bytes, manifest.size_bytes) - first * manifest.chunk_bytes
            for first, end in partial.missing()
        )
        self.advance(manifest.size_bytes - missing_bytes)

    def advance(self, more_bytes: int) -> None:
        """Note progress."""
        if self.partial is not None:
            size_bytes = self.partial.manifest.size_bytes
            self.done_bytes = min(self.done_bytes + more_bytes, size_bytes)
            if self.progress is not None:
                self.progress(self.done_bytes, size_bytes)

    async def ask(self, source: str) -> None:
        """Take from ``source`` all that is missing, ``MAX_RANGES`` of it a stream."""
        ranges: Sequence[Range] = WHOLE_BLOB if self.partial is None else self.partial.missing()
        while ranges:
            download = Download(self.address, ranges, self.token, self.max_bytes, source)
            stream = await _open(self.dialer, source)
            try:
                await _send(stream, encode(download.request))
                has_it = await self._receive(stream, download)
            finally:
                await _close(stream)
            if not has_it:
                self.failures.append(f"{source} does not have it, or not for this node")
                return
            ranges = [] if self.partial is None else self.partial.missing()

    async def _receive(self, stream: Stream, download: Download) -> bool:
        """Take all that ``download`` asks for. False if the source does not have the blob."""
        event: Event = None
        while event is None:
            event = download.receive(await _receive(stream, download.max_frame_bytes))
        if isinstance(event, Absent):
            return False
        if self.partial is None:
            manifest = download.opened
            await self.open(await self.store.begin(manifest, public=self.public, owner=self.owner))
        if not download.finished:
            await self._receive_chunks(stream, download)
        return True

    async def _receive_chunks(self, stream: Stream, download: Download) -> None:
        """Raises what stopped it, itself and not in a group: callers tell the kinds apart."""
        outbox, inbox = trio.open_memory_channel[Chunk](READ_AHEAD)
        faults: list[P2PFlopError] = []

        async def read() -> None:
            async with outbox:
                try:
                    while not download.finished:
                        event = download.receive(await _receive(stream, download.max_frame_bytes))
                        if isinstance(event, Chunk):
                            await outbox.send(event)
                except P2PFlopError as error:
                    faults.append(error)

        async def write(chunks: trio.MemoryReceiveChannel[Chunk]) -> None:
            async for chunk in chunks:
                try:
                    await self._write(chunk)
                except P2PFlopError as error:
                    faults.insert(0, error)
                    nursery.cancel_scope.cancel()
                    return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for _ in range(WRITERS):
                nursery.start_soon(write, inbox)
        if faults:
            raise faults[0]

    async def _write(self, chunk: Chunk) -> None:
        if self.partial is not None:
            await self.partial.write_chunk(chunk.index, chunk.data)
            self.advance(len(chunk.data))

    def failure(self) -> P2PFlopError:
        """Why no source gave all of the blob."""
        causes = "; ".join(self.failures) or "there is nobody to ask"
        if self.partial is None:
            return BlobNotFoundError(
                f"nobody has blob {self.address.hex()}: {causes}",
                hint="See that a node that has it is online and has put it with --public.",
            )
        return ProviderError(
            f"nobody gave all of blob {self.address.hex()}: {causes}",
            hint=f"Try again: {self.done_bytes} bytes are here and will not be fetched twice.",
        )


async def serve(
    stream: Stream, store: Store, authorise: Authorise = nobody, slots: Slots | None = None
) -> None:
    """Answer one request and end the stream; BUSY if ``slots`` has none for it.

    Raises ProtocolError for a request that is none, ProviderError if the peer goes away or another
    one took its slot.
    """
    try:
        request = decode(Request, await _receive(stream, Request.MAX_BYTES, REQUEST_TIMEOUT_S))
        manifest, private = await _readable(request, stream.peer, store, authorise)
        if manifest is None:
            await _send(stream, answer_absent())
            return
        slots = Slots() if slots is None else slots
        slot = slots.take(stream.peer, private=private, now_s=trio.current_time())
        if slot is None:
            await _send(stream, answer_busy())
            return
        try:
            with slot.scope:
                for frame in answer_found(manifest):
                    await _send(stream, frame)
                await _send_chunks(stream, store, request, manifest, slot)
        finally:
            slots.give_back(slot)
        if slot.scope.cancelled_caught:
            raise ProviderError(f"{stream.peer} lost its slot to another reader")
    except ProtocolError as error:
        error.peer = stream.peer
        raise
    finally:
        await _close(stream)


class BlobServer:
    """``serve`` for a host: so many streams at once (``slots.py``), and so many of one peer.

    Others hear BUSY.
    """

    def __init__(self, store: Store, authorise: Authorise = nobody) -> None:
        self._store = store
        self._authorise = authorise
        self._slots = Slots()
        self._streams: Counter[str] = Counter()

    async def handle(self, stream: Stream) -> None:
        """See ``serve``."""
        peer = stream.peer
        if self._streams[peer] >= MAX_STREAMS_PER_PEER:
            try:
                await _send(stream, answer_busy())
            finally:
                await _close(stream)
            return
        self._streams[peer] += 1
        try:
            await serve(stream, self._store, self._authorise, self._slots)
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]


async def _readable(
    request: Request, peer: str, store: Store, authorise: Authorise
) -> tuple[Manifest | None, bool]:
    """The manifest of a blob that ``peer`` may read, and whether not everybody may.

    The right to it is asked for whether it is here or not, so that the time an answer takes does
    not tell the two apart.
    """
    info = await store.stat(request.address)
    is_public = info is not None and info.public
    if not is_public and not await authorise(peer, request.token, request.address):
        return None, True
    try:
        return await store.manifest(request.address), not is_public
    except (StoreError, VerificationError):
        return None, not is_public


async def _send_chunks(
    stream: Stream, store: Store, request: Request, manifest: Manifest, slot: Slot
) -> None:
    """Send chunks, reading the next while one is sent. Stops where the store can read no more."""
    outbox, inbox = trio.open_memory_channel[bytes](1)
    faults: list[P2PFlopError] = []

    async def read() -> None:
        async with outbox:
            for index in request.chunks(len(manifest.chunks)):
                try:
                    data = await store.read_chunk(request.address, index)
                except (StoreError, VerificationError):
                    return
                await outbox.send(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        async for data in inbox:
            try:
                await _send(stream, data)
                slot.sent_bytes += len(data)
            except ProviderError as error:
                faults.append(error)
                nursery.cancel_scope.cancel()
                break
    if faults:
        raise faults[0]


async def _open(dialer: Dialer, peer: str) -> Stream:
    with trio.move_on_after(OPEN_TIMEOUT_S):
        return await dialer.open(peer, BLOB_PROTOCOL)
    raise ProviderError(f"{peer} did not answer within {OPEN_TIMEOUT_S:.0f} s")


async def _send(stream: Stream, frame: bytes) -> None:
    with trio.move_on_after(FRAME_TIMEOUT_S):
        return await stream.send(frame)
    raise ProviderError(f"{stream.peer} took no frame for {FRAME_TIMEOUT_S:.0f} s")


async def _receive(stream: Stream, max_bytes: int, timeout_s: float = FRAME_TIMEOUT_S) -> bytes:
    with trio.move_on_after(timeout_s):
        try:
            return await stream.receive(max_bytes)
        except EndOfStream as error:
            raise ProviderError(f"{stream.peer} ended the stream too early") from error
    raise ProviderError(f"{stream.peer} sent no frame for {timeout_s:.0f} s")


async def _close(stream: Stream) -> None:
    with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S, shield=True):
        await stream.aclose()
