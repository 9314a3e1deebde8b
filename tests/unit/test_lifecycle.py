"""A buyer and a provider joined by a link that loses messages, and restarts anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from p2pflop.errors import ProtocolError, StoreError
from p2pflop.ids import content_hash
from p2pflop.job import buying
from p2pflop.job.buying import MAX_REST_NS, Buying, buyer
from p2pflop.job.events import (
    DEADLINE,
    Action,
    Again,
    Alive,
    Blame,
    Checkpointed,
    Deny,
    Done,
    Event,
    Finish,
    Grant,
    Lost,
    Persist,
    Ranked,
    Ready,
    Received,
    Reveal,
    Send,
    SetTimer,
    Start,
    State,
    Stop,
    Timer,
    Verified,
)
from p2pflop.job.lifecycle import (
    Lifecycle,
    Row,
)
from p2pflop.job.selling import Selling, provider
from p2pflop.market.ranking import Deal
from p2pflop.market.records import Receipt
from p2pflop.market.samples import (
    DEADLINE_NS,
    NOW_NS,
    RESULT,
    ROOT,
    SALT,
    STEPS,
    Party,
    ask,
    buyer_desk,
    deals,
    party,
    provider_desk,
)
from p2pflop.wire import open_sealed

SHOPPER = party(0)
HALF = content_hash(b"half way")


@dataclass
class End:
    """One side, its journal, and what a driver would do. ``crash_at`` counts actions done."""

    name: str
    make: Callable[[], Lifecycle[Buying] | Lifecycle[Selling]]
    life: Lifecycle[Buying] | Lifecycle[Selling]
    journal: list[Row] = field(default_factory=list)
    outbox: list[Send] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    timers: dict[str, int] = field(default_factory=dict)
    finishes: list[Finish] = field(default_factory=list)
    done: int = 0
    crash_at: int = -1
    crashed: bool = False

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if self.done == self.crash_at:
                self.crashed = True
                return
            self.done += 1
            match action:
                case Persist(kind, body):
                    self.journal.append((kind, body))
                case Send():
                    self.outbox.append(action)
                case Start(task):
                    self.tasks.append(task)
                case SetTimer(name, at_ns):
                    self.timers[name] = at_ns
                case Stop():
                    self.tasks.clear()
                case Finish():
                    self.finishes.append(action)


@dataclass
class Link:
    """Joins one buyer to providers; plays both drivers. ``drop`` loses the n-th message sent."""

    sellers: list[Party]
    checkpoint: bool = True
    drop: frozenset[int] = frozenset()
    deny: frozenset[int] = frozenset()
    now_ns: int = NOW_NS
    sent: int = 0
    bids: int = 0

    def __post_init__(self) -> None:
        found = deals(*(seller.sheet(ask()) for seller in self.sellers))
        self.found: list[Deal] = found
        by_node = {seller.node.public_key: seller for seller in self.sellers}
        self.order = [by_node[deal.node] for deal in found]
        self.buyer = self._end("buyer", lambda: buyer(buyer_desk(SHOPPER, found), DEADLINE_NS))
        self.provider: End | None = None
        self.providers: list[End] = []

    @staticmethod
    def _end(name: str, make: Callable[[], Lifecycle[Buying] | Lifecycle[Selling]]) -> End:
        return End(name, make, make())

    @property
    def ends(self) -> list[End]:
        return [self.buyer, *self.providers]

    def run(self) -> None:
        """Until both sides have ended or nothing but time could change anything."""
        self.buyer.do(self.buyer.life.start(self.now_ns))
        self.feed(self.buyer, Ranked())
        for _ in range(500):
            if not (self._restart() or self._deliver() or self._work() or self._wait()):
                return
        raise AssertionError("the exchange does not come to an end")

    def feed(self, end: End, event: Event) -> None:
        try:
            end.do(end.life.on(event, self.now_ns))
        except ProtocolError:
            end.do(end.life.on(Lost("a bad message"), self.now_ns))

    def _restart(self) -> bool:
        for end in self.ends:
            if end.crashed:
                end.crashed, end.crash_at = False, -1
                end.outbox.clear()
                end.tasks.clear()
                end.timers.clear()
                end.life = end.make()
                if not end.journal:
                    end.do(end.life.start(self.now_ns))
                else:
                    end.do(end.life.resume(end.journal, self.now_ns))
                if end.life.state is State.RANKING:
                    self.feed(end, Ranked())
                other = self.provider if end is self.buyer else self.buyer
                if other is not None and not other.crashed:
                    self.feed(other, Lost("connection reset"))
                return True
        return False

    def _deliver(self) -> bool:
        for end in self.ends:
            if end.outbox:
                message = end.outbox.pop(0)
                self.sent += 1
                if self.sent not in self.drop:
                    self._hand_over(end, message)
                return True
        return False

    def _hand_over(self, end: End, message: Send) -> None:
        if end is not self.buyer:
            if end is self.provider:
                self.feed(self.buyer, Received(message.wire, message.salt))
            return
        if message.kind == "bid":
            known = [made for made in self.providers if made.name == message.wire.hex()]
            if known:
                self.provider = known[0]
            else:
                self._offer(message.wire)
                return
        if self.provider is not None:
            self.feed(self.provider, Received(message.wire))

    def _offer(self, wire: bytes) -> None:
        seller = next(s for s, d in zip(self.order, self.found, strict=True) if d.node in wire)
        end = self._end(wire.hex(), lambda: provider(provider_desk(seller), wire, DEADLINE_NS))
        self.providers.append(end)
        self.provider = end
        end.do(end.life.start(self.now_ns))
        self.bids += 1

    def _work(self) -> bool:
        for end in self.providers:
            if end.crashed:
                continue
            if end.life.state is State.OFFERED:
                denied = self.providers.index(end) + 1 in self.deny
                self.feed(end, Deny("busy") if denied else Grant())
                return True
            if end.tasks:
                self._provide(end, end.tasks.pop(0))
                return True
        if self.buyer.tasks:
            self.buyer.tasks.clear()
            side = self.buyer.life.side
            assert isinstance(side, Buying)
            for number, wire in sorted(side.unsigned.items()):
                self.feed(self.buyer, Verified(number, wire))
            return True
        return False

    def _provide(self, end: End, task: str) -> None:
        if task == "prepare":
            self._progress(end)
            self.feed(end, Ready())
        elif task == "run":
            if self.checkpoint:
                self.feed(end, Checkpointed(STEPS // 2, HALF))
            self._progress(end)
            if not end.crashed and end.life.state is State.RUNNING:
                self.feed(end, Done(STEPS, ROOT, RESULT, SALT))
        elif task == "reveal":
            self.feed(end, Reveal())

    def _progress(self, end: End) -> None:
        if end is self.provider and not self.buyer.crashed:
            try:
                self.buyer.do(self.buyer.life.on(Alive(), self.now_ns))
            except ProtocolError as error:
                raise AssertionError("progress is never an offence") from error

    def _wait(self) -> bool:
        """Nothing to do: let the next timer of anybody come."""
        waiting = [
            (at_ns, end, name)
            for end in self.ends
            if not end.life.ended
            for name, at_ns in end.timers.items()
        ]
        if not waiting:
            return False
        at_ns, end, name = min(waiting, key=lambda entry: entry[0])
        self.now_ns = max(self.now_ns, at_ns)
        del end.timers[name]
        end.do(end.life.on(Timer(name), self.now_ns))
        return True

    def check(self) -> None:
        """What must hold whatever was lost and whoever died."""
        for end in self.ends:
            assert end.life.ended, f"{end.name[:8]} hangs in {end.life.state}"
            assert {finish.state for finish in end.finishes} == {end.life.state}
            assert not end.outbox or end.life.ended
        settled = [end for end in self.providers if end.life.state is State.SETTLED]
        assert len(settled) <= 1
        if settled:
            assert self.buyer.life.state is State.SETTLED, "paid for what the buyer did not take"
            ours, theirs = self.buyer.life.side, settled[0].life.side
            assert ours.countersigned == theirs.countersigned
            amount = open_sealed(Receipt, theirs.countersigned).record.amount_nusd
            assert amount == self.found[0].total_nusd


def test_an_exchange_settles_on_both_sides() -> None:
    link = Link([party(1)])
    link.run()
    link.check()
    assert [end.life.state for end in link.ends] == [State.SETTLED, State.SETTLED]
    assert [kind for kind, _ in link.buyer.journal] == [
        "start",
        "ranked",
        "fill",
        "started",
        "receipt",
        "commit",
        "last receipt",
        "countersign",
        "verified",
    ]
    assert [kind for kind, _ in link.providers[0].journal] == [
        "start",
        "grant",
        "confirm",
        "ready",
        "receipt",
        "done",
        "reveal",
        "countersign",
        "settle",
    ]


def test_a_row_is_journalled_before_anything_else_is_done() -> None:
    made = buyer(buyer_desk(SHOPPER, deals(party(1).sheet(ask()))), DEADLINE_NS)
    assert isinstance(made.start(NOW_NS)[0], Persist)
    assert [type(action) for action in made.on(Ranked(), NOW_NS)[:2]] == [Persist, Send]


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("lost", range(1, 11))
def test_a_lost_message_leaves_nobody_hanging(lost: int, checkpoint: bool) -> None:
    link = Link([party(1), party(2)], checkpoint=checkpoint, drop=frozenset({lost}))
    link.run()
    link.check()


def test_a_lost_bid_or_answer_costs_an_attempt_only() -> None:
    for lost, reached in ((1, 1), (2, 2)):
        link = Link([party(1), party(2)], drop=frozenset({lost}))
        link.run()
        link.check()
        assert link.buyer.life.state is State.SETTLED
        assert link.bids == reached, "how many providers got a bid"


@pytest.mark.parametrize("side", ["buyer", "provider"])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_restart_at_every_action_leaves_nobody_hanging(side: str, checkpoint: bool) -> None:
    whole = Link([party(1), party(2)], checkpoint=checkpoint)
    whole.run()
    total = whole.buyer.done if side == "buyer" else whole.providers[0].done
    assert total > 15
    for at in range(total):
        link = Link([party(1), party(2)], checkpoint=checkpoint)
        if side == "buyer":
            link.buyer.crash_at = at
        else:
            made = link._offer

            def offer(
                wire: bytes, link: Link = link, at: int = at, made: Callable[[bytes], None] = made
            ) -> None:
                made(wire)
                if len(link.providers) == 1:
                    link.providers[0].crash_at = max(at, link.providers[0].done)

            link._offer = offer  # type: ignore[method-assign]
        link.run()
        link.check()
        if side == "buyer":
            assert link.buyer.life.state is State.SETTLED, f"a restart at action {at} lost the job"


def test_no_deal_fails_with_the_reason_given() -> None:
    made = buyer(buyer_desk(SHOPPER, []), DEADLINE_NS)
    made.start(NOW_NS)
    actions = made.on(Ranked("all too dear"), NOW_NS)
    assert actions[-1] == Finish(State.FAILED, "all too dear", Blame.MARKET)


def test_a_run_that_rests_waits_ever_longer_until_its_deadline() -> None:
    made = buyer(buyer_desk(SHOPPER, []), DEADLINE_NS, rests=True)
    made.start(NOW_NS)
    now_ns, waits = NOW_NS, []
    while not made.ended:
        actions = made.on(Ranked("all too dear"), now_ns)
        assert made.state is State.WAITING
        assert Start("rest") in actions
        [again] = [a for a in actions if isinstance(a, SetTimer) and a.name == "again"]
        waits.append(again.at_ns - now_ns)
        now_ns = min(again.at_ns, DEADLINE_NS)
        made.on(Timer("again" if now_ns < DEADLINE_NS else DEADLINE), now_ns)
    assert waits == sorted(waits)
    assert waits[-1] == MAX_REST_NS
    assert made.state is State.FAILED


def test_a_run_that_rests_ends_with_a_ranking_that_is_final() -> None:
    made = buyer(buyer_desk(SHOPPER, []), DEADLINE_NS, rests=True)
    made.start(NOW_NS)
    made.on(Ranked("all too dear"), NOW_NS)
    assert made.state is State.WAITING
    made.on(Again(), NOW_NS)
    actions = made.on(Ranked("over a limit of each ask", is_final=True), NOW_NS)
    assert actions[-1] == Finish(State.FAILED, "over a limit of each ask", Blame.MARKET)


def test_one_that_was_filled_before_waits_whatever_a_ranking_says() -> None:
    """What is delivered is paid for: another provider may do the rest until the deadline."""
    seller = party(1)
    desk = buyer_desk(SHOPPER, deals(seller.sheet(ask())))
    made = buyer(desk, DEADLINE_NS, rests=True)
    made.start(NOW_NS)
    made.on(Ranked(), NOW_NS)
    sale = provider(provider_desk(seller), made.side.bid, DEADLINE_NS)
    sale.start(NOW_NS)
    [fill] = [action for action in sale.on(Grant(), NOW_NS) if isinstance(action, Send)]
    made.on(Received(fill.wire), NOW_NS)
    made.on(Lost("the network is gone"), NOW_NS)
    assert made.state is State.WAITING
    made.on(Again(), NOW_NS)
    made.on(Ranked("over a limit of each ask", is_final=True), NOW_NS)
    assert made.state is State.WAITING


def test_a_quote_wakes_a_run_that_rests_and_a_restart_has_it_wait_again() -> None:
    made = buyer(buyer_desk(SHOPPER, []), DEADLINE_NS, rests=True)
    rows = [made.start(NOW_NS)[0], made.on(Ranked("all too dear"), NOW_NS)[0]]
    journal = [(row.kind, row.body) for row in rows if isinstance(row, Persist)]
    again = buyer(buyer_desk(SHOPPER, []), DEADLINE_NS, rests=True)
    assert Start("rest") in again.resume(journal, NOW_NS)
    assert Start("rank") in again.on(Again(), NOW_NS)
    assert again.state is State.RANKING


def test_a_refusal_leads_to_the_next_deal_and_the_last_to_failure() -> None:
    link = Link([party(1), party(2)], deny=frozenset({1}))
    link.run()
    link.check()
    assert link.buyer.life.state is State.SETTLED
    assert [end.life.state for end in link.providers] == [State.RELEASED, State.SETTLED]
    link = Link([party(1), party(2)], deny=frozenset({1, 2}))
    link.run()
    assert link.buyer.finishes[0].state is State.FAILED
    assert "busy" in link.buyer.finishes[0].reason
    assert link.buyer.finishes[0].blame is Blame.MARKET


def test_attempts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buying, "MAX_ATTEMPTS", 64)
    (deal,) = deals(party(1).sheet(ask()))
    made = buyer(buyer_desk(SHOPPER, [deal] * 74), DEADLINE_NS)
    made.start(NOW_NS)
    made.on(Ranked(), NOW_NS)
    attempts = 1
    while not made.ended:
        made.on(Lost("no route"), NOW_NS)
        attempts += 1
    assert attempts == 65


def test_a_damaged_journal_is_an_error_of_the_store() -> None:
    good = Link([party(1)])
    good.run()
    rows = good.buyer.journal
    for bad in (
        [*rows[:2], *rows[3:]],
        [("no such edge", rows[0][1])],
        [rows[0], ("ranked", b"\xc1")],
        [rows[0], ("ranked", rows[0][1])],
        [*rows, rows[-1]],
    ):
        with pytest.raises(StoreError, match="journal"):
            good.buyer.make().resume(bad, NOW_NS)


def test_a_restarted_provider_gives_running_leases_back() -> None:
    for state in (State.PREPARING, State.RUNNING):
        link = Link([party(1)])
        link.run()
        rows = link.providers[0].journal[: 3 if state is State.PREPARING else 4]
        life = link.providers[0].make()
        actions = life.resume(rows, NOW_NS)
        assert isinstance(actions[0], Persist)
        assert life.state is State.RELEASED
        assert any(isinstance(a, Send) and a.kind == "abandon" for a in actions)


def test_a_finished_journal_only_repeats_its_end() -> None:
    link = Link([party(1)])
    link.run()
    life = link.buyer.make()
    actions = life.resume(link.buyer.journal, NOW_NS)
    assert [type(action) for action in actions] == [Send, Finish]
    sold = link.providers[0].make()
    assert sold.resume(link.providers[0].journal, NOW_NS) == [
        Finish(State.SETTLED, "", Blame.NOBODY)
    ]
