"""Many nodes' books in one process: the production relay under a virtual network and clock.

For tests and benches. Every peer has the real ``Book``, ``Relay`` and ``Exchange``; the network
between them is made up: messages take time, get lost, links break, peers crash, come back with what
they had saved, and some are villains (``memory_villains``). All chance comes from one seed, and
events of one moment happen in the order in which they were planned: a run is replayed by its seed.

A gossiped message goes to every neighbour but the one that it came from, as in GossipSub's mesh. A
turn of a comparison is one message; if it is lost, the stream stalls until ``SILENCE_S`` is over.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from blake3 import blake3

from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.ids import content_hash
from p2pflop.market.book import Book, Dump
from p2pflop.market.exchange import Exchange, proofs_hash, read
from p2pflop.market.relay import COMPARE_SOON_S, PASS_ON_S, OpenedSheet, Relay
from p2pflop.market.samples import NOW_NS, ask, party
from p2pflop.market.sheets import OpenSheet, open_sheet
from p2pflop.node.comparing import SILENCE_S
from p2pflop.node.sheets import EXPIRE_S
from p2pflop.units import NS_PER_S
from p2pflop.wire import DEFAULT_NETWORK

RECONNECT_S: Final = 2.0
"""Links that a partition has cut are back within this time of its end."""
SETTLED_S: Final = 2.0
"""A peer that has just come back is given this time to connect and compare."""
SAVE_S: Final = 20.0
DOWN_S: Final = (2.0, 15.0)
MAX_PRICE_NUSD: Final = 10**7


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """A network. ``churn_per_minute`` is the share of peers that crash, and come back later.

    Every ``verified_every``-th peer checks all signatures itself; the others share what was checked
    once. ``skew_s`` is how far a clock may be off.
    """

    peers: int
    villains: int = 0
    links: int = 5
    loss: float = 0.05
    delay_s: tuple[float, float] = (0.01, 0.15)
    churn_per_minute: float = 0.01
    skew_s: float = 10.0
    verified_every: int = 10


@lru_cache(maxsize=65_536)
def open_once(wire: bytes, network: str) -> OpenedSheet:
    """``open_sheet``, whose result all peers of the process share."""
    return open_sheet(wire, network)


class Mesh:
    """A network of peers, numbered from 0; the last ``settings.villains`` are left to villains."""

    def __init__(self, settings: MeshSettings, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.random = random.Random(seed)  # noqa: S311 - a simulation
        self.now_s = 0.0
        self.counts: Counter[str] = Counter()
        self.peers = [MeshPeer(self, number) for number in range(settings.peers)]
        self.honest = self.peers[: settings.peers - settings.villains]
        self.sides: dict[int, int] = {}
        self._cut: list[tuple[int, int]] = []
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._planned = 0
        self._trace = blake3()
        self._pairs: dict[tuple[int, int], int] = {}
        for peer in self.peers:
            self.after(self.random.random(), peer.start)

    @property
    def trace(self) -> bytes:
        """A hash of every message so far: two runs of one seed have the same."""
        return self._trace.digest()

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Do something later."""
        self._planned += 1
        heapq.heappush(self._events, (self.now_s + delay_s, self._planned, action, arguments))

    def run(self, until_s: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, action, arguments = heapq.heappop(self._events)
            action(*arguments)
        self.now_s = until_s

    def send(
        self, source: MeshPeer, target: MeshPeer, size: int, action: Callable[..., None], *rest: Any
    ) -> None:
        """Call ``action(*rest)`` at ``target`` after a while, unless the message is lost."""
        self.counts["messages"] += 1
        self.counts["bytes"] += size
        if self.random.random() < self.settings.loss:
            return
        delay_s = self.random.uniform(*self.settings.delay_s)
        self.after(
            delay_s, self._deliver, source, target, source.life, target.life, size, action, rest
        )

    def _deliver(
        self,
        source: MeshPeer,
        target: MeshPeer,
        source_life: int,
        target_life: int,
        size: int,
        action: Callable[..., None],
        rest: tuple[Any, ...],
    ) -> None:
        same = (source.life, target.life) == (source_life, target_life)
        if same and source.number in target.links:
            self._trace.update(
                b"%d %d %d %d " % (self._planned, source.number, target.number, size)
            )
            action(*rest)

    def can_reach(self, one: MeshPeer, other: MeshPeer) -> bool:
        """Whether both are up and on one side of every partition."""
        return one.up and other.up and self._side(one) == self._side(other)

    def _side(self, peer: MeshPeer) -> int:
        return self.sides.get(peer.number, 0)

    def link(self, one: MeshPeer, other: MeshPeer) -> None:
        """Connect two peers, if they can reach each other."""
        if one is other or other.number in one.links or not self.can_reach(one, other):
            return
        one.links[other.number] = None
        other.links[one.number] = None
        one.met(other)
        other.met(one)

    def unlink(self, one: MeshPeer, other: MeshPeer) -> None:
        """End their connection."""
        for peer, far in ((one, other), (other, one)):
            if peer.links.pop(far.number, peer) is None:
                peer.lost(far)

    def partition(self) -> None:
        """Split the network into two halves by chance."""
        self.sides = {peer.number: self.random.randrange(2) for peer in self.peers}
        for peer in self.peers:
            for number in list(peer.links):
                other = self.peers[number]
                if not self.can_reach(peer, other):
                    self.unlink(peer, other)
                    self._cut.append((peer.number, number))

    def heal(self) -> None:
        """End the partition: the links that it cut come back within ``RECONNECT_S``."""
        self.sides = {}
        for one, other in self._cut:
            delay_s = self.random.uniform(0, RECONNECT_S)
            self.after(delay_s, self.link, self.peers[one], self.peers[other])
        self._cut = []

    def churn(self, until_s: float, *, selling: bool) -> None:
        """Crash peers by chance until then; if ``selling``, who is back by then issues a sheet."""
        per_s = self.settings.churn_per_minute * len(self.honest) / 60
        at_s = self.now_s
        while per_s > 0 and (at_s := at_s + self.random.expovariate(per_s)) < until_s:
            self.after(at_s - self.now_s, self._crash_one, until_s if selling else 0.0)

    def _crash_one(self, selling_until_s: float) -> None:
        peer = self.random.choice(self.honest)
        if peer.up:
            self.counts["crashes"] += 1
            peer.crash()
            down_s = self.random.uniform(*DOWN_S)
            self.after(down_s, peer.start, self.now_s + down_s < selling_until_s)

    def trade(self, until_s: float, per_s: float) -> None:
        """Let honest peers issue sheets by chance until then; the last comes just then."""
        at_s = self.now_s
        while (at_s := at_s + self.random.expovariate(per_s)) < until_s:
            self.after(at_s - self.now_s, self._issue_one)
        self.after(until_s - self.now_s, self._issue_one)

    def _issue_one(self) -> None:
        peer = self.random.choice([peer for peer in self.honest if peer.up])
        peer.issue()

    def differing(self) -> list[MeshPeer]:
        """Honest peers that are up and whose book is not the one that most have."""
        settled = [
            peer for peer in self.honest if peer.up and self.now_s - peer.since_s >= SETTLED_S
        ]
        states = {peer.number: peer.state() for peer in settled}
        most = Counter(states.values()).most_common(1)[0][0]
        return [peer for peer in settled if states[peer.number] != most]

    def converge(self, within_s: float, step_s: float = 0.5) -> float:
        """Run until every honest book is the same; how long that took.

        Raises AssertionError, which names the seed, if it takes longer than ``within_s``.
        """
        began_s = self.now_s
        while True:
            self.run(self.now_s + step_s)
            differing = self.differing()
            if not differing:
                return self.now_s - began_s
            if self.now_s - began_s >= within_s:
                raise self.failure(f"{len(differing)} books differ after {within_s} s")

    def failure(self, what: str) -> AssertionError:
        """An error that says how to see it again."""
        return AssertionError(f"{what}; replay with seed {self.seed} and {self.settings}")

    def check(self) -> None:
        """What must hold among honest peers once books are equal. Raises AssertionError."""
        book = next(peer for peer in self.honest if peer.up and not self._is_new(peer))
        live = book.book.view(book.now_ns())
        shown = {sheet.node: sheet.sheet.number for sheet in live.sheets}
        for peer in self.honest:
            if peer.newest is not None and shown.get(peer.node, 0) < peer.newest.sheet.number:
                raise self.failure(f"the newest sheet of peer {peer.number} is nowhere")
            for other in self.honest:
                if peer.up and other.up and peer.relay.is_shunned(other.name, peer.now_ns()):
                    raise self.failure(f"peer {peer.number} shuns honest peer {other.number}")

    def _is_new(self, peer: MeshPeer) -> bool:
        return self.now_s - peer.since_s < SETTLED_S


class MeshPeer:
    """One node's book, relay and neighbours. ``life`` counts its starts."""

    def __init__(self, mesh: Mesh, number: int) -> None:
        self.mesh = mesh
        self.number = number
        self.name = f"peer {number}"
        self.party = party(number)
        self.node = self.party.node.public_key
        self.links: dict[int, None] = {}
        self.up = False
        self.life = 0
        self.since_s = 0.0
        self.newest: OpenSheet | None = None
        self.book = Book(content_hash(b"secret %d" % number), own=self.node)
        self.relay = Relay(self.book, mesh.random.random)
        self._skew_s = mesh.random.uniform(-1, 1) * mesh.settings.skew_s
        self._opener = open_sheet if number % mesh.settings.verified_every == 0 else open_once
        self._saved = Dump((), ())
        self._sessions: dict[tuple[int, int], Exchange] = {}
        self._comparing: dict[int, float] = {}

    def now_ns(self) -> int:
        """The time by this peer's clock."""
        return NOW_NS + int((self.mesh.now_s + self._skew_s) * NS_PER_S)

    def state(self) -> tuple[bytes, bytes]:
        """What must be equal everywhere: the live sheets, and who is convicted."""
        return self.book.digest(self.now_ns()), proofs_hash(self.book.convicted())

    def start(self, selling: bool = True) -> None:
        """Begin with what was saved, connect, and sell."""
        self.up = True
        self.life += 1
        self.since_s = self.mesh.now_s
        self.book = Book(content_hash(b"secret %d %d" % (self.number, self.life)), own=self.node)
        self.book.load(self._saved, self.now_ns())
        self.relay = Relay(self.book, self.mesh.random.random, DEFAULT_NETWORK, self._opener)
        self._every(COMPARE_SOON_S, self.tick)
        self._every(PASS_ON_S, self.pass_on)
        self._every(EXPIRE_S, lambda: self.book.expire(self.now_ns()))
        self._every(SAVE_S, self._save)
        self.tick()
        if selling:
            self.issue()

    def crash(self) -> None:
        """Lose everything that was not saved."""
        self.up = False
        self.life += 1
        self._sessions.clear()
        self._comparing.clear()
        for number in list(self.links):
            self.mesh.unlink(self, self.mesh.peers[number])

    def tick(self) -> None:
        """Stay connected, and compare with whom the relay says."""
        if len(self.links) < self.mesh.settings.links:
            self.mesh.link(self, self.mesh.random.choice(self.mesh.peers))
        for name in self.relay.due(self.now_ns()):
            self.compare(self.mesh.peers[int(name.split()[1])])

    def pass_on(self) -> None:
        """Gossip what the relay has kept for later."""
        for wire in self.relay.to_pass_on(self.now_ns()):
            self.mesh.counts["passed on"] += 1
            self.gossip(wire, self.links)

    def met(self, other: MeshPeer) -> None:
        """A connection has begun."""
        self.relay.connected(other.name, f"10.{other.number // 256}.{other.number % 256}.0/24")
        self.compare(other)

    def lost(self, other: MeshPeer) -> None:
        """A connection has ended, and its streams."""
        self.relay.disconnected(other.name)
        self._comparing.pop(other.number, None)
        for key in [key for key in self._sessions if key[0] == other.number]:
            del self._sessions[key]

    def issue(self, price_nusd: int | None = None, lifetime_s: float = 3600) -> None:
        """Sign a new sheet and gossip it."""
        now_ns = self.now_ns()
        number = max(now_ns, self.book.last_number(self.node) + 1)
        price_nusd = price_nusd or self.mesh.random.randrange(1, MAX_PRICE_NUSD)
        life_ns = int(lifetime_s * NS_PER_S)
        offer = ask(1, price_nusd, valid_until_ns=now_ns + life_ns)
        self.newest = self.party.sheet(offer, now_ns=now_ns, number=number, lifetime_ns=life_ns)
        self.book.apply(self.newest, now_ns)
        self.mesh.counts["sheets"] += 1
        self.gossip(self.newest.sealed.wire, self.links)

    def gossip(self, wire: bytes, targets: Iterable[int]) -> None:
        """Send a sheet to neighbours."""
        for number in list(targets):
            other = self.mesh.peers[number]
            self.mesh.send(self, other, len(wire), other.hear, self, wire)

    def hear(self, source: MeshPeer, wire: bytes) -> None:
        """A neighbour has gossiped a sheet."""
        self.mesh.counts["gossip"] += 1
        if self.relay.take(wire, source.name, self.now_ns()).outcome.is_passed_on:
            self.gossip(wire, [number for number in self.links if number != source.number])

    def compare(self, other: MeshPeer) -> None:
        """Compare books, as the dialler, unless that is under way."""
        if self._comparing.get(other.number, -1.0) > self.mesh.now_s:
            return
        self._comparing[other.number] = self.mesh.now_s + SILENCE_S
        self.mesh.counts["comparisons"] += 1
        session = self.mesh.counts["comparisons"]
        exchange = Exchange(self.relay, other.name, dialling=True)
        self._sessions[other.number, session] = exchange
        self.say(other, session, list(exchange.start(self.now_ns())), opening=True)

    def say(self, other: MeshPeer, session: int, frames: list[bytes], *, opening: bool) -> None:
        """Send a turn of a comparison."""
        size = sum(map(len, frames))
        self.mesh.counts["comparison bytes"] += size
        self.mesh.send(self, other, size, other.listen, self, session, frames, opening)

    def listen(self, other: MeshPeer, session: int, frames: list[bytes], opening: bool) -> None:
        """A turn of a comparison has come."""
        key = (other.number, session)
        if opening and self.relay.gate.may_compare(other.name, self.now_ns()):
            self._sessions[key] = Exchange(self.relay, other.name, dialling=False)
        exchange = self._sessions.get(key)
        if exchange is None:
            return
        answer: list[bytes] = []
        try:
            for frame in frames:
                message = read(exchange.expects, frame, DEFAULT_NETWORK, self._opener)
                answer += exchange.receive(message, self.now_ns())
        except ProtocolError:
            self.relay.fault(other.name, self.now_ns())
        except ProviderError:
            pass
        if exchange.done or not answer:
            del self._sessions[key]
            self._comparing.pop(other.number, None)
        if answer:
            self.say(other, session, answer, opening=False)

    def _save(self) -> None:
        self._saved = self.book.dump()

    def _every(self, period_s: float, action: Callable[[], None]) -> None:
        """Do something again and again, for as long as this life goes on."""
        life = self.life

        def again() -> None:
            if self.life == life:
                action()
                self.mesh.after(period_s, again)

        self.mesh.after(self.mesh.random.uniform(0, period_s), again)
