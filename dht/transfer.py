"""The blob protocol ``/p2pflop/blob/1``: what is said on one stream, without the stream.

Participants. A **requester** opens a stream to a **provider**, a peer that may have a blob, and
says one request. The provider answers it and ends the stream. One request, one stream.

Goals. Bytes that nobody has to trust: the manifest is checked against the address, each chunk
against the manifest, before either is kept. Resuming at the first chunk that is missing, with any
provider. One round trip before the first byte. Bounds on everything that a liar could inflate.

Non-goals. Finding providers (``announce.py``), fetching from many at once, pushing blobs, secrecy
from whoever carries the stream (noise and TLS below give it).

Request, one frame: ``[1, address, ((first, end)...), token]``. The ranges of chunks wanted rise
and do not touch; one past the end of the blob is cut, so ``((0, 2**32 - 1),)`` is all of it.
``token`` is whatever the parties agreed on to prove the right to a private blob.

Response, frames in this order:

1. ``[1, status, manifest_bytes]``. ``ABSENT`` says *not for you*: a blob that is not there and one
   that may not be read get the same bytes, so that asking reveals nothing. ``BUSY`` asks to come
   back later. Both end the response.
2. The manifest, in frames of ``PIECE_BYTES``, the last one shorter.
3. Each chunk wanted, in order, a frame each, which has exactly the chunk's bytes.

A provider that can read no further (a chunk damaged on its disk, the blob deleted) ends the
stream early; what came before is good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

import msgspec

from p2pflop.dht.blobs import Range
from p2pflop.dht.manifest import Manifest, max_manifest_bytes
from p2pflop.errors import ProtocolError, ProviderError, VerificationError
from p2pflop.ids import content_hash
from p2pflop.units import MIB
from p2pflop.wire import U32, Hash, Record, decode, encode

BLOB_PROTOCOL: Final = "/p2pflop/blob/1"
VERSION: Final = 1
MAX_RANGES: Final = 64
MAX_TOKEN_BYTES: Final = 256
PIECE_BYTES: Final = MIB
WHOLE_BLOB: Final[tuple[Range, ...]] = ((0, 2**32 - 1),)

Ranges = Annotated[tuple[tuple[U32, U32], ...], msgspec.Meta(min_length=1, max_length=MAX_RANGES)]
Token = Annotated[bytes, msgspec.Meta(max_length=MAX_TOKEN_BYTES)]

FOUND: Final = 0
ABSENT: Final = 1
BUSY: Final = 2


class Request(Record, frozen=True):
    """What a requester wants. ValueError (ProtocolError on decode) for ranges that do not rise."""

    MAX_BYTES: ClassVar[int] = 2048

    version: Literal[1]
    address: Hash
    ranges: Ranges
    token: Token

    def __post_init__(self) -> None:
        previous = -1
        for first, end in self.ranges:
            if not previous < first < end:
                raise ValueError("ranges of chunks do not rise")
            previous = end

    def chunks(self, count: int) -> Iterator[int]:
        """The chunks wanted of a blob that has ``count``."""
        for first, end in self.ranges:
            yield from range(first, min(end, count))


class Answer(Record, frozen=True):
    """The head of a response."""

    MAX_BYTES: ClassVar[int] = 64

    version: Literal[1]
    status: Annotated[int, msgspec.Meta(ge=FOUND, le=BUSY)]
    manifest_bytes: U32


@dataclass(frozen=True, slots=True)
class Absent:
    """The provider has no such blob for this requester."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The manifest has come, and is the blob's."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Chunk:
    """A frame that must be chunk ``index``: it has the right length, its hash is not checked."""

    index: int
    data: bytes


Event = Absent | Opened | Chunk | None


class Download:
    """The requester's side of one stream: give it each frame, do what it returns.

    ``max_bytes`` is the largest blob wanted; ``peer`` is who answers, for errors.
    """

    def __init__(
        self, address: bytes, ranges: Sequence[Range], token: bytes, max_bytes: int, peer: str
    ) -> None:
        self.request = Request(VERSION, address, tuple(ranges[:MAX_RANGES]), token)
        self.finished = False
        self.manifest: Manifest | None = None
        self._max_manifest_bytes = max_manifest_bytes(max_bytes)
        self._peer = peer
        self._answer: Answer | None = None
        self._pieces = bytearray()
        self._wanted: Iterator[int] = iter(())
        self._next: int | None = None

    @property
    def opened(self) -> Manifest:
        """The manifest, once ``Opened`` was returned."""
        if self.manifest is None:
            raise ValueError("the manifest has not come yet")
        return self.manifest

    @property
    def max_frame_bytes(self) -> int:
        """The most that the next frame may have."""
        if self._answer is None:
            return Answer.MAX_BYTES
        if self.manifest is None:
            return min(PIECE_BYTES, self._answer.manifest_bytes - len(self._pieces))
        return 0 if self._next is None else self.manifest.chunk_length(self._next)

    def receive(self, frame: bytes) -> Event:
        """Take the next frame.

        Raises ProtocolError for one that may not stand here, VerificationError for a manifest that
        is not the blob's, ProviderError if the provider is busy or its blob is over the limit.
        """
        if self.finished:
            raise self._misbehaved("sent more than was asked for")
        if self._answer is None:
            return self._receive_answer(frame)
        if len(frame) != self.max_frame_bytes:
            raise self._misbehaved(
                f"sent {len(frame)} bytes where {self.max_frame_bytes} must stand"
            )
        if self.manifest is None:
            return self._receive_manifest(frame)
        index = self._next
        if index is None:
            raise self._misbehaved("sent more than was asked for")
        self._advance()
        return Chunk(index, frame)

    def _receive_answer(self, frame: bytes) -> Absent | None:
        answer = decode(Answer, frame)
        if answer.status == ABSENT:
            self.finished = True
            return Absent()
        if answer.status == BUSY:
            self.finished = True
            raise ProviderError(f"{self._peer} is busy", hint="Ask again in a moment.")
        if answer.manifest_bytes > self._max_manifest_bytes:
            raise ProviderError(
                f"{self._peer} says that the blob is larger than the limit",
                hint="Raise the limit if you expect so large a blob.",
            )
        if answer.manifest_bytes == 0:
            raise self._misbehaved("sent no manifest")
        self._answer = answer
        return None

    def _receive_manifest(self, frame: bytes) -> Opened | None:
        self._pieces += frame
        if self.max_frame_bytes:
            return None
        data = bytes(self._pieces)
        if content_hash(data) != self.request.address:
            raise VerificationError(
                f"{self._peer} sent a manifest that is not that of {self.request.address.hex()}"
            )
        self.manifest = decode(Manifest, data)
        self._pieces.clear()
        self._wanted = self.request.chunks(len(self.manifest.chunks))
        self._advance()
        return Opened(self.manifest)

    def _advance(self) -> None:
        self._next = next(self._wanted, None)
        self.finished = self._next is None

    def _misbehaved(self, what: str) -> ProtocolError:
        return ProtocolError(f"{self._peer} {what}", peer=self._peer)


def answer_absent() -> bytes:
    """The response for a blob that is not there, or not for this requester."""
    return encode(Answer(VERSION, ABSENT, 0))


def answer_busy() -> bytes:
    """The response of a provider that serves enough others."""
    return encode(Answer(VERSION, BUSY, 0))


def answer_found(manifest: Manifest) -> Iterator[bytes]:
    """The frames of a response before the first chunk."""
    data = encode(manifest)
    yield encode(Answer(VERSION, FOUND, len(data)))
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]
