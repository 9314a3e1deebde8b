"""The limits of asks: what a sheet may say, and what they keep out, on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from p2pflop.cli.tape import ASK_HEADER, ask_changes, ask_lines
from p2pflop.job.session import Mark
from p2pflop.market.fills import bid_figures
from p2pflop.market.limits import (
    MAX_ASK_LIMITS,
    MAX_LIMIT,
    Limit,
    Over,
    exceeded,
    label_words,
    lease_seconds,
    limit_words,
    limits_ext,
)
from p2pflop.market.ranking import Deal, Miss, MissReason, Need, Policy, best, no_deal, rank
from p2pflop.market.records import LIMITS_EXT, MAX_SHEET_ORDERS, Rejected
from p2pflop.market.samples import (
    DEADLINE_NS,
    NOW_NS,
    TERMS,
    ask,
    bid,
    deals,
    need,
    party,
    session_bid,
)
from p2pflop.market.sessions import MIN_LEASE_S, rank_session
from p2pflop.market.sheets import OpenSheet, open_sheet
from p2pflop.market.views import BookView
from p2pflop.market.wishes import crosses, offer_to
from p2pflop.wire import DEFAULT_NETWORK, MAX_EXT_BYTES, Ext, seal
from tests.unit.test_market_wishes import checked, quoted, wish

SELLER, OTHER, BUYER = party(1), party(2), party(3)
LEASE_S = 900
NODES = 700
JUST = {
    Limit.LEASE: LEASE_S,
    Limit.FLOP: 350 * 10**12,
    Limit.MOVED: TERMS.moved_bytes,
    Limit.NODES: NODES,
}
"""What the sample job, of so many nodes, comes to."""


def limited(*limits: tuple[int, int], seller: Any = SELLER, price_nusd: int = 10**6) -> OpenSheet:
    sheet: OpenSheet = seller.sheet(ask(1, price_nusd), limits={1: limits})
    return sheet


def wanted(**changes: Any) -> Need:
    return need(known=((Limit.NODES, NODES),), **changes)


def ranked(*sheets: OpenSheet, **changes: Any) -> list[Deal | Miss]:
    return rank(sheets, wanted(**changes), Policy(), NOW_NS)


def opened(ext: Ext) -> OpenSheet | Rejected:
    """What becomes of a sheet with that ext."""
    sheet = SELLER.sheet(ask(1), ask(2)).sheet
    return open_sheet(seal(replace(sheet, ext=ext), SELLER.node).wire, DEFAULT_NETWORK)


def said(asks: object) -> Ext:
    return ((LIMITS_EXT, msgspec.msgpack.encode((asks,))),)


# The sheet


def test_limits_travel_in_the_sheet() -> None:
    limits = {1: ((1, 60), (3, 5)), 2: ((99, MAX_LIMIT),)}
    made = SELLER.sheet(ask(1), ask(2), ask(3), limits={**limits, 3: ()})
    again = open_sheet(made.sealed.wire, DEFAULT_NETWORK)
    assert isinstance(again, OpenSheet)
    assert again == made
    assert dict(again.limits) == limits


def test_a_sheet_without_limits_costs_no_byte() -> None:
    plain, empty = SELLER.sheet(ask(1)), SELLER.sheet(ask(1), limits={1: ()})
    assert plain.sealed.wire == empty.sealed.wire
    assert plain.sheet.ext == ()
    assert not plain.limits


def test_a_full_sheet_has_room_for_limits() -> None:
    asks = [ask(number) for number in range(MAX_SHEET_ORDERS)]
    each = ((Limit.LEASE, 86400), (Limit.FLOP, 10**18))
    assert len(SELLER.sheet(*asks, limits=dict.fromkeys(range(32), each)).limits) == 32
    many = tuple((number, MAX_LIMIT) for number in range(1, MAX_ASK_LIMITS + 1))
    with pytest.raises(ValueError, match=f"over {MAX_EXT_BYTES} bytes"):
        SELLER.sheet(*asks, limits=dict.fromkeys(range(32), many))


@pytest.mark.parametrize(
    "asks",
    [
        (),
        ((1, ()),),
        ((1, ((1, 0),)),),
        ((1, ((1, -5),)),),
        ((1, ((1, MAX_LIMIT + 1),)),),
        ((1, ((0, 5),)),),
        ((1, ((2**32, 5),)),),
        ((1, ((1, True),)),),
        ((1, ((1, 5), (1, 5))),),
        ((1, ((2, 5), (1, 5))),),
        ((1, ((1, 5),)), (1, ((2, 5),))),
        ((2, ((1, 5),)), (1, ((1, 5),))),
        ((7, ((1, 5),)),),
        ((1, tuple((n, 5) for n in range(1, MAX_ASK_LIMITS + 2))),),
        ((1, ((1, 5, 5),)),),
        "no list",
    ],
)
def test_a_sheet_with_other_limits_is_refused(asks: object) -> None:
    found = opened(said(asks))
    assert isinstance(found, Rejected)
    assert found.reason.startswith("limits: ")


def test_limits_have_one_encoding() -> None:
    assert isinstance(opened(said(((1, ((1, 5),)),))), OpenSheet)
    found = opened(((LIMITS_EXT, b"\x91\x91\x92\x01\x91\x92\x01\xcd\x00\x05"),))
    assert isinstance(found, Rejected)
    assert "one encoding" in found.reason
    assert isinstance(opened(((LIMITS_EXT, b""),)), Rejected)


def test_as_many_limits_as_an_ask_may_have() -> None:
    limits = tuple((number, 5) for number in range(1, MAX_ASK_LIMITS + 1))
    assert isinstance(opened(limits_ext({1: limits})), OpenSheet)


def test_one_is_not_made_of_an_ask_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="that the sheet does not have"):
        SELLER.sheet(ask(1), limits={2: ((1, 5),)})


# The ranking


@pytest.mark.parametrize("limit", Limit)
def test_a_limit_is_judged_at_its_edge(limit: Limit) -> None:
    figure = JUST[limit]
    [deal] = ranked(limited((limit, figure)))
    assert isinstance(deal, Deal)
    [miss] = ranked(limited((limit, figure - 1)))
    assert isinstance(miss, Miss)
    assert miss.reason is MissReason.LIMIT
    assert miss.over == Over(limit, figure, figure - 1)
    assert miss.told == f"over a limit of the ask: {miss.over.told}"


def test_a_lease_that_has_begun_another_second_counts_it() -> None:
    assert lease_seconds(NOW_NS, DEADLINE_NS) == LEASE_S
    assert lease_seconds(NOW_NS - 1, DEADLINE_NS) == LEASE_S + 1
    assert lease_seconds(NOW_NS + 1, DEADLINE_NS) == LEASE_S
    sheet = limited((Limit.LEASE, LEASE_S))
    later = rank([sheet], wanted(deadline_ns=DEADLINE_NS + 1), Policy(), NOW_NS)
    assert isinstance(later[0], Miss)


def test_a_limit_that_is_not_known_is_never_within() -> None:
    [miss] = ranked(limited((99, MAX_LIMIT)))
    assert isinstance(miss, Miss)
    assert miss.reason is MissReason.LIMIT
    assert "limit 99, which this version does not know" in miss.told
    assert "update p2pflop" in no_deal([miss]).hint


def test_limits_are_those_of_their_own_ask_alone() -> None:
    sheet = SELLER.sheet(ask(1), ask(2, 2 * 10**6), limits={1: ((Limit.FLOP, 1),)})
    first, second = ranked(sheet)
    assert (first.ask.number, second.ask.number) == (2, 1)
    assert isinstance(first, Deal)
    assert isinstance(second, Miss)


def test_the_best_is_the_first_that_is_within() -> None:
    view = BookView(
        (limited((Limit.NODES, NODES - 1)), limited(seller=OTHER, price_nusd=2 * 10**6)), NOW_NS
    )
    assert view.has_limits
    found = best(view, wanted(), Policy(), NOW_NS)
    assert found == ranked(*view.sheets)[0]
    assert found is not None
    assert found.node == OTHER.node.public_key


def test_what_else_keeps_an_ask_out_is_told_before_but_for_the_budget() -> None:
    sheet = limited((Limit.FLOP, 1))
    [over] = ranked(sheet, max_nusd=0)
    assert isinstance(over, Miss)
    assert over.reason is MissReason.LIMIT
    excluded = Policy(excluded=(SELLER.account.public_key,))
    [barred] = rank([sheet], wanted(), excluded, NOW_NS)
    assert isinstance(barred, Miss)
    assert (barred.reason, barred.over) == (MissReason.POLICY, None)


def test_the_advice_is_by_the_ask_that_takes_the_most() -> None:
    found = ranked(limited((Limit.LEASE, 60)), limited((Limit.LEASE, 600), seller=OTHER))
    error = no_deal(found)
    assert "2 x over a limit of the ask" in error.message
    assert error.hint == (
        "A lease of 15 min 0 s is over the ask's 10 min 0 s: give the job an earlier deadline."
    )


def test_figures_that_look_alike_are_told_exactly() -> None:
    assert Over(Limit.MOVED, 10**9 + 1, 10**9).told == (
        "moving 1000000001 is over the ask's 1000000000"
    )
    assert Over(Limit.NODES, 2, 1).told == "lowering 2 nodes is over the ask's 1 node"


def test_no_figure_no_judgement() -> None:
    assert exceeded(((Limit.NODES, 1),), {Limit.FLOP: 5}) is None
    assert exceeded((), {Limit.FLOP: 5}) is None
    assert exceeded(((9, 1),), {}) == Over(9, 0, 1)


# Bids, sessions, wishes


def test_a_bid_says_what_its_provider_judges() -> None:
    [deal] = deals(limited())
    told = bid_figures(bid(BUYER, deal).record)
    assert told == {limit: JUST[limit] for limit in Limit if limit is not Limit.NODES}
    assert bid_figures(session_bid(BUYER, deal).record) == {Limit.LEASE: LEASE_S}


def test_a_session_takes_a_short_lease_and_judges_what_it_has_to_do_first() -> None:
    again = Mark(count=1, flop=5 * 10**12, moved_bytes=7, lowered_nodes=3)

    def found(*limits: tuple[int, int]) -> Deal | Miss:
        [entry] = rank_session([limited(*limits)], need(), again, Policy(), NOW_NS)
        return entry

    just = ((Limit.LEASE, MIN_LEASE_S), (Limit.FLOP, 5 * 10**12), (Limit.MOVED, 7), (4, 3))
    assert isinstance(found(*just), Deal)
    for limit, most in just:
        miss = found((limit, most - 1))
        assert isinstance(miss, Miss)
        assert miss.over == Over(limit, most, most - 1)


@pytest.mark.parametrize("limit", [(Limit.FLOP, 1), (Limit.MOVED, 1), (99, MAX_LIMIT)])
def test_a_wish_over_a_limit_is_not_crossed(limit: tuple[int, int]) -> None:
    offer = ask(price_nusd=500_000)
    assert crosses(offer, wish())
    assert not crosses(offer, wish(), (limit,))
    assert offer_to([offer], wish(), None, {1: (limit,)}) is None
    sheet = OTHER.sheet(ask(), limits={1: (limit,)})
    found = checked(quoted(), sheet=sheet)
    assert found == Rejected("the quote does not cross the wish")


def test_lease_and_nodes_of_a_quote_are_judged_where_it_is_ranked() -> None:
    limits = ((Limit.LEASE, 1), (Limit.NODES, 1))
    assert crosses(ask(price_nusd=500_000), wish(), limits)
    sheet = OTHER.sheet(ask(), limits={1: limits})
    assert not isinstance(checked(quoted(), sheet=sheet), Rejected)


# What people and programs see


def test_limits_in_words() -> None:
    limits = ((1, 6 * 3600), (2, 5 * 10**17), (3, 20 * 10**9), (4, 20_000), (9, 1))
    assert limit_words(limits) == "6 h 0 min, 500 PFLOP, 20 GB moved, 20000 nodes, limit 9"
    labelled = {"lease_s": 6 * 3600, "flop": 5 * 10**17, "nodes": 1, "9": 1}
    assert label_words(labelled) == "6 h 0 min, 500 PFLOP, 1 node, limit 9"
    assert limit_words(()) == label_words({}) == ""


def test_the_book_shows_limits_where_there_are_any() -> None:
    told: dict[str, Any] = {
        "provider": "12D3KooWQ",
        "price_nusd": 1,
        "memory_bytes": 1,
        "class_id": "00" * 32,
    }
    assert not any("AT MOST" in line for line in ask_lines([told]))
    lines = ask_lines([told, {**told, "limits": {"lease_s": 60}}])
    assert lines[0].endswith(ASK_HEADER[-1])
    assert lines[2].endswith("1 min 0 s")


def test_an_ask_with_other_limits_is_another_to_who_watches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    books: Iterator[list[dict[str, Any]]] = iter(
        [[{"ask": 1}], [{"ask": 1, "limits": {}}], [{"ask": 1, "limits": {"flop": 2}}]]
    )
    changes = ask_changes(lambda: next(books))
    assert next(changes)[0] == "new"
    assert [next(changes)[0], next(changes)] == ["gone", ("new", {"ask": 1, "limits": {"flop": 2}})]
