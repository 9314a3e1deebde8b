"""From bid to fill: what each side refuses."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from p2pflop.job.lifecycle import CONFIRM_WITHIN_NS
from p2pflop.job.spec import Job
from p2pflop.market.fills import (
    MAX_BID_AGE_NS,
    OpenBid,
    check_abandon,
    check_bid,
    check_commit,
    check_confirm,
    check_costs,
    check_fill,
    check_opening,
    check_reject,
    make_abandon,
    make_commit,
    make_confirm,
    make_fill,
    make_reject,
)
from p2pflop.market.records import (
    CHECKPOINT_EXT,
    FIXED_EXT,
    MAX_CHECKPOINT_SECONDS,
    MIN_CHECKPOINT_SECONDS,
    Bid,
    CostLine,
    Fill,
    Rejected,
    Terms,
    checkpoint_ext,
    checkpoint_seconds,
    fixed_charges,
    fixed_ext,
)
from p2pflop.market.samples import (
    ASK_LIFE_NS,
    COSTS,
    DEADLINE_NS,
    METER_ID,
    NOW_NS,
    RESULT,
    ROOT,
    SALT,
    STEPS,
    TERMS,
    ask,
    bid,
    deals,
    party,
)
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS
from p2pflop.wire import Sealed, seal

BUYER, SELLER, STRANGER = party(1), party(2), party(3)
SHEET = SELLER.sheet(ask(4), number=6)
(DEAL,) = deals(SHEET)
BID = bid(BUYER, DEAL)
FILL = make_fill(SELLER.node, BID, now_ns=NOW_NS, delegation=SELLER.delegation)


def checked(wire: bytes, now_ns: int = NOW_NS) -> OpenBid | Rejected:
    return check_bid(wire, node=SELLER.node.public_key, sheets={6: SHEET.sheet}, now_ns=now_ns)


def altered(**values: Any) -> bytes:
    """The bid with other fields, properly signed by the buyer."""
    return seal(msgspec.structs.replace(BID.record, **values), BUYER.node).wire


def refusal(outcome: object) -> str:
    assert isinstance(outcome, Rejected)
    return outcome.reason


def test_a_bid_opens_with_buyer_and_ask() -> None:
    opened = checked(BID.wire)
    assert isinstance(opened, OpenBid)
    assert opened.account == BUYER.account.public_key
    assert opened.ask.number == 4
    assert opened.bid.quote_nusd == DEAL.total_nusd


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"provider": STRANGER.node.public_key}, "another provider"),
        ({"sheet_number": 5}, "superseded"),
        ({"ask": 5}, "no such ask"),
        ({"class_id": ROOT}, "another class"),
        ({"quote_nusd": BID.record.quote_nusd - 1}, "quote should be"),
        ({"quote_nusd": BID.record.quote_nusd + 1}, "quote should be"),
        ({"costs": COSTS[:1]}, "quote should be"),
        ({"terms": msgspec.structs.replace(TERMS, memory_bytes=2**33 + 1)}, "memory"),
        ({"terms": msgspec.structs.replace(TERMS, deadline_ns=NOW_NS)}, "deadline"),
        ({"delegation": STRANGER.delegation}, "another node"),
        ({"decided_at_ns": NOW_NS - MAX_BID_AGE_NS - 1}, "just now"),
        ({"decided_at_ns": NOW_NS + CLOCK_TOLERANCE_NS + 1}, "just now"),
    ],
)
def test_a_provider_refuses_a_bid_that_is_not_right(values: dict[str, Any], why: str) -> None:
    assert why in refusal(checked(altered(**values)))


def test_a_bid_names_the_setup_and_minimum_charge_of_its_ask() -> None:
    for charges in ((0, 0), (1000, 0), (0, 2000), (1000, 2000)):
        dear = ask(setup_nusd=charges[0], min_charge_nusd=charges[1])
        sheet = SELLER.sheet(dear)
        sheets = {sheet.sheet.number: sheet.sheet}
        sealed = bid(BUYER, deals(sheet)[0])
        assert (sealed.record.ext == ()) == (charges == (0, 0))
        node = SELLER.node.public_key
        opened = check_bid(sealed.wire, node=node, sheets=sheets, now_ns=NOW_NS)
        assert isinstance(opened, OpenBid)
        assert fixed_charges(opened.bid) == charges
        for ext in (fixed_ext(charges[0], 999), ((FIXED_EXT, b""),), ((FIXED_EXT, bytes(17)),)):
            wrong = seal(msgspec.structs.replace(sealed.record, ext=ext), BUYER.node)
            refused = check_bid(wrong.wire, node=node, sheets=sheets, now_ns=NOW_NS)
            assert isinstance(refused, Rejected)
            assert "does not name the setup and minimum charge" in refused.reason


@pytest.mark.parametrize(
    ("ext", "seconds"),
    [
        ((), 0),
        (checkpoint_ext(0), 0),
        (checkpoint_ext(600), 600),
        (checkpoint_ext(1), MIN_CHECKPOINT_SECONDS),
        (checkpoint_ext(MAX_CHECKPOINT_SECONDS), MAX_CHECKPOINT_SECONDS),
        (((CHECKPOINT_EXT, b""),), 0),
        (((CHECKPOINT_EXT, bytes(3)),), 0),
        (((CHECKPOINT_EXT, b"\xff" * 1024),), MAX_CHECKPOINT_SECONDS),
        (((4, b"later"),), 0),
    ],
)
def test_a_bid_may_say_how_often_it_would_like_a_checkpoint(ext: Any, seconds: int) -> None:
    outcome = checked(altered(ext=ext))
    assert isinstance(outcome, OpenBid)
    assert checkpoint_seconds(outcome.bid) == seconds


def test_a_bid_is_fresh_within_its_limits() -> None:
    for at_ns in (NOW_NS - MAX_BID_AGE_NS, NOW_NS + CLOCK_TOLERANCE_NS):
        assert isinstance(checked(altered(decided_at_ns=at_ns)), OpenBid)


def test_an_ask_can_be_taken_until_it_expires() -> None:
    last_ns = NOW_NS + ASK_LIFE_NS
    terms = msgspec.structs.replace(TERMS, deadline_ns=last_ns + 10)
    wire = altered(decided_at_ns=last_ns - 1, terms=terms)
    assert isinstance(checked(wire, last_ns - 1), OpenBid)
    assert "expired" in refusal(checked(wire, last_ns))


def test_a_node_may_buy_from_itself() -> None:
    assert isinstance(checked(bid(SELLER, DEAL).wire), OpenBid)


def test_a_buyer_cannot_sign_a_bid_at_another_price() -> None:
    with pytest.raises(ValueError, match="ranked at"):
        bid(BUYER, DEAL, terms=msgspec.structs.replace(TERMS, moved_bytes=0), costs=COSTS[:1])


def test_a_quote_past_all_money_is_refused() -> None:
    line = CostLine(ROOT, 2**63 - 1, 0, 2**63 - 1)
    wire = altered(costs=(line,), quote_nusd=2**63 - 1)
    assert "quote should be" in refusal(checked(wire))


def test_cost_lines_are_the_providers_own() -> None:
    assert check_costs(BID.record, METER_ID, COSTS) is None
    assert "meter says" in refusal(check_costs(BID.record, METER_ID, COSTS[::-1]))
    assert "meter" in refusal(check_costs(BID.record, "other", COSTS))
    assert "cost lines" in refusal(check_costs(BID.record, METER_ID, COSTS * 33))


def test_a_fill_answers_its_bid() -> None:
    fill = check_fill(FILL.wire, BID, SELLER.account.public_key, NOW_NS)
    assert fill == FILL
    assert FILL.record.confirm_by_ns == NOW_NS + CONFIRM_WITHIN_NS
    assert FILL.record.lease_until_ns == DEADLINE_NS


def signed_fill(key: Any = SELLER.node, **values: Any) -> bytes:
    return seal(msgspec.structs.replace(FILL.record, **values), key).wire


@pytest.mark.parametrize(
    ("wire", "why"),
    [
        (signed_fill(STRANGER.node), "not by the provider"),
        (signed_fill(bid=ROOT), "another bid"),
        (signed_fill(delegation=STRANGER.delegation), "another node"),
        (signed_fill(lease_until_ns=DEADLINE_NS - 1), "before the deadline"),
        (signed_fill(confirm_by_ns=NOW_NS - CLOCK_TOLERANCE_NS - 1), "lapsed"),
        (BID.wire, "expected a fill"),
        (b"junk", "envelope"),
    ],
)
def test_a_buyer_refuses_a_fill_that_is_not_right(wire: bytes, why: str) -> None:
    assert why in refusal(check_fill(wire, BID, SELLER.account.public_key, NOW_NS))


def test_a_fill_is_for_the_account_of_the_ask() -> None:
    assert "account" in refusal(check_fill(FILL.wire, BID, STRANGER.account.public_key, NOW_NS))


def test_a_reject_carries_reason_and_newest_sheet() -> None:
    wire = make_reject(SELLER.node, BID.id, "busy", SHEET.sealed.wire).wire
    reject = check_reject(wire, BID)
    assert isinstance(reject, Sealed)
    assert (reject.record.reason, reject.record.sheet) == ("busy", SHEET.sealed.wire)
    assert refusal(check_reject(make_reject(STRANGER.node, BID.id, "busy").wire, BID))
    assert refusal(check_reject(make_reject(SELLER.node, ROOT, "busy").wire, BID))
    assert len(make_reject(SELLER.node, BID.id, "x" * 999).record.reason) == 200


def test_only_the_buyer_confirms() -> None:
    confirm = make_confirm(BUYER.node, FILL)
    assert check_confirm(confirm.wire, BID, FILL) == confirm
    assert refusal(check_confirm(make_confirm(STRANGER.node, FILL).wire, BID, FILL))
    other = seal(Fill(1, ROOT, 1, 1, b""), SELLER.node)
    assert refusal(check_confirm(make_confirm(BUYER.node, other).wire, BID, FILL))


def test_a_commit_opens_with_its_salt_only() -> None:
    commit = make_commit(SELLER.node, FILL, salt=SALT, state_root=ROOT, result=RESULT)
    assert check_commit(commit.wire, FILL) == commit
    assert check_opening(commit, SALT, ROOT, RESULT) is None
    for salt, root, result in [(ROOT, ROOT, RESULT), (SALT, RESULT, RESULT), (SALT, ROOT, ROOT)]:
        assert "committed" in refusal(check_opening(commit, salt, root, result))
    assert "salt" in refusal(check_opening(commit, b"", ROOT, RESULT))
    copied = seal(commit.record, STRANGER.node)
    assert refusal(check_commit(copied.wire, FILL))
    assert "committed" in refusal(check_opening(copied, SALT, ROOT, RESULT)), "commits do not copy"


def test_either_party_abandons_within_the_stretch() -> None:
    for key in (BUYER.node, SELLER.node):
        for step in (0, STEPS):
            wire = make_abandon(key, FILL, from_step=step, root=ROOT, reason="enough").wire
            assert isinstance(check_abandon(wire, BID, FILL), Sealed)
    for key, step in [(STRANGER.node, 0), (BUYER.node, STEPS + 1)]:
        wire = make_abandon(key, FILL, from_step=step, root=ROOT, reason="").wire
        assert refusal(check_abandon(wire, BID, FILL))


def test_the_largest_bid_fits() -> None:
    lines = tuple(CostLine(bytes([n]) * 32, 2**62, 2**62, 2**62) for n in range(64))
    record = msgspec.structs.replace(
        BID.record,
        costs=lines,
        job=Job(ROOT, 2**62, 2**40),
        terms=Terms(2**62, 2**62, 2**62, 2**62),
    )
    assert len(seal(record, BUYER.node).wire) < Bid.MAX_BYTES // 8
