"""The ranking's promises, for any book and any need."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from math import ceil
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pflop.ids import content_hash
from p2pflop.market.book import Book
from p2pflop.market.ranking import Deal, Experience, Miss, Need, Policy, best, rank, total_nusd
from p2pflop.market.records import Ask
from p2pflop.market.samples import CLASS_ID, DEADLINE_NS, NOW_NS, ask, need, party
from p2pflop.market.sheets import OpenSheet, open_sheet
from p2pflop.market.views import BookView
from p2pflop.units import round_price
from p2pflop.wire import decode, encode

PARTIES = [party(number, account=number // 2) for number in range(8)]
PRICES = st.integers(0, 10**12).map(round_price) | st.integers(0, 3)
ASKS = st.builds(
    lambda number, price, **rest: ask(number, price, **rest),
    st.integers(1, 1000),
    PRICES,
    class_id=st.sampled_from([CLASS_ID, bytes(32)]),
    memory_bytes=st.sampled_from([0, 2**33]),
    flop_per_byte=st.sampled_from([0, 1, 10**4]),
    setup_nusd=st.integers(0, 100),
    min_charge_nusd=st.sampled_from([0, 10, 10**6]),
    byte_price_nusd=st.sampled_from([0, 10**6]),
    flop_per_s=st.integers(0, 10**13),
)
SHEETS = st.lists(
    st.tuples(
        st.sampled_from(PARTIES), st.lists(ASKS, max_size=4, unique_by=lambda made: made.number)
    ),
    max_size=8,
    unique_by=lambda entry: entry[0].node.public_key,
).map(lambda entries: [seller.sheet(*asks) for seller, asks in entries])
NEEDS = st.builds(
    lambda **rest: need(**rest),
    flop=st.integers(0, 10**18),
    touched_bytes=st.integers(0, 10**14),
    moved_bytes=st.integers(0, 10**10),
    max_nusd=st.sampled_from([0, 10**4, 10**7, 2**62]),
    nonce=st.binary(min_size=16, max_size=16),
)
POLICIES = st.builds(
    Policy,
    excluded=st.lists(st.sampled_from([p.account.public_key for p in PARTIES]), max_size=2).map(
        tuple
    ),
    max_price_nusd=st.sampled_from([0, 10**6]),
    experience=st.lists(
        st.builds(
            Experience,
            st.sampled_from([p.account.public_key for p in PARTIES]),
            st.just(CLASS_ID),
            st.integers(1, 10**15),
        ),
        max_size=3,
    ).map(tuple),
)


@given(SHEETS, NEEDS, POLICIES, st.randoms())
def test_the_order_of_arrival_changes_nothing(
    sheets: list[OpenSheet], wanted: Need, policy: Policy, random: Any
) -> None:
    ranked = rank(sheets, wanted, policy, NOW_NS)
    shuffled = list(sheets)
    random.shuffle(shuffled)
    assert rank(shuffled, wanted, policy, NOW_NS) == ranked


@given(SHEETS, NEEDS, POLICIES, st.randoms(), st.binary(min_size=32, max_size=32))
def test_the_same_book_and_policy_rank_alike_everywhere(
    sheets: list[OpenSheet], wanted: Need, policy: Policy, random: Any, secret: bytes
) -> None:
    """Two nodes with secrets of their own, told in different orders, the second over the wire."""
    here, there = Book(bytes(32)), Book(secret)
    for sheet in sheets:
        here.apply(sheet, NOW_NS, "neighbour")
    shuffled = list(sheets)
    random.shuffle(shuffled)
    for sheet in shuffled:
        opened = open_sheet(bytes(bytearray(sheet.sealed.wire)), "main")
        assert isinstance(opened, OpenSheet)
        there.apply(opened, NOW_NS + 1, "another")
    one, other = here.view(NOW_NS), there.view(NOW_NS + 1)
    assert one.digest == other.digest
    again = decode(Policy, encode(policy))
    assert again.canonical() == policy.canonical()
    ranked = rank(one.sheets, wanted, policy, NOW_NS)
    assert rank(other.sheets, wanted, again.canonical(), NOW_NS) == ranked
    assert best(other, wanted, again, NOW_NS) == best(one, wanted, policy, NOW_NS)


@given(SHEETS, NEEDS, POLICIES, st.lists(st.sampled_from(["/ip4/192.0.2.7/tcp/1", "/dns/far"])))
def test_where_a_provider_is_ranks_nothing(
    sheets: list[OpenSheet], wanted: Need, policy: Policy, addresses: list[str]
) -> None:
    """Nor how new its sheet is."""
    moved = [
        next(p for p in PARTIES if p.node.public_key == sheet.node).sheet(
            *sheet.sheet.asks, addresses=addresses[:8], number=9, now_ns=NOW_NS - number
        )
        for number, sheet in enumerate(sheets)
    ]
    order = [(e.node, e.ask.number) for e in rank(sheets, wanted, policy, NOW_NS)]
    assert [(e.node, e.ask.number) for e in rank(moved, wanted, policy, NOW_NS)] == order


@settings(max_examples=10)
@given(NEEDS)
def test_ties_are_drawn_anew_for_each_bid_and_favour_nobody(wanted: Need) -> None:
    """Over 400 nonces, each of four equal accounts wins about as often."""
    sheets = [seller.sheet(ask(1, 0)) for seller in PARTIES[::2]]
    wins = Counter(
        rank(
            sheets,
            replace(
                wanted,
                max_nusd=10**9,
                nonce=content_hash(wanted.nonce + bytes([n // 256, n % 256]))[:16],
            ),
            Policy(),
            NOW_NS,
        )[0].account
        for n in range(400)
    )
    assert len(wins) == len(sheets)
    assert max(wins.values()) < 170


@given(SHEETS, NEEDS, POLICIES)
def test_deals_are_sorted_fit_and_complete(
    sheets: list[OpenSheet], wanted: Need, policy: Policy
) -> None:
    ranked = rank(sheets, wanted, policy, NOW_NS)
    kinds = [isinstance(entry, Deal) for entry in ranked]
    assert kinds == sorted(kinds, reverse=True)
    totals = [entry.total_nusd for entry in ranked if isinstance(entry, Deal)]
    assert totals == sorted(totals)
    assert len(ranked) == sum(len(sheet.sheet.asks) for sheet in sheets)
    for entry in ranked:
        if isinstance(entry, Deal):
            assert entry.total_nusd <= wanted.max_nusd
            assert entry.ask.class_id == CLASS_ID
            assert entry.ask.memory_bytes >= wanted.memory_bytes
            assert entry.account not in policy.excluded
        sizes = (wanted.flop, wanted.touched_bytes, wanted.moved_bytes)
        assert entry.total_nusd == total_nusd(entry.ask, *sizes)


@given(SHEETS, NEEDS, POLICIES)
def test_the_fast_path_finds_the_same_deal(
    sheets: list[OpenSheet], wanted: Need, policy: Policy
) -> None:
    ranked = rank(sheets, wanted, policy, NOW_NS)
    first = ranked[0] if ranked and isinstance(ranked[0], Deal) else None
    assert best(BookView(tuple(sheets), NOW_NS), wanted, policy, NOW_NS) == first


@given(ASKS, NEEDS)
def test_the_total_is_the_published_formula(made: Ask, wanted: Need) -> None:
    work = max(wanted.flop, made.flop_per_byte * wanted.touched_bytes)
    compute = ceil(Fraction(made.price_nusd * work, 10**15))
    moved = ceil(Fraction(made.byte_price_nusd * wanted.moved_bytes, 10**9))
    total = max(made.min_charge_nusd, made.setup_nusd + compute + moved)
    assert total_nusd(made, wanted.flop, wanted.touched_bytes, wanted.moved_bytes) == total


@given(ASKS, NEEDS, st.integers(0, 10**15))
def test_more_work_never_costs_less(made: Ask, wanted: Need, more: int) -> None:
    base = total_nusd(made, wanted.flop, wanted.touched_bytes, wanted.moved_bytes)
    assert total_nusd(made, wanted.flop + more, wanted.touched_bytes, wanted.moved_bytes) >= base
    assert total_nusd(made, wanted.flop, wanted.touched_bytes + more, wanted.moved_bytes) >= base
    assert total_nusd(made, wanted.flop, wanted.touched_bytes, wanted.moved_bytes + more) >= base


@given(SHEETS, NEEDS, st.integers(0, 10**13))
def test_a_claimed_speed_ranks_nothing(sheets: list[OpenSheet], wanted: Need, claim: int) -> None:
    order = [(e.node, e.ask.number) for e in rank(sheets, wanted, Policy(), NOW_NS)]
    boasting = [
        next(p for p in PARTIES if p.node.public_key == sheet.node).sheet(
            *(
                Ask(**{n: getattr(a, n) for n in Ask.__struct_fields__} | {"flop_per_s": claim})
                for a in sheet.sheet.asks
            )
        )
        for sheet in sheets
    ]
    assert [(e.node, e.ask.number) for e in rank(boasting, wanted, Policy(), NOW_NS)] == order


@given(SHEETS, NEEDS, POLICIES, SHEETS)
def test_another_sheet_never_turns_a_deal_into_a_miss(
    sheets: list[OpenSheet], wanted: Need, policy: Policy, more: list[OpenSheet]
) -> None:
    known = {sheet.node for sheet in sheets}
    both = sheets + [sheet for sheet in more if sheet.node not in known]
    alone = rank(sheets, wanted, policy, NOW_NS)
    together = rank(both, wanted, policy, NOW_NS)
    kept = [entry for entry in together if entry.node in known]
    assert [e for e in kept if isinstance(e, Deal)] == [e for e in alone if isinstance(e, Deal)]
    assert [e for e in kept if isinstance(e, Miss)] == [e for e in alone if isinstance(e, Miss)]


@given(SHEETS, NEEDS)
def test_after_the_deadline_there_is_no_deal(sheets: list[OpenSheet], wanted: Need) -> None:
    late = replace(wanted, deadline_ns=NOW_NS)
    assert not any(isinstance(entry, Deal) for entry in rank(sheets, late, Policy(), NOW_NS))
    assert wanted.deadline_ns == DEADLINE_NS
