"""What every host promises, over libp2p on loopback and in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from p2pflop.dht.planes import MAX_FRAME_BYTES, EndOfStream, Stream
from p2pflop.errors import ConfigError, ProtocolError, ProviderError
from p2pflop.keys import PrivateKey, peer_id
from p2pflop.node.memory_host import MemoryNetwork
from p2pflop.node.network import MAX_MESSAGE_BYTES, HostConfig, Network, Sink, Validator

PROTOCOL = "/p2pflop/test/1"
LIMIT_S = 10.0
Opener = Callable[[HostConfig], AbstractAsyncContextManager[Network]]


@pytest.fixture(params=["libp2p", "memory"])
def opener(request: pytest.FixtureRequest) -> Opener:
    if request.param == "memory":
        return MemoryNetwork().open_host
    from p2pflop.node.host import open_host

    return open_host


def seed(number: int) -> bytes:
    return bytes([number]) * 32


@asynccontextmanager
async def hosts(opener: Opener, count: int, **options: Any) -> AsyncIterator[list[Network]]:
    """``count`` hosts, each connected to the one before it."""
    async with AsyncExitStack() as stack:
        line: list[Network] = []
        for number in range(count):
            host = await stack.enter_async_context(opener(HostConfig(seed(number + 1), **options)))
            if line:
                await host.connect(line[-1].addresses[0])
            line.append(host)
        yield line


async def echo(stream: Stream) -> None:
    try:
        while True:
            await stream.send(await stream.receive())
    except EndOfStream:
        return


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - some conditions have no event
            await trio.sleep(0.01)


async def test_peer_is_the_id_of_the_seeds_key_and_stands_in_the_address(opener: Opener) -> None:
    async with opener(HostConfig(seed(9))) as host:
        assert host.peer == peer_id(PrivateKey(seed(9)).public_key)
        assert host.addresses
        assert all(address.endswith(f"/p2p/{host.peer}") for address in host.addresses)


async def test_connect_gives_the_peer_and_both_ends_know(opener: Opener) -> None:
    async with opener(HostConfig(seed(1))) as left, opener(HostConfig(seed(2))) as right:
        seen: list[tuple[str, str]] = []
        left.on_connect(lambda peer: seen.append(("left", peer)))
        right.on_connect(lambda peer: seen.append(("right", peer)))
        assert await left.connect(right.addresses[0]) == right.peer
        assert await left.connect(right.addresses[0]) == right.peer
        await until(lambda: len(seen) == 2)
        assert set(seen) == {("left", right.peer), ("right", left.peer)}
        assert [(p.peer, p.inbound) for p in left.peers()] == [(right.peer, False)]
        assert [(p.peer, p.inbound) for p in right.peers()] == [(left.peer, True)]
        assert left.peers()[0].addresses[0] in right.addresses[0] + "/p2p/"
        assert left.statistics().peers == 1


async def test_disconnect_is_told_to_both_and_breaks_streams(opener: Opener) -> None:
    async with hosts(opener, 2) as (left, right):
        gone: list[str] = []
        left.on_disconnect(gone.append)
        right.on_disconnect(gone.append)
        right.handle(PROTOCOL, echo)
        stream = await left.open(right.peer, PROTOCOL)
        async with trio.open_nursery() as nursery:

            async def wait_for_more() -> None:
                with pytest.raises(ProviderError) as caught:
                    await stream.receive()
                assert not isinstance(caught.value, EndOfStream)

            nursery.start_soon(wait_for_more)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await right.disconnect(left.peer)
            await until(lambda: len(gone) >= 2)
        assert {left.peer, right.peer} <= set(gone)
        with pytest.raises(ProviderError):
            await stream.send(b"more")


async def test_a_callback_that_raises_harms_nobody(opener: Opener) -> None:
    def fail(peer: str) -> None:
        raise RuntimeError(peer)

    async with opener(HostConfig(seed(1))) as left, opener(HostConfig(seed(2))) as right:
        told: list[str] = []
        for subscribe in (left.on_connect, left.on_disconnect):
            subscribe(fail)
            subscribe(told.append)
        await left.connect(right.addresses[0])
        await left.disconnect(right.peer)
        await until(lambda: len(told) >= 2)
        await left.connect(right.addresses[0])


async def test_it_does_not_connect_to_itself(opener: Opener) -> None:
    async with opener(HostConfig(seed(1))) as host:
        with pytest.raises(ConfigError, match="itself"):
            await host.connect(host.addresses[0])


@pytest.mark.parametrize(
    "address", ["", "nonsense", "/ip4/127.0.0.1/tcp/7421", "/ip4/127.0.0.1/tcp/7421/p2p/xyz"]
)
async def test_a_bad_address_is_a_config_error(opener: Opener, address: str) -> None:
    async with opener(HostConfig(seed(1))) as host:
        with pytest.raises(ConfigError):
            await host.connect(address)


async def test_nobody_at_the_address(opener: Opener) -> None:
    async with opener(HostConfig(seed(1))) as host:
        async with opener(HostConfig(seed(2))) as other:
            address = other.addresses[0]
        with trio.fail_after(LIMIT_S), pytest.raises(ProviderError, match="nobody answers at"):
            await host.connect(address)


async def test_another_peer_at_the_address(opener: Opener) -> None:
    stranger = peer_id(PrivateKey(seed(77)).public_key)
    async with opener(HostConfig(seed(1))) as host, opener(HostConfig(seed(2))) as other:
        address = other.addresses[0].replace(other.peer, stranger)
        with pytest.raises(ProviderError, match="another peer"):
            await host.connect(address)
        assert host.peers() == []


async def test_an_address_works_once_its_peer_is_there_again(opener: Opener) -> None:
    async with opener(HostConfig(seed(1))) as host:
        async with opener(HostConfig(seed(2))) as other:
            await host.connect(other.addresses[0])
            old = other.addresses[0]
        await until(lambda: not host.peers())
        with pytest.raises(ProviderError):
            await host.connect(old)
        async with opener(HostConfig(seed(2))) as other:
            assert await host.connect(other.addresses[0]) == other.peer


@pytest.mark.parametrize("size", [0, 1, 200, 70_000, MAX_FRAME_BYTES])
async def test_frames_come_back_whole(opener: Opener, size: int) -> None:
    async with hosts(opener, 2) as (left, right):
        right.handle(PROTOCOL, echo)
        stream = await left.open(right.peer, PROTOCOL)
        assert stream.peer == right.peer
        frame = bytes(range(256)) * (size // 256) + bytes(size % 256)
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send, frame)
                assert await stream.receive() == frame


async def test_either_end_opens_on_one_connection(opener: Opener) -> None:
    async with hosts(opener, 2) as (left, right):
        peers: list[str] = []

        async def note(stream: Stream) -> None:
            peers.append(stream.peer)
            await echo(stream)

        for here, there in ((left, right), (right, left)):
            there.handle(PROTOCOL, note)
            stream = await here.open(there.peer, PROTOCOL)
            await stream.send(b"ping")
            assert await stream.receive() == b"ping"
        assert peers == [left.peer, right.peer]


async def test_both_directions_at_once(opener: Opener) -> None:
    count = 200

    async def pour(stream: Stream) -> None:
        for number in range(count):
            await stream.send(number.to_bytes(4, "big") * 500)

    async def drain(stream: Stream) -> None:
        for number in range(count):
            assert await stream.receive() == number.to_bytes(4, "big") * 500

    async def both(stream: Stream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour, stream)
            nursery.start_soon(drain, stream)

    async with hosts(opener, 2) as (left, right):
        right.handle(PROTOCOL, both)
        with trio.fail_after(LIMIT_S):
            await both(await left.open(right.peer, PROTOCOL))


async def test_what_was_sent_arrives_before_the_end(opener: Opener) -> None:
    got: list[bytes] = []
    ended = trio.Event()

    async def collect(stream: Stream) -> None:
        try:
            while True:
                got.append(await stream.receive())
        except EndOfStream:
            ended.set()

    async with hosts(opener, 2) as (left, right):
        right.handle(PROTOCOL, collect)
        for _ in range(2):  # the second stream skips the wait for the agreed protocol
            got.clear()
            stream = await left.open(right.peer, PROTOCOL)
            for number in range(10):
                await stream.send(bytes([number]))
            await stream.aclose()
            with trio.fail_after(LIMIT_S):
                await ended.wait()
            ended = trio.Event()
            assert got == [bytes([number]) for number in range(10)]


async def test_the_end_of_a_handler_ends_the_stream(opener: Opener) -> None:
    async def greet(stream: Stream) -> None:
        await stream.send(b"hello")

    async with hosts(opener, 2) as (left, right):
        right.handle(PROTOCOL, greet)
        stream = await left.open(right.peer, PROTOCOL)
        assert await stream.receive() == b"hello"
        with pytest.raises(EndOfStream):
            await stream.receive()
        await stream.aclose()


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ProtocolError("nonsense")])
async def test_a_handler_that_raises_breaks_its_stream_alone(
    opener: Opener, error: Exception
) -> None:
    async def fail(stream: Stream) -> None:
        await stream.receive()
        raise error

    async with hosts(opener, 2) as (left, right):
        right.handle(PROTOCOL, fail)
        right.handle("/p2pflop/echo/1", echo)
        other = await left.open(right.peer, "/p2pflop/echo/1")
        stream = await left.open(right.peer, PROTOCOL)
        await stream.send(b"go")
        with trio.fail_after(LIMIT_S), pytest.raises(ProviderError) as caught:
            await stream.receive()
        assert not isinstance(caught.value, EndOfStream)
        await other.send(b"still here")
        assert await other.receive() == b"still here"


async def test_an_oversized_frame_is_a_protocol_error(opener: Opener) -> None:
    async with hosts(opener, 2) as (left, right):
        right.handle(PROTOCOL, echo)
        stream = await left.open(right.peer, PROTOCOL)
        await stream.send(b"123456")
        with pytest.raises(ProtocolError):
            await stream.receive(5)


async def test_a_cancelled_receive_loses_nothing(opener: Opener) -> None:
    async with hosts(opener, 2) as (left, right):
        right.handle(PROTOCOL, echo)
        for _ in range(2):
            stream = await left.open(right.peer, PROTOCOL)
            with trio.move_on_after(0.01):
                await stream.receive()
            await stream.send(b"late")
            with trio.fail_after(LIMIT_S):
                assert await stream.receive() == b"late"


async def test_nobody_answers_the_protocol(opener: Opener) -> None:
    async with hosts(opener, 2) as (left, right):
        with pytest.raises(ProviderError, match="does not answer"):
            await left.open(right.peer, "/p2pflop/unknown/1")


async def test_another_network_does_not_answer(opener: Opener) -> None:
    other = HostConfig(seed(2), network="other")
    async with opener(HostConfig(seed(1))) as left, opener(other) as right:
        right.handle(PROTOCOL, echo)
        await left.connect(right.addresses[0])
        with pytest.raises(ProviderError, match="does not answer"):
            await left.open(right.peer, PROTOCOL)


async def test_open_without_an_address_is_refused(opener: Opener) -> None:
    async with hosts(opener, 2) as (left, _):
        left.handle(PROTOCOL, echo)
        for peer in (peer_id(PrivateKey(seed(99)).public_key), left.peer, "nonsense", ""):
            with trio.fail_after(LIMIT_S), pytest.raises(ProviderError):
                await left.open(peer, PROTOCOL)
        await left.disconnect("nonsense")


async def test_open_reconnects_to_a_peer_once_known(opener: Opener) -> None:
    async with hosts(opener, 2) as (left, right):
        left.handle(PROTOCOL, echo)
        right.handle(PROTOCOL, echo)
        gone: list[str] = []
        left.on_disconnect(gone.append)
        await right.disconnect(left.peer)
        await until(lambda: gone == [right.peer])
        stream = await right.open(left.peer, PROTOCOL)
        await stream.send(b"again")
        assert await stream.receive() == b"again"


async def subscribe_all(
    line: list[Network], validator: Validator, capacity: int = 100
) -> list[trio.MemoryReceiveChannel[tuple[str, bytes]]]:
    channels = []
    for host in line:
        sink, source = trio.open_memory_channel[tuple[str, bytes]](capacity)
        await host.subscribe("orders", validator, sink)
        channels.append(source)
    await until(
        lambda: all(
            {p.peer for p in host.peers()} == set(host.neighbours("orders")) for host in line
        )
    )
    return channels


async def deliver(
    host: Network, data: bytes, source: trio.MemoryReceiveChannel[tuple[str, bytes]]
) -> tuple[str, bytes]:
    """Publish until it arrives: a mesh is young for a second."""
    with trio.fail_after(LIMIT_S):
        while True:
            await host.publish("orders", data)
            with trio.move_on_after(1):
                return await source.receive()


async def test_gossip_reaches_who_is_not_a_neighbour_and_names_the_author(opener: Opener) -> None:
    async with hosts(opener, 3) as line:
        sources = await subscribe_all(line, lambda *_: True)
        assert await deliver(line[0], b"sheet", sources[2]) == (line[0].peer, b"sheet")
        with pytest.raises(trio.WouldBlock):
            sources[0].receive_nowait()


async def test_gossip_that_does_not_validate_is_neither_delivered_nor_forwarded(
    opener: Opener,
) -> None:
    heard: set[tuple[str, str]] = set()

    def validator(peer: str, data: bytes, forwarder: str) -> bool:
        heard.add((peer, forwarder))
        if data == b"crash":
            raise RuntimeError("a bug")
        return data.startswith(b"good")

    async with hosts(opener, 3) as line:
        sources = await subscribe_all(line, validator)
        assert (await deliver(line[0], b"good 1", sources[2]))[1] == b"good 1"
        await line[0].publish("orders", b"bad")
        await line[0].publish("orders", b"crash")
        assert (await deliver(line[0], b"good 2", sources[2]))[1] == b"good 2"
        assert line[1].statistics().counts["gossip_refused_validator"] >= 2
        assert "gossip_refused_validator" not in line[2].statistics().counts
        author, middle = line[0].peer, line[1].peer
        assert heard >= {(author, author), (author, middle)}


async def test_a_full_sink_drops_and_counts(opener: Opener) -> None:
    async with hosts(opener, 2) as line:
        sources = await subscribe_all(line, lambda *_: True, capacity=1)
        with trio.fail_after(LIMIT_S):
            while not line[1].statistics().counts.get("gossip_dropped"):
                await line[0].publish("orders", b"more")
                await trio.sleep(0.3)
        assert sources[1].receive_nowait()[1] == b"more"


async def test_gossip_limits(opener: Opener) -> None:
    def sink() -> Sink:
        return trio.open_memory_channel[tuple[str, bytes]](1)[0]

    async with opener(HostConfig(seed(1))) as host:
        await host.publish("orders", bytes(MAX_MESSAGE_BYTES))
        with pytest.raises(ValueError, match="bytes"):
            await host.publish("orders", bytes(MAX_MESSAGE_BYTES + 1))
        await host.subscribe("orders", lambda *_: True, sink())
        with pytest.raises(ValueError, match="subscriber"):
            await host.subscribe("orders", lambda *_: True, sink())


async def test_a_key_is_found_from_afar_and_its_provider_can_be_reached(opener: Opener) -> None:
    async with hosts(opener, 3) as (left, middle, right):
        await until(lambda: min(h.statistics().directory_peers for h in (left, middle, right)) >= 1)
        left.handle(PROTOCOL, echo)
        key = bytes(range(32))
        with trio.fail_after(LIMIT_S):
            assert await right.find(key) == []
            await left.provide(key)
            assert await right.find(key) == [left.peer]
            assert await left.find(key) == []
            stream = await right.open(left.peer, PROTOCOL)
            await stream.send(b"reached")
            assert await stream.receive() == b"reached"


async def test_alone_nobody_takes_an_announcement(opener: Opener) -> None:
    async with opener(HostConfig(seed(1))) as host:
        with pytest.raises(ProviderError):
            await host.provide(bytes(32))
        assert await host.find(bytes(32)) == []


async def test_leaving_ends_handlers_and_is_quick(opener: Opener) -> None:
    ended = trio.Event()

    async def stay(stream: Stream) -> None:
        try:
            await stream.send(b"here")
            await trio.sleep_forever()
        finally:
            ended.set()

    async with opener(HostConfig(seed(1))) as left:
        async with opener(HostConfig(seed(2))) as right:
            right.handle(PROTOCOL, stay)
            await left.connect(right.addresses[0])
            stream = await left.open(right.peer, PROTOCOL)
            assert await stream.receive() == b"here"
            started = trio.current_time()
        assert trio.current_time() - started < 2
        assert ended.is_set()
        await until(lambda: not left.peers())


async def test_an_error_in_the_block_comes_out_as_it_is(opener: Opener) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with opener(HostConfig(seed(1))):
            raise KeyError("mine")
