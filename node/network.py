"""What the node wants of the peer-to-peer network, in plain types. ``host.py`` is the real one.

Peers are base58 ids, addresses multiaddrs as text, messages bytes.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import trio

from p2pflop.dht.planes import Stream
from p2pflop.units import KIB
from p2pflop.wire import DEFAULT_NETWORK

MAX_CONNECTIONS: Final = 300
MAX_MESSAGE_BYTES: Final = 64 * KIB

Handler = Callable[[Stream], Awaitable[None]]
Validator = Callable[[str, bytes, str], bool]
"""``(author, data, forwarder)``: whether a message is delivered and forwarded."""
Sink = trio.MemorySendChannel[tuple[str, bytes]]


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


class Network(Protocol):
    """A host: a Dialer, a Directory, gossip, and who is connected."""

    @property
    def peer(self) -> str:
        """The id of this host."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it listens, each with ``/p2p/<peer>``."""

    def handle(self, protocol: str, handler: Handler) -> None:
        """Let ``handler`` answer each stream that a peer opens for ``protocol``.

        The stream is closed when it returns and broken when it raises. It runs on if the peer
        disconnects, and is cancelled when the host closes.
        """

    async def open(self, peer: str, protocol: str) -> Stream:
        """See Dialer. Connects first if it must and can find an address.

        On a connection that has answered ``protocol`` before, a refusal shows at the first read.
        """

    async def connect(self, address: str) -> str:
        """Connect to ``address``, a multiaddr that ends in ``/p2p/<peer>``; the peer's id.

        Raises ConfigError if it is no such address, or this host's own; ProviderError if nobody,
        or somebody else, answers there.
        """

    async def disconnect(self, peer: str) -> None:
        """Close every connection to ``peer``. Either end may connect again."""

    def peers(self) -> list[Peer]:
        """Who is connected, with the addresses of the connections."""

    def on_connect(self, callback: Callable[[str], None]) -> None:
        """Call ``callback(peer)`` when the first connection to a peer has begun."""

    def on_disconnect(self, callback: Callable[[str], None]) -> None:
        """Call ``callback(peer)`` when the last connection to a peer has ended."""

    def statistics(self) -> HostStatistics:
        """See HostStatistics."""

    async def publish(self, topic: str, data: bytes) -> None:
        """Send ``data`` to every subscriber of ``topic``, signed by this host; not to itself.

        Delivery is likely, not certain. Raises ValueError over ``MAX_MESSAGE_BYTES``.
        """

    async def subscribe(self, topic: str, validator: Validator, sink: Sink) -> None:
        """Put ``(author, data)`` of every message on ``topic`` into ``sink``; dropped if full.

        ``validator(author, data, forwarder)`` decides what is delivered and forwarded, and must be
        quick. The author's signature was checked; the forwarder is the peer that it came from, who
        may have made the author up. Closing the other end of ``sink`` ends the subscription.
        Raises ValueError if the topic has a subscriber.
        """

    def neighbours(self, topic: str) -> list[str]:
        """Connected peers that take messages on ``topic``."""

    async def provide(self, key: bytes) -> None:
        """See Directory."""

    async def find(self, key: bytes) -> list[str]:
        """See Directory. The addresses found are remembered for ``open``."""
