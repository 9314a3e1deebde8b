"""The muxer between two ends on a socket pair, and against a peer that breaks the rules."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from p2pflop.node import mux as muxing
from p2pflop.node.mux import (
    ACK,
    DATA,
    FIN,
    FRAMES_A_TURN,
    GO_AWAY,
    HEADER,
    MAX_STREAMS,
    PING,
    PING_BURST,
    RST,
    SYN,
    WINDOW_BYTES,
    WINDOW_UPDATE,
    Mux,
    MuxStream,
    StreamBroken,
)
from p2pflop.node.sealed_socket import (
    MAX_PACKET_BYTES,
    PACKETS_A_TURN,
    SealedSocket,
    Violation,
)
from p2pflop.units import KIB

LIMIT_S = 5.0


def plain(sock: socket.socket) -> SealedSocket:
    return SealedSocket(sock, lambda data: data, lambda data: data)


@asynccontextmanager
async def joined() -> AsyncIterator[tuple[Mux, Mux, trio.MemoryReceiveChannel[MuxStream]]]:
    """Two muxers that run, and the streams that the right one is offered."""
    here, there = socket.socketpair()
    offered, streams = trio.open_memory_channel[MuxStream](1000)
    left = Mux(plain(here), initiator=True, on_stream=lambda stream: stream.reset())
    right = Mux(plain(there), initiator=False, on_stream=offered.send_nowait)
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.run)
            nursery.start_soon(right.run)
            yield left, right, streams
            nursery.cancel_scope.cancel()


class Raw:
    """A peer that writes frames by hand to a muxer under test, as its initiator."""

    def __init__(self, sock: socket.socket) -> None:
        self._wire = plain(sock)
        self.write_queue = self._wire.write_queue

    def send(self, kind: int, flags: int, number: int, length: int, body: bytes = b"") -> None:
        self._wire.send(HEADER.pack(0, kind, flags, number, length) + body)

    def send_bytes(self, data: bytes) -> None:
        self._wire.send(data)

    async def frame(self) -> tuple[int, int, int, int]:
        """Kind, flags, stream and length of the next frame but pings."""
        while True:
            data = await self._wire.receive()
            for start in range(0, len(data), HEADER.size):
                _, kind, flags, number, length = HEADER.unpack_from(data, start)
                if kind != PING or flags != SYN:
                    return kind, flags, number, length
            if not data:
                raise EOFError


@asynccontextmanager
async def against_raw(
    on_stream: Callable[[MuxStream], None] = lambda stream: None,
) -> AsyncIterator[tuple[Raw, Mux]]:
    here, there = socket.socketpair()
    mux = Mux(plain(here), initiator=False, on_stream=on_stream)
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            raw = Raw(there)
            nursery.start_soon(mux.run)
            nursery.start_soon(raw.write_queue)
            yield raw, mux
            nursery.cancel_scope.cancel()


async def read_exactly(stream: MuxStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = await stream.read(size - len(data))
        assert part
        data += part
    return data


async def test_bytes_arrive_in_order_and_end() -> None:
    async with joined() as (left, _, streams):
        stream = left.open()
        await stream.write(b"hello")
        other = await streams.receive()
        assert await other.read(2) == b"he"
        assert await other.read(100) == b"llo"
        await stream.write(b"bye")
        stream.close_write()
        assert await other.read(100) == b"bye"
        assert await other.read(100) == b""
        await other.write(b"still open this way")
        assert await stream.read(100) == b"still open this way"


class TestWritingSoon:
    async def test_it_leaves_with_what_is_written_first(self, monkeypatch: Any) -> None:
        async with joined() as (left, _, _):
            sent: list[bytes] = []
            monkeypatch.setattr(left.wire, "send", sent.append)
            stream = left.open()
            stream.write_soon(b"hello ", before_waiting=False)
            assert not sent
            await stream.write(b"world")
            await stream.write(b"!")
            assert [frame[HEADER.size :] for frame in sent] == [b"hello world", b"!"]

    @pytest.mark.parametrize("before_waiting", [True, False])
    async def test_before_a_read_that_waits(self, before_waiting: bool) -> None:
        async with joined() as (left, _, streams):
            stream = left.open()
            stream.write_soon(b"hello", before_waiting=before_waiting)
            with trio.move_on_after(0.05):
                await stream.read(1)
            await stream.close()
            other = await streams.receive()
            assert await other.read(100) == b"hello"
            assert await other.read(100) == b""

    async def test_it_left_before_the_read_waited(self) -> None:
        async with joined() as (left, _, streams), trio.open_nursery() as nursery:
            stream = left.open()
            stream.write_soon(b"hello", before_waiting=True)
            nursery.start_soon(stream.read, 1)
            other = await streams.receive()
            assert await other.read(100) == b"hello"
            await other.write(b"!")


async def test_more_than_a_window_waits_for_the_reader() -> None:
    size = 5 * WINDOW_BYTES + 17
    data = bytes(range(251)) * (size // 251 + 1)
    async with joined() as (left, _, streams), trio.open_nursery() as nursery:
        stream = left.open()
        done = trio.Event()

        async def write() -> None:
            await stream.write(data[:size])
            done.set()

        nursery.start_soon(write)
        other = await streams.receive()
        while other.buffered_bytes < WINDOW_BYTES:
            await trio.testing.wait_all_tasks_blocked()
        assert other.buffered_bytes == WINDOW_BYTES
        assert not done.is_set()
        assert await read_exactly(other, size) == data[:size]
        await done.wait()


async def test_many_streams_at_once_keep_apart() -> None:
    async with joined() as (left, _, streams), trio.open_nursery() as nursery:

        async def echo() -> None:
            other = await streams.receive()
            while data := await other.read(100):
                await other.write(data)
            await other.close()

        async def talk(number: int) -> None:
            stream = left.open()
            for turn in range(20):
                message = b"%d %d" % (number, turn)
                await stream.write(message)
                assert await read_exactly(stream, len(message)) == message
            stream.close_write()
            assert await stream.read(1) == b""

        for number in range(50):
            nursery.start_soon(echo)
            nursery.start_soon(talk, number)


async def test_streams_that_both_ends_finished_are_forgotten() -> None:
    async with joined() as (left, right, streams):
        for _ in range(3 * MAX_STREAMS):
            stream = left.open()
            await stream.write(b"x")
            other = await streams.receive()
            await other.close()
            assert await stream.read(1) == b""
            await stream.close()
        while left.count_streams(inbound=False) or right.count_streams(inbound=True):
            await trio.testing.wait_all_tasks_blocked(0.001)


async def test_the_limit_on_our_own_streams() -> None:
    async with joined() as (left, _, _streams):
        opened = [left.open() for _ in range(MAX_STREAMS)]
        with pytest.raises(StreamBroken, match=str(MAX_STREAMS)):
            left.open()
        opened[0].reset()
        left.open()


async def test_a_reset_breaks_both_ends() -> None:
    async with joined() as (left, _, streams):
        stream = left.open()
        await stream.write(b"x")
        other = await streams.receive()
        other.reset()
        with pytest.raises(StreamBroken):
            await stream.read(1)
        with pytest.raises(StreamBroken):
            await stream.write(b"y")
        with pytest.raises(StreamBroken):
            await other.write(b"y")


async def test_the_end_of_the_connection_breaks_streams_but_not_what_came() -> None:
    async with joined() as (left, right, streams):
        stream = left.open()
        await stream.write(b"last words")
        other = await streams.receive()
        left.close()
        while not right.why_closed:
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert await other.read(100) == b"last words"
        with pytest.raises(StreamBroken):
            await other.read(1)
        with pytest.raises(StreamBroken):
            right.open()


async def test_a_reader_that_left_does_not_hold_its_peer_for_ever() -> None:
    async with joined() as (left, _, streams):
        stream = left.open()
        await stream.write(b"x")
        other = await streams.receive()
        await other.close()
        with pytest.raises(StreamBroken):
            await stream.write(bytes(2 * WINDOW_BYTES))


async def test_a_cancelled_writer_leaves_the_connection_whole() -> None:
    async with joined() as (left, _, streams):
        stream = left.open()
        with trio.move_on_after(0.02):
            await stream.write(bytes(3 * WINDOW_BYTES))
        stream.reset()
        await streams.receive()
        second = left.open()
        await second.write(b"fine")
        assert await (await streams.receive()).read(10) == b"fine"


async def test_the_round_trip_is_measured() -> None:
    async with joined() as (left, right, _):
        while not left.rtt_ns or not right.rtt_ns:
            await trio.testing.wait_all_tasks_blocked(0.001)


async def test_a_silent_peer_is_dropped(autojump_clock: trio.testing.MockClock) -> None:
    here, _there = socket.socketpair()
    mux = Mux(plain(here), initiator=True, on_stream=lambda stream: None)
    await mux.run()
    assert "nothing came" in mux.why_closed


async def test_a_stream_that_the_peer_never_finishes_is_let_go() -> None:
    async with against_raw() as (raw, mux):
        stream = mux.open()
        await stream.write(b"x")
        await stream.close()
        assert stream.finished_at is not None
        stream.finished_at -= muxing.LINGER_S
        raw.send(WINDOW_UPDATE, ACK, 2, 0)
        mux.let_go(trio.current_time() + 1)
        assert not mux.count_streams(inbound=False)


Attack = Callable[[Raw], None]


def open_with(body: bytes) -> Attack:
    return lambda raw: raw.send(DATA, SYN, 1, len(body), body)


def beyond_credit(raw: Raw) -> None:
    raw.send(WINDOW_UPDATE, SYN, 1, 0)
    for _ in range(5):
        raw.send(DATA, 0, 1, WINDOW_BYTES // 4, bytes(WINDOW_BYTES // 4))


def after_the_end(raw: Raw) -> None:
    raw.send(DATA, SYN | FIN, 1, 1, b"x")
    raw.send(DATA, 0, 1, 1, b"y")


def twice(raw: Raw) -> None:
    raw.send(WINDOW_UPDATE, SYN, 1, 0)
    raw.send(WINDOW_UPDATE, SYN, 1, 0)


def window_overflow(raw: Raw) -> None:
    raw.send(WINDOW_UPDATE, SYN, 1, 2**32 - 1)


@pytest.mark.parametrize(
    "attack",
    [
        beyond_credit,
        after_the_end,
        twice,
        window_overflow,
        lambda raw: raw.send(WINDOW_UPDATE, SYN, 2, 0),
        lambda raw: raw.send(DATA, SYN, 1, WINDOW_BYTES + 1),
        lambda raw: raw.send(4, 0, 1, 0),
        lambda raw: raw.send_bytes(b"\x01" * HEADER.size),
        lambda raw: raw.send_bytes(b"GET / HTTP/1.1\r\n\r\n"),
    ],
)
async def test_who_breaks_the_rules_is_cut_off(attack: Attack) -> None:
    async with against_raw() as (raw, mux):
        attack(raw)
        while not mux.why_closed:
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert mux.why_closed.startswith("cut off")


@pytest.mark.parametrize(
    "harmless",
    [
        lambda raw: raw.send(DATA, 0, 99, 5, b"12345"),
        lambda raw: raw.send(WINDOW_UPDATE, RST, 99, 0),
        lambda raw: raw.send(WINDOW_UPDATE, ACK, 99, 2**32 - 1),
        lambda raw: raw.send(PING, ACK, 0, 12345),
        lambda raw: raw.send(WINDOW_UPDATE, SYN | RST, 1, 0),
        open_with(bytes(WINDOW_BYTES)),
    ],
)
async def test_what_is_odd_but_allowed_is_borne(harmless: Attack) -> None:
    async with against_raw() as (raw, mux):
        harmless(raw)
        raw.send(PING, SYN, 0, 7)
        while True:
            kind, flags, _, value = await raw.frame()
            if (kind, flags, value) == (PING, ACK, 7):
                break
        assert not mux.why_closed


async def test_streams_beyond_the_limit_are_reset() -> None:
    async with against_raw() as (raw, mux):
        for number in range(MAX_STREAMS + 1):
            raw.send(WINDOW_UPDATE, SYN, 2 * number + 1, 0)
        assert await raw.frame() == (WINDOW_UPDATE, RST, 2 * MAX_STREAMS + 1, 0)
        assert mux.count_streams(inbound=True) == MAX_STREAMS


async def test_go_away_ends_it() -> None:
    async with against_raw() as (raw, mux):
        raw.send(GO_AWAY, 0, 0, 0)
        while not mux.why_closed:
            await trio.testing.wait_all_tasks_blocked(0.001)


async def test_asking_without_reading_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muxing, "MAX_QUEUED_BYTES", 4096)
    monkeypatch.setattr(muxing, "MAX_STREAMS", 0)
    monkeypatch.setattr(muxing, "WORK_BURST", 10**9)
    async with against_raw() as (raw, mux):
        streams = HEADER.pack(0, WINDOW_UPDATE, SYN, 1, 0) * 5000
        with trio.move_on_after(LIMIT_S):
            while not mux.why_closed:
                raw.send_bytes(streams)
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert "without reading" in mux.why_closed


async def test_a_few_pings_are_answered_and_many_cut_off() -> None:
    async with against_raw() as (raw, mux):
        for value in range(PING_BURST):
            raw.send(PING, SYN, 0, value)
            assert await raw.frame() == (PING, ACK, 0, value)
        raw.send_bytes(HEADER.pack(0, PING, SYN, 0, 7) * 5000)
        while not mux.why_closed:
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert "pings" in mux.why_closed


FLOODS = {
    "updates of no stream": HEADER.pack(0, WINDOW_UPDATE, 0, 77777, 1),
    "resets of no stream": HEADER.pack(0, WINDOW_UPDATE, RST, 77777, 0),
    "updates of a stream": HEADER.pack(0, WINDOW_UPDATE, 0, 1, 1),
    "answers that nobody asked for": HEADER.pack(0, PING, ACK, 0, 10**6),
    "a byte at a time for no stream": HEADER.pack(0, DATA, 0, 77777, 1) + b"x",
    "much for no stream": HEADER.pack(0, DATA, 0, 77777, 64 * KIB) + bytes(64 * KIB),
    "streams that begin and end": HEADER.pack(0, WINDOW_UPDATE, SYN | RST, 3, 0),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
async def test_a_flood_of_what_moves_nothing_is_paced(
    flood: bytes, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(muxing, "PING_S", 10**6)
    here, _ = socket.socketpair()
    wire = plain(here)
    turns = 0

    async def receive() -> bytes:
        nonlocal turns
        turns += 1
        await trio.lowlevel.checkpoint()
        return flood * 100 if turns > 1 else HEADER.pack(0, WINDOW_UPDATE, SYN, 1, 0)

    monkeypatch.setattr(wire, "receive", receive)
    mux = Mux(wire, initiator=False, on_stream=lambda stream: None)
    with trio.move_on_after(10):
        await mux.run()
    assert turns * 100 <= muxing.WORK_BURST + 10 * muxing.WORK_PER_S + 200


async def test_a_flood_gives_way_to_other_tasks() -> None:
    """All that came with one packet is not served in one go."""
    async with against_raw() as (raw, mux):
        turns = 0
        raw.send_bytes(HEADER.pack(0, WINDOW_UPDATE, 0, 77777, 1) * (50 * FRAMES_A_TURN))
        while not mux._inbox:
            await trio.lowlevel.checkpoint()
        while mux._inbox:
            turns += 1
            await trio.lowlevel.checkpoint()
        assert turns >= 40


async def test_smallest_packets_are_opened_some_at_a_time() -> None:
    here, there = socket.socketpair()
    wire = plain(here)
    there.send((b"\x00\x01x") * 1000)
    assert len(await wire.receive()) == PACKETS_A_TURN == wire.take_count()
    assert wire.take_count() == 0
    there.send(b"\x00\x00")

    async def read_all() -> None:
        while True:
            await wire.receive()

    with pytest.raises(Violation, match="empty"):
        await read_all()


async def test_packets_larger_than_one_are_split_and_joined() -> None:
    here, there = socket.socketpair()
    sender, receiver = plain(here), plain(there)
    data = bytes(range(256)) * (3 * MAX_PACKET_BYTES // 256)
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.write_queue)
            sender.send(data)
            got = b""
            while len(got) < len(data):
                got += await receiver.receive()
            await sender.room(0)
            nursery.cancel_scope.cancel()
    assert got == data
    sender.close()
    assert await receiver.receive() == b""
    sender.send(b"nothing happens")
