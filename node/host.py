"""The node's place in the peer-to-peer network: connections, streams, gossip and the directory.

A ``Host`` is py-libp2p behind plain types: peers are base58 strings, addresses multiaddrs as text,
messages bytes. ``memory_host.py`` keeps the same promises without a network.

Three rules hold here:

- **Nothing a peer does ends more than its own stream or connection.** Handlers, validators and
  callbacks are guarded; what they raise is logged.
- **Nothing waits for ever to begin.** Connecting, opening and finding have time limits. Once a
  stream is open, silence is the protocol's business; a peer that is gone is noticed by the muxer.
- **Every queue and count has a limit**, named below; over it, a refusal that is counted.

A network id is part of every protocol, topic and directory key, so networks share connections at
most. Importing this module imports libp2p and takes over a second: the daemon imports it late.
"""

from __future__ import annotations

import logging
import random
import socket
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo as Libp2pPeerInfo
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from p2pflop.dht.planes import FrameStream, Stream
from p2pflop.errors import ConfigError, P2PFlopError, ProtocolError, ProviderError
from p2pflop.keys import PrivateKey, peer_id, public_key_of
from p2pflop.node import multistream
from p2pflop.node.libp2p_directory import KadDirectory
from p2pflop.node.libp2p_gossip import Gossip
from p2pflop.node.libp2p_streams import MuxedConnection, build_host
from p2pflop.node.mux import MuxStream
from p2pflop.wire import DEFAULT_NETWORK

CONNECT_S: Final = 10.0
OPEN_S: Final = 10.0
NEGOTIATE_S: Final = 10.0
SHUTDOWN_S: Final = 1.0
MAX_CONNECTIONS: Final = 300
MAX_INBOUND_STREAMS: Final = 1024
MAX_INBOUND_STREAMS_PER_PEER: Final = 64
MAX_KNOWN_PEERS: Final = 4096
MAX_ADDRESSES_PER_PEER: Final = 8
MIN_RETRY_S: Final = 0.5
MAX_RETRY_S: Final = 60.0

_log = logging.getLogger(__name__)

Handler = Callable[[Stream], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class HostConfig:
    """What a host needs to know.

    ``seed`` is the node's 32-byte Ed25519 seed, ``listen`` multiaddrs to listen on (port 0 takes a
    free one), ``bootstrap`` multiaddrs with ``/p2p/<peer>`` to stay connected to. ``jitter`` gives
    numbers in [0, 1) that spread reconnections.
    """

    seed: bytes
    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    network: str = DEFAULT_NETWORK
    bootstrap: tuple[str, ...] = ()
    max_connections: int = MAX_CONNECTIONS
    jitter: Callable[[], float] = field(default_factory=lambda: random.SystemRandom().random)


@dataclass(frozen=True, slots=True)
class Peer:
    """A connected peer. ``rtt_ns`` is 0 until it was measured."""

    peer: str
    addresses: tuple[str, ...]
    inbound: bool
    rtt_ns: int


@dataclass(frozen=True, slots=True)
class HostStatistics:
    """``counts`` are since the host was opened; the others are of now.

    ``directory_peers`` are those in the DHT's routing table.
    """

    peers: int
    inbound_streams: int
    directory_peers: int
    counts: dict[str, int]


class Host:
    """See the module. Made by ``open_host``; a Dialer and a Directory."""

    def __init__(self, config: HostConfig, nursery: trio.Nursery) -> None:
        self.peer = peer_id(PrivateKey(config.seed).public_key)
        self.network = config.network
        self.addresses: tuple[str, ...] = ()
        self._config = config
        self._nursery = nursery
        self._handlers: dict[str, Handler] = {}
        self._connections: dict[str, list[MuxedConnection]] = {}
        self._known: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._inbound: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._connect_callbacks: list[Callable[[str], None]] = []
        self._disconnect_callbacks: list[Callable[[str], None]] = []
        self._changed = trio.Event()
        listen = [_listen_address(text) for text in config.listen]
        self._libp2p = build_host(config.seed, listen, config.max_connections, self)
        self._libp2p.get_network().set_stream_handler(self._serve_libp2p)
        if self._libp2p.get_id().to_base58() != self.peer:
            raise ConfigError("libp2p derives another peer id from this key than p2pflop does")
        self._gossip = Gossip(self._libp2p, self.peer, self.network, self._counts)
        self._directory = KadDirectory(self._libp2p, self.network)

    # Streams

    def handle(self, protocol: str, handler: Handler) -> None:
        """Let ``handler`` answer each stream that a peer opens for ``protocol``.

        The stream is closed when it returns and reset when it raises. It runs on if the peer
        disconnects, and is cancelled when the host closes.
        """
        self._handlers[self._protocol(protocol)] = handler

    async def open(self, peer: str, protocol: str) -> Stream:
        """See Dialer. Connects first if it must and knows an address.

        On a connection that has answered ``protocol`` before, a refusal shows at the first read.
        """
        name = self._protocol(protocol)
        with trio.move_on_after(OPEN_S):
            connection = self._live(peer) or await self._find_and_dial(peer)
            stream = connection.mux.open()
            proposed = multistream.ProposedStream(stream, peer, name)
            if name not in connection.answered:
                try:
                    await proposed.confirm()
                except BaseException:
                    stream.reset()
                    raise
                connection.answered.add(name)
            self._counts["streams_opened"] += 1
            return FrameStream(proposed, peer)
        raise ProviderError(f"{peer} did not answer {protocol} within {OPEN_S:.0f} s")

    def _protocol(self, protocol: str) -> str:
        """``/p2pflop/job/1`` as it is named on this network."""
        return f"/p2pflop/{self.network}/{protocol.removeprefix('/p2pflop/')}"

    def stream_opened(self, connection: MuxedConnection, stream: MuxStream) -> None:
        """See Owner."""
        peer = connection.peer
        if (
            self._inbound.total() >= MAX_INBOUND_STREAMS
            or self._inbound[peer] >= MAX_INBOUND_STREAMS_PER_PEER
        ):
            self._counts["streams_refused"] += 1
            stream.reset()
            return
        self._inbound[peer] += 1
        self._counts["streams_accepted"] += 1
        self._nursery.start_soon(self._serve, connection, stream)

    async def _serve(self, connection: MuxedConnection, stream: MuxStream) -> None:
        try:
            await self._negotiate_and_serve(connection, stream)
        finally:
            self._inbound[connection.peer] -= 1
            if not self._inbound[connection.peer]:
                del self._inbound[connection.peer]

    async def _negotiate_and_serve(self, connection: MuxedConnection, stream: MuxStream) -> None:
        libp2p = self._libp2p.multiselect.handlers
        try:
            with trio.fail_after(NEGOTIATE_S):
                known = {name for name in libp2p if name} | set(self._handlers)
                protocol = await multistream.answer(stream, known)
        except (trio.TooSlowError, ProtocolError, ProviderError) as error:
            _log.debug("no protocol agreed with %s: %s", connection.peer, error)
            stream.reset()
            return
        handler = self._handlers.get(protocol)
        if handler is None:
            stream.protocol = protocol
            connection.hand_over(stream)
            return
        framed = FrameStream(stream, connection.peer)
        try:
            await handler(framed)
        except (ProtocolError, ProviderError) as error:
            _log.info("%s with %s ended: %s", protocol, connection.peer, error)
            stream.reset()
        except Exception:  # noqa: BLE001 - a bug in one stream's handler must not end the node
            _log.exception("the handler of %s failed", protocol)
            stream.reset()
        except BaseException:
            stream.reset()
            raise
        await framed.aclose()

    async def _serve_libp2p(self, net_stream: object) -> None:
        """Let libp2p's own handler (identify, ping, gossip, DHT) answer, and survive it."""
        muxed = net_stream.muxed_stream  # type: ignore[attr-defined]
        protocol = muxed.stream.protocol
        try:
            net_stream.set_protocol(protocol)  # type: ignore[attr-defined]
            await self._libp2p.multiselect.handlers[protocol](net_stream)
        except Exception:  # noqa: BLE001 - likewise
            _log.debug("libp2p's handler of %s failed", protocol, exc_info=True)
        finally:
            await muxed.stream.close()

    # Connections

    async def connect(self, address: str) -> str:
        """Connect to ``address``, a multiaddr that ends in ``/p2p/<peer>``; the peer's id.

        Raises ConfigError if it is no such address, or this host's own; ProviderError if nobody,
        or somebody else, answers there.
        """
        peer = _peer_of(address)
        if peer == self.peer:
            raise ConfigError(f"{address} is this node itself")
        if self._live(peer) is None:
            await self._dial(peer, (address,))
        self._remember(peer, (address,))
        return peer

    async def disconnect(self, peer: str) -> None:
        """Close every connection to ``peer``."""
        async with trio.open_nursery() as nursery:
            for connection in list(self._connections.get(peer, ())):
                nursery.start_soon(connection.close)

    def peers(self) -> list[Peer]:
        """Who is connected, with the addresses of the connections."""
        return [
            Peer(
                peer,
                tuple(str(a) for c in connections for a in c.get_transport_addresses()),
                not connections[0].is_initiator,
                connections[0].mux.rtt_ns,
            )
            for peer, connections in self._connections.items()
        ]

    def on_connect(self, callback: Callable[[str], None]) -> None:
        """Call ``callback(peer)`` when the first connection to a peer has begun."""
        self._connect_callbacks.append(callback)

    def on_disconnect(self, callback: Callable[[str], None]) -> None:
        """Call ``callback(peer)`` when the last connection to a peer has ended."""
        self._disconnect_callbacks.append(callback)

    def statistics(self) -> HostStatistics:
        """See HostStatistics."""
        return HostStatistics(
            len(self._connections),
            self._inbound.total(),
            self._directory.size,
            dict(self._counts),
        )

    def connection_up(self, connection: MuxedConnection) -> None:
        """See Owner."""
        connections = self._connections.setdefault(connection.peer, [])
        connections.append(connection)
        self._counts["connections"] += 1
        if len(connections) == 1:
            self._tell(self._connect_callbacks, connection.peer)
            self._nursery.start_soon(self._directory.introduce, connection.peer)

    def connection_down(self, connection: MuxedConnection) -> None:
        """See Owner."""
        connections = self._connections.get(connection.peer, [])
        if connection in connections:
            connections.remove(connection)
        if not connections and self._connections.pop(connection.peer, None) is not None:
            self._tell(self._disconnect_callbacks, connection.peer)

    def _tell(self, callbacks: Iterable[Callable[[str], None]], peer: str) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        for callback in callbacks:
            try:
                callback(peer)
            except Exception:  # noqa: BLE001 - likewise
                _log.exception("a callback about %s failed", peer)

    def _live(self, peer: str) -> MuxedConnection | None:
        for connection in self._connections.get(peer, ()):
            if connection.is_established:
                return connection
        return None

    def _remember(self, peer: str, addresses: tuple[str, ...]) -> None:
        merged = tuple(dict.fromkeys(addresses + self._known.pop(peer, ())))
        self._known[peer] = merged[:MAX_ADDRESSES_PER_PEER]
        if len(self._known) > MAX_KNOWN_PEERS:
            self._known.popitem(last=False)

    async def _dial(self, peer: str, addresses: tuple[str, ...]) -> MuxedConnection:
        """Connect to ``peer`` at the first of ``addresses`` that works. Raises ProviderError."""
        if not addresses:
            raise ProviderError(
                f"no address of {peer} is known", hint="Connect to it, or to a peer that knows it."
            )
        network = self._libp2p.get_network()
        target = ID.from_base58(peer)
        why = ""
        for address in addresses:
            # libp2p dials one address of a kind and remembers failures for a minute.
            network._negative_peer_cache.evict(str(target))
            network.peerstore.clear_addrs(target)
            transport = Multiaddr(address).decapsulate(Multiaddr(f"/p2p/{peer}"))
            try:
                with trio.fail_after(CONNECT_S):
                    await self._libp2p.connect(Libp2pPeerInfo(target, [transport]))
            except (BaseLibp2pError, OSError) as error:
                why = _reason(error, peer)
            except trio.TooSlowError:
                why = f" within {CONNECT_S:.0f} s"
            connection = self._live(peer)
            if connection is not None:
                return connection
        raise ProviderError(
            f"nobody answers at {', '.join(addresses)}{why}",
            hint="Check that the address is right and that its node is running.",
        )

    async def _find_and_dial(self, peer: str) -> MuxedConnection:
        public_key_of(peer)
        known = self._known.get(peer, ())
        try:
            return await self._dial(peer, known)
        except ProviderError:
            found = await self._directory.find_addresses(peer)
            found = _dialable(peer, found)
            if not set(found) - set(known):
                raise
            self._remember(peer, found)
            return await self._dial(peer, found)

    async def _stay_connected(self, address: str) -> None:
        """Keep a connection to a bootstrap address, trying again ever more rarely."""
        peer = _peer_of(address)
        delay_s = MIN_RETRY_S
        while True:
            try:
                await self.connect(address)
                delay_s = MIN_RETRY_S
            except P2PFlopError as error:
                _log.info("bootstrap: %s", error)
                await trio.sleep(delay_s * (0.5 + self._config.jitter()))
                delay_s = min(delay_s * 2, MAX_RETRY_S)
            while self._live(peer) is not None:
                await self._changed.wait()

    # Gossip and directory

    async def publish(self, topic: str, data: bytes) -> None:
        """Send ``data`` to every subscriber of ``topic``, signed by this host; not to itself.

        Delivery is likely, not certain. Raises ValueError over ``MAX_MESSAGE_BYTES``.
        """
        await self._gossip.publish(topic, data)

    async def subscribe(
        self,
        topic: str,
        validator: Callable[[str, bytes], bool],
        sink: trio.MemorySendChannel[tuple[str, bytes]],
    ) -> None:
        """Put ``(author, data)`` of every message on ``topic`` into ``sink``, dropped if it is full.

        ``validator(author, data)`` decides what is delivered and forwarded, and must be quick. The
        author's signature was checked. Closing the channel ends the subscription. Raises ValueError
        if the topic has a subscriber.
        """
        await self._gossip.subscribe(self._nursery, topic, validator, sink)

    def neighbours(self, topic: str) -> list[str]:
        """Connected peers that take messages on ``topic``."""
        return self._gossip.reachable(topic)

    async def provide(self, key: bytes) -> None:
        """See Directory."""
        await self._directory.provide(key)

    async def find(self, key: bytes) -> list[str]:
        """See Directory. The addresses found are remembered for ``open``."""
        found = await self._directory.find(key)
        for peer, addresses in found:
            self._remember(peer, _dialable(peer, addresses))
        return [peer for peer, _ in found]

    # Life

    async def _close(self) -> None:
        with trio.move_on_after(SHUTDOWN_S, shield=True):
            async with trio.open_nursery() as nursery:
                for connections in list(self._connections.values()):
                    for connection in list(connections):
                        nursery.start_soon(connection.close)
        for scope in list(self._libp2p._identify_tasks):
            scope.cancel()


@asynccontextmanager
async def open_host(config: HostConfig) -> AsyncIterator[Host]:
    """A host that listens and keeps its connections until the block ends.

    Raises ConfigError for a bad key, address or bootstrap peer, and for a port in use.
    """
    for address in config.bootstrap:
        _peer_of(address)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            host = Host(config, nursery)
            async with _listening(host):
                nursery.start_soon(host._directory.keep_addresses)
                for address in config.bootstrap:
                    if _peer_of(address) != host.peer:
                        nursery.start_soon(host._stay_connected, address)
                try:
                    yield host
                finally:
                    await host._close()
        except Exception as error:  # noqa: BLE001 - raised below, outside the nursery's group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


@asynccontextmanager
async def _listening(host: Host) -> AsyncIterator[None]:
    listen = [_listen_address(text) for text in host._config.listen]
    for address in listen:
        _check_port_free(address)
    libp2p = host._libp2p
    async with libp2p.run(listen_addrs=listen):
        if len(libp2p.get_transport_addrs()) < len(listen):
            raise ConfigError(f"cannot listen on {', '.join(host._config.listen)}")
        host.addresses = tuple(f"{a}/p2p/{host.peer}" for a in libp2p.get_transport_addrs())
        async with host._gossip.running(), host._directory.running():
            yield


def _listen_address(text: str) -> Multiaddr:
    address = _parse(text)
    names = [protocol.name for protocol in address.protocols()]
    if names not in (["ip4", "tcp"], ["ip6", "tcp"]):
        raise ConfigError(
            f"cannot listen on {text!r}",
            hint="Give an address like /ip4/0.0.0.0/tcp/7421.",
        )
    return address


def _check_port_free(address: Multiaddr) -> None:
    """libp2p shares ports with whoever lets it, so two nodes would take each other's peers."""
    family, name = (socket.AF_INET, "ip4") if "/ip4/" in str(address) else (socket.AF_INET6, "ip6")
    port = int(address.value_for_protocol("tcp"))
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.value_for_protocol(name), port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {address}: {error.strerror}",
                hint="Another program has the port, or the address is not this machine's. "
                "Choose another one, or /tcp/0 for any free port.",
            ) from error


def _parse(text: str) -> Multiaddr:
    try:
        return Multiaddr(text)
    except (MultiaddrError, ValueError) as error:
        raise ConfigError(
            f"{text[:200]!r} is not a multiaddr",
            hint="Give an address like /ip4/203.0.113.7/tcp/7421/p2p/<peer id>.",
        ) from error


def _peer_of(address: str) -> str:
    """The peer that a dialable multiaddr names. Raises ConfigError."""
    parsed = _parse(address)
    names = [protocol.name for protocol in parsed.protocols()]
    if len(names) != 3 or names[1:] != ["tcp", "p2p"]:
        raise ConfigError(
            f"{address[:200]!r} does not name a peer that can be dialled",
            hint="Give an address like /ip4/203.0.113.7/tcp/7421/p2p/<peer id>.",
        )
    peer = str(parsed.value_for_protocol("p2p"))
    public_key_of(peer)
    return peer


def _dialable(peer: str, addresses: Iterable[str]) -> tuple[str, ...]:
    """Those of the ``addresses`` that other peers give for ``peer`` that can be dialled."""
    dialable: list[str] = []
    for text in addresses:
        address = text if text.endswith(f"/p2p/{peer}") else f"{text}/p2p/{peer}"
        try:
            if _peer_of(address) == peer:
                dialable.append(address)
        except ConfigError:
            continue
    return tuple(dialable[:MAX_ADDRESSES_PER_PEER])


def _reason(error: BaseException, peer: str) -> str:
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 10:
        chain.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    if any("mismatch" in text.lower() for text in chain):
        return f" as {peer}: another peer does"
    return ""
