"""Which of the streams that peers open are served, when they open more than there is room for.

A stream counts for its peer and for the address that the peer is connected from. Where the host or
an address has no room left, a peer may still have the place of another's stream that has said
nothing so far, the oldest of them, if its peer has at least two more streams than the one that
comes. So who holds streams open and says nothing keeps nobody out, however many identities it has.
And ``RESERVED_STREAMS`` places are for peers that have no other stream.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import trio

from p2pflop.node.mux import MuxStream

MAX_INBOUND_STREAMS: Final = 1024
RESERVED_STREAMS: Final = 128
"""Of these; for the first stream of a peer."""
MAX_INBOUND_STREAMS_PER_ADDRESS: Final = 512
"""Without what first streams of peers come to."""
MAX_INBOUND_STREAMS_PER_PEER: Final = 64


@dataclass(slots=True, eq=False)
class Place:
    """One stream that is served; its ``scope`` is cancelled when another has its place."""

    peer: str
    address: str
    stream: MuxStream
    agreed_bytes: int | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def agreed(self) -> None:
        """The protocol is agreed on: what the peer says from now on is said."""
        self.agreed_bytes = self.stream.received_bytes - self.stream.buffered_bytes

    @property
    def is_silent(self) -> bool:
        """Whether the peer has said nothing yet."""
        return self.agreed_bytes is None or self.stream.received_bytes <= self.agreed_bytes


class Inbound:
    """The places of one host."""

    def __init__(self) -> None:
        self.peers: Counter[str] = Counter()
        self._addresses: Counter[str] = Counter()
        self._places: dict[Place, None] = {}

    def __len__(self) -> int:
        return len(self._places)

    def take(self, peer: str, address: str, stream: MuxStream) -> Place | None:
        """A place for a new stream; None if there is none for it."""
        held = self.peers[peer]
        if held >= MAX_INBOUND_STREAMS_PER_PEER:
            return None
        is_host_full = len(self) >= MAX_INBOUND_STREAMS - RESERVED_STREAMS
        is_address_full = self._addresses[address] >= MAX_INBOUND_STREAMS_PER_ADDRESS
        if is_host_full or is_address_full:
            victim = self._victim(held + 2, "" if is_host_full else address)
            if victim is not None:
                self.give_back(victim)
                victim.scope.cancel()
                victim.stream.reset("its place is another's: nothing was said on it")
            elif held or len(self) >= MAX_INBOUND_STREAMS:
                return None
        place = Place(peer, address, stream)
        self._places[place] = None
        self.peers[peer] += 1
        self._addresses[address] += 1
        return place

    def give_back(self, place: Place) -> None:
        """The stream has ended."""
        if place not in self._places:
            return
        del self._places[place]
        for counter, key in ((self.peers, place.peer), (self._addresses, place.address)):
            counter[key] -= 1
            if not counter[key]:
                del counter[key]

    def _victim(self, held: int, address: str) -> Place | None:
        """The oldest silent stream of a peer with ``held`` or more, from ``address`` if given."""
        if max(self.peers.values(), default=0) < held:
            return None
        for place in self._places:
            if (
                self.peers[place.peer] >= held
                and place.is_silent
                and (not address or place.address == address)
            ):
                return place
        return None
