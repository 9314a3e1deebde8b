"""Yamux over an encrypted socket: many streams of bytes on one connection.

It speaks yamux as go-yamux, js-libp2p and py-libp2p do: frames of a 12-byte header (version, type,
flags, stream, length), inside the packets of ``sealed_socket.py``. It is ours because a round trip
through py-libp2p's layers costs 1.5 ms of Python on both ends together, a bid needs several, and
its buffers have no bound. How it gets by with little:

- **Writing never waits for the socket**; senders of much wait for what is queued to shrink.
- **Reading is one task**, which takes what the kernel has, opens all packets in it and wakes the
  streams that got something.
- **Credit** goes back to a sender once half a window was read, so small messages cost no updates.
- A stream's first frame carries SYN or ACK itself, and what agrees on its protocol.

Nothing that a peer sends can make it use more than ``MAX_STREAMS`` windows of ``WINDOW_BYTES`` and
``MAX_QUEUED_BYTES`` of answers; who goes beyond its credit, or breaks the format, is cut off.

Nor can it take all of the node's time. Reading gives way to other tasks after ``FRAMES_A_TURN``.
What costs this end much and moves little (packets, small frames, new streams, bytes for streams
that are not there) is counted as **work**; who causes more than ``WORK_PER_S`` is read more slowly,
so that TCP slows it down. Useful bytes are paced by credit. Pings beyond ``PINGS_PER_S`` cut off.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

import trio

from p2pflop.errors import ProviderError
from p2pflop.node.rates import Pace
from p2pflop.node.sealed_socket import READY_BYTES, SealedSocket, Violation
from p2pflop.units import KIB, MIB

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
HEADER: Final = struct.Struct("!BBHII")
WINDOW_BYTES: Final = 256 * KIB
"""Fixed by yamux for a new stream; ours stays there."""
MAX_SEND_WINDOW_BYTES: Final = 2**32 - 1
MAX_BODY_BYTES: Final = 60 * KIB
"""Of the data frames that we send: one fits a packet."""
MAX_STREAMS: Final = 256
"""Open at once on one connection, counted apart for each end's own."""
MAX_QUEUED_BYTES: Final = 2 * MIB
"""A peer that lets more pile up, by asking without reading, is cut off."""
MAX_DISCARDED_BYTES: Final = 128 * KIB
"""What a peer may still send on a stream that this end has finished with."""
LINGER_S: Final = 30.0
"""How long a stream that this end has finished with waits for the peer to finish too."""
PING_S: Final = 15.0
SILENCE_S: Final = 45.0
"""A connection on which nothing at all came for so long is dead."""
FRAMES_A_TURN: Final = 128
WORK_PER_S: Final = 4_000
"""Twice what the updates and packets of 200 MiB/s come to."""
WORK_BURST: Final = 8_000
SMALL_FRAME_BYTES: Final = KIB
"""A frame on an open stream with fewer is one of work; so is each KiB for a stream not there."""
NEW_STREAM_WORK: Final = 16
"""It starts a task, which agrees on a protocol and looks for a handler: some 150 us."""
PINGS_PER_S: Final = 2
PING_BURST: Final = 16
FAREWELL_S: Final = 0.5
"""How long a closing connection waits for the peer to take what was sent."""


class StreamBroken(ProviderError):
    """The stream was reset, or its connection ended."""


class MuxStream:
    """A stream of bytes. One task may read and another write at the same time."""

    def __init__(self, mux: Mux, number: int, first_flag: int) -> None:
        self.mux = mux
        self.number = number
        self.protocol = ""
        self.received_bytes = 0
        self.finished_at: float | None = None
        self._flag = first_flag
        self._soon, self._sends_before_waiting = b"", False
        self._buffer = bytearray()
        self._unreported_bytes = 0
        self._credit_bytes = WINDOW_BYTES  # what the peer may still send
        self._window_bytes = WINDOW_BYTES  # what we may still send
        self._discarded_bytes = 0
        self._fault = ""
        self._ended = False  # the peer has sent FIN
        self._closed = False  # we have sent FIN
        self._readable = trio.Event()
        self._writable = trio.Event()

    @property
    def buffered_bytes(self) -> int:
        """What can be read without waiting."""
        return len(self._buffer)

    async def read(self, n: int) -> bytes:
        """Between 1 and ``n`` bytes, or none at the orderly end. Raises StreamBroken."""
        if self._buffer:
            await trio.lowlevel.checkpoint_if_cancelled()
        while not self._buffer:
            if self._fault:
                raise StreamBroken(self._fault)
            if self.finished_at is not None:
                raise StreamBroken("the stream is closed")
            if self._ended:
                return b""
            if self._sends_before_waiting:
                self._send_soon()
            self._readable = trio.Event()
            await self._readable.wait()
        data = bytes(self._buffer[:n])
        del self._buffer[:n]
        self._unreported_bytes += len(data)
        if self._unreported_bytes >= WINDOW_BYTES // 2 and not self._ended and not self._fault:
            self._send(WINDOW_UPDATE, self._unreported_bytes)
            self._credit_bytes += self._unreported_bytes
            self._unreported_bytes = 0
        return data

    async def write(self, data: bytes) -> None:
        """Send all of ``data``, as the peer gives credit. One task at a time. Raises StreamBroken.

        Cancelled, it may have sent a part.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        data, self._soon = self._soon + data, b""
        position = 0
        while position < len(data):
            self._check_writable()
            if not self._window_bytes:
                self._writable = trio.Event()
                await self._writable.wait()
                continue
            if self.mux.wire.queued_bytes > READY_BYTES:
                await self.mux.wire.room()
                continue
            size = min(self._window_bytes, MAX_BODY_BYTES, len(data) - position)
            self._window_bytes -= size
            self._send(DATA, size, data[position : position + size])
            position += size

    def write_soon(self, data: bytes, *, before_waiting: bool) -> None:
        """Begin with ``data``, little, in one packet with what is written first; by itself if
        nothing is before the end, or, ``before_waiting``, before a read waits for the peer."""
        self._soon, self._sends_before_waiting = data, before_waiting

    def _send_soon(self) -> None:
        if self._soon and not self._closed:
            data, self._soon = self._soon, b""
            self._window_bytes -= len(data)
            self._send(DATA, len(data), data)

    def _check_writable(self) -> None:
        if self._fault:
            raise StreamBroken(self._fault)
        if self._closed:
            raise StreamBroken("the stream is closed")

    def _send(self, kind: int, length: int, body: bytes = b"", flags: int = 0) -> None:
        flags |= self._flag
        self._flag = 0
        self.mux.wire.send(HEADER.pack(0, kind, flags, self.number, length) + body)

    def close_write(self) -> None:
        """Finish sending; reading goes on."""
        if not self._closed and not self._fault:
            self._send_soon()
            self._closed = True
            self._send(WINDOW_UPDATE, 0, flags=FIN)
            self._writable.set()
            self.mux.forget_if_over(self)

    async def close(self) -> None:
        """Finish sending, and read no more: what still comes is thrown away."""
        self.close_write()
        if self.finished_at is None:
            self.finished_at = trio.current_time()
            self._readable.set()
            self._buffer.clear()
            self.mux.forget_if_over(self)

    def reset(self, why: str = "the stream was reset here") -> None:
        """End it both ways at once; the peer sees a broken stream."""
        if not self._fault and not self.over:
            self._send(WINDOW_UPDATE, 0, flags=RST)
        self.break_off(why)

    def break_off(self, why: str) -> None:
        """Let every task that uses it fail with ``why``. What came is still read first."""
        self._fault = self._fault or why
        self._readable.set()
        self._writable.set()
        self.mux.forget_if_over(self)

    @property
    def over(self) -> bool:
        """Whether nothing will come or go any more."""
        return bool(self._fault) or (self._closed and self._ended)

    def on_frame(self, flags: int, increment: int, body: bytes) -> None:
        """What the peer sent. Raises Violation."""
        if increment:
            self._window_bytes += increment
            if self._window_bytes > MAX_SEND_WINDOW_BYTES:
                raise Violation("a send window beyond 32 bits")
            self._writable.set()
        if body:
            self._credit_bytes -= len(body)
            self.received_bytes += len(body)
            if self._credit_bytes < 0 or self._ended:
                raise Violation("data beyond the credit or after the end of a stream")
            self._take(body)
        if flags & RST:
            self._buffer.clear()
            self.break_off("the peer reset the stream")
        elif flags & FIN:
            self._ended = True
            self._readable.set()
            self.mux.forget_if_over(self)

    def _take(self, body: bytes) -> None:
        if self.finished_at is None:
            self._buffer += body
            self._readable.set()
            return
        self._discarded_bytes += len(body)
        if self._discarded_bytes > MAX_DISCARDED_BYTES:
            self.reset("the peer went on sending")


class Mux:
    """One end of a yamux connection. ``run`` it; ``on_stream`` gets each stream the peer opens.

    ``received`` is what came before the muxer took over.
    """

    def __init__(
        self,
        wire: SealedSocket,
        *,
        initiator: bool,
        on_stream: Callable[[MuxStream], None],
        received: bytes = b"",
    ) -> None:
        self.wire = wire
        self.why_closed = ""
        self.rtt_ns = 0
        self._on_stream = on_stream
        self._inbox = bytearray(received)
        self._streams: dict[int, MuxStream] = {}
        self._next_number = 1 if initiator else 2
        self._peer_parity = 0 if initiator else 1
        self._heard_at = 0.0
        self._ping_sent_at = 0.0
        self._pings = 0
        self._work = 0
        now_s = trio.current_time()
        self._pace = Pace(WORK_PER_S, WORK_BURST, now_s)
        self._ping_pace = Pace(PINGS_PER_S, PING_BURST, now_s)

    def open(self) -> MuxStream:
        """A new stream. Raises StreamBroken if the connection ended or has too many."""
        if self.why_closed:
            raise StreamBroken(self.why_closed)
        if self.count_streams(inbound=False) >= MAX_STREAMS:
            raise StreamBroken(f"{MAX_STREAMS} streams are already open on the connection")
        stream = MuxStream(self, self._next_number, SYN)
        self._next_number += 2
        self._streams[stream.number] = stream
        return stream

    def count_streams(self, *, inbound: bool) -> int:
        """Open streams that the peer (``inbound``) or this end began."""
        parity = self._peer_parity if inbound else 1 - self._peer_parity
        return sum(1 for number in self._streams if number % 2 == parity)

    def forget_if_over(self, stream: MuxStream) -> None:
        """Drop the entry of a stream on which nothing will come or go any more."""
        if stream.over:
            self._streams.pop(stream.number, None)

    async def run(self) -> None:
        """Serve the connection until either end closes it. Raises nothing that a peer caused."""
        self._heard_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.wire.write_queue)
            nursery.start_soon(self._watch)
            try:
                await self._read()
                self.close("the peer closed the connection")
            except Violation as fault:
                self.close(f"cut off: {fault}")
            finally:
                self.close("the connection was closed here")
                nursery.cancel_scope.cancel()

    async def aclose(self) -> None:
        """``close`` after what was sent has gone out, if the peer takes it within a moment."""
        with trio.move_on_after(FAREWELL_S):
            await self.wire.room(0)
        self.close()

    def close(self, why: str = "the connection was closed here") -> None:
        """End the connection and break its streams. What they received can still be read."""
        if self.why_closed:
            return
        self.why_closed = why
        self.wire.send(HEADER.pack(0, GO_AWAY, 0, 0, 0))
        self.wire.close()
        for stream in list(self._streams.values()):
            stream.break_off(why)
        self._streams.clear()

    async def _read(self) -> None:
        while True:
            while self._take_frames():
                await self._rest()
            if self._work:
                await self._rest(only_if_due=True)
            data = await self.wire.receive()
            if not data:
                return
            self._heard_at = trio.current_time()
            self._work += self.wire.take_count()
            self._inbox += data

    async def _rest(self, *, only_if_due: bool = False) -> None:
        """Give way to other tasks, for as long as the work done calls for."""
        rest_s = self._pace.spend(self._work, trio.current_time())
        self._work = 0
        if rest_s or not only_if_due:
            await trio.sleep(rest_s)
            self._heard_at = trio.current_time()

    def _take_frames(self) -> bool:
        """Serve what has come, at most ``FRAMES_A_TURN``. Whether there is more."""
        start, size, is_more = 0, len(self._inbox), False
        for _ in range(FRAMES_A_TURN):
            if size - start < HEADER.size or self.why_closed:
                break
            version, kind, flags, number, length = HEADER.unpack_from(self._inbox, start)
            if version or kind > GO_AWAY:
                raise Violation("not a yamux frame")
            end = start + HEADER.size + (length if kind == DATA else 0)
            if kind == DATA and length > WINDOW_BYTES:
                raise Violation(f"a data frame of {length} bytes")
            if end > size:
                break
            if kind == PING:
                self._on_ping(flags, length)
            elif kind == GO_AWAY:
                self.close("the peer closed the connection")
            else:
                body = bytes(self._inbox[start + HEADER.size : end])
                self._on_stream_frame(flags, number, 0 if kind == DATA else length, body)
            start = end
        else:
            is_more = True
        del self._inbox[:start]
        if self.wire.queued_bytes > MAX_QUEUED_BYTES:
            raise Violation("the peer asks without reading the answers")
        return is_more

    def _on_stream_frame(self, flags: int, number: int, increment: int, body: bytes) -> None:
        stream = self._streams.get(number)
        if stream is None:
            self._work += 1 + len(body) // KIB
        elif len(body) < SMALL_FRAME_BYTES:
            self._work += 1
        if flags & SYN:
            self._work += NEW_STREAM_WORK
            # Numbers need not rise: a stream is announced by its first frame, not when it is made.
            if number % 2 != self._peer_parity or stream is not None:
                raise Violation(f"a new stream with the number {number}")
            if self.count_streams(inbound=True) >= MAX_STREAMS:
                self.wire.send(HEADER.pack(0, WINDOW_UPDATE, RST, number, 0))
                return
            stream = self._streams[number] = MuxStream(self, number, ACK)
            stream.on_frame(flags, increment, body)
            self._on_stream(stream)
        elif stream is not None:
            stream.on_frame(flags, increment, body)

    def _on_ping(self, flags: int, value: int) -> None:
        self._work += 1
        if flags & SYN:
            if self._ping_pace.spend(1, trio.current_time()):
                raise Violation("too many pings")
            self.wire.send(HEADER.pack(0, PING, ACK, 0, value))
        elif value == self._pings and self._ping_sent_at:
            self.rtt_ns = int((trio.current_time() - self._ping_sent_at) * 1e9)
            self._ping_sent_at = 0.0

    async def _watch(self) -> None:
        """Notice a dead peer, measure the round trip, and let go of streams long finished here."""
        while True:
            self._pings += 1
            self._ping_sent_at = trio.current_time()
            self.wire.send(HEADER.pack(0, PING, SYN, 0, self._pings))
            await trio.sleep(PING_S)
            now = trio.current_time()
            if now - self._heard_at > SILENCE_S:
                self.close(f"nothing came for {SILENCE_S:.0f} s")
                return
            self.let_go(now)

    def let_go(self, now_s: float) -> None:
        """Reset streams that this end finished long ago and the peer did not."""
        for stream in list(self._streams.values()):
            if stream.finished_at is not None and now_s - stream.finished_at > LINGER_S:
                stream.reset("the peer did not finish")
