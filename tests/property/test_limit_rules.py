"""The limits of asks, for any sheet and any need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from p2pflop.market.limits import (
    MAX_ASK_LIMITS,
    MAX_LIMIT,
    AskLimits,
    Limit,
    SheetLimits,
    exceeded,
    limits_ext,
    read_limits,
)
from p2pflop.market.ranking import Deal, Miss, MissReason, Need, Policy, best, rank
from p2pflop.market.records import LIMITS_EXT, Rejected
from p2pflop.market.samples import NOW_NS, ask, need, party
from p2pflop.market.sheets import OpenSheet, open_sheet
from p2pflop.market.views import BookView
from p2pflop.wire import DEFAULT_NETWORK, MAX_EXT_BYTES

PARTIES = [party(number) for number in range(6)]
MOST = st.sampled_from([1, 899, 900, 901, 10**6, 35 * 10**13, MAX_LIMIT]) | st.integers(
    1, MAX_LIMIT
)
ASK_LIMITS = st.dictionaries(
    st.sampled_from(Limit).map(int) | st.integers(1, 2**32 - 1), MOST, max_size=MAX_ASK_LIMITS
).map(lambda limits: tuple(sorted(limits.items())))
SHEET_LIMITS = st.dictionaries(st.integers(0, 3), ASK_LIMITS, max_size=4)
NEEDS = st.builds(
    lambda nodes, **rest: need(known=((Limit.NODES, nodes),), **rest),
    st.integers(0, 10**5),
    flop=st.sampled_from([0, 35 * 10**13]) | st.integers(0, 2**70),
    moved_bytes=st.integers(0, 2**63 - 1),
    max_nusd=st.sampled_from([0, 2**62]),
)


def sheet_of(seller: Any, limits: SheetLimits) -> OpenSheet:
    sheet: OpenSheet = seller.sheet(*(ask(number) for number in range(4)), limits=limits)
    return sheet


SHEETS = st.lists(SHEET_LIMITS, min_size=1, max_size=6).map(
    lambda each: [sheet_of(*pair) for pair in zip(PARTIES, each, strict=False)]
)


@given(SHEET_LIMITS)
def test_what_a_sheet_says_is_read_from_anywhere(limits: SheetLimits) -> None:
    made = sheet_of(PARTIES[0], limits)
    again = open_sheet(made.sealed.wire, DEFAULT_NETWORK)
    assert isinstance(again, OpenSheet)
    assert again.limits == made.limits == {n: each for n, each in limits.items() if each}


@given(
    st.binary(max_size=64) | SHEET_LIMITS.map(lambda limits: dict(limits_ext(limits)).get(1, b""))
)
def test_whatever_bytes_come_are_refused_or_are_the_one_encoding(said: bytes) -> None:
    sheet = sheet_of(PARTIES[0], {}).sheet
    found = read_limits(msgspec.structs.replace(sheet, ext=((LIMITS_EXT, said),)))
    if not isinstance(found, Rejected):
        assert limits_ext(found) == ((LIMITS_EXT, said),)
        assert len(said) <= MAX_EXT_BYTES


@given(SHEETS, NEEDS, st.randoms())
def test_who_is_within_does_and_in_no_order_but_by_price(
    sheets: list[OpenSheet], wanted: Need, random: Any
) -> None:
    ranked = rank(sheets, wanted, Policy(), NOW_NS)
    shuffled = list(sheets)
    random.shuffle(shuffled)
    assert rank(shuffled, wanted, Policy(), NOW_NS) == ranked
    figures = wanted.figures(NOW_NS)
    for entry in ranked:
        over = exceeded(entry.sheet.limits_of(entry.ask), figures)
        if isinstance(entry, Miss):
            assert entry.over == over
            assert (entry.reason is MissReason.LIMIT) == (over is not None)
        else:
            assert over is None
    view = BookView(tuple(sorted(sheets, key=lambda sheet: sheet.node)), NOW_NS)
    first = ranked[0] if isinstance(ranked[0], Deal) else None
    assert best(view, wanted, Policy(), NOW_NS) == first


@given(SHEETS, NEEDS)
def test_limits_take_deals_away_and_change_no_order(sheets: list[OpenSheet], wanted: Need) -> None:
    plain = [sheet_of(seller, {}) for seller in PARTIES[: len(sheets)]]

    def names(found: list[Deal | Miss]) -> list[tuple[bytes, int]]:
        return [(each.node, each.ask.number) for each in found if isinstance(each, Deal)]

    every = names(rank(plain, wanted, Policy(), NOW_NS))
    within = names(rank(sheets, wanted, Policy(), NOW_NS))
    assert within == [name for name in every if name in within]


@given(ASK_LIMITS, NEEDS, st.integers(0, 10**20))
def test_less_is_never_over_where_more_is_not(limits: AskLimits, more: Need, flop: int) -> None:
    less = replace(more, flop=min(flop, more.flop))
    if exceeded(limits, more.figures(NOW_NS)) is None:
        assert exceeded(limits, less.figures(NOW_NS)) is None
