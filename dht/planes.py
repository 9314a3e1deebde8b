"""Framed streams between two peers, and how one is opened.

Everything above the network speaks frames: byte strings of at most ``MAX_FRAME_BYTES``, in order,
one conversation a stream. On a stream of bytes a frame is its length (u32, big endian) and then
its bytes; the in-memory twin passes frames as they are. Both keep the same promises:

- What was sent before ``aclose`` arrives before ``EndOfStream``.
- A frame is sent whole or the stream is dead: a cancelled ``send`` leaves half a frame behind, so
  every later one fails. A cancelled ``receive`` loses nothing.
- One oversized frame ends the conversation, because its bytes were never read.
- A sender that is faster than its receiver waits.

Timeouts belong to the protocols, which alone know how long a silence may last.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import trio

from p2pflop.dht.turns import Turn
from p2pflop.errors import P2PFlopError, ProtocolError, ProviderError
from p2pflop.units import KIB, MIB

MAX_FRAME_BYTES: Final = MIB + 64 * KIB
"""A chunk of a blob and what is said about it."""

LENGTH_BYTES: Final = 4
READ_BYTES: Final = 64 * KIB
MEMORY_FRAMES: Final = 16

_log = logging.getLogger(__name__)


class EndOfStream(ProviderError):
    """The other end finished sending, in order. An error only where more was expected."""


class Stream(Protocol):
    """A conversation in frames with one peer. ``send`` from many tasks, ``receive`` from one."""

    @property
    def peer(self) -> str:
        """The base58 peer id of the other end."""

    async def send(self, *frames: bytes) -> None:
        """Send frames, in order. Raises ProviderError if the stream is broken or closed.

        Raises ValueError for a frame over ``MAX_FRAME_BYTES``.
        """

    async def receive(self, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
        """The next frame.

        Raises EndOfStream after the last one, ProtocolError if it has more than ``max_bytes``,
        ProviderError if the stream is broken or closed.
        """

    async def aclose(self) -> None:
        """Finish: the other end gets what was sent, then EndOfStream. Never raises."""


class Dialer(Protocol):
    """Opens streams to peers."""

    async def open(self, peer: str, protocol: str) -> Stream:
        """A stream on which ``peer`` answers ``protocol``. Raises ProviderError if it cannot."""


class ByteStream(Protocol):
    """What a transport gives. Its errors are OSError, trio's closed and broken resource errors, or
    ProviderError; a transport with others translates them."""

    async def read(self, n: int) -> bytes:
        """Between 1 and ``n`` bytes, or none at the orderly end."""

    async def write(self, data: bytes) -> None:
        """Write all of ``data``."""

    async def close(self) -> None:
        """Finish sending and release the stream."""


_TRANSPORT_ERRORS: Final = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class FrameStream:
    """A Stream over any stream of bytes."""

    def __init__(self, transport: ByteStream, peer: str) -> None:
        self.peer = peer
        self._transport = transport
        self._sending = Turn()
        self._buffer = bytearray()
        self._ended = False
        self._send_fault = ""
        self._receive_fault: ProtocolError | None = None

    async def send(self, *frames: bytes) -> None:
        """See Stream."""
        data = b"".join(map(_prefixed, frames))
        async with self._sending:
            if self._send_fault:
                raise ProviderError(f"cannot send to {self.peer}: {self._send_fault}")
            self._send_fault = "an earlier frame was not sent whole"
            try:
                await self._transport.write(data)
            except _TRANSPORT_ERRORS as error:
                raise ProviderError(f"stream to {self.peer} broke: {error}") from error
            self._send_fault = ""

    async def receive(self, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
        """See Stream."""
        if self._receive_fault is not None:
            raise self._receive_fault
        if not await self._fill(LENGTH_BYTES):
            raise EndOfStream(f"{self.peer} ended the stream")
        length = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
        if length > max_bytes:
            self._receive_fault = _oversized(length, max_bytes, self.peer)
            raise self._receive_fault
        end = LENGTH_BYTES + length
        await self._fill(end)
        with memoryview(self._buffer) as view:
            frame = bytes(view[LENGTH_BYTES:end])
        del self._buffer[:end]
        return frame

    async def aclose(self) -> None:
        """See Stream."""
        self._send_fault = self._send_fault or "the stream is closed"
        try:
            await self._transport.close()
        except (*_TRANSPORT_ERRORS, ProviderError):
            return  # The other end sees a broken stream, which is all that is left to tell it.

    async def _fill(self, size: int) -> bool:
        """Read until ``size`` bytes are buffered. False if the stream ended before the first."""
        while len(self._buffer) < size:
            if not self._ended:
                try:
                    data = await self._transport.read(max(size - len(self._buffer), READ_BYTES))
                except _TRANSPORT_ERRORS as error:
                    raise ProviderError(f"stream from {self.peer} broke: {error}") from error
                self._ended = not data
                self._buffer += data
            if self._ended and len(self._buffer) < size:
                if not self._buffer:
                    return False
                raise ProviderError(f"{self.peer} vanished in the middle of a frame")
        return True


class MemoryStream:
    """A Stream inside one process. Made in pairs by ``memory_stream_pair``."""

    def __init__(
        self,
        peer: str,
        outbox: trio.MemorySendChannel[bytes],
        inbox: trio.MemoryReceiveChannel[bytes],
    ) -> None:
        self.peer = peer
        self._outbox = outbox
        self._inbox = inbox
        self._receive_fault: ProtocolError | None = None

    async def send(self, *frames: bytes) -> None:
        """See Stream."""
        for frame in frames:
            _check_frame(frame)
        try:
            for frame in frames:
                await self._outbox.send(bytes(frame))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ProviderError(f"cannot send to {self.peer}: the stream is closed") from error

    async def receive(self, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
        """See Stream."""
        if self._receive_fault is not None:
            raise self._receive_fault
        try:
            frame = await self._inbox.receive()
        except trio.EndOfChannel as error:
            raise EndOfStream(f"{self.peer} ended the stream") from error
        except trio.ClosedResourceError as error:
            raise ProviderError(f"the stream to {self.peer} is closed") from error
        if len(frame) > max_bytes:
            self._receive_fault = _oversized(len(frame), max_bytes, self.peer)
            raise self._receive_fault
        return frame

    async def aclose(self) -> None:
        """See Stream."""
        self._outbox.close()
        self._inbox.close()
        await trio.lowlevel.checkpoint()


def memory_stream_pair(
    left_peer: str = "left", right_peer: str = "right"
) -> tuple[MemoryStream, MemoryStream]:
    """Two joined streams: the end that ``left_peer`` holds, then that of ``right_peer``."""
    to_right, from_left = trio.open_memory_channel[bytes](MEMORY_FRAMES)
    to_left, from_right = trio.open_memory_channel[bytes](MEMORY_FRAMES)
    return (
        MemoryStream(right_peer, to_right, from_right),
        MemoryStream(left_peer, to_left, from_left),
    )


class MemoryDialer:
    """A Dialer inside one process: handlers run in ``nursery`` and close their stream at the end.

    ``peer`` is who dials. Handlers must not raise anything but P2PFlopError, as on a real host.
    """

    def __init__(self, nursery: trio.Nursery, peer: str) -> None:
        self.peer = peer
        self._nursery = nursery
        self._handlers: dict[tuple[str, str], Callable[[Stream], Awaitable[None]]] = {}

    def handle(
        self, peer: str, protocol: str, handler: Callable[[Stream], Awaitable[None]]
    ) -> None:
        """Let ``handler`` answer ``protocol`` as ``peer``."""
        self._handlers[peer, protocol] = handler

    async def open(self, peer: str, protocol: str) -> Stream:
        """See Dialer."""
        await trio.lowlevel.checkpoint()
        handler = self._handlers.get((peer, protocol))
        if handler is None:
            raise ProviderError(f"{peer} does not answer {protocol}")
        ours, theirs = memory_stream_pair(self.peer, peer)
        self._nursery.start_soon(_answer, handler, theirs)
        return ours


async def _answer(handler: Callable[[Stream], Awaitable[None]], stream: MemoryStream) -> None:
    try:
        await handler(stream)
    except (P2PFlopError, trio.TooSlowError):
        return  # The peer's own doing; a host would note it against the peer and go on.
    except Exception:  # noqa: BLE001 - a bug in one stream's handler must not end the node
        _log.exception("a handler failed")
    finally:
        await stream.aclose()


def _check_frame(frame: bytes) -> None:
    if len(frame) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")


def _prefixed(frame: bytes) -> bytes:
    _check_frame(frame)
    return len(frame).to_bytes(LENGTH_BYTES, "big") + frame


def _oversized(length: int, max_bytes: int, peer: str) -> ProtocolError:
    return ProtocolError(
        f"{peer} sent a frame of {length} bytes where at most {max_bytes} may stand", peer=peer
    )
