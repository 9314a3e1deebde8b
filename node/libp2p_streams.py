"""What stands between py-libp2p and this node: its host, built as we need it, and our muxer in it.

Only ``host.py`` and ``libp2p_*.py`` import libp2p. It is pinned to one version, because three
things here lean on its insides; ``build_host`` fails with ConfigError if one of them is gone:

- ``_HAPPY_EYEBALLS_DELAY``: every dial waits for it, 250 ms, even when it has one address.
- The muxer is replaced (``mux.py``). libp2p's upgrader makes its own Yamux whatever it is given,
  so the upgrader's muxer negotiation is replaced too.
- An accepted connection holds its place in the limit on inbound connections until the host ends;
  our listener cancels libp2p's task when the connection closes. It also bounds unfinished
  handshakes: 500 idle ones from one address kept everybody else out for 35 s.

An exception in a handler, in the negotiation before it (a protocol name that is not UTF-8) or in a
validator would end the whole host: nothing of ours is called by libp2p without a guard.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import libp2p.network.connection.swarm_connection as swarm_connection
import libp2p.network.swarm as libp2p_swarm
import trio
from libp2p import new_host
from libp2p.abc import ConnectionType, IMuxedConn, IMuxedStream
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.io.trio import TrioTCPStream
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from p2pflop.errors import ConfigError
from p2pflop.node.libp2p_addresses import concrete_addresses, texts
from p2pflop.node.mux import Mux, MuxStream, StreamBroken
from p2pflop.node.sealed_socket import SealedSocket, Violation

YAMUX: Final = TProtocol("/yamux/1.0.0")
HANDSHAKE_S: Final = 5.0
DIAL_S: Final = 5.0
MAX_HANDSHAKES: Final = 128
"""Inbound connections that are not yet secured."""
MAX_HANDSHAKES_PER_ADDRESS: Final = 16
MAX_CONNECTIONS_PER_ADDRESS: Final = 64
"""Inbound ones, secured or not."""
MAX_WAITING_STREAMS: Final = 64
_READ_BYTES: Final = 64 * 1024

_log = logging.getLogger("p2pflop.libp2p")


class Owner(Protocol):
    """Who is told about connections: the Host."""

    def connection_up(self, connection: MuxedConnection) -> None:
        """A secured connection has begun."""

    def connection_down(self, connection: MuxedConnection) -> None:
        """It has ended."""

    def stream_opened(self, connection: MuxedConnection, stream: MuxStream) -> None:
        """The peer opened a stream, on which no protocol is agreed yet."""


class MuxedConnection(IMuxedConn):  # type: ignore[misc]
    """A connection as libp2p's swarm wants it, over our muxer."""

    def __init__(self, session: SecureSession, peer_id: ID, owner: Owner) -> None:
        self.peer_id = peer_id
        self.peer = peer_id.to_base58()
        self.secured_conn = session
        self.on_close: Any = None
        self.event_started = trio.Event()
        self.answered: set[str] = set()
        self._owner = owner
        self._waiting, self._accepted = trio.open_memory_channel[MuxStream](MAX_WAITING_STREAMS)
        wire, received = _take_over(session)
        self.mux = Mux(
            wire, initiator=session.is_initiator, on_stream=self._on_stream, received=received
        )

    def _on_stream(self, stream: MuxStream) -> None:
        self._owner.stream_opened(self, stream)

    def hand_over(self, stream: MuxStream) -> None:
        """Give a stream, whose ``protocol`` is one of libp2p's own, to libp2p."""
        try:
            self._waiting.send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            stream.reset()

    @property
    def is_initiator(self) -> bool:
        return bool(self.secured_conn.is_initiator)

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self.is_closed

    @property
    def is_closed(self) -> bool:
        return bool(self.mux.why_closed)

    async def start(self) -> None:
        """Serve the connection until it ends."""
        try:
            self._owner.connection_up(self)
            self.event_started.set()
            await self.mux.run()
        # A bug here, or whatever libp2p raises, ends this connection and not the node.
        except Exception:
            logging.getLogger(__name__).exception("the connection to %s failed", self.peer)
            self.mux.close("it failed here")
        finally:
            self._waiting.close()
            self._owner.connection_down(self)
            with trio.CancelScope(shield=True):
                await self._close_socket()

    async def close(self) -> None:
        await self.mux.aclose()
        await self._close_socket()

    async def _close_socket(self) -> None:
        try:
            await self.secured_conn.close()
        except (OSError, trio.BrokenResourceError):
            _log.debug("the socket to %s was gone already", self.peer)

    async def open_stream(self) -> IMuxedStream:
        await trio.lowlevel.checkpoint()
        try:
            return MuxedStream(self.mux.open(), self)
        except StreamBroken as error:
            raise MuxedStreamError(error.message) from error

    async def accept_stream(self) -> IMuxedStream:
        try:
            return MuxedStream(await self._accepted.receive(), self)
        except trio.EndOfChannel as error:
            raise MuxedConnUnavailable("the connection ended") from error

    def get_remote_address(self) -> tuple[str, int] | None:
        address: tuple[str, int] | None = self.secured_conn.get_remote_address()
        return address

    def get_transport_addresses(self) -> list[Multiaddr]:
        address = self.get_remote_address()
        if address is None:
            return []
        family = "ip6" if ":" in address[0] else "ip4"
        return [Multiaddr(f"/{family}/{address[0]}/tcp/{address[1]}")]

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT


class MuxedStream(IMuxedStream):  # type: ignore[misc]
    """A stream as libp2p's own protocols (identify, gossip, DHT) want it."""

    def __init__(self, stream: MuxStream, connection: MuxedConnection) -> None:
        self.stream = stream
        self.muxed_conn = connection

    async def read(self, n: int | None = None) -> bytes:
        try:
            data = await self.stream.read(_READ_BYTES if n is None or n < 0 else n)
        except StreamBroken as error:
            raise MuxedStreamReset(error.message) from error
        if not data and n != 0:
            raise MuxedStreamEOF("the peer finished")
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self.stream.write(data)
        except StreamBroken as error:
            raise MuxedStreamReset(error.message) from error

    async def close(self) -> None:
        self.stream.close_write()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def reset(self) -> None:
        self.stream.reset()
        await trio.lowlevel.checkpoint_if_cancelled()

    def set_deadline(self, ttl: int) -> None:
        raise NotImplementedError

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.muxed_conn.get_remote_address()

    async def __aenter__(self) -> MuxedStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _take_over(session: SecureSession) -> tuple[SealedSocket, bytes]:
    """The socket under a noise session with its keys, and what the session had read ahead."""
    noise = getattr(session, "conn", None)
    raw = getattr(getattr(noise, "read_writer", None), "read_write_closer", None)
    tcp = getattr(raw, "stream", None)
    if (
        not isinstance(noise, NoiseTransportReadWriter)
        or not isinstance(raw, RawConnection)
        or not isinstance(tcp, TrioTCPStream)
    ):
        raise _unfit("a noise session over TCP")
    if isinstance(tcp, _AcceptedSocket):
        tcp.secured()
    state = noise.noise_state

    def unseal(sealed: bytes) -> bytes:
        try:
            return bytes(state.decrypt(sealed))
        except Exception as error:
            raise Violation("a packet that is not sealed with our key") from error

    sock = tcp.stream.socket
    twin = socket.fromfd(sock.fileno(), sock.family, sock.type)
    return SealedSocket(twin, lambda data: bytes(state.encrypt(data)), unseal), session._drain(None)


class _Muxers(MuxerMultistream):  # type: ignore[misc]
    """Negotiates the muxer as libp2p does, and then makes ours."""

    def __init__(self, owner: Owner) -> None:
        super().__init__({YAMUX: MuxedConnection}, int(HANDSHAKE_S))
        self._owner = owner

    async def new_conn(self, conn: SecureSession, peer_id: ID) -> IMuxedConn:
        await self.select_transport(conn)
        return MuxedConnection(conn, peer_id, self._owner)


class _AcceptedSocket(TrioTCPStream):  # type: ignore[misc]
    """An inbound socket that says when its handshake is over and when it is closed."""

    def __init__(self, stream: trio.SocketStream, secured: Callable[[], None]) -> None:
        super().__init__(stream)
        self.secured = secured
        self.scope = trio.CancelScope()

    async def close(self) -> None:
        await super().close()
        self.scope.cancel()


class _Transport(TCP):  # type: ignore[misc]
    """TCP with a bound on unfinished handshakes, which gives up a closed connection's place."""

    def __init__(self) -> None:
        super().__init__(dns_resolution_timeout=DIAL_S, dns_max_retries=1)
        self._handshakes: Counter[str] = Counter()
        self._connections: Counter[str] = Counter()

    def _full(self, address: str) -> bool:
        return (
            self._handshakes[address] >= MAX_HANDSHAKES_PER_ADDRESS
            or self._handshakes.total() >= MAX_HANDSHAKES
            or self._connections[address] >= MAX_CONNECTIONS_PER_ADDRESS
        )

    def create_listener(self, handler_function: Callable[[Any], Any]) -> Any:
        async def accept(stream: TrioTCPStream) -> None:
            address = (stream.get_remote_address() or ("", 0))[0]
            if self._full(address):
                _log.debug("refused %s: too many connections or unfinished handshakes", address)
                await stream.close()
                return
            self._handshakes[address] += 1
            self._connections[address] += 1
            finished = False

            def secured() -> None:
                nonlocal finished
                if not finished:
                    finished = True
                    _lower(self._handshakes, address)

            accepted = _AcceptedSocket(stream.stream, secured)
            try:
                with accepted.scope:
                    await handler_function(accepted)
            finally:
                secured()
                _lower(self._connections, address)

        return super().create_listener(accept)


def _lower(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


class _QuietHandler(logging.Handler):
    """Passes libp2p's records on as ours, for those who debug: what it warns of is peers."""

    def emit(self, record: logging.LogRecord) -> None:
        _log.debug("%s %s: %s", record.levelname, record.name, record.getMessage())


def _quieten() -> None:
    logger = logging.getLogger("libp2p")
    if not any(isinstance(handler, _QuietHandler) for handler in logger.handlers):
        logger.handlers[:] = [_QuietHandler()]
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    # This module logs through the root logger, which would then print to stderr.
    swarm_connection.logging = logger


def _unfit(what: str) -> ConfigError:
    return ConfigError(
        f"the installed libp2p is not the one this was made for: it lacks {what}",
        hint="Install the pinned version: pip install --force-reinstall libp2p==0.8.1",
    )


def _keep_out_unparsable(peerstore: Any) -> None:
    """Refuse addresses that raise when printed: libp2p prints them in tasks of its own."""
    add = peerstore.add_addrs

    def add_parsable(peer_id: ID, addresses: Sequence[Multiaddr], ttl: int = 0) -> None:
        add(peer_id, [address for address in addresses if texts([address])], ttl)

    peerstore.add_addrs = add_parsable


async def _do_nothing() -> None:
    """In place of libp2p's dialling of peers that nobody asked for."""
    await trio.lowlevel.checkpoint()


def build_host(
    seed: bytes, listen: Sequence[Multiaddr], max_connections: int, owner: Owner
) -> BasicHost:
    """A libp2p host with noise, our muxer and our limits. Raises ConfigError if libp2p changed."""
    _quieten()
    if not hasattr(libp2p_swarm, "_HAPPY_EYEBALLS_DELAY"):
        raise _unfit("_HAPPY_EYEBALLS_DELAY")
    libp2p_swarm._HAPPY_EYEBALLS_DELAY = 0.0
    private_key = Ed25519PrivateKey.new(seed)
    keys = KeyPair(private_key, private_key.get_public_key())
    host = new_host(
        key_pair=keys,
        listen_addrs=listen,
        sec_opt={NOISE: Noise(keys, noise_privkey=create_new_key_pair().private_key)},
        muxer_opt={YAMUX: MuxedConnection},
        transports=[_Transport()],
        addrs_factory=concrete_addresses,
        connection_config=ConnectionConfig(
            max_connections=max_connections,
            high_watermark=max_connections,
            min_connections=0,
            low_watermark=0,
            dial_timeout=DIAL_S,
            inbound_upgrade_timeout=HANDSHAKE_S,
            outbound_upgrade_timeout=HANDSHAKE_S,
        ),
    )
    network = host.get_network()
    for part in ("upgrader", "auto_connector", "retry_config", "_negative_peer_cache"):
        if not hasattr(network, part):
            raise _unfit(part)
    if not hasattr(network.upgrader, "muxer_multistream"):
        raise _unfit("muxer_multistream")
    network.upgrader.muxer_multistream = _Muxers(owner)
    network.auto_connector.maybe_connect = _do_nothing
    network.retry_config = RetryConfig(max_retries=0)
    _keep_out_unparsable(host.get_peerstore())
    network.set_resource_manager(None)  # its limits are by rate and would refuse honest bursts
    return host
