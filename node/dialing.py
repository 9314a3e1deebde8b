"""Opening streams to anybody, this node included.

A node may buy from itself: an embedded one always does. libp2p does not connect a host to itself,
so those streams are joined in memory, and the code on both ends is the same as for a stranger.
"""

from __future__ import annotations

import trio

from p2pflop.dht.planes import MemoryDialer, Stream
from p2pflop.node.network import Handler, Network


class NodeDialer:
    """A Dialer over the network, with this node itself among the peers."""

    def __init__(self, network: Network, nursery: trio.Nursery) -> None:
        self._network = network
        self._own = MemoryDialer(nursery, network.peer)

    def handle(self, protocol: str, handler: Handler) -> None:
        """Answer ``protocol``, whoever asks."""
        self._network.handle(protocol, handler)
        self._own.handle(self._network.peer, protocol, handler)

    async def open(self, peer: str, protocol: str) -> Stream:
        """See Dialer."""
        if peer == self._network.peer:
            return await self._own.open(peer, protocol)
        return await self._network.open(peer, protocol)
