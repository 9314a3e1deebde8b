"""Whom a buyer believes that the job itself is at fault."""

from __future__ import annotations

import msgspec
import pytest

from p2pflop.job.buying import (
    BUSY_PREFIX,
    FAULTS_HERE,
    HOW_TO_CHECK,
    MAX_STALLED,
    MAX_STRANGERS,
    PASSES_HERE,
    Buying,
    buyer,
)
from p2pflop.job.events import (
    Again,
    Alive,
    Blame,
    Cancel,
    Deny,
    Fault,
    Grant,
    Lost,
    Persist,
    Ranked,
    Start,
    State,
    Timer,
    Trial,
    Tried,
)
from p2pflop.job.lifecycle import BUYER_LIMITS, Edge, Lifecycle
from p2pflop.job.selling import provider
from p2pflop.market.records import Bid
from p2pflop.market.samples import (
    DEADLINE_NS,
    NOW_NS,
    Party,
    ask,
    buyer_desk,
    deals,
    party,
    provider_desk,
)
from p2pflop.wire import open_sealed
from tests.unit.test_lifecycle_states import Pair

SHOPPER = party(0)


def job_fault(seller: Party, made: Lifecycle[Buying]) -> None:
    """The provider that is asked now fills and then says that the job is at fault."""
    sale = provider(provider_desk(seller), made.side.bid, DEADLINE_NS)
    sale.start(NOW_NS)
    both = Pair(made, sale, seller)
    both.to_provider(both.to_buyer(sale.on(Grant(), NOW_NS)))
    both.to_buyer(sale.on(Fault("it faulted", job_fault=True), NOW_NS))


def assert_names(reason: str, accusers: list[Party]) -> None:
    """Whose word it is stands there, and how to see whether it is true."""
    for accuser in accusers:
        assert accuser.account.public_key.hex()[:12] in reason
    assert HOW_TO_CHECK in reason


@pytest.mark.parametrize("known", [(), (1,), (2,), (3,)])
def test_a_second_account_is_believed_if_one_of_the_two_has_delivered_before(
    known: tuple[int, ...],
) -> None:
    sellers = [party(number) for number in (1, 2, 3)]
    found = [deal for seller in sellers for deal in deals(seller.sheet(ask()))]
    accounts = [party(number).account.public_key for number in known]
    made = buyer(buyer_desk(SHOPPER, found, accounts), DEADLINE_NS)
    made.start(NOW_NS)
    made.on(Ranked(), NOW_NS)
    states = []
    for seller in sellers[:2]:
        job_fault(seller, made)
        states.append(made.state)
    assert states[0] is State.BIDDING, "another one is asked first"
    is_believed = known in [(1,), (2,)]
    assert states[1] is (State.FAILED if is_believed else State.BIDDING)
    if not is_believed:
        job_fault(sellers[2], made)
        reason = made.side.outcome()[0]
        assert reason.endswith("it faulted") is bool(known)
        if not known:
            assert_names(reason, sellers)
    assert made.side.outcome()[1] is Blame.JOB


def test_many_strangers_are_believed() -> None:
    sellers = [party(number) for number in range(1, MAX_STRANGERS + 2)]
    found = [deal for seller in sellers for deal in deals(seller.sheet(ask()))]
    made = buyer(buyer_desk(SHOPPER, found), DEADLINE_NS)
    made.start(NOW_NS)
    made.on(Ranked(), NOW_NS)
    for seller in sellers[: MAX_STRANGERS - 1]:
        job_fault(seller, made)
        assert made.state is State.BIDDING
    job_fault(sellers[MAX_STRANGERS - 1], made)
    assert made.state is State.FAILED
    assert_names(made.side.outcome()[0], sellers[:MAX_STRANGERS])


def test_strangers_cannot_end_a_run_that_rests() -> None:
    sellers = [party(number) for number in (1, 2)]
    found = [deal for seller in sellers for deal in deals(seller.sheet(ask()))]
    made = buyer(buyer_desk(SHOPPER, found), DEADLINE_NS, rests=True)
    made.start(NOW_NS)
    made.on(Ranked(), NOW_NS)
    for seller in sellers:
        job_fault(seller, made)
    assert made.state is State.WAITING


def test_two_nodes_of_one_account_have_one_opinion() -> None:
    liars = [party(number, account=1) for number in (1, 2)]
    honest = party(3)
    found = deals(*(seller.sheet(ask()) for seller in liars), honest.sheet(ask(1, 10**9)))
    made = buyer(buyer_desk(SHOPPER, found), DEADLINE_NS)
    made.start(NOW_NS)
    made.on(Ranked(), NOW_NS)
    states = []
    for sellers in (liars, liars, [honest]):
        job_fault(asked(made, sellers), made)
        states.append(made.state)
        if made.state is State.WAITING:
            made.on(Again(), NOW_NS)
            made.on(Ranked(), NOW_NS)
    assert states == [State.WAITING, State.BIDDING, State.FAILED], "first the book is ranked again"
    assert_names(made.side.outcome()[0], [liars[0], honest])


def asked(made: Lifecycle[Buying], sellers: list[Party]) -> Party:
    """Whom the newest bid is to."""
    node = open_sealed(Bid, made.side.bid).record.provider
    return next(seller for seller in sellers if seller.node.public_key == node)


@pytest.mark.parametrize("own", [False, True])
def test_a_job_fault_is_believed_of_oneself_and_where_there_is_no_other(own: bool) -> None:
    seller = party(1, account=0 if own else 1)
    sheets = [seller.sheet(ask(1, 10))]
    if own:
        sheets.append(party(2).sheet(ask(1, 10**6)))
    made = buyer(buyer_desk(SHOPPER, deals(*sheets)), DEADLINE_NS)
    made.start(NOW_NS)
    made.on(Ranked(), NOW_NS)
    job_fault(seller, made)
    assert made.state is State.FAILED
    reason, blame = made.side.outcome()
    assert blame is Blame.JOB
    assert reason.endswith("it faulted") is own
    if not own:
        assert_names(reason, [seller])


def test_a_job_fault_of_one_provider_twice_is_one_opinion() -> None:
    busy, liar = party(1), party(2)
    (first,), (second,) = deals(busy.sheet(ask())), deals(liar.sheet(ask()))
    found = [first, second]
    made = buyer(buyer_desk(SHOPPER, found), DEADLINE_NS)
    made.start(NOW_NS)
    for _ in range(3):
        made.on(Ranked(), NOW_NS)
        sale = provider(provider_desk(busy), made.side.bid, DEADLINE_NS)
        sale.start(NOW_NS)
        Pair(made, sale, busy).to_buyer(sale.on(Deny(BUSY_PREFIX + "full"), NOW_NS))
        job_fault(liar, made)
        assert made.state is State.WAITING, "the other one may have room later"
        found += [first, second]
        made.on(Again(), NOW_NS)


# The buyer's own sandbox


def doubting(number: int, known: tuple[int, ...] = ()) -> tuple[Lifecycle[Buying], list[Party]]:
    """A buyer that can run the job itself, and ``number`` providers, asked in that order."""
    sellers = [party(each) for each in range(1, number + 1)]
    found = [deal for seller in sellers for deal in deals(seller.sheet(ask()))]
    accounts = [party(each).account.public_key for each in known]
    made = buyer(buyer_desk(SHOPPER, found, accounts, tries=True), DEADLINE_NS)
    made.start(NOW_NS)
    made.on(Ranked(), NOW_NS)
    return made, sellers


@pytest.mark.parametrize(("accusers", "known"), [(1, ()), (2, ()), (2, (1,))])
def test_what_faults_here_too_is_the_jobs_fault(accusers: int, known: tuple[int, ...]) -> None:
    made, sellers = doubting(accusers, known)
    for seller in sellers:
        assert made.state is State.BIDDING
        job_fault(seller, made)
    assert made.state is State.CHECKING
    made.on(Tried(made.side.attempt, Trial.FAULTS, "SIGFPE"), NOW_NS)
    assert made.ended
    reason, blame = made.side.outcome()
    assert reason.endswith("job: SIGFPE" + FAULTS_HERE)
    assert blame is Blame.JOB


def test_what_passes_here_is_no_fault_whoever_says_so() -> None:
    made, sellers = doubting(MAX_STRANGERS + 3, known=(3, 4))
    for seller in sellers[:2]:
        job_fault(seller, made)
    assert Start("rank") in made.on(Tried(made.side.attempt, Trial.PASSES), NOW_NS)
    made.on(Ranked(), NOW_NS)
    for seller in sellers[2:-1]:
        job_fault(seller, made)
        assert made.state is State.BIDDING, "the next one is asked, whoever says it"
    assert PASSES_HERE in made.side.outcome()[0]


def test_those_who_always_say_it_end_a_run_as_failed_providers() -> None:
    seller = party(1)
    found = [deal for _ in range(20) for deal in deals(seller.sheet(ask()))[:1]]
    offers = found[:1]
    made = buyer(buyer_desk(SHOPPER, offers, tries=True), DEADLINE_NS)
    made.start(NOW_NS)
    made.on(Ranked(), NOW_NS)
    job_fault(seller, made)
    made.on(Tried(made.side.attempt, Trial.PASSES), NOW_NS)
    for _ in range(MAX_STALLED + 1):
        offers += found[:1]
        made.on(Ranked(), NOW_NS)
        job_fault(seller, made)
        made.on(Again(), NOW_NS)
    assert made.state is State.FAILED
    reason, blame = made.side.outcome()
    assert blame is Blame.PROVIDER
    assert reason.endswith(PASSES_HERE)


def test_what_cannot_be_seen_here_is_believed_as_if_there_were_no_sandbox() -> None:
    made, sellers = doubting(MAX_STRANGERS + 1)
    for seller in sellers[:2]:
        job_fault(seller, made)
    limit = BUYER_LIMITS[State.CHECKING]
    assert made.on(Timer(limit.name), NOW_NS + limit.after_ns - 1) == []
    later_ns = NOW_NS + limit.after_ns
    assert Start("rank") in made.on(Timer(limit.name), later_ns)
    assert made.on(Tried(made.side.attempt, Trial.FAULTS, "late"), later_ns) == []
    made.on(Ranked(), NOW_NS)
    for seller in sellers[2:MAX_STRANGERS]:
        assert made.state is State.BIDDING
        job_fault(seller, made)
    assert made.state is State.FAILED
    assert_names(made.side.outcome()[0], sellers[:MAX_STRANGERS])


def test_while_it_is_seen_nothing_else_decides_but_the_user() -> None:
    made, sellers = doubting(3)
    for seller in sellers[:2]:
        job_fault(seller, made)
    stale = Tried(made.side.attempt - 1, Trial.FAULTS, "of another doubt")
    for event in (stale, Alive(), Lost("gone")):
        assert made.on(event, NOW_NS) == []
    assert made.side.pending(made.state) == [Start("check")], "a restart begins it anew"
    made.on(Cancel(), NOW_NS)
    assert made.state is State.CANCELLED


def test_a_trial_is_journalled_and_forgotten_with_the_next_checkpoint() -> None:
    made, sellers = doubting(2)
    for seller in sellers:
        job_fault(seller, made)
    [row] = [
        action
        for action in made.on(Tried(made.side.attempt, Trial.PASSES), NOW_NS)
        if isinstance(action, Persist)
    ]
    again = Buying(made.side.desk)
    again.apply(Edge(row.kind), msgspec.msgpack.decode(row.body, type=tuple[bytes, ...]))
    trials = [again.trial]
    again.countersigned = b"a receipt"
    again.apply(Edge.RESUBMIT, (b"lost", b"", b""))
    trials.append(again.trial)
    assert trials == [Trial.PASSES, Trial.NONE]
