"""Every Stream keeps the promises of p2pflop.dht.planes: in memory, over sockets, by odd reads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
import trio.testing

from p2pflop.dht.planes import (
    MAX_FRAME_BYTES,
    EndOfStream,
    FrameStream,
    MemoryDialer,
    Stream,
    memory_stream_pair,
)
from p2pflop.errors import ProtocolError, ProviderError


class _Bytes:
    """A trio stream as a ByteStream; ``most`` bytes a read."""

    def __init__(self, stream: trio.abc.Stream, most: int) -> None:
        self._stream = stream
        self._most = most

    async def read(self, n: int) -> bytes:
        return bytes(await self._stream.receive_some(min(n, self._most)))

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def close(self) -> None:
        await self._stream.aclose()


Pair = tuple[Stream, Stream]


async def _memory() -> Pair:
    return memory_stream_pair("left", "right")


async def _sockets(most: int = 1 << 20) -> Pair:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    left = await trio.open_tcp_stream("127.0.0.1", port)
    right = await listeners[0].accept()
    await listeners[0].aclose()
    return FrameStream(_Bytes(left, most), "right"), FrameStream(_Bytes(right, most), "left")


async def _three_bytes_a_read() -> Pair:
    return await _sockets(3)


@pytest.fixture(params=[_memory, _sockets, _three_bytes_a_read])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    make: Callable[[], Awaitable[Pair]] = request.param
    left, right = await make()
    yield left, right
    await left.aclose()
    await right.aclose()


async def test_frames_arrive_whole_and_in_order_both_ways(pair: Pair) -> None:
    left, right = pair
    frames = [b"", b"a", b"\0" * 5, bytes(range(256)) * 11]
    for frame in frames:
        await left.send(frame)
    assert [await right.receive() for _ in frames] == frames
    await right.send(b"back")
    assert await left.receive() == b"back"
    assert (left.peer, right.peer) == ("right", "left")


async def test_what_was_sent_before_closing_arrives_before_the_end(pair: Pair) -> None:
    left, right = pair
    await left.send(b"last")
    await left.aclose()
    assert await right.receive() == b"last"
    for _ in range(2):
        with pytest.raises(EndOfStream):
            await right.receive()


async def test_a_closed_stream_refuses_its_owner_and_closing_twice_is_fine(pair: Pair) -> None:
    left, _ = pair
    await left.aclose()
    await left.aclose()
    with pytest.raises(ProviderError):
        await left.send(b"x")
    with pytest.raises(ProviderError):
        await left.receive()


async def test_sending_to_a_peer_that_is_gone_fails(pair: Pair) -> None:
    left, right = pair
    await right.aclose()

    async def send_on() -> None:
        while True:
            await left.send(bytes(64 * 1024))

    with trio.fail_after(5), pytest.raises(ProviderError):
        await send_on()


async def test_the_limit_of_a_frame_is_exact(pair: Pair) -> None:
    left, right = pair
    await left.send(b"1234")
    await left.send(b"12345")
    assert await right.receive(4) == b"1234"
    for _ in range(2):
        with pytest.raises(ProtocolError) as caught:
            await right.receive(4)
        assert caught.value.peer == "left"


@pytest.mark.parametrize("size", [MAX_FRAME_BYTES - 1, MAX_FRAME_BYTES])
async def test_the_largest_frame_passes(size: int) -> None:
    for make in (_memory, _sockets):
        left, right = await make()
        frame = bytes(size)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.send, frame)
            assert await right.receive() == frame
        await left.aclose()
        await right.aclose()


async def test_a_frame_over_the_limit_is_not_sent(pair: Pair) -> None:
    left, right = pair
    with pytest.raises(ValueError, match="limit"):
        await left.send(bytes(MAX_FRAME_BYTES + 1))
    await left.send(b"ok")
    assert await right.receive() == b"ok"


async def test_a_cancelled_receive_loses_nothing(pair: Pair) -> None:
    left, right = pair
    with trio.move_on_after(0.01):
        await right.receive()
    await left.send(b"first")
    assert await right.receive() == b"first"


async def test_a_fast_sender_waits_for_a_slow_receiver(pair: Pair) -> None:
    left, _ = pair
    sent = 0

    async def send() -> None:
        nonlocal sent
        for _ in range(64):
            await left.send(bytes(MAX_FRAME_BYTES // 2))
            sent += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert sent < 64
        nursery.cancel_scope.cancel()


async def test_frames_sent_from_many_tasks_do_not_mix(pair: Pair) -> None:
    left, right = pair
    frames = [bytes([number]) * (number * 97) for number in range(1, 30)]
    async with trio.open_nursery() as nursery:
        for frame in frames:
            nursery.start_soon(left.send, frame)
        got = [await right.receive() for _ in frames]
    assert sorted(got) == sorted(frames)


async def test_an_end_inside_a_frame_is_not_an_orderly_end() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    stream = FrameStream(_Bytes(theirs, 100), "peer")
    await ours.send_all(b"\0\0\0\x05abc")
    await ours.aclose()
    with pytest.raises(ProviderError) as caught:
        await stream.receive()
    assert not isinstance(caught.value, EndOfStream)


async def test_a_cancelled_send_ends_sending() -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    stream = FrameStream(_Bytes(ours, 100), "peer")
    with trio.move_on_after(0.01):
        await stream.send(b"half of this")
    with pytest.raises(ProviderError, match="not sent whole"):
        await stream.send(b"more")
    await theirs.aclose()


async def test_a_dialer_in_memory_joins_handlers() -> None:
    async def echo(stream: Stream) -> None:
        assert stream.peer == "me"
        await stream.send(await stream.receive())

    async def misbehaved(stream: Stream) -> None:
        raise ProtocolError("no", peer=stream.peer)

    async with trio.open_nursery() as nursery:
        dialer = MemoryDialer(nursery, "me")
        dialer.handle("peer", "/echo", echo)
        dialer.handle("peer", "/bad", misbehaved)
        stream = await dialer.open("peer", "/echo")
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        with pytest.raises(EndOfStream):
            await stream.receive()
        with pytest.raises(EndOfStream):
            await (await dialer.open("peer", "/bad")).receive()
        with pytest.raises(ProviderError):
            await dialer.open("peer", "/other")
