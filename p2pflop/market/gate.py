"""The gate: which gossiped bytes are worth a check of signatures. For sheets and trades alike.

Sans-IO. Bytes are looked at in this order, cheapest first:

1. whether the forwarder is shunned for its faults;
2. the size;
3. whether these bytes were judged before;
4. what the forwarder and its subnet may still cost this node: a check of signatures each.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from p2pflop.ids import content_hash
from p2pflop.market.rates import Rates, remember
from p2pflop.market.tape import OpenTrade
from p2pflop.units import NS_PER_S


class Outcome(StrEnum):
    """What became of a sheet or trade that a peer brought."""

    NEW = "new"
    PROOF = "proof of an equivocation"
    KNOWN = "known already"
    SHUNNED = "its forwarder has brought too much that is wrong"
    FORWARDER = "over the forwarder's quota"
    SUBNET = "over the quota of the forwarder's subnet"
    BAD = "not valid"
    CLOCK = "not for now"
    LATER = "held back by the account's quota"
    ACCOUNT = "over the account's quota"
    BOOK = "refused by the book"
    TAPE = "refused by the tape"

    @property
    def is_passed_on(self) -> bool:
        """Whether neighbours should have it too."""
        return self in (Outcome.NEW, Outcome.PROOF)


@dataclass(frozen=True, slots=True)
class Verdict:
    """An outcome, of a refusal the reason in words, and a trade that is new."""

    outcome: Outcome
    reason: str = ""
    trade: OpenTrade | None = None


class Peers(Protocol):
    """Who brings what: ``p2pflop.market.relay.Relay`` knows them."""

    def subnet(self, peer: str) -> str:
        """What a neighbour shares a quota with."""

    def fault(self, peer: str, now_ns: int) -> None:
        """Note that ``peer`` did what no honest one does."""

    def is_shunned(self, peer: str, now_ns: int) -> bool:
        """Whether nothing from ``peer`` is looked at."""


class Gate:
    """What gossip brings of one kind, up to ``max_bytes`` each, on its way to be judged.

    ``answered`` are the comparisons that one peer may begin; ``max_seen`` is how many judged ones
    are remembered.
    """

    def __init__(
        self,
        peers: Peers,
        *,
        forwarders: Rates,
        subnets: Rates,
        answered: Rates,
        max_bytes: int,
        max_seen: int,
    ) -> None:
        self.peers = peers
        self._forwarders = forwarders
        self._subnets = subnets
        self._answered = answered
        self._max_bytes = max_bytes
        self._max_seen = max_seen
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        """How many are remembered as judged."""
        return len(self._seen)

    def refusal(self, wire: bytes, forwarder: str, now_ns: int) -> Verdict | None:
        """Why ``wire`` is not looked at any further; None if it may cost a check of signatures."""
        if self.peers.is_shunned(forwarder, now_ns):
            return Verdict(Outcome.SHUNNED)
        if len(wire) > self._max_bytes:
            self.peers.fault(forwarder, now_ns)
            return Verdict(Outcome.BAD, f"{len(wire)} bytes are over the limit")
        if content_hash(wire) in self._seen:
            return Verdict(Outcome.KNOWN)
        if not self._forwarders.allow(forwarder, now_ns / NS_PER_S):
            return Verdict(Outcome.FORWARDER)
        if not self._subnets.allow(self.peers.subnet(forwarder), now_ns / NS_PER_S):
            return Verdict(Outcome.SUBNET)
        return None

    def judged(self, wire: bytes) -> None:
        """These bytes need no judging again, whoever brings them."""
        remember(self._seen, content_hash(wire), None, self._max_seen)

    def may_compare(self, peer: str, now_ns: int) -> bool:
        """Whether to answer ``peer``, which begins a comparison; if so, it is counted."""
        allowed = self._answered.allow(peer, now_ns / NS_PER_S)
        return allowed and not self.peers.is_shunned(peer, now_ns)
