"""Hosts inside one process: the promises of ``network.py`` without sockets, keys or libp2p.

All hosts of a ``MemoryNetwork`` can reach each other, at addresses ``/memory/<n>/p2p/<peer>``.
Gossip floods along connections and is validated at every hop; the directory is one table, which a
host can use while it is connected to anybody.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol, TypeVar

import trio

from p2pflop.dht.planes import MAX_FRAME_BYTES, MemoryStream, Stream, memory_stream_pair
from p2pflop.errors import ConfigError, P2PFlopError, ProviderError
from p2pflop.keys import PrivateKey, peer_id, public_key_of
from p2pflop.node.network import (
    MAX_MESSAGE_BYTES,
    Handler,
    HostConfig,
    HostStatistics,
    Peer,
    Sink,
    Validator,
)

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Weather(Protocol):
    """What a ``MemoryNetwork`` does to who uses it. Peers are named by their ids."""

    def reaches(self, one: str, other: str) -> bool:
        """Whether they can connect, and gossip over their connection."""

    def gossips(self, source: str, target: str) -> bool:
        """Whether this gossiped message arrives."""

    async def carries(self, source: str, target: str) -> bool:
        """Wait for as long as a frame of a stream is on its way. False: it is lost, and so is all
        that follows it."""


class MemoryNetwork:
    """Where memory hosts find each other. Without ``weather`` everything arrives at once."""

    def __init__(self, weather: Weather | None = None) -> None:
        self.weather = weather
        self.hosts: dict[str, MemoryHost] = {}
        self.providers: dict[tuple[str, bytes], dict[str, None]] = {}
        self._opened = 0

    def reaches(self, one: str, other: str) -> bool:
        """Whether the weather lets them connect."""
        return self.weather is None or self.weather.reaches(one, other)

    def gossips(self, source: str, target: str) -> bool:
        """Whether the weather lets a gossiped message arrive."""
        return self.weather is None or self.weather.gossips(source, target)

    @asynccontextmanager
    async def open_host(self, config: HostConfig) -> AsyncIterator[MemoryHost]:
        """As ``host.open_host``; what it listens on is ignored."""
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            host = MemoryHost(self, config, nursery, self._opened)
            self._opened += 1
            self.hosts[host.peer] = host
            try:
                for address in config.bootstrap:
                    await host.connect(address)
                yield host
            except Exception as error:  # noqa: BLE001 - raised below, outside the nursery's group
                failure = error
            finally:
                del self.hosts[host.peer]
                for peer in list(host.links):
                    host.cut(peer)
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure


class _LinkStream:
    """A memory stream that can break, as one over a socket does."""

    def __init__(self, inner: MemoryStream, own: str, network: MemoryNetwork) -> None:
        self.peer = inner.peer
        self._inner = inner
        self._own = own
        self._network = network
        self._is_dark = False
        self._scopes: set[trio.CancelScope] = set()
        self._fault = ""

    async def send(self, *frames: bytes) -> None:
        for frame in frames:
            await self._unless_broken(partial(self._carry, frame))

    async def receive(self, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
        return await self._unless_broken(lambda: self._inner.receive(max_bytes))

    async def aclose(self) -> None:
        await self._inner.aclose()

    def break_off(self, why: str) -> None:
        self._fault = self._fault or why
        for scope in self._scopes:
            scope.cancel()

    async def _carry(self, frame: bytes) -> None:
        weather = self._network.weather
        if weather is not None and not self._is_dark:
            self._is_dark = not await weather.carries(self._own, self.peer)
        if self._is_dark:
            await trio.lowlevel.checkpoint()
        else:
            await self._inner.send(frame)

    async def _unless_broken(self, use: Callable[[], Awaitable[T]]) -> T:
        if not self._fault:
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                try:
                    return await use()
                finally:
                    self._scopes.discard(scope)
        raise ProviderError(f"the stream with {self.peer} broke: {self._fault}")


class MemoryHost:
    """A Network inside one process. Made by ``MemoryNetwork.open_host``."""

    def __init__(
        self, network: MemoryNetwork, config: HostConfig, nursery: trio.Nursery, number: int
    ) -> None:
        self.peer = peer_id(PrivateKey(config.seed).public_key)
        self.network = config.network
        self.addresses = (f"/memory/{number}/p2p/{self.peer}",)
        self.links: dict[str, bool] = {}
        self._hosts = network
        self._nursery = nursery
        self._handlers: dict[str, Handler] = {}
        self._streams: dict[str, set[_LinkStream]] = {}
        self._topics: dict[str, tuple[Validator, Sink]] = {}
        self._connect_callbacks: list[Callable[[str], None]] = []
        self._disconnect_callbacks: list[Callable[[str], None]] = []
        self._counts: Counter[str] = Counter()

    def handle(self, protocol: str, handler: Handler) -> None:
        """See Network."""
        self._handlers[protocol] = handler

    async def open(self, peer: str, protocol: str) -> Stream:
        """See Network."""
        await trio.lowlevel.checkpoint()
        other = self._hosts.hosts.get(peer)
        if other is None or other is self:
            raise ProviderError(f"no address of {peer} is known")
        if not self._hosts.reaches(self.peer, peer):
            raise ProviderError(f"{peer} cannot be reached")
        if peer not in self.links:
            self.link(other)
        handler = other._handlers.get(protocol) if other.network == self.network else None
        if handler is None:
            raise ProviderError(f"{peer} does not answer {protocol}")
        near, far = memory_stream_pair(self.peer, peer)
        ours = _LinkStream(near, self.peer, self._hosts)
        theirs = _LinkStream(far, peer, self._hosts)
        self._streams.setdefault(peer, set()).add(ours)
        other._streams.setdefault(self.peer, set()).add(theirs)
        other._nursery.start_soon(other._serve, handler, theirs, ours)
        return ours

    async def _serve(self, handler: Handler, stream: _LinkStream, far_end: _LinkStream) -> None:
        try:
            await handler(stream)
        except (P2PFlopError, trio.TooSlowError) as error:
            far_end.break_off(f"the handler ended: {error}")
        except Exception:  # noqa: BLE001 - a bug in one stream's handler must not end the node
            _log.exception("a handler failed")
            far_end.break_off("the handler failed")
        finally:
            self._streams.get(stream.peer, set()).discard(stream)
            with trio.CancelScope(shield=True):
                await stream.aclose()

    async def connect(self, address: str) -> str:
        """See Network."""
        await trio.lowlevel.checkpoint()
        head, _, peer = address.rpartition("/p2p/")
        if not head.startswith("/"):
            raise ConfigError(f"{address[:200]!r} does not name a peer that can be dialled")
        public_key_of(peer)
        if peer == self.peer:
            raise ConfigError(f"{address} is this node itself")
        for other in list(self._hosts.hosts.values()):
            if other.addresses[0].startswith(head + "/p2p/"):
                if other.peer != peer:
                    raise ProviderError(f"nobody answers at {address} as {peer}: another peer does")
                if not self._hosts.reaches(self.peer, peer):
                    break
                self.link(other)
                return peer
        raise ProviderError(f"nobody answers at {address}")

    def link(self, other: MemoryHost) -> None:
        if other.peer in self.links:
            return
        self.links[other.peer] = False
        other.links[self.peer] = True
        self._tell(self._connect_callbacks, other.peer)
        other._tell(other._connect_callbacks, self.peer)

    def cut(self, peer: str) -> None:
        """End the connection to ``peer`` and break its streams."""
        other = self._hosts.hosts.get(peer)
        for host, far in ((self, peer), (other, self.peer)):
            if host is None or host.links.pop(far, None) is None:
                continue
            for stream in host._streams.pop(far, set()):
                stream.break_off("the connection ended")
            host._tell(host._disconnect_callbacks, far)

    async def disconnect(self, peer: str) -> None:
        """See Network."""
        await trio.lowlevel.checkpoint()
        self.cut(peer)

    def peers(self) -> list[Peer]:
        """See Network."""
        return [
            Peer(peer, self._hosts.hosts[peer].addresses, inbound, 0)
            for peer, inbound in self.links.items()
            if peer in self._hosts.hosts
        ]

    def on_connect(self, callback: Callable[[str], None]) -> None:
        """See Network."""
        self._connect_callbacks.append(callback)

    def on_disconnect(self, callback: Callable[[str], None]) -> None:
        """See Network."""
        self._disconnect_callbacks.append(callback)

    def _tell(self, callbacks: list[Callable[[str], None]], peer: str) -> None:
        for callback in callbacks:
            try:
                callback(peer)
            except Exception:  # noqa: BLE001 - likewise
                _log.exception("a callback about %s failed", peer)

    def statistics(self) -> HostStatistics:
        """See Network."""
        return HostStatistics(len(self.links), 0, len(self.links), dict(self._counts))

    async def publish(self, topic: str, data: bytes) -> None:
        """See Network."""
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a gossip message of {len(data)} bytes")
        await trio.lowlevel.checkpoint()
        self._counts["gossip_published"] += 1
        seen, frontier = {self.peer}, [self]
        while frontier:
            forwarder = frontier.pop()
            for peer in forwarder.neighbours(topic):
                if peer not in seen and self._hosts.gossips(forwarder.peer, peer):
                    seen.add(peer)
                    host = self._hosts.hosts[peer]
                    if host._accept(topic, self.peer, data, forwarder.peer):
                        frontier.append(host)

    def _accept(self, topic: str, author: str, data: bytes, forwarder: str) -> bool:
        validator, sink = self._topics[topic]
        try:
            if not validator(author, data, forwarder):
                self._counts["gossip_refused_validator"] += 1
                return False
            sink.send_nowait((author, data))
            self._counts["gossip_received"] += 1
        except trio.WouldBlock:
            self._counts["gossip_dropped"] += 1
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            del self._topics[topic]
            return False
        except Exception:  # noqa: BLE001 - likewise
            _log.exception("a gossip validator failed")
            self._counts["gossip_refused_validator"] += 1
            return False
        return True

    async def subscribe(self, topic: str, validator: Validator, sink: Sink) -> None:
        """See Network."""
        await trio.lowlevel.checkpoint()
        if topic in self._topics:
            raise ValueError(f"the topic {topic!r} has a subscriber already")
        self._topics[topic] = (validator, sink)

    def neighbours(self, topic: str) -> list[str]:
        """See Network."""
        hosts = self._hosts.hosts
        return [
            peer
            for peer in self.links
            if peer in hosts
            and hosts[peer].network == self.network
            and topic in hosts[peer]._topics
        ]

    async def provide(self, key: bytes) -> None:
        """See Network."""
        await trio.lowlevel.checkpoint()
        if not self.links:
            raise ProviderError("no peer took the announcement")
        self._hosts.providers.setdefault((self.network, key), {})[self.peer] = None

    async def find(self, key: bytes) -> list[str]:
        """See Network."""
        await trio.lowlevel.checkpoint()
        found = self._hosts.providers.get((self.network, key), {}) if self.links else {}
        return [peer for peer in found if peer != self.peer]
