"""Both sides brought to each state by hand: what each accepts there, and each limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from p2pflop.errors import ProtocolError
from p2pflop.ids import content_hash
from p2pflop.job.buying import (
    BUSY_PREFIX,
    FIRST_WAIT_NS,
    MAX_UNSIGNED_RECEIPTS,
    Buying,
    buyer,
)
from p2pflop.job.events import (
    DEADLINE,
    ENDS,
    Action,
    Again,
    Alive,
    Blame,
    Cancel,
    Checkpointed,
    Deny,
    Done,
    Event,
    Fault,
    Fetched,
    Finish,
    Grant,
    Lost,
    Ranked,
    Ready,
    Received,
    Refuted,
    Reveal,
    Send,
    SetTimer,
    Start,
    State,
    Timer,
    Trial,
    Tried,
    Verified,
    Withdraw,
)
from p2pflop.job.lifecycle import (
    BUYER,
    BUYER_LIMITS,
    CONFIRM_WITHIN_NS,
    DELIVERY,
    MAX_WAIT_NS,
    PROVIDER,
    PROVIDER_LIMITS,
    VOLATILE,
    Edge,
    Lifecycle,
)
from p2pflop.job.selling import Selling, provider
from p2pflop.market.receipts import countersign
from p2pflop.market.records import Abandon, Confirm, Receipt
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
from p2pflop.units import NS_PER_S
from p2pflop.wire import open_sealed, seal

SHOPPER = party(0)
HALF = content_hash(b"half way")


@dataclass
class Pair:
    """Both sides brought to a state, message by message, without a driver."""

    buyer: Lifecycle[Buying]
    provider: Lifecycle[Selling]
    seller: Party

    def to_provider(self, actions: list[Action], now_ns: int = NOW_NS) -> list[Action]:
        return [
            made
            for action in actions
            if isinstance(action, Send)
            for made in self.provider.on(Received(action.wire, action.salt), now_ns)
        ]

    def to_buyer(self, actions: list[Action], now_ns: int = NOW_NS) -> list[Action]:
        return [
            made
            for action in actions
            if isinstance(action, Send)
            for made in self.buyer.on(Received(action.wire, action.salt), now_ns)
        ]


def verified(life: Lifecycle[Buying], number: int) -> Verified:
    """That receipt ``number``, which waits at the buyer, is verified."""
    return Verified(number, life.side.unsigned.get(number, b""))


def pair(until: State, **charges: int) -> Pair:
    """``until`` is the buyer's or the provider's state at which to stop."""
    seller = party(1)
    desk = buyer_desk(SHOPPER, deals(seller.sheet(ask(**charges))), tries=until is State.CHECKING)
    made = buyer(desk, DEADLINE_NS)
    made.start(NOW_NS)
    made.on(Ranked(), NOW_NS)
    sale = provider(provider_desk(seller), made.side.bid, DEADLINE_NS)
    sale.start(NOW_NS)
    both = Pair(made, sale, seller)
    if until is State.CHECKING:
        both.to_provider(both.to_buyer(sale.on(Grant(), NOW_NS)))
        both.to_buyer(sale.on(Fault("it faulted", job_fault=True), NOW_NS))
        return both
    if until is State.WAITING:
        both.to_buyer(sale.on(Deny(BUSY_PREFIX + "full"), NOW_NS))
        return both
    steps: list[Callable[[], object]] = [
        lambda: both.to_buyer(sale.on(Grant(), NOW_NS)),
        lambda: sale.on(Received(made.side.confirm), NOW_NS),
        lambda: (sale.on(Ready(), NOW_NS), made.on(Alive(), NOW_NS)),
        lambda: both.to_buyer(sale.on(Done(STEPS, ROOT, RESULT, SALT), NOW_NS)),
        lambda: both.to_buyer(sale.on(Reveal(), NOW_NS)),
        lambda: both.to_provider(made.on(verified(made, 1), NOW_NS)),
    ]
    for step in steps:
        if until in (made.state, sale.state):
            return both
        step()
    assert until in (made.state, sale.state)
    return both


def test_a_buyer_comes_back_to_those_that_had_no_room() -> None:
    seller = party(1)
    (deal,) = deals(seller.sheet(ask()))
    offers = [deal]
    made = buyer(buyer_desk(SHOPPER, offers), DEADLINE_NS)
    made.start(NOW_NS)

    def refuse(reason: str, now_ns: int) -> None:
        made.on(Ranked(), now_ns)
        assert made.state is State.BIDDING
        sale = provider(provider_desk(seller), made.side.bid, DEADLINE_NS)
        sale.start(now_ns)
        Pair(made, sale, seller).to_buyer(sale.on(Deny(reason), now_ns), now_ns)

    waited, now_ns = [], NOW_NS
    for _ in range(8):
        refuse(BUSY_PREFIX + "full", now_ns)
        offers.append(deal)
        began_ns = now_ns
        while made.state is State.WAITING:
            now_ns += NS_PER_S // 8
            actions = made.on(Timer("again"), now_ns)
        waited.append(now_ns - began_ns)
        assert Start("rank") in actions
    assert waited[:3] == [2 * FIRST_WAIT_NS, 4 * FIRST_WAIT_NS, 8 * FIRST_WAIT_NS]
    assert waited[-1] == MAX_WAIT_NS
    refuse(BUSY_PREFIX + "full", now_ns)
    offers.append(deal)
    assert Start("rank") in made.on(Again(), now_ns), "or at once, when there is room"
    refuse("never", now_ns)
    assert made.state is State.FAILED, "a no that is not for want of room is final"


def test_a_check_of_a_receipt_counts_for_that_receipt_alone() -> None:
    """One may end after its provider was given up and the next one has billed."""
    both = pair(State.VERIFYING)
    assert both.buyer.on(Verified(1, b"another receipt"), NOW_NS) == []
    assert both.buyer.on(Refuted("wrong", b"another receipt"), NOW_NS) == []
    assert both.buyer.state is State.VERIFYING
    assert pair(State.CONFIRMING).buyer.on(Verified(1, b"another receipt"), NOW_NS) == []


def test_a_confirm_must_come_within_two_seconds() -> None:
    both = pair(State.LEASED)
    late = NOW_NS + CONFIRM_WITHIN_NS
    assert both.provider.on(Timer("confirm"), late - 1) == [], "an early timer is ignored"
    actions = both.provider.on(Received(both.buyer.side.confirm), late)
    assert both.provider.state is State.RELEASED, "the limit wins over a late event"
    finish = actions[-1]
    assert isinstance(finish, Finish)
    assert finish.blame is Blame.BUYER
    again = both.to_buyer(actions)
    assert both.buyer.state is State.WAITING, "the buyer hears of it and looks for another deal"
    assert again


def test_who_a_lease_is_given_back_for_bears_the_blame() -> None:
    for blame in (Blame.PROVIDER, Blame.BUYER):
        sale = pair(State.RUNNING).provider
        [finish] = [a for a in sale.on(Withdraw("x", blame), NOW_NS) if isinstance(a, Finish)]
        assert (finish.state, finish.blame) == (State.RELEASED, blame)


@pytest.mark.parametrize("end", [Withdraw("shutdown"), Fault("broken")])
def test_what_is_countersigned_is_owed_even_after_the_providers_end(end: Event) -> None:
    both = pair(State.RUNNING)
    both.to_buyer(both.provider.on(Checkpointed(STEPS // 2, HALF), NOW_NS))
    signed = both.buyer.on(verified(both.buyer, 1), NOW_NS)
    both.provider.on(end, NOW_NS)
    state = both.provider.state
    assert state in ENDS
    actions = both.to_provider(signed)
    assert [type(action).__name__ for action in actions] == ["Persist"], "it ends only once"
    assert both.provider.side.countersigned == both.buyer.side.countersigned
    assert both.provider.state is state
    assert both.to_provider(signed) == [], "and is booked once"


@pytest.mark.parametrize("state", [State.BIDDING, State.CONFIRMING, State.RUNNING])
def test_a_silent_provider_is_given_up(state: State) -> None:
    both = pair(state)
    limit = BUYER_LIMITS[state]
    assert both.buyer.on(Timer(limit.name), NOW_NS + limit.after_ns - 1) == []
    actions = both.buyer.on(Timer(limit.name), NOW_NS + limit.after_ns)
    assert f"silent for {limit.after_ns // NS_PER_S} s" in both.buyer.side.outcome()[0]
    assert both.buyer.state is (State.FAILED if state is State.BIDDING else State.WAITING)
    fenced = any(isinstance(action, Send) and action.kind == "abandon" for action in actions)
    assert fenced == (state is not State.BIDDING)


def test_signs_of_life_renew_the_limit() -> None:
    both = pair(State.RUNNING)
    limit = BUYER_LIMITS[State.RUNNING]
    now_ns = NOW_NS
    for _ in range(5):
        now_ns += limit.after_ns - 1
        both.buyer.on(Alive(), now_ns)
        both.provider.on(Alive(), now_ns)
    assert both.buyer.state is State.RUNNING
    assert both.provider.state is State.RUNNING


@pytest.mark.parametrize("last", [False, True])
def test_what_was_billed_has_to_come_whatever_else_is_told(last: bool) -> None:
    both = pair(State.RUNNING)
    both.to_buyer(both.provider.on(Checkpointed(1, HALF), NOW_NS))
    half_ns = NOW_NS + DELIVERY.after_ns // 2
    for at_ns in range(NOW_NS, half_ns, 10 * NS_PER_S):
        both.buyer.on(Alive(worked=True), at_ns)
    both.to_buyer(both.provider.on(Checkpointed(2, HALF), half_ns), half_ns)
    if last:
        both.to_buyer(both.provider.on(Done(STEPS, ROOT, RESULT, SALT), half_ns), half_ns)
        both.to_buyer(both.provider.on(Reveal(), half_ns), half_ns)
    due_ns = NOW_NS + DELIVERY.after_ns
    assert both.buyer.on(Timer(DELIVERY.name), due_ns - 1) == []
    assert both.buyer.on(Timer(DELIVERY.name), due_ns)
    assert "handed over nothing more" in both.buyer.side.outcome()[0]
    assert both.buyer.state is State.WAITING


@pytest.mark.parametrize("renews", [Fetched(), "countersignature"])
def test_a_delivery_that_moves_is_waited_for(renews: Event | str) -> None:
    both = pair(State.RUNNING)
    for step in (1, 2):
        both.to_buyer(both.provider.on(Checkpointed(step, HALF), NOW_NS))
    later_ns = NOW_NS + 20 * NS_PER_S
    event = verified(both.buyer, 1) if isinstance(renews, str) else renews
    both.buyer.on(Alive(), later_ns)
    both.buyer.on(event, later_ns)
    due_ns = later_ns + DELIVERY.after_ns
    for at_ns in range(later_ns, due_ns, 10 * NS_PER_S):
        assert both.buyer.on(Alive(), at_ns)
    assert both.buyer.state.value == "running"
    assert both.buyer.on(Timer(DELIVERY.name), due_ns)
    assert both.buyer.state is State.WAITING


def test_the_deadline_ends_what_is_not_delivered_and_spares_what_is() -> None:
    running = pair(State.RUNNING)
    for at_ns in range(NOW_NS, DEADLINE_NS, 20 * NS_PER_S):
        running.buyer.on(Alive(), at_ns)
        running.provider.on(Alive(), at_ns)
    for life in (running.buyer, running.provider):
        actions = life.on(Timer(DEADLINE), DEADLINE_NS)
        assert isinstance(actions[-1], Finish)
        assert "deadline" in actions[-1].reason
    delivered = pair(State.VERIFYING)
    for at_ns in range(NOW_NS, DEADLINE_NS, 20 * NS_PER_S):
        delivered.buyer.on(Fetched(), at_ns)
    assert not [
        a
        for a in delivered.buyer.on(verified(delivered.buyer, 1), DEADLINE_NS + 1)
        if isinstance(a, SetTimer)
    ]
    assert delivered.buyer.state is State.SETTLED


def test_an_abandon_is_fenced_at_the_last_countersigned_step() -> None:
    both = pair(State.RUNNING)
    both.to_buyer(both.provider.on(Checkpointed(STEPS // 2, HALF), NOW_NS))
    both.to_provider(both.buyer.on(verified(both.buyer, 1), NOW_NS))
    (abandon,) = [a for a in both.buyer.on(Cancel(), NOW_NS) if isinstance(a, Send)]
    record = open_sealed(Abandon, abandon.wire).record
    assert (record.from_step, record.root) == (STEPS // 2, HALF)
    both.provider.on(Received(abandon.wire), NOW_NS)
    assert both.provider.state is State.RELEASED
    assert both.provider.side.countersigned, "what was countersigned stays owed"


def test_a_wrong_delivery_is_not_countersigned() -> None:
    both = pair(State.VERIFYING)
    actions = both.buyer.on(Refuted("chunk 3 is missing", both.buyer.side.unsigned[1]), NOW_NS)
    assert both.buyer.state is State.WAITING
    assert not both.buyer.side.delivered
    both.to_provider(actions)
    assert both.provider.state is State.FAILED
    assert "chunk 3 is missing" in both.provider.side.outcome()[0]


def test_a_result_must_be_the_one_committed_to() -> None:
    both = pair(State.COMMITTED)
    (receipt,) = [a for a in both.provider.on(Reveal(), NOW_NS) if isinstance(a, Send)]
    before = both.buyer.state
    with pytest.raises(ProtocolError, match="committed"):
        both.buyer.on(Received(receipt.wire, ROOT), NOW_NS)
    with pytest.raises(ProtocolError, match="salt"):
        both.buyer.on(Received(receipt.wire), NOW_NS)
    assert both.buyer.state is before
    assert both.buyer.on(Received(receipt.wire, SALT), NOW_NS)


def test_a_result_before_its_commit_is_refused() -> None:
    both = pair(State.RUNNING)
    both.provider.on(Done(STEPS, ROOT, RESULT, SALT), NOW_NS)
    with pytest.raises(ProtocolError, match="before its commit"):
        both.to_buyer(both.provider.on(Reveal(), NOW_NS))


def test_a_fault_of_the_job_is_told_apart_from_one_of_the_provider() -> None:
    for job_fault, end in [(True, State.FAILED), (False, State.WAITING)]:
        told = pair(State.RUNNING)
        told.to_buyer(told.provider.on(Fault("out of memory", job_fault), NOW_NS))
        assert told.provider.state is State.FAILED
        assert told.buyer.state is end
        unsigned = pair(State.RUNNING)
        unsigned.buyer.on(Fault("out of memory", job_fault), NOW_NS)
        assert unsigned.buyer.state is end
        assert (unsigned.buyer.side.outcome()[1] is Blame.JOB) == job_fault


def test_a_lease_given_back_before_the_start_moves_the_buyer_on() -> None:
    sellers = [party(1), party(2)]
    found = deals(*(seller.sheet(ask()) for seller in sellers))
    first = next(s for s in sellers if s.node.public_key == found[0].node)
    made = buyer(buyer_desk(SHOPPER, found), DEADLINE_NS)
    made.start(NOW_NS)
    made.on(Ranked(), NOW_NS)
    sale = provider(provider_desk(first), made.side.bid, DEADLINE_NS)
    sale.start(NOW_NS)
    both = Pair(made, sale, first)
    both.to_provider(both.to_buyer(sale.on(Grant(), NOW_NS)))
    sent = both.to_buyer(sale.on(Withdraw("cost"), NOW_NS))
    assert [a.kind for a in sent if isinstance(a, Send)] == ["bid"]
    assert made.state is State.BIDDING
    assert sale.state is State.RELEASED


def test_the_same_bid_gets_the_same_bytes_in_every_state() -> None:
    for state in (State.LEASED, State.PREPARING, State.RUNNING, State.COMMITTED, State.SETTLED):
        both = pair(state)
        assert both.provider.on(Received(both.provider.side.bid), NOW_NS) == [
            Send("fill", both.provider.side.fill)
        ]
    denied = pair(State.OFFERED).provider
    reject = [a for a in denied.on(Deny("busy"), NOW_NS) if isinstance(a, Send)]
    assert denied.on(Received(denied.side.bid), NOW_NS) == reject
    other = buyer(buyer_desk(party(5), deals(party(1).sheet(ask()))), DEADLINE_NS)
    other.start(NOW_NS)
    other.on(Ranked(), NOW_NS)
    with pytest.raises(ProtocolError, match="another bid"):
        denied.on(Received(other.side.bid), NOW_NS)


def test_a_settled_buyer_repeats_its_countersignature() -> None:
    both = pair(State.SETTLED)
    wire = both.provider.side.receipt
    again = both.buyer.on(Received(wire, SALT), NOW_NS)
    assert again == [Send("countersign", both.buyer.side.countersigned)]
    assert both.provider.on(Received(both.buyer.side.countersigned), NOW_NS) == []


def test_a_stranger_cannot_confirm_countersign_or_abandon() -> None:
    stranger = party(9).node
    leased = pair(State.LEASED)
    confirm = open_sealed(Confirm, leased.buyer.side.confirm).record
    with pytest.raises(ProtocolError, match="buyer's word"):
        leased.provider.on(Received(seal(confirm, stranger).wire), NOW_NS)
    both = pair(State.RECEIPTED)
    receipt = open_sealed(Receipt, both.provider.side.receipt)
    with pytest.raises(ProtocolError, match="countersigned"):
        both.provider.on(Received(countersign(stranger, receipt).wire), NOW_NS)
    assert both.provider.state is State.RECEIPTED


def test_a_node_may_buy_from_itself_and_abandon_that() -> None:
    (deal,) = deals(SHOPPER.sheet(ask()))
    made = buyer(buyer_desk(SHOPPER, [deal]), DEADLINE_NS)
    made.start(NOW_NS)
    made.on(Ranked(), NOW_NS)
    sale = provider(provider_desk(SHOPPER), made.side.bid, DEADLINE_NS)
    sale.start(NOW_NS)
    both = Pair(made, sale, SHOPPER)
    both.to_provider(both.to_buyer(sale.on(Grant(), NOW_NS)))
    both.to_provider(made.on(Cancel(), NOW_NS))
    assert (made.state, sale.state) == (State.CANCELLED, State.RELEASED)


def test_unsigned_receipts_are_bounded_on_both_sides() -> None:
    both = pair(State.RUNNING)
    for step in range(1, MAX_UNSIGNED_RECEIPTS + 1):
        root = content_hash(bytes([step]))
        both.to_buyer(both.provider.on(Checkpointed(step, root), NOW_NS))
    assert len(both.buyer.side.unsigned) == MAX_UNSIGNED_RECEIPTS
    assert both.provider.on(Checkpointed(STEPS - 1, ROOT), NOW_NS) == []
    both.to_provider(both.buyer.on(verified(both.buyer, MAX_UNSIGNED_RECEIPTS), NOW_NS))
    assert both.buyer.side.unsigned == both.provider.side.unsigned == {}
    assert both.to_buyer(both.provider.on(Checkpointed(STEPS - 1, ROOT), NOW_NS))


ALL_EVENTS: list[Event] = [
    Alive(),
    Lost("x"),
    Fault("x"),
    Fetched(),
    Ranked(),
    Verified(1, b""),
    Refuted("x", b""),
    Tried(1, Trial.FAULTS, "x"),
    Tried(1, Trial.PASSES),
    Cancel(),
    Grant(),
    Deny("x"),
    Ready(),
    Checkpointed(1, ROOT),
    Done(STEPS, ROOT, RESULT, SALT),
    Reveal(),
    Withdraw("x"),
    Received(b"junk"),
    Received(pair(State.BIDDING).buyer.side.bid),
    Received(pair(State.CONFIRMING).buyer.side.fill),
    Received(pair(State.CONFIRMING).buyer.side.confirm),
    Received(pair(State.SETTLED).provider.side.commit),
    Received(pair(State.SETTLED).provider.side.receipt, SALT),
    Received(pair(State.SETTLED).buyer.side.countersigned),
]


@pytest.mark.parametrize("state", sorted({*BUYER, *PROVIDER} - {State.RANKING, State.CANCELLED}))
@pytest.mark.parametrize("event", ALL_EVENTS, ids=lambda event: type(event).__name__)
def test_any_event_in_any_state_is_taken_or_refused_by_name(state: State, event: Event) -> None:
    for side, table in (("buyer", BUYER), ("provider", PROVIDER)):
        if state not in table or state in (State.RELEASED, State.FAILED):
            continue
        both = pair(state)
        life: Lifecycle[Buying] | Lifecycle[Selling] = getattr(both, side)
        before, refused = life.state, ""
        try:
            life.on(event, NOW_NS)
        except ProtocolError as error:
            refused = error.message
        if refused:
            assert life.state is before
        assert before in refused or "not allowed" not in refused
        assert life.state in set(table[before].values()) | {before}


@pytest.mark.parametrize(
    ("table", "limits", "initial"),
    [(BUYER, BUYER_LIMITS, State.RANKING), (PROVIDER, PROVIDER_LIMITS, State.OFFERED)],
)
def test_every_state_is_reached_bounded_and_leads_to_an_end(
    table: dict[State, dict[Edge, State]], limits: dict[State, object], initial: State
) -> None:
    reached, frontier = {initial}, [initial]
    while frontier:
        for after in table[frontier.pop()].values():
            if after not in reached:
                reached.add(after)
                frontier.append(after)
    assert reached == set(table)
    assert set(limits) == set(table) - ENDS
    ending = set(ENDS)
    while True:
        more = {s for s, row in table.items() if s not in ending and ending & set(row.values())}
        if not more:
            break
        ending |= more
    assert ending >= set(table)
    for state, row in table.items():
        for edge, after in row.items():
            if edge in VOLATILE:
                assert after is state
        if state in ENDS:
            assert set(row) <= VOLATILE | {Edge.COUNTERSIGN}
            assert set(row.values()) == {state}


def test_every_limit_moves_its_state_on() -> None:
    for state, limit in BUYER_LIMITS.items():
        if state is State.RANKING:
            made = buyer(buyer_desk(SHOPPER, []), DEADLINE_NS)
            made.start(NOW_NS)
        else:
            made = pair(state).buyer
        assert made.on(Timer(limit.name), NOW_NS + limit.after_ns)
        assert made.state is not state
    for state, limit in PROVIDER_LIMITS.items():
        sale = pair(state).provider
        at_ns = NOW_NS + limit.after_ns
        assert sale.on(Timer(limit.name), at_ns)
        assert sale.ended
