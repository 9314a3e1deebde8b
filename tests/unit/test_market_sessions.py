"""Bids for sessions and the receipts under them."""

from __future__ import annotations

from dataclasses import replace as replace_mark
from typing import Any

import pytest
from msgspec.structs import replace

from p2pflop.job.session import Mark
from p2pflop.job.spec import Job
from p2pflop.market.fills import OpenBid, check_bid, make_fill
from p2pflop.market.records import Bid, Fill, Receipt, Rejected, session_prices
from p2pflop.market.samples import (
    COSTS,
    METER_ID,
    NOW_NS,
    ROOT,
    TERMS,
    ask,
    bid,
    deals,
    party,
    session_bid,
)
from p2pflop.market.sessions import (
    FIRST_HELD_SECONDS,
    LEAST_FLOP_PER_S,
    LOWERING_FLOP_PER_NODE,
    MAX_LEASE_COMMANDS,
    check_session_bid,
    check_session_receipt,
    due_receipt,
    expected_nusd,
    full_nusd,
    metered_nusd,
    worked_s,
)
from p2pflop.wire import Sealed, seal

BUYER, SELLER = party(0), party(1)
PRICES = {
    "price_nusd": 50_000_000,
    "flop_per_byte": 2,
    "byte_price_nusd": 1000,
    "setup_nusd": 700,
    "min_charge_nusd": 2000,
}
SHEET = SELLER.sheet(ask(**PRICES))
DEAL = deals(SHEET)[0]
CHAINS = [bytes([number]) * 32 for number in range(1, 5)]
MARKS = {
    3: Mark(3, CHAINS[0], flop=10**11, touched_bytes=10**10, moved_bytes=10**9),
    5: Mark(5, CHAINS[1], flop=10**11, touched_bytes=10**11, moved_bytes=2 * 10**9),
}


def checked(sealed: Sealed[Bid]) -> OpenBid | Rejected:
    return check_session_bid(
        sealed.wire,
        node=SELLER.node.public_key,
        sheets={SHEET.sheet.number: SHEET.sheet},
        meter_id=METER_ID,
        now_ns=NOW_NS,
    )


def changed(**fields: Any) -> Sealed[Bid]:
    return seal(replace(session_bid(BUYER, DEAL).record, **fields), BUYER.node)


def filled(memory_bytes: int = 0) -> tuple[Sealed[Bid], Sealed[Fill]]:
    """Without memory, what a lease is held for counts nothing."""
    made = session_bid(BUYER, DEAL, terms=replace(TERMS, memory_bytes=memory_bytes))
    return made, make_fill(SELLER.node, made, now_ns=NOW_NS, delegation=SELLER.delegation)


def told(receipt: Receipt) -> bytes:
    return seal(receipt, SELLER.node).wire


def test_a_bid_for_a_session_is_taken_and_names_the_prices() -> None:
    opened = checked(session_bid(BUYER, DEAL))
    assert isinstance(opened, OpenBid)
    prices = session_prices(opened.bid)
    assert prices is not None
    assert (prices.price_nusd, prices.flop_per_byte, prices.byte_price_nusd) == (
        50_000_000,
        2,
        1000,
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"costs": COSTS}, "no cost lines"),
        ({"job": Job(ROOT, 1, MAX_LEASE_COMMANDS)}, "command 0"),
        ({"job": Job(ROOT, 0, 7)}, "command 0"),
        ({"root_from": ROOT}, "command 0"),
        ({"meter_id": "another"}, "meter"),
        ({"quote_nusd": 2**62 + 1}, "a quote of"),
        ({"quote_nusd": 1999}, "a lease's least"),
        ({"ext": session_bid(BUYER, DEAL).record.ext[:1]}, "bid for a job"),
        ({"ext": (*session_bid(BUYER, DEAL).record.ext[:1], (5, bytes(24)))}, "name the prices"),
        ({"ext": (*session_bid(BUYER, DEAL).record.ext[:1], (5, b""))}, "name the prices"),
        ({"ext": session_bid(BUYER, DEAL).record.ext[1:]}, "setup and minimum charge"),
        ({"class_id": ROOT}, "another class"),
        ({"ask": 9}, "no such ask"),
    ],
)
def test_what_a_bid_may_not_say(fields: dict[str, Any], reason: str) -> None:
    refused = checked(changed(**fields))
    assert isinstance(refused, Rejected)
    assert reason in refused.reason


def test_neither_kind_of_bid_passes_for_the_other() -> None:
    sheets = {SHEET.sheet.number: SHEET.sheet}
    session = session_bid(BUYER, DEAL).wire
    refused = check_bid(session, node=SELLER.node.public_key, sheets=sheets, now_ns=NOW_NS)
    assert refused == Rejected("a bid for a session, where one for a job is due")
    assert checked(bid(BUYER, DEAL)) == Rejected("a bid for a job, where one for a session is due")


def test_amounts_follow_from_the_prices() -> None:
    made, _ = filled()
    assert metered_nusd(made.record, Mark()) == full_nusd(made.record, Mark()) == 0
    assert metered_nusd(made.record, MARKS[3]) == 700 + 5000 + 1000
    assert full_nusd(made.record, MARKS[3]) == 6700
    assert metered_nusd(made.record, MARKS[5]) == 700 + 10_000 + 2000  # bytes count more here
    assert metered_nusd(made.record, Mark(1)) == 700
    assert full_nusd(made.record, Mark(1)) == 2000


def test_lowering_counts_beside_what_runs() -> None:
    made, _ = filled()
    before, nodes = MARKS[5], 4000
    after = replace_mark(before, lowered_nodes=nodes)
    assert metered_nusd(made.record, after) - metered_nusd(made.record, before) == 5000
    assert nodes * LOWERING_FLOP_PER_NODE == 10**11


@pytest.mark.parametrize(("flop_per_byte", "nusd_per_gb"), [(0, 50), (1, 50), (2, 100)])
def test_reserved_memory_counts_as_touched_once_a_second(
    flop_per_byte: int, nusd_per_gb: int
) -> None:
    sheet = SELLER.sheet(ask(**{**PRICES, "flop_per_byte": flop_per_byte}))
    terms = replace(TERMS, memory_bytes=10**9)
    made = session_bid(BUYER, deals(sheet)[0], terms=terms).record
    amounts = [metered_nusd(made, Mark(1, held_seconds=held)) for held in (0, 1, 60)]
    first = 700 + FIRST_HELD_SECONDS * nusd_per_gb
    assert amounts == [first, first + nusd_per_gb, first + 60 * nusd_per_gb]
    assert metered_nusd(made, Mark(0)) == 0


@pytest.mark.parametrize("mark", [*MARKS.values(), Mark(1, lowered_nodes=9, held_seconds=7)])
def test_what_is_expected_of_a_lease_is_what_it_comes_to(mark: Mark) -> None:
    made, _ = filled(10**9)
    expected = expected_nusd(DEAL.ask, 10**9, mark)
    assert expected == full_nusd(made.record, mark)


def test_what_is_worked_pays_for_its_time_by_the_prices() -> None:
    made, _ = filled()
    mark = Mark(1, flop=10**9, touched_bytes=10**9)
    assert worked_s(made.record, mark) == 2 * 10**9 / LEAST_FLOP_PER_S  # of a byte: two FLOP
    nodes = replace_mark(Mark(1), lowered_nodes=4)
    assert worked_s(made.record, nodes) == 4 * LOWERING_FLOP_PER_NODE / LEAST_FLOP_PER_S == 1
    free = session_bid(BUYER, deals(SELLER.sheet(ask(**{**PRICES, "flop_per_byte": 0})))[0])
    assert worked_s(free.record, Mark(1, touched_bytes=10**12)) == 0


def test_receipts_are_cumulative_and_the_closing_one_is_the_last() -> None:
    made, fill = filled()
    first = due_receipt(fill.id, made.record, None, MARKS[3], closing=False)
    assert isinstance(check_session_receipt(told(first), fill, made.record, None, MARKS), Sealed)
    last = due_receipt(fill.id, made.record, first, MARKS[5], closing=True)
    assert (last.number, last.from_step, last.to_step, last.amount_nusd) == (2, 3, 5, 12_700)
    assert first.amount_nusd == 6700, "setup is due from the first receipt on"
    assert isinstance(check_session_receipt(told(last), fill, made.record, first, MARKS), Sealed)
    after = check_session_receipt(told(last), fill, made.record, last, MARKS)
    assert after == Rejected("receipt comes after the last one")
    closing = due_receipt(fill.id, made.record, first, MARKS[3], closing=True)
    assert isinstance(check_session_receipt(told(closing), fill, made.record, first, MARKS), Sealed)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"amount_nusd": 6701}, "should be 6700 nusd, not 6701"),
        ({"number": 2}, "should be"),
        ({"root_to": CHAINS[2]}, "should be"),
        ({"from_step": 1}, "should be"),
        ({"to_step": 4}, "not just obeyed"),
        ({"fill": ROOT}, "should be"),
        ({"result": CHAINS[1]}, "should be"),
    ],
)
def test_what_a_receipt_may_not_say(fields: dict[str, Any], reason: str) -> None:
    made, fill = filled()
    honest = due_receipt(fill.id, made.record, None, MARKS[3], closing=False)
    wrong = told(replace(honest, **fields))
    refused = check_session_receipt(wrong, fill, made.record, None, MARKS)
    assert isinstance(refused, Rejected)
    assert reason in refused.reason


def test_a_receipt_by_somebody_else_or_for_nothing_is_refused() -> None:
    made, fill = filled()
    first = due_receipt(fill.id, made.record, None, MARKS[3], closing=False)
    forged = seal(first, BUYER.node).wire
    refused = check_session_receipt(forged, fill, made.record, None, MARKS)
    assert refused == Rejected("receipt is not by the provider")
    again = due_receipt(fill.id, made.record, first, MARKS[3], closing=False)
    refused = check_session_receipt(told(again), fill, made.record, first, MARKS)
    assert refused == Rejected("receipt covers no command")
    assert isinstance(check_session_receipt(b"junk", fill, made.record, None, MARKS), Rejected)


def test_no_receipt_is_above_the_quote() -> None:
    made = session_bid(BUYER, DEAL, quote_nusd=5000)
    due = due_receipt(ROOT, made.record, None, MARKS[5], closing=True)
    assert due.amount_nusd == 5000
