"""The directory: who provides what, kept by all peers together in libp2p's Kademlia DHT.

Only provider records are used. Values are refused, because our validator knows no namespace and
validation is strict. libp2p hard-wires IPFS's protocol name; here it sees the host through a proxy
that puts the network's own in its place, so that our peers' DHT is ours.

A lookup takes a quarter of a second or more: never on the path of a job.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.records.validator import NamespacedValidator
from libp2p.tools.anyio_service import background_trio_service

from p2pflop.errors import ProviderError
from p2pflop.ids import content_hash
from p2pflop.market.rates import Rates
from p2pflop.node.libp2p_addresses import texts
from p2pflop.node.printable import printable

LOOKUP_S: Final = 10.0
MAX_FOUND: Final = 20
PROVIDES_PER_S: Final = 0.8
PROVIDES_BURST: Final = 8
"""Peers take ten announcements in ten seconds from one peer and reset the stream after that."""
IDENTIFY_TRIES: Final = 60
IDENTIFY_WAIT_S: Final = 0.05
MAX_KEYS: Final = 65_536
"""Keys with providers kept for others; libp2p has no limit, and a peer may add one a second."""
REFRESH_S: Final = 60.0
ADDRESS_TTL_S: Final = 600
"""libp2p forgets the address of a peer after two minutes, even while it is connected."""

_BLAKE3_MULTIHASH: Final = b"\x1e\x20"

_log = logging.getLogger(__name__)


class _ProxyPeerstore:
    def __init__(self, peerstore: Any, ours: str) -> None:
        self._peerstore = peerstore
        self._ours = ours

    def __getattr__(self, name: str) -> Any:
        return getattr(self._peerstore, name)

    def get_protocols(self, peer: ID) -> list[str]:
        names = self._peerstore.get_protocols(peer)
        return [str(PROTOCOL_ID) if name == self._ours else name for name in names]


class _ProxyHost:
    """A libp2p host on which IPFS's DHT protocol is called as ours is."""

    def __init__(self, host: BasicHost, ours: str) -> None:
        self._host = host
        self._ours = TProtocol(ours)
        self._peerstore = _ProxyPeerstore(host.get_peerstore(), ours)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def get_peerstore(self) -> _ProxyPeerstore:
        return self._peerstore

    def set_stream_handler(self, protocol: TProtocol, handler: Any) -> None:
        self._host.set_stream_handler(self._translate(protocol), handler)

    def remove_stream_handler(self, protocol: TProtocol) -> None:
        self._host.remove_stream_handler(self._translate(protocol))

    async def new_stream(self, peer: ID, protocols: Sequence[TProtocol]) -> Any:
        return await self._host.new_stream(peer, [self._translate(p) for p in protocols])

    def _translate(self, protocol: TProtocol) -> TProtocol:
        return self._ours if protocol == PROTOCOL_ID else protocol


class KadDirectory:
    """The DHT of one host; see ``p2pflop.dht.announce.Directory``."""

    def __init__(self, host: BasicHost, network: str) -> None:
        self._host = host
        self._network = network.encode()
        self._rate = Rates(PROVIDES_PER_S, PROVIDES_BURST)
        self._providing = trio.Lock()
        self._finding_self = False
        self._find_self_again = False
        self._dht = KadDHT(
            _ProxyHost(host, f"/p2pflop/{network}/kad/1"),
            DHTMode.SERVER,
            validator=NamespacedValidator({}, strict_validation=True),
            validator_changed=True,
            protocol_prefix=TProtocol(f"/p2pflop/{network}"),
            strict_validation=True,
        )
        self._add_provider = self._dht.provider_store.add_provider
        self._dht.provider_store.add_provider = self._bounded_add_provider

    def _bounded_add_provider(self, key: bytes, provider: Any) -> None:
        known = self._dht.provider_store.providers
        if key in known or len(known) < MAX_KEYS or provider.peer_id == self._host.get_id():
            self._add_provider(key, provider)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take part while the block runs."""
        async with background_trio_service(self._dht):
            yield

    @property
    def size(self) -> int:
        """Peers in the routing table."""
        return int(self._dht.get_routing_table_size())

    def _key(self, key: bytes) -> bytes:
        return _BLAKE3_MULTIHASH + content_hash(b"p2pflop/1/" + self._network + b"/" + key)

    async def provide(self, key: bytes) -> None:
        """Announce this host; waits its turn below the rate that peers take."""
        async with self._providing:
            await trio.sleep(self._rate.wait_s("", trio.current_time()))
            self._rate.allow("", trio.current_time())
        taken = False
        with trio.move_on_after(LOOKUP_S):
            try:
                taken = await self._dht.provider_store.provide(self._key(key))
            except Exception as error:  # libp2p's errors have no common base
                raise _failed("the announcement", error) from error
        if not taken:
            raise ProviderError("no peer took the announcement")

    async def find(self, key: bytes) -> list[tuple[str, tuple[str, ...]]]:
        """Providers but this host, with addresses; those that the network names now come first."""
        store, name = self._dht.provider_store, self._key(key)
        # libp2p answers from its own records alone if it has any, even a stale or our own one.
        kept: dict[str, Any] = {}
        local: list[Any] = []
        found: list[Any] = []
        try:
            local = store.get_providers(name)
            kept = store.providers.pop(name, {})
            with trio.move_on_after(LOOKUP_S):
                found = await store.find_providers(name, MAX_FOUND)
        except Exception as error:  # likewise
            raise _failed("the lookup", error) from error
        finally:
            if kept:
                store.providers[name] = {**store.providers.get(name, {}), **kept}
        addresses: dict[str, tuple[str, ...]] = {}
        for info in [*found, *local]:
            if info.peer_id != self._host.get_id():
                addresses.setdefault(info.peer_id.to_base58(), texts(info.addrs))
        return list(addresses.items())

    async def find_addresses(self, peer: str) -> tuple[str, ...]:
        """Where ``peer`` can be reached, as far as the network knows. Raises ProviderError."""
        with trio.move_on_after(LOOKUP_S):
            try:
                info = await self._dht.find_peer(ID.from_base58(peer))
            except Exception as error:  # likewise
                raise _failed("the lookup", error) from error
            if info is not None:
                return texts(info.addrs)
        return ()

    async def introduce(self, peer: str) -> None:
        """Take a newly connected peer into the routing table, and look around from there.

        A table starts nearly empty and fills by looking up one's own id.
        """
        try:
            await self._add(ID.from_base58(peer))
            self._find_self_again = True
            if not self._finding_self:
                await self._find_self()
        except Exception:  # noqa: BLE001 - libp2p's lookup must not end the node
            _log.debug("could not look around from %s", peer, exc_info=True)

    async def _add(self, target: ID) -> None:
        for _ in range(IDENTIFY_TRIES):
            if await self._dht.add_peer(target, skip_server_mode_check=True):
                return
            await trio.sleep(IDENTIFY_WAIT_S)  # its address is known once identify is through

    async def _find_self(self) -> None:
        self._finding_self = True
        own_id = self._host.get_id().to_bytes()
        try:
            while self._find_self_again:
                self._find_self_again = False
                with trio.move_on_after(LOOKUP_S):
                    await self._dht.peer_routing.find_closest_peers_network(own_id)
        finally:
            self._finding_self = False

    async def keep_addresses(self) -> None:
        """Keep libp2p from forgetting where connected peers are."""
        peerstore = self._host.get_peerstore()
        while True:
            for target in self._host.get_connected_peers():
                peerstore.add_addrs(target, [], ADDRESS_TTL_S)
            await trio.sleep(REFRESH_S)


def _failed(what: str, error: Exception) -> ProviderError:
    return ProviderError(f"{what} failed: {printable(error)}")
