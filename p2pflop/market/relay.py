"""The relay: what a node takes from its peers, what it passes on, with whom it compares books.

Sans-IO: every call is given the time and says what to do; the same class runs in the daemon, over
libp2p, and in the simulation, over a virtual network.

**Gossip.** ``take`` looks at a sheet in this order, cheapest first, and passes on only what changed
the book, or proved an equivocation:

1. what ``gate`` looks at: the forwarder's faults and quotas, the size, what was judged before;
2. signatures and rules. Every honest forwarder has checked them, and they do not depend on the
   clock: what is wrong here is the forwarder's **fault**. It may have ``MAX_FAULTS``, and one is
   forgiven every ``FORGIVEN_S``; beyond them it is shunned;
3. the clock, which may differ by ``CLOCK_TOLERANCE_NS``;
4. the book;
5. what the account may still gossip: beyond it the sheet is passed on **later**.

What is refused for a forwarder's quota, the clock or want of space is not remembered: another
forwarder may bring it, and comparing will.

**Comparing** mends what gossip lost. ``due`` names ``COMPARED_AT_ONCE`` random neighbours every
``COMPARE_S``. How two books compare is in ``exchange``. A neighbour may bring a book's worth at
once that way, and then no more than by gossip: identities are free, and whoever has many could
renew all their sheets at each comparison. Which of more are asked for is left to chance.

**Later.** What changed the book is passed on once, however it came. ``to_pass_on`` gives what is to
be gossiped now: of an account over its quota the newest sheets, as the quota allows; and what was
learnt by comparing, unless gossip brought it within ``OVERTAKEN_S`` after all, as it does when a
comparison was only faster. So a sheet of which few neighbours know goes on at the speed of gossip.
News of more sheets than ``PASSED_ON_BURST``, as after a partition, spreads by comparing again
after ``COMPARE_SOON_S``, which costs less than a message for each.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Final, TypeVar

from p2pflop.market.book import MAX_PROOFS, MAX_SHEETS, Applied, Book, Equivocation
from p2pflop.market.gate import Gate, Outcome, Verdict
from p2pflop.market.rates import Rates, remember
from p2pflop.market.records import MAX_SHEET_BYTES, Rejected
from p2pflop.market.sheets import OpenSheet, check_clock, open_sheet
from p2pflop.units import NS_PER_S
from p2pflop.wire import DEFAULT_NETWORK, MAX_ENVELOPE_OVERHEAD_BYTES

MAX_SHEET_WIRE_BYTES: Final = MAX_SHEET_BYTES + MAX_ENVELOPE_OVERHEAD_BYTES
FORWARDER_PER_S: Final = 50.0
FORWARDER_BURST: Final = 200
SUBNET_PER_S: Final = 200.0
SUBNET_BURST: Final = 800
ACCOUNT_PER_S: Final = 4.0
ACCOUNT_BURST: Final = 64
"""As many as the nodes that an account may have in a book: all may renew their sheets at once."""
MAX_FAULTS: Final = 16
FORGIVEN_S: Final = 30.0
MAX_SEEN: Final = 16_384
MAX_TURNED_AWAY: Final = 16_384
TURNED_AWAY_NS: Final = 60 * NS_PER_S
"""For so long a sheet that was refused is not asked of the same peer again."""
ANSWERED_PER_S: Final = 2.0
ANSWERED_BURST: Final = 8
"""Comparisons that one peer may begin; each may cost a book's worth of summaries."""
PROOFS_PER_S: Final = 0.25
"""That a neighbour may bring by comparing, after a book's worth at once: each has everybody compare
again."""
COMPARED_AT_ONCE: Final = 3
COMPARE_S: Final = 4.0
COMPARE_SOON_S: Final = 0.5
PASS_ON_S: Final = 0.25
PASSED_ON_PER_S: Final = 3.0
PASSED_ON_BURST: Final = 16
"""Sheets of others that a node gossips anew: each neighbour checks one more signature for it."""
OVERTAKEN_S: Final = 0.5
"""Longer than gossip takes to a neighbour."""
MAX_LATER: Final = 4_096
"""Nodes whose sheet waits to be passed on."""
MAX_NEIGHBOURS: Final = 4_096

OpenedSheet = OpenSheet | Rejected
OpenedProof = Equivocation | Rejected
Opener = Callable[[bytes, str], OpenedSheet]
"""``open_sheet``, or what gives the same."""
T = TypeVar("T")


class Relay:
    """The sheets of a node's neighbours on their way into ``book`` and on.

    ``random()`` gives numbers in [0, 1) and chooses neighbours. ``counts`` has how often each
    outcome was. A simulation of many nodes in one process may share an ``opener`` that remembers.
    """

    def __init__(
        self,
        book: Book,
        random: Callable[[], float],
        network: str = DEFAULT_NETWORK,
        opener: Opener = open_sheet,
    ) -> None:
        self.book = book
        self.network = network
        self.opener = opener
        self.counts: Counter[Outcome] = Counter()
        self._random = random
        self._subnets: dict[str, str] = {}
        self.gate = Gate(
            self,
            forwarders=Rates(FORWARDER_PER_S, FORWARDER_BURST),
            subnets=Rates(SUBNET_PER_S, SUBNET_BURST),
            answered=Rates(ANSWERED_PER_S, ANSWERED_BURST),
            max_bytes=MAX_SHEET_WIRE_BYTES,
            max_seen=MAX_SEEN,
        )
        self._accounts = Rates(ACCOUNT_PER_S, ACCOUNT_BURST)
        self._sheets_asked = Rates(FORWARDER_PER_S, MAX_SHEETS)
        self._proofs_asked = Rates(PROOFS_PER_S, MAX_PROOFS)
        self._faults = Rates(1 / FORGIVEN_S, MAX_FAULTS)
        self._turned_away: OrderedDict[tuple[bytes, str], int] = OrderedDict()
        self._compare_at_ns = 0
        self._passed_on = Rates(PASSED_ON_PER_S, PASSED_ON_BURST)
        self._later: OrderedDict[bytes, int] = OrderedDict()

    @property
    def neighbours(self) -> tuple[str, ...]:
        """Who is connected."""
        return tuple(self._subnets)

    def subnet(self, peer: str) -> str:
        """What a neighbour shares a quota with; what nobody's neighbours share is empty."""
        return self._subnets.get(peer, "")

    def connected(self, peer: str, subnet: str) -> None:
        """A peer is a neighbour from now on; ``subnet`` is what it shares a quota with."""
        if len(self._subnets) < MAX_NEIGHBOURS:
            self._subnets[peer] = subnet

    def disconnected(self, peer: str) -> None:
        """It is one no more. Its quotas and faults are remembered."""
        self._subnets.pop(peer, None)

    def take(self, wire: bytes, forwarder: str, now_ns: int) -> Verdict:
        """Judge a gossiped sheet. Costs at most two signature checks."""
        verdict = self._take(wire, forwarder, now_ns)
        self.counts[verdict.outcome] += 1
        return verdict

    def enter(self, opened: OpenedSheet, source: str, now_ns: int) -> Verdict:
        """Judge a sheet that came by comparing; its signatures were checked already."""
        verdict = self._enter(opened, source, now_ns)
        self.counts[verdict.outcome] += 1
        if verdict.outcome is Outcome.NEW and isinstance(opened, OpenSheet):
            self._pass_on_later(opened.node, now_ns + int(OVERTAKEN_S * NS_PER_S))
        elif verdict.outcome is Outcome.PROOF:
            self._compare_soon(now_ns)
        return verdict

    def enter_proof(self, opened: OpenedProof, source: str, now_ns: int) -> bool:
        """Judge a proof of an equivocation that came by comparing; whether it is new."""
        outcome: OpenedProof | Applied = opened
        if isinstance(opened, Equivocation):
            outcome = self.book.apply_equivocation(opened, now_ns)
        if isinstance(outcome, Rejected):
            self.fault(source, now_ns)
        elif isinstance(outcome, Equivocation):
            self.counts[Outcome.PROOF] += 1
            self._compare_soon(now_ns)
        return isinstance(outcome, Equivocation)

    def wants(self, node: bytes, number: int, sheet_id: bytes, peer: str, now_ns: int) -> bool:
        """Whether to ask ``peer`` for a sheet that it says it has."""
        if self._turned_away.get((sheet_id, peer), now_ns) > now_ns:
            return False
        return self.book.lacks(node, number, sheet_id)

    def sheets_to_ask(self, nodes: list[bytes], peer: str, now_ns: int) -> tuple[bytes, ...]:
        """Of which of ``nodes`` to ask ``peer`` for the sheet now; they are counted."""
        return self._sample(nodes, self._sheets_asked.take(peer, len(nodes), now_ns / NS_PER_S))

    def proofs_to_ask(self, nodes: list[bytes], peer: str, now_ns: int) -> tuple[bytes, ...]:
        """Against which of ``nodes`` to ask ``peer`` for its proof now; they are counted."""
        return self._sample(nodes, self._proofs_asked.take(peer, len(nodes), now_ns / NS_PER_S))

    def fault(self, peer: str, now_ns: int) -> None:
        """Note that ``peer`` did what no honest one does."""
        self._faults.allow(peer, now_ns / NS_PER_S)

    def score(self, peer: str, now_ns: int) -> float:
        """How many faults ``peer`` may still have; below one, it is shunned."""
        return self._faults.left(peer, now_ns / NS_PER_S)

    def is_shunned(self, peer: str, now_ns: int) -> bool:
        """Whether nothing from ``peer`` is looked at."""
        return self.score(peer, now_ns) < 1

    def due(self, now_ns: int) -> tuple[str, ...]:
        """With whom to compare now: nobody, most of the time. Ask every ``COMPARE_SOON_S``."""
        if now_ns < self._compare_at_ns:
            return ()
        # Spread, so that nodes that start together do not go on comparing together.
        self._compare_at_ns = now_ns + int(COMPARE_S * (0.75 + self._random() / 4) * NS_PER_S)
        return self.sample(COMPARED_AT_ONCE, now_ns)

    def sample(self, most: int, now_ns: int) -> tuple[str, ...]:
        """Up to ``most`` random neighbours that are not shunned."""
        return self._sample([p for p in self._subnets if not self.is_shunned(p, now_ns)], most)

    def to_pass_on(self, now_ns: int) -> list[bytes]:
        """The envelopes to gossip now. Ask every ``PASS_ON_S``."""
        now_s, found = now_ns / NS_PER_S, []
        for node in [node for node, at_ns in self._later.items() if at_ns <= now_ns]:
            sheet = self.book.get(node, now_ns)
            if sheet is not None and self._accounts.left(sheet.account.hex(), now_s) < 1:
                continue
            del self._later[node]
            if sheet is None:
                continue
            if self._passed_on.allow("", now_s):
                self._accounts.allow(sheet.account.hex(), now_s)
                found.append(sheet.sealed.wire)
            else:
                self._compare_soon(now_ns)
        return found

    def _sample(self, found: list[T], most: int) -> tuple[T, ...]:
        if most >= len(found):
            return tuple(found)
        for place in range(most):
            other = place + int(self._random() * (len(found) - place))
            found[place], found[other] = found[other], found[place]
        return tuple(found[:most])

    def _compare_soon(self, now_ns: int) -> None:
        soon_ns = now_ns + int(COMPARE_SOON_S * NS_PER_S)
        self._compare_at_ns = min(self._compare_at_ns, soon_ns)

    def _take(self, wire: bytes, forwarder: str, now_ns: int) -> Verdict:
        refusal = self.gate.refusal(wire, forwarder, now_ns)
        if refusal is not None:
            return refusal
        opened = self.opener(wire, self.network)
        if isinstance(opened, OpenSheet):
            early = check_clock(opened, now_ns)
            if early is not None:
                return Verdict(Outcome.CLOCK, early.reason)
        verdict = self._enter(opened, forwarder, now_ns)
        if isinstance(opened, OpenSheet):
            verdict = self._may_gossip(verdict, opened, now_ns)
        if verdict.outcome is not Outcome.BOOK:
            self.gate.judged(wire)
        return verdict

    def _may_gossip(self, verdict: Verdict, sheet: OpenSheet, now_ns: int) -> Verdict:
        """The verdict on a gossiped sheet, by what its account may still gossip."""
        is_late = verdict.outcome is Outcome.KNOWN and sheet.node in self._later
        if verdict.outcome is not Outcome.NEW and not is_late:
            return verdict
        if self._accounts.allow(sheet.account.hex(), now_ns / NS_PER_S):
            self._later.pop(sheet.node, None)
            return Verdict(Outcome.NEW)
        self._pass_on_later(sheet.node, now_ns)
        return Verdict(Outcome.LATER)

    def _pass_on_later(self, node: bytes, at_ns: int) -> None:
        remember(self._later, node, at_ns, MAX_LATER)

    def _enter(self, opened: OpenedSheet, source: str, now_ns: int) -> Verdict:
        if isinstance(opened, Rejected):
            self.fault(source, now_ns)
            return Verdict(Outcome.BAD, opened.reason)
        wrong = check_clock(opened, now_ns)
        if wrong is not None:
            self._turn_away(opened, source, now_ns)
            return Verdict(Outcome.CLOCK, wrong.reason)
        outcome = self.book.apply(opened, now_ns, source)
        if isinstance(outcome, Equivocation):
            return Verdict(Outcome.PROOF)
        if isinstance(outcome, Rejected):
            self._turn_away(opened, source, now_ns)
            return Verdict(Outcome.BOOK, outcome.reason)
        return Verdict(Outcome.NEW if outcome.changed else Outcome.KNOWN)

    def _turn_away(self, sheet: OpenSheet, source: str, now_ns: int) -> None:
        until_ns = now_ns + TURNED_AWAY_NS
        remember(self._turned_away, (sheet.sealed.id, source), until_ns, MAX_TURNED_AWAY)
