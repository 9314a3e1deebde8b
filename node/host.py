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
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Final

import trio
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo as Libp2pPeerInfo
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from multiaddr import Multiaddr

from p2pflop.dht.planes import FrameStream, Stream
from p2pflop.errors import ConfigError, P2PFlopError, ProtocolError, ProviderError
from p2pflop.keys import PrivateKey, peer_id, public_key_of
from p2pflop.node import multistream
from p2pflop.node.guard import keep_going
from p2pflop.node.inbound import Inbound, Place
from p2pflop.node.libp2p_addresses import (
    MAX_ADDRESSES_PER_PEER,
    check_port_free,
    concrete_addresses,
    dialable,
    listen_address,
    peer_of,
)
from p2pflop.node.libp2p_directory import KadDirectory
from p2pflop.node.libp2p_gossip import Gossip
from p2pflop.node.libp2p_streams import MuxedConnection, build_host
from p2pflop.node.mux import MuxStream
from p2pflop.node.network import Handler, HostConfig, HostStatistics, Peer, Sink, Validator
from p2pflop.node.printable import printable

CONNECT_S: Final = 10.0
OPEN_S: Final = 10.0
NEGOTIATE_S: Final = 10.0
SHUTDOWN_S: Final = 1.0
MAX_KNOWN_PEERS: Final = 4096
RETRY_S: Final = 0.05
MIN_RETRY_S: Final = 0.5
MAX_RETRY_S: Final = 60.0
MAX_CAUSES: Final = 50

_log = logging.getLogger(__name__)


class Host:
    """See the module, and ``Network`` for the methods. Made by ``open_host``."""

    def __init__(self, config: HostConfig, nursery: trio.Nursery) -> None:
        self.peer = peer_id(PrivateKey(config.seed).public_key)
        self.network = config.network
        self.addresses: tuple[str, ...] = ()
        self._config = config
        self._nursery = nursery
        self._handlers: dict[str, Handler] = {}
        self._connections: dict[str, list[MuxedConnection]] = {}
        self._dialling: dict[str, trio.Lock] = {}
        self._known: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._inbound = Inbound()
        self._counts: Counter[str] = Counter()
        self._connect_callbacks: list[Callable[[str], None]] = []
        self._disconnect_callbacks: list[Callable[[str], None]] = []
        self._changed = trio.Event()
        listen = [listen_address(text) for text in config.listen]
        self._libp2p = build_host(config.seed, listen, config.max_connections, self)
        self._libp2p.get_network().set_stream_handler(self._serve_libp2p)
        if self._libp2p.get_id().to_base58() != self.peer:
            raise ConfigError("libp2p derives another peer id from this key than p2pflop does")
        self._gossip = Gossip(self._libp2p, self.peer, self.network, self._counts)
        self._directory = KadDirectory(self._libp2p, self.network)

    # Streams

    def handle(self, protocol: str, handler: Handler) -> None:
        """See Network."""
        self._handlers[self._protocol(protocol)] = handler

    async def open(self, peer: str, protocol: str) -> Stream:
        """See Network."""
        try:
            with trio.move_on_after(OPEN_S):
                return await self._open(peer, self._protocol(protocol))
        except P2PFlopError:
            raise
        except Exception as error:  # libp2p's errors have no common base
            raise ProviderError(f"cannot open {protocol} to {peer}: {printable(error)}") from error
        raise ProviderError(f"{peer} did not answer {protocol} within {OPEN_S:.0f} s")

    async def _open(self, peer: str, name: str) -> Stream:
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

    def _protocol(self, protocol: str) -> str:
        """``/p2pflop/job/1`` as it is named on this network."""
        return f"/p2pflop/{self.network}/{protocol.removeprefix('/p2pflop/')}"

    def stream_opened(self, connection: MuxedConnection, stream: MuxStream) -> None:
        """See Owner."""
        address = (connection.get_remote_address() or ("", 0))[0]
        place = self._inbound.take(connection.peer, address, stream)
        if place is None:
            self._counts["streams_refused"] += 1
            stream.reset()
            return
        self._counts["streams_accepted"] += 1
        self._nursery.start_soon(self._serve, connection, place)

    async def _serve(self, connection: MuxedConnection, place: Place) -> None:
        try:
            with place.scope:
                await self._negotiate_and_serve(connection, place)
        finally:
            self._inbound.give_back(place)

    async def _negotiate_and_serve(self, connection: MuxedConnection, place: Place) -> None:
        stream = place.stream
        libp2p = self._libp2p.multiselect.handlers
        try:
            with trio.fail_after(NEGOTIATE_S):
                known = {name for name in libp2p if name} | set(self._handlers)
                protocol = await multistream.answer(stream, known, self._handlers)
        except (trio.TooSlowError, ProtocolError, ProviderError) as error:
            _log.debug("no protocol agreed with %s: %s", connection.peer, error)
            stream.reset()
            return
        if protocol is None:
            await stream.close()
            return
        place.agreed()
        handler = self._handlers.get(protocol)
        if handler is None:
            stream.protocol = protocol
            connection.hand_over(stream)
            return
        framed = FrameStream(stream, connection.peer)
        try:
            await handler(framed)
        except (P2PFlopError, trio.TooSlowError) as error:
            # What a peer sends, or fails to send, is no fault of this node: one line says so.
            told = error if isinstance(error, P2PFlopError) else "it took too long"
            _log.info("%s with %s ended: %s", protocol, connection.peer, printable(told))
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
        """See Network."""
        peer = peer_of(address)
        if peer == self.peer:
            raise ConfigError(f"{address} is this node itself")
        if self._live(peer) is None:
            await self._dial(peer, (address,))
        self._remember(peer, (address,))
        return peer

    async def disconnect(self, peer: str) -> None:
        """See Network."""
        if peer in self._connections:  # else libp2p's DHT dials it again at once
            self._libp2p.get_peerstore().clear_addrs(ID.from_base58(peer))
        async with trio.open_nursery() as nursery:
            for connection in list(self._connections.get(peer, ())):
                nursery.start_soon(connection.close)

    def peers(self) -> list[Peer]:
        """See Network."""
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
        """See Network."""
        self._connect_callbacks.append(callback)

    def on_disconnect(self, callback: Callable[[str], None]) -> None:
        """See Network."""
        self._disconnect_callbacks.append(callback)

    def statistics(self) -> HostStatistics:
        """See Network."""
        return HostStatistics(
            len(self._connections),
            len(self._inbound),
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
        """As ``_dial_alone``, after whoever is dialling that peer already."""
        lock = self._dialling.setdefault(peer, trio.Lock())
        try:
            async with lock:
                return self._live(peer) or await self._dial_alone(peer, addresses)
        finally:
            if not lock.locked():
                self._dialling.pop(peer, None)

    async def _dial_alone(self, peer: str, addresses: tuple[str, ...]) -> MuxedConnection:
        """Connect to ``peer`` at the first of ``addresses`` that works. Raises ProviderError."""
        if not addresses:
            raise ProviderError(
                f"no address of {peer} is known", hint="Connect to it, or to a peer that knows it."
            )
        network = self._libp2p.get_network()
        target = ID.from_base58(peer)
        why = ""
        limit_s = CONNECT_S / len(addresses)
        for address in addresses:
            # libp2p dials one address of a kind and remembers failures for a minute.
            network._negative_peer_cache.evict(str(target))
            network.peerstore.clear_addrs(target)
            try:
                transport = Multiaddr(address).decapsulate(Multiaddr(f"/p2p/{peer}"))
                with trio.fail_after(limit_s):
                    return await self._dial_until_live(peer, Libp2pPeerInfo(target, [transport]))
            except trio.TooSlowError:
                why = f" within {limit_s:.1f} s"
            except Exception as error:  # noqa: BLE001 - libp2p's have no common base
                why = _reason(error, peer)
        raise ProviderError(
            f"nobody answers at {', '.join(addresses)}{why}",
            hint="Check that the address is right and that its node is running.",
        )

    async def _dial_until_live(self, peer: str, info: Libp2pPeerInfo) -> MuxedConnection:
        while True:
            await self._libp2p.connect(info)
            connection = self._live(peer)
            if connection is not None:
                return connection
            await trio.sleep(RETRY_S)  # libp2p still holds a connection that has just ended

    async def _find_and_dial(self, peer: str) -> MuxedConnection:
        try:
            public_key_of(peer)
        except ConfigError as error:
            raise ProviderError(error.message) from error
        if peer == self.peer:
            raise ProviderError(f"{peer} is this node itself")
        known = self._known.get(peer, ())
        try:
            return await self._dial(peer, known)
        except ProviderError:
            found = await self._directory.find_addresses(peer)
            found = dialable(peer, found)
            if not set(found) - set(known):
                raise
            self._remember(peer, found)
            return await self._dial(peer, found)

    async def _stay_connected(self, address: str) -> None:
        """Keep a connection to a bootstrap address, trying again ever more rarely."""
        peer = peer_of(address)
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
        """See Network."""
        await self._gossip.publish(topic, data)

    async def subscribe(
        self,
        topic: str,
        validator: Validator,
        sink: Sink,
    ) -> None:
        """See Network."""
        await self._gossip.subscribe(self._nursery, topic, validator, sink)

    def neighbours(self, topic: str) -> list[str]:
        """See Network."""
        return self._gossip.reachable(topic)

    async def provide(self, key: bytes) -> None:
        """See Network."""
        await self._directory.provide(key)

    async def find(self, key: bytes) -> list[str]:
        """See Network."""
        found = await self._directory.find(key)
        for peer, addresses in found:
            self._remember(peer, dialable(peer, addresses))
        return [peer for peer, _ in found]

    # Life

    def _start(self) -> None:
        listening = self._libp2p.get_transport_addrs()
        if len(listening) < len(self._config.listen):
            raise ConfigError(f"cannot listen on all of {', '.join(self._config.listen)}")
        self.addresses = tuple(
            f"{address}/p2p/{self.peer}" for address in concrete_addresses(listening)
        )
        self._nursery.start_soon(keep_going, self._directory.keep_addresses)
        for address in self._config.bootstrap:
            if peer_of(address) != self.peer:
                self._nursery.start_soon(keep_going, self._stay_connected, address)

    async def _close(self) -> None:
        with trio.CancelScope(deadline=trio.current_time() + SHUTDOWN_S, shield=True):
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
        peer_of(address)
    listen = [listen_address(text) for text in config.listen]
    for listened in listen:
        check_port_free(listened)
    failure: Exception | None = None  # raised at the end, outside the nurseries' groups
    async with trio.open_nursery() as nursery:
        try:
            host = Host(config, nursery)
            async with (
                host._libp2p.run(listen_addrs=listen),
                host._gossip.running(),
                host._directory.running(),
            ):
                try:
                    host._start()
                    yield host
                except Exception as error:  # noqa: BLE001 - see failure
                    failure = error
                finally:
                    await host._close()
        except Exception as error:  # noqa: BLE001 - see failure
            failure = failure or error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _reason(error: BaseException, peer: str) -> str:
    """What to add to "nobody answers", from the chains and groups of causes that libp2p makes."""
    causes: list[BaseException | None] = [error]
    for cause in causes:
        if cause is None or len(causes) > MAX_CAUSES:
            continue
        if isinstance(cause, PeerIDMismatchesPubkey) or "mismatch" in str(cause).lower():
            return f" as {peer}: another peer does"
        causes += [cause.__cause__, cause.__context__, *getattr(cause, "errors", ())]
    return ""
