"""Gossip: signed messages to everybody on a topic, over libp2p's GossipSub 1.1.

What is ours is the limits. A message is looked at in this order, cheapest first: whether the peer
that forwards it may send one more now, its size and form, whether this node may look at one more of
its topic now, its signature (libp2p), whether its author may send one more now, and last the
topic's validator. Only what passes all is delivered and forwarded. The limits of the forwarder and
the topic come before libp2p remembers the message, so that what one peer sends over them others may
deliver all the same.

A look costs some milliseconds of this node's time, and links cost a stranger nothing. So all links
together have ``LOOKS_PER_S``, and each has ``LINK_PER_S`` of its own, which no flood over others
takes from it: what honest neighbours bring goes on slowly then, and books are compared besides.
What was seen before costs no look, and a message comes from every neighbour.

libp2p's own limit (ten a second for a forwarder, relayed ones included) is off, as are its adaptive
heartbeat, which stretches to a minute, and peer scores. 1.2 is left out: it saturates at ten hosts.
A message waits in a queue of 32 for each peer and is dropped there in silence on a machine that is
overloaded: what must arrive is asked for over a stream.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service

from p2pflop.market.rates import Rates, SharedRates
from p2pflop.node.network import MAX_MESSAGE_BYTES, Sink, Validator
from p2pflop.units import KIB

FORWARDER_PER_S: Final = 50.0
FORWARDER_BURST: Final = 200
LOOKS_PER_S: Final = 100.0
"""On one topic, over all links together: twice what a node is to follow."""
LOOKS_BURST: Final = 800
LINK_PER_S: Final = 0.25
LINK_BURST: Final = 8
ORIGIN_PER_S: Final = 4.0
ORIGIN_BURST: Final = 32
_MAX_RPC_BYTES: Final = 512 * KIB

_log = logging.getLogger(__name__)


class Gossip:
    """Topics of one host. ``counts`` is where refusals are counted."""

    def __init__(self, host: BasicHost, peer: str, network: str, counts: Counter[str]) -> None:
        self._peer = peer
        self._prefix = f"p2pflop/{network}/"
        self._counts = counts
        self._forwarders = Rates(FORWARDER_PER_S, FORWARDER_BURST)
        self._looks = SharedRates(Rates(LINK_PER_S, LINK_BURST), Rates(LOOKS_PER_S, LOOKS_BURST))
        self._origins = Rates(ORIGIN_PER_S, ORIGIN_BURST)
        self._router = GossipSub(
            protocols=[TProtocol("/meshsub/1.1.0")],
            degree=6,
            degree_low=4,
            degree_high=12,
            heartbeat_interval=1,
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,
            eclipse_protection_enabled=False,
        )
        self._pubsub = Pubsub(
            host, self._router, strict_signing=True, max_inbound_rpc_size=_MAX_RPC_BYTES
        )
        self._push = self._pubsub.push_msg
        self._pubsub.push_msg = self._guarded_push

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take part while the block runs."""
        async with background_trio_service(self._pubsub), background_trio_service(self._router):
            await self._pubsub.wait_until_ready()
            yield

    async def publish(self, topic: str, data: bytes) -> None:
        """Send to all. Raises ValueError over ``MAX_MESSAGE_BYTES``."""
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a gossip message of {len(data)} bytes is over {MAX_MESSAGE_BYTES}")
        self._counts["gossip_published"] += 1
        await self._pubsub.publish(self._prefix + topic, data)

    async def subscribe(
        self,
        nursery: trio.Nursery,
        topic: str,
        validator: Validator,
        sink: Sink,
    ) -> None:
        """Deliver into ``sink`` from a task in ``nursery``; see ``Network.subscribe``."""
        name = self._prefix + topic
        if name in self._pubsub.topic_validators:
            raise ValueError(f"the topic {topic!r} has a subscriber already")
        self._pubsub.set_topic_validator(
            name,
            lambda forwarder, message: self._valid(validator, message, forwarder.to_base58()),
            False,
        )
        subscription = await self._pubsub.subscribe(name)
        nursery.start_soon(self._deliver, name, subscription, sink)

    def reachable(self, topic: str) -> list[str]:
        """Neighbours that take messages on ``topic`` from this host."""
        name = self._prefix + topic
        subscribed = self._pubsub.peer_topics.get(name, set())
        return [peer.to_base58() for peer in subscribed if peer in self._pubsub.peers]

    async def _deliver(self, name: str, subscription: Any, sink: Sink) -> None:
        try:
            async for message in subscription:
                origin = ID(message.from_id).to_base58()
                if origin == self._peer:
                    continue
                try:
                    sink.send_nowait((origin, bytes(message.data)))
                    self._counts["gossip_received"] += 1
                except trio.WouldBlock:
                    self._counts["gossip_dropped"] += 1
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self._pubsub.unsubscribe(name)
            self._pubsub.remove_topic_validator(name)

    async def _guarded_push(self, forwarder: ID, message: Any) -> None:
        peer = forwarder.to_base58()
        if peer != self._peer:
            if not self._forwarders.allow(peer, trio.current_time()):
                self._counts["gossip_refused_forwarder"] += 1
                return
            if len(message.data) > MAX_MESSAGE_BYTES or len(message.topicIDs) != 1:
                self._counts["gossip_refused_form"] += 1
                return
            if not self._may_look(peer, message):
                self._counts["gossip_refused_looks"] += 1
                return
        try:
            await self._push(forwarder, message)
        except Exception:  # noqa: BLE001 - a hostile message must not end the node
            self._counts["gossip_refused_form"] += 1
            _log.debug("a gossip message from %s failed", peer, exc_info=True)

    def _may_look(self, peer: str, message: Any) -> bool:
        name = message.topicIDs[0]
        topic = name if name in self._pubsub.topic_validators else ""
        is_seen = self._pubsub._is_msg_seen(message)
        return is_seen or self._looks.allow(peer, topic, trio.current_time())

    def _valid(self, validator: Validator, message: Any, forwarder: str) -> bool:
        origin = ID(message.from_id).to_base58()
        if origin == self._peer:
            return True
        if not self._origins.allow(origin, trio.current_time()):
            self._counts["gossip_refused_origin"] += 1
            return False
        try:
            valid = bool(validator(origin, bytes(message.data), forwarder))
        except Exception:  # noqa: BLE001 - likewise
            _log.exception("a gossip validator failed")
            valid = False
        if not valid:
            self._counts["gossip_refused_validator"] += 1
        return valid
