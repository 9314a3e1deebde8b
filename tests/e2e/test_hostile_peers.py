"""What hostile peers send over real sockets: it ends their own streams and connections at most."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes

from p2pflop.dht.planes import EndOfStream, Stream
from p2pflop.errors import ConfigError, ProviderError, VerificationError
from p2pflop.keys import PrivateKey, peer_id
from p2pflop.node import inbound, multistream
from p2pflop.node.host import Host, open_host
from p2pflop.node.network import HostConfig

LIMIT_S = 20.0
PROTOCOL = "/p2pflop/echo/1"
PROTOCOL_NAME = "/p2pflop/main/echo/1"


def config(number: int) -> HostConfig:
    return HostConfig(bytes([number]) * 32)


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Host, Host]]:
    async with open_host(config(1)) as left, open_host(config(2)) as right:
        await right.connect(left.addresses[0])
        await until(lambda: len(left.peers()) == 1)
        yield left, right


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


UNPARSABLE = b"\x04\x7f\x00\x00\x01\x06\x1f\x90\xa5\x03\x03abc"
"""An address whose peer id is no multihash: a multiaddr that raises when it is printed."""


async def ask_directory(host: Host, other: Host, message: Message) -> None:
    stream = host._connections[other.peer][0].mux.open()
    name = next(str(n) for n in host._libp2p.multiselect.handlers if n and "/kad/" in n)
    proposed = multistream.ProposedStream(stream, other.peer, name)
    await proposed.confirm()
    data = message.SerializeToString()
    await proposed.write(encode_varint_prefixed(data))


async def test_a_provider_with_an_unparsable_address_is_found_without_it() -> None:
    async with pair() as (victim, stranger):
        key = victim._directory._key(b"key")
        message = Message(type=Message.MessageType.ADD_PROVIDER, key=key)
        provider = message.providerPeers.add(id=ID.from_base58(stranger.peer).to_bytes())
        provider.addrs.append(UNPARSABLE)
        await ask_directory(stranger, victim, message)
        await until(lambda: key in victim._directory._dht.provider_store.providers)
        assert await victim.find(b"key") == [stranger.peer]


async def test_an_unparsable_address_of_a_peer_is_nowhere_and_harms_nobody() -> None:
    """A stranger names one in the answer to a lookup; then this node has to open a stream there."""
    nobody = peer_id(PrivateKey(bytes([77]) * 32).public_key)
    poisoned = trio.Event()

    async def poison(stream: INetStream) -> None:
        while True:
            request = Message()
            request.ParseFromString(await read_varint_prefixed_bytes(stream))
            answer = Message(type=request.type)
            closer = answer.closerPeers.add(id=ID.from_base58(nobody).to_bytes())
            closer.addrs.append(UNPARSABLE)
            data = answer.SerializeToString()
            await stream.write(encode_varint_prefixed(data))
            poisoned.set()

    async with open_host(config(1)) as victim, open_host(config(2)) as stranger:
        handlers = stranger._libp2p.multiselect.handlers
        handlers[next(n for n in handlers if n and "/kad/" in n)] = poison
        await stranger.connect(victim.addresses[0])
        with trio.fail_after(LIMIT_S):
            await poisoned.wait()
        for _ in range(3):
            with pytest.raises(ProviderError):
                await victim.open(nobody, PROTOCOL)


async def test_whatever_libp2p_raises_is_a_provider_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise KeyError("a fault of libp2p")

    nobody = peer_id(PrivateKey(bytes([77]) * 32).public_key)
    async with pair() as (left, _):
        store = left._directory._dht.provider_store
        for target, name in ((left._directory._dht, "find_peer"), (store, "find_providers")):
            monkeypatch.setattr(target, name, fail)
        monkeypatch.setattr(store, "provide", fail)
        with pytest.raises(ProviderError):
            await left.open(nobody, PROTOCOL)
        with pytest.raises(ProviderError):
            await left.find(b"key")
        with pytest.raises(ProviderError):
            await left.provide(b"key")
        monkeypatch.setattr(left, "_live", lambda _peer: 1 / 0)
        with pytest.raises(ProviderError):
            await left.open(nobody, PROTOCOL)


async def test_silent_streams_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbound, "MAX_INBOUND_STREAMS", 40)
    monkeypatch.setattr(inbound, "RESERVED_STREAMS", 10)
    async with pair() as (victim, hoarder), open_host(config(3)) as honest:
        victim.handle(PROTOCOL, echo)
        await until(lambda: victim.statistics().inbound_streams == 0)
        held = [await hoarder.open(victim.peer, PROTOCOL) for _ in range(30)]
        for stream in held:
            await stream._transport.write(b"")  # type: ignore[attr-defined]
        await until(lambda: victim.statistics().inbound_streams == 30)
        await honest.connect(victim.addresses[0])
        for _ in range(5):
            stream = await honest.open(victim.peer, PROTOCOL)
            await stream.send(b"hello")
            with trio.fail_after(LIMIT_S):
                assert await stream.receive() == b"hello"


@pytest.mark.parametrize(
    "error", [VerificationError("a signature"), ConfigError("a key"), trio.TooSlowError()]
)
async def test_what_a_peer_makes_a_handler_raise_is_one_quiet_line(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(stream: Stream) -> None:
        await stream.receive()
        raise error

    async with pair() as (victim, stranger):
        victim.handle(PROTOCOL, fail)
        stream = await stranger.open(victim.peer, PROTOCOL)
        with caplog.at_level(logging.INFO):
            await stream.send(b"hostile")
            with pytest.raises(ProviderError):
                await stream.receive()
            await until(lambda: any(PROTOCOL_NAME in line for line in caplog.messages))
        records = [record for record in caplog.records if PROTOCOL_NAME in record.getMessage()]
        assert [(record.levelname, record.exc_info) for record in records] == [("INFO", None)]
