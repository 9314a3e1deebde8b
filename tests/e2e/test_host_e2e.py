"""Hosts over real sockets: in processes of their own, restarted, killed, flooded and lied to."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import libp2p.network.swarm as libp2p_swarm
import pytest
import trio
from libp2p import generate_new_ed25519_identity, new_host
from libp2p.crypto.x25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from p2pflop.dht.planes import EndOfStream, Stream
from p2pflop.errors import ConfigError, ProviderError
from p2pflop.keys import PrivateKey, peer_id
from p2pflop.market.rates import Rates, SharedRates
from p2pflop.node import host as hosting
from p2pflop.node import inbound, libp2p_directory, libp2p_streams
from p2pflop.node.host import Host, open_host
from p2pflop.node.libp2p_gossip import ORIGIN_BURST, ORIGIN_PER_S
from p2pflop.node.libp2p_streams import MAX_HANDSHAKES_PER_ADDRESS
from p2pflop.node.network import MAX_MESSAGE_BYTES, HostConfig

LIMIT_S = 20.0
PROTOCOL = "/p2pflop/echo/1"
WIRE_NAME = "/p2pflop/main/echo/1"

NODE = """
import sys, trio
from p2pflop.dht.planes import EndOfStream
from p2pflop.errors import ProviderError
from p2pflop.node.host import open_host
from p2pflop.node.network import HostConfig

async def echo(stream):
    try:
        while True:
            await stream.send(await stream.receive())
    except EndOfStream:
        pass

async def main():
    seed, bootstrap = bytes([int(sys.argv[1])]) * 32, tuple(sys.argv[2:])
    async with open_host(HostConfig(seed, bootstrap=bootstrap)) as host:
        host.handle("/p2pflop/echo/1", echo)
        sink, source = trio.open_memory_channel(100)
        await host.subscribe("orders", lambda *_: True, sink)
        print(host.addresses[0], flush=True)
        async with trio.open_nursery() as nursery:
            @nursery.start_soon
            async def heard():
                async for peer, data in source:
                    print("heard", peer, data.decode(), flush=True)
            while True:
                line = await trio.to_thread.run_sync(sys.stdin.readline)
                word, _, rest = line.strip().partition(" ")
                if word == "provide":
                    while True:
                        try:
                            await host.provide(rest.encode())
                            break
                        except ProviderError:
                            await trio.sleep(0.1)
                    print("provided", flush=True)
                elif word == "publish":
                    await host.publish("orders", rest.encode())
                else:
                    break
            nursery.cancel_scope.cancel()
trio.run(main)
"""


class Node:
    """A host in a process of its own."""

    def __init__(self, number: int, *bootstrap: str) -> None:
        self.peer = peer_id(PrivateKey(bytes([number]) * 32).public_key)
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODE, str(number), *bootstrap],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.address = self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    async def line(self) -> str:
        return await trio.to_thread.run_sync(self._line)

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def finish(self) -> str:
        """End it in order; what it wrote to stderr."""
        _, errors = self.process.communicate("end\n", timeout=LIMIT_S)
        assert self.process.returncode == 0
        return errors


@pytest.fixture
def start() -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def start_node(number: int, *bootstrap: str) -> Node:
        nodes.append(Node(number, *bootstrap))
        return nodes[-1]

    yield start_node
    for node in nodes:
        node.process.kill()
        node.process.communicate()


def config(number: int, **options: object) -> HostConfig:
    return HostConfig(bytes([number]) * 32, **options)  # type: ignore[arg-type]


async def echo(stream: Stream) -> None:
    try:
        while True:
            await stream.send(await stream.receive())
    except EndOfStream:
        return


async def echoes(host: Host, peer: str) -> None:
    """Assert that ``peer`` echoes."""
    with trio.fail_after(LIMIT_S):
        stream = await host.open(peer, PROTOCOL)
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        await stream.aclose()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - some conditions have no event
            await trio.sleep(0.01)


async def test_three_processes_in_a_line_find_hear_and_reach_each_other(
    start: Callable[..., Node],
) -> None:
    first = start(1)
    second = start(2, first.address)
    async with open_host(config(3, bootstrap=(second.address,))) as host:
        sink, source = trio.open_memory_channel[tuple[str, bytes]](100)
        await host.subscribe("orders", lambda *_: True, sink)
        first.tell("provide some key")
        assert await first.line() == "provided"
        with trio.fail_after(LIMIT_S):
            while await host.find(b"some key") != [first.peer]:  # noqa: ASYNC110 - as in until
                await trio.sleep(0.05)
            await echoes(host, first.peer)
            while True:
                first.tell("publish a sheet")
                with trio.move_on_after(1):
                    assert await source.receive() == (first.peer, b"a sheet")
                    break
    assert second.finish() == ""
    assert first.finish() == ""


async def test_a_killed_peer_is_noticed_and_a_restarted_one_found_again(
    start: Callable[..., Node],
) -> None:
    node = start(1)
    port = node.address.split("/")[4]
    events: list[str] = []
    async with open_host(config(2, bootstrap=(node.address,), jitter=lambda: 0.0)) as host:
        host.on_connect(lambda peer: events.append("up"))
        host.on_disconnect(lambda peer: events.append("down"))
        await until(lambda: events == ["up"])
        stream = await host.open(node.peer, PROTOCOL)
        node.process.kill()
        with trio.fail_after(LIMIT_S), pytest.raises(ProviderError):
            await stream.receive()
        await until(lambda: events == ["up", "down"])
        async with open_host(config(1, listen=(f"/ip4/127.0.0.1/tcp/{port}",))) as again:
            again.handle(PROTOCOL, echo)
            await until(lambda: events == ["up", "down", "up"])
            await echoes(host, again.peer)


def test_a_short_life_is_quiet_and_quick() -> None:
    script = """
import trio
from p2pflop.node.host import open_host
from p2pflop.node.network import HostConfig

async def main():
    async with open_host(HostConfig(b"1" * 32)) as left:
        async with open_host(HostConfig(b"2" * 32)) as right:
            async def fail(stream):
                await stream.receive()
            right.handle("/p2pflop/x/1", fail)
            await left.connect(right.addresses[0])
            stream = await left.open(right.peer, "/p2pflop/x/1")
            await left.publish("topic", b"data")
            started = trio.current_time()
        assert trio.current_time() - started < 2
trio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", script],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_memory_host_does_not_need_libp2p() -> None:
    script = "import sys, p2pflop.node.memory_host; assert 'libp2p' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], timeout=LIMIT_S, check=True)


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Host, Host]]:
    async with open_host(config(1)) as left, open_host(config(2)) as right:
        right.handle(PROTOCOL, echo)
        await left.connect(right.addresses[0])
        yield left, right


async def test_a_port_in_use_is_a_config_error_with_a_hint() -> None:
    async with open_host(config(1)) as host:
        taken = host.addresses[0].partition("/p2p/")[0]
        with pytest.raises(ConfigError, match="cannot listen") as caught:
            async with open_host(config(2, listen=(taken,))):
                pass
        assert "Choose another" in caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"listen": ("/ip4/127.0.0.1/udp/0",)},
        {"listen": ("localhost:7421",)},
        {"listen": ("/ip4/192.0.2.1/tcp/0",)},
        {"bootstrap": ("/ip4/127.0.0.1/tcp/1",)},
    ],
)
async def test_bad_settings_are_config_errors(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        async with open_host(config(1, **options)):
            pass


async def test_another_libp2p_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(libp2p_swarm, "_HAPPY_EYEBALLS_DELAY")
    with pytest.raises(ConfigError, match="not the one this was made for"):
        async with open_host(config(1)):
            pass


async def test_stock_libp2p_and_this_host_understand_each_other() -> None:
    keys, listen = generate_new_ed25519_identity(), [Multiaddr("/ip4/127.0.0.1/tcp/0")]
    noise = Noise(keys, noise_privkey=create_new_key_pair().private_key)
    stock = new_host(
        key_pair=keys,
        listen_addrs=listen,
        sec_opt={NOISE: noise},
        muxer_opt={TProtocol(YAMUX): Yamux},
    )

    async def answer(stream: object) -> None:
        frame = await stream.read(9)  # type: ignore[attr-defined]
        await stream.write(frame)  # type: ignore[attr-defined]
        await stream.close()  # type: ignore[attr-defined]

    stock.set_stream_handler(TProtocol(WIRE_NAME), answer)
    with trio.fail_after(LIMIT_S):
        async with stock.run(listen_addrs=listen), open_host(config(1)) as host:
            host.handle(PROTOCOL, echo)
            await host.connect(str(stock.get_addrs()[0]))
            stream = await host.open(str(stock.get_id()), PROTOCOL)
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"
            with pytest.raises(EndOfStream):
                await stream.receive()
            with pytest.raises(ProviderError, match="does not answer"):
                await host.open(str(stock.get_id()), "/p2pflop/unknown/1")
            theirs = await stock.new_stream(ID.from_base58(host.peer), [TProtocol(WIRE_NAME)])
            size = 600_000
            async with trio.open_nursery() as nursery:
                nursery.start_soon(theirs.write, size.to_bytes(4, "big") + bytes(size))
                got = b""
                while len(got) < size + 4:
                    got += await theirs.read(65536)
            assert got == size.to_bytes(4, "big") + bytes(size)
            await theirs.close()


async def test_a_peer_without_encryption_is_refused() -> None:
    keys, listen = generate_new_ed25519_identity(), [Multiaddr("/ip4/127.0.0.1/tcp/0")]
    stock = new_host(
        key_pair=keys,
        listen_addrs=listen,
        sec_opt={TProtocol(PLAINTEXT_PROTOCOL_ID): InsecureTransport(keys)},
        muxer_opt={TProtocol(YAMUX): Yamux},
    )
    with trio.fail_after(LIMIT_S):
        async with stock.run(listen_addrs=listen), open_host(config(1)) as host:
            stock.get_network().retry_config.max_retries = 0
            with pytest.raises(Exception, match="unable to connect"):
                await stock.connect(info_from_p2p_addr(Multiaddr(host.addresses[0])))
            with pytest.raises(ProviderError):
                await host.connect(str(stock.get_addrs()[0]))
            assert host.peers() == []


@pytest.mark.parametrize(
    "said",
    [
        b"\x13/multistream/1.0.0\n\x03\xff\xfe\n",
        b"\xff" * 100,
        b"\x13/multistream/1.0.0\n" + b"\x11/ipfs/kad/1.0.0\n",
        b"\x13/multistream/1.0.0\n\x13/p2pflop/main/kad/1\n" + b"\x05\xff\xff\xff\xff\xff",
        b"\x13/multistream/1.0.0\n\x0f/meshsub/1.1.0\n" + b"\x05\xff\xff\xff\xff\xff",
        b"\x13/multistream/1.0.0\n\x0f/meshsub/1.1.0\n" + b"\xff\xff\xff\xff\x7f",
        b"\x13/multistream/1.0.0\n\x14/ipfs/id/push/1.0.0\n" + b"\x05\xff\xff\xff\xff\xff",
    ],
)
async def test_nonsense_on_a_stream_ends_the_stream_alone(said: bytes) -> None:
    async with pair() as (left, right):
        connection = left._live(right.peer)
        assert connection is not None
        stream = connection.mux.open()
        await stream.write(said)
        stream.close_write()
        with trio.fail_after(LIMIT_S):
            try:
                while await stream.read(1000):
                    pass
            except ProviderError:
                pass
        await echoes(left, right.peer)


async def test_nonsense_on_the_port_harms_nobody() -> None:
    async with pair() as (left, right):
        address = Multiaddr(right.addresses[0])
        port = int(address.value_for_protocol("tcp"))
        for said in (b"GET / HTTP/1.1\r\n\r\n", bytes(100_000), b"\x13/multistream/1.0.0\n\xff"):
            raw = await trio.open_tcp_stream("127.0.0.1", port)
            async with raw:
                try:
                    await raw.send_all(said)
                    await raw.send_eof()
                    with trio.fail_after(LIMIT_S):
                        while await raw.receive_some(1000):
                            pass
                except trio.BrokenResourceError:
                    pass
        await echoes(left, right.peer)


async def test_idle_handshakes_of_one_address_keep_out_only_that_address() -> None:
    async with open_host(config(1)) as left, open_host(config(2)) as right:
        right.handle(PROTOCOL, echo)
        port = int(Multiaddr(right.addresses[0]).value_for_protocol("tcp"))
        async with AsyncExitStack() as stack:
            refused = 0
            for _ in range(MAX_HANDSHAKES_PER_ADDRESS + 5):
                sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
                await sock.bind(("127.0.0.2", 0))
                await sock.connect(("127.0.0.1", port))
                stream = await stack.enter_async_context(trio.SocketStream(sock))
                with trio.move_on_after(0.1):
                    try:
                        if not await stream.receive_some(1000):
                            refused += 1
                    except trio.BrokenResourceError:
                        refused += 1
            assert refused == 5
            with trio.fail_after(2):
                await left.connect(right.addresses[0])
            await echoes(left, right.peer)


async def test_connections_that_ended_do_not_count_against_the_limit() -> None:
    async with open_host(config(1, max_connections=3)) as host:
        host.handle(PROTOCOL, echo)
        for number in range(2, 10):
            async with open_host(config(number)) as guest:
                await guest.connect(host.addresses[0])
                await echoes(guest, host.peer)
            await until(lambda: not host.peers())


async def test_streams_beyond_the_limit_of_a_peer_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair() as (left, right):
        streams = [await left.open(right.peer, PROTOCOL) for _ in range(5)]
        for stream in streams:
            await stream.send(b"x")
            assert await stream.receive() == b"x"
        monkeypatch.setattr(inbound, "MAX_INBOUND_STREAMS_PER_PEER", 5)
        with trio.fail_after(LIMIT_S), pytest.raises(ProviderError):
            await echoes(left, right.peer)
        assert right.statistics().counts["streams_refused"] >= 1
        for stream in streams:
            await stream.aclose()
        await until(lambda: right.statistics().inbound_streams == 0)
        await echoes(left, right.peer)


async def test_a_silent_answerer_does_not_hold_the_opener(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosting, "OPEN_S", 0.2)

    async def never(*_: object) -> None:
        await trio.sleep_forever()

    async with pair() as (left, right):
        monkeypatch.setattr(right, "_negotiate_and_serve", never)
        with trio.fail_after(LIMIT_S), pytest.raises(ProviderError, match="did not answer"):
            await left.open(right.peer, "/p2pflop/other/1")


async def hear(left: Host, right: Host) -> trio.MemoryReceiveChannel[tuple[str, bytes]]:
    """What ``right`` hears, once ``left`` knows that it listens."""
    sink, source = trio.open_memory_channel[tuple[str, bytes]](1000)
    await right.subscribe("orders", lambda *_: True, sink)
    mine, _ = trio.open_memory_channel[tuple[str, bytes]](1)
    await left.subscribe("orders", lambda *_: True, mine)
    await until(lambda: left.neighbours("orders") == [right.peer])
    return source


async def test_a_forwarder_beyond_the_rate_is_not_listened_to() -> None:
    async with pair() as (left, right):
        source = await hear(left, right)
        right._gossip._forwarders = Rates(per_s=0.001, burst=3)
        with trio.fail_after(LIMIT_S):
            while not right.statistics().counts.get("gossip_refused_forwarder"):
                await left.publish("orders", b"more")
                await trio.sleep(0.05)
        assert source.statistics().current_buffer_used == 3


async def test_all_links_together_have_a_share_and_each_its_own() -> None:
    async with pair() as (left, right):
        source = await hear(left, right)
        common = Rates(per_s=0.001, burst=2)
        right._gossip._looks = SharedRates(Rates(per_s=0.001, burst=1), common)
        with trio.fail_after(LIMIT_S):
            while not right.statistics().counts.get("gossip_refused_looks"):
                await left.publish("orders", b"more")
                await trio.sleep(0.05)
        assert source.statistics().current_buffer_used == 3
        now_s = trio.current_time()
        assert common.left("p2pflop/main/orders", now_s) < 1
        assert common.left("p2pflop/main/others", now_s) == 2, "each topic has its own"


async def test_gossip_over_the_size_limit_is_refused_by_who_gets_it() -> None:
    async with pair() as (left, right):
        source = await hear(left, right)
        name = "p2pflop/main/orders"
        with trio.fail_after(LIMIT_S):
            while not right.statistics().counts.get("gossip_refused_form"):
                await left._gossip._pubsub.publish(name, bytes(MAX_MESSAGE_BYTES + 1))
                await trio.sleep(0.05)
            while not source.statistics().current_buffer_used:
                await left._gossip._pubsub.publish(name, bytes(MAX_MESSAGE_BYTES))
                await trio.sleep(0.05)
        assert len(source.receive_nowait()[1]) == MAX_MESSAGE_BYTES


async def test_an_author_beyond_the_rate_is_not_delivered() -> None:
    async with pair() as (left, right):
        source = await hear(left, right)
        started = trio.current_time()
        number = 0
        with trio.fail_after(LIMIT_S):
            while not right.statistics().counts.get("gossip_refused_origin"):
                await left.publish("orders", b"%d" % number)
                number += 1
                await trio.sleep(0.002)
        elapsed = trio.current_time() - started
        received = source.statistics().current_buffer_used
        assert ORIGIN_BURST <= received <= ORIGIN_BURST + ORIGIN_PER_S * elapsed + 1


async def test_connections_of_one_address_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_streams, "MAX_CONNECTIONS_PER_ADDRESS", 2)
    async with AsyncExitStack() as stack:
        host, *guests = [
            await stack.enter_async_context(open_host(config(number))) for number in range(1, 5)
        ]
        for guest in guests[:2]:
            await guest.connect(host.addresses[0])
        with pytest.raises(ProviderError):
            await guests[2].connect(host.addresses[0])
        await guests[0].disconnect(host.peer)
        with trio.fail_after(LIMIT_S):
            while True:
                try:
                    await guests[2].connect(host.addresses[0])
                    break
                except ProviderError:
                    await trio.sleep(0.05)


async def test_all_interfaces_are_told_as_addresses_that_can_be_dialled() -> None:
    async with open_host(config(1, listen=("/ip4/0.0.0.0/tcp/0",))) as host:
        assert host.addresses
        assert not any("/0.0.0.0/" in address for address in host.addresses)
        async with open_host(config(2)) as guest:
            host.handle(PROTOCOL, echo)
            assert await guest.connect(host.addresses[0]) == host.peer
            await echoes(guest, host.peer)


async def test_the_directory_keeps_a_bounded_number_of_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair() as (left, right):
        await until(lambda: left.statistics().directory_peers == 1)
        monkeypatch.setattr(libp2p_directory, "MAX_KEYS", 2)
        for key in (b"one", b"two", b"three"):
            await left.provide(key)
        kept = right._directory._dht.provider_store.providers
        await until(lambda: len(kept) == 2)
        assert await right.find(b"one") == [left.peer]
