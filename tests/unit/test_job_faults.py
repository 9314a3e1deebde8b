"""Whom a buyer believes that the job itself is at fault."""

from __future__ import annotations

import pytest

from p2pflop.job.buying import (
    BUSY_PREFIX,
    MAX_STRANGERS,
    ONE_OPINION,
    STRANGERS,
    Buying,
    buyer,
)
from p2pflop.job.events import Again, Blame, Deny, Fault, Grant, Ranked, State
from p2pflop.job.lifecycle import Lifecycle
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
        doubt = "" if known else STRANGERS.format(3)
        assert made.side.outcome()[0].endswith("it faulted" + doubt)
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
    assert made.side.outcome()[0].endswith(STRANGERS.format(MAX_STRANGERS))


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
    assert ONE_OPINION not in made.side.outcome()[0]


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
    assert reason.endswith(ONE_OPINION) is not own


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
