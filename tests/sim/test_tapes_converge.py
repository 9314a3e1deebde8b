"""Tapes of many nodes become alike though gossip is lost: by the real relay, on a virtual network.

Each round is ``COMPARE_TAPES_S``. A failure names the seed that replays it.
"""

from __future__ import annotations

import random
from functools import cache

import pytest

from p2pflop.market.gate import Outcome
from p2pflop.market.relay import MAX_FAULTS, Relay
from p2pflop.market.samples import CLASS_ID, NOW_NS, book, party
from p2pflop.market.tape import MAX_TRADES_AN_ACCOUNT, OpenTrade, Tape, last_price, make_trade
from p2pflop.market.tape_relay import (
    COMPARE_TAPES_S,
    Pull,
    TapeRelay,
    listing_for,
    parcels_for,
    read_parcel,
)
from p2pflop.units import NS_PER_S

NODES = 30
NEIGHBOURS = 4
MAX_ROUNDS = 20
ROUND_NS = int(COMPARE_TAPES_S * NS_PER_S)
SEEDS = (4, random.randrange(2**32))  # noqa: S311 - no secret


@cache
def trade(account: int, number: int, price_nusd: int = 10**6) -> OpenTrade:
    seller = party(account)
    return make_trade(
        seller.node,
        fill_id=b"%d" % number,
        class_id=CLASS_ID,
        price_nusd=price_nusd,
        flop=10**12,
        now_ns=NOW_NS,
        delegation=seller.delegation,
    )


class Mesh:
    """Nodes, each with a secret of its own, on a random graph that loses most of all gossip."""

    def __init__(self, seed: int) -> None:
        print(f"replay with seed {seed}")
        self.rng = random.Random(seed)  # noqa: S311 - a simulation
        self.now_ns = NOW_NS
        self.relays = [
            TapeRelay(Tape(self.rng.randbytes(32)), Relay(book(), self.rng.random))
            for _ in range(NODES)
        ]
        self.links: list[set[int]] = [set() for _ in range(NODES)]
        for node in range(NODES):
            for other in {(node + 1) % NODES, *self.rng.sample(range(NODES), NEIGHBOURS)} - {node}:
                self.links[node].add(other)
                self.links[other].add(node)
        for node, others in enumerate(self.links):
            for other in others:
                self.relays[node].peers.connected(str(other), f"subnet {other}")

    def publish(self, origin: int, wire: bytes, loss: float = 0.85) -> None:
        """Gossip from ``origin``; each hop is lost with that chance."""
        frontier = [origin]
        while frontier:
            forwarder = frontier.pop()
            for other in sorted(self.links[forwarder]):
                if self.rng.random() >= loss:
                    verdict = self.relays[other].take(wire, str(forwarder), self.now_ns)
                    if verdict.outcome.is_passed_on:
                        frontier.append(other)

    def settle(self, seller: int, each: OpenTrade) -> None:
        """A node tells a trade of its own."""
        self.relays[seller].tape.add(each, self.now_ns)
        self.publish(seller, each.sealed.wire)

    def compare(self) -> None:
        """One round: every node pulls from one neighbour."""
        self.now_ns += ROUND_NS
        for node, relay in enumerate(self.relays):
            for peer in relay.peers.sample(1, self.now_ns):
                self.pull(node, int(peer))

    def pull(self, node: int, other: int) -> None:
        here, there = self.relays[node], self.relays[other].tape
        pull = Pull(here, str(other))
        want = pull.want(listing_for(there, pull.outline(self.now_ns), self.now_ns), self.now_ns)
        for frame in parcels_for(there, want, self.now_ns):
            pull.receive(read_parcel(frame, "main"), self.now_ns)

    def kept(self) -> list[frozenset[bytes]]:
        return [
            frozenset(each.sealed.id for each in relay.tape.trades(self.now_ns))
            for relay in self.relays
        ]


@pytest.mark.parametrize("seed", SEEDS, ids=["fixed", "random"])
def test_all_tapes_are_alike_within_a_bounded_time(seed: int) -> None:
    mesh = Mesh(seed)
    told = [trade(account, number) for account in range(8) for number in range(4)]
    for each in told:
        mesh.settle(mesh.rng.randrange(NODES), each)
    before = {len(kept) for kept in mesh.kept()}
    assert before != {len(told)}, "gossip that loses nothing tests nothing"
    rounds = 0
    while set(mesh.kept()) != {frozenset(each.sealed.id for each in told)}:
        mesh.compare()
        rounds += 1
        assert rounds <= MAX_ROUNDS


@pytest.mark.parametrize("seed", SEEDS, ids=["fixed", "random"])
def test_a_liar_neither_floods_nor_moves_the_price(seed: int) -> None:
    """It gossips forgeries and trades of one account at a price of its own, from one node."""
    mesh = Mesh(seed)
    liar = 0
    for number in range(3 * MAX_TRADES_AN_ACCOUNT):
        mesh.publish(liar, trade(99, number, price_nusd=999 * 10**9).sealed.wire, loss=0)
    for number in range(2 * MAX_FAULTS):
        mesh.publish(liar, b"junk %d" % number, loss=0)
    honest = [trade(account, 1) for account in range(4)]
    for each in honest:
        mesh.settle(1 + mesh.rng.randrange(NODES - 1), each)
    for _ in range(MAX_ROUNDS):
        mesh.compare()
    for node, relay in enumerate(mesh.relays[1:], start=1):
        trades = relay.tape.trades(mesh.now_ns)
        assert set(honest) <= set(trades)
        assert len(trades) <= len(honest) + MAX_TRADES_AN_ACCOUNT
        assert last_price(trades) == 10**6
        if liar in mesh.links[node]:
            assert relay.counts[Outcome.BAD] == MAX_FAULTS
            assert relay.counts[Outcome.SHUNNED] > 0
