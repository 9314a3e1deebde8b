"""Receipts: numbered, continuous, cumulative, and never above the quote."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from p2pflop.ids import content_hash
from p2pflop.job.spec import InitSource, Phase, Stop, WorkParam
from p2pflop.market.fills import make_fill
from p2pflop.market.receipts import (
    amount_nusd,
    begun_nusd,
    check_closing,
    check_countersigned,
    check_receipt,
    close,
    closing_nusd,
    countersign,
    make_receipt,
)
from p2pflop.market.records import ZERO_HASH, CostLine, Receipt, Rejected, fixed_charges
from p2pflop.market.samples import (
    COSTS,
    NOW_NS,
    RESULT,
    ROOT,
    STEPS,
    TEST_EVERY,
    TRAIN,
    WORK,
    ask,
    bid,
    deals,
    party,
)
from p2pflop.wire import Sealed, seal

BUYER, SELLER, STRANGER = party(1), party(2), party(3)
(DEAL,) = deals(SELLER.sheet(ask()))
SEALED_BID = bid(BUYER, DEAL)
BID = SEALED_BID.record
FILL = make_fill(SELLER.node, SEALED_BID, now_ns=NOW_NS, delegation=SELLER.delegation)
HALF = content_hash(b"state after 50")


def receipt(previous: Receipt | None, to_step: int, **rest: Any) -> Sealed[Receipt]:
    values = {"root_to": HALF, **rest}
    return make_receipt(SELLER.node, FILL, BID, WORK, previous, to_step=to_step, **values)


FIRST = receipt(None, 50)
LAST = receipt(FIRST.record, STEPS, root_to=ROOT, result=RESULT)


def refusal(
    record: Receipt, previous: Receipt | None, key: Any = SELLER.node, work: Any = WORK
) -> str:
    outcome = check_receipt(seal(record, key).wire, FILL, BID, work, previous)
    assert isinstance(outcome, Rejected)
    return outcome.reason


def altered(sealed: Sealed[Receipt], **values: Any) -> Receipt:
    return msgspec.structs.replace(sealed.record, **values)


def test_a_chain_of_receipts_is_accepted_and_ends_at_the_quote() -> None:
    assert check_receipt(FIRST.wire, FILL, BID, WORK, None) == FIRST
    assert check_receipt(LAST.wire, FILL, BID, WORK, FIRST.record) == LAST
    assert FIRST.record.amount_nusd == BID.quote_nusd // 2
    assert LAST.record.amount_nusd == BID.quote_nusd
    assert (FIRST.record.number, LAST.record.number) == (1, 2)
    assert LAST.record.root_from == HALF


def test_one_receipt_may_cover_everything() -> None:
    whole = receipt(None, STEPS, result=RESULT)
    assert check_receipt(whole.wire, FILL, BID, WORK, None) == whole
    assert whole.record.amount_nusd == BID.quote_nusd


def test_the_last_receipt_may_follow_a_checkpoint_at_the_last_step() -> None:
    all_steps = receipt(None, STEPS)
    last = receipt(all_steps.record, STEPS, result=RESULT)
    assert last.record.amount_nusd == all_steps.record.amount_nusd == BID.quote_nusd


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"number": 1}, "continue"),
        ({"number": 3}, "continue"),
        ({"from_step": 0}, "continue"),
        ({"root_from": ROOT}, "continue"),
        ({"to_step": 49}, "outside"),
        ({"to_step": STEPS + 1}, "outside"),
        ({"amount_nusd": BID.quote_nusd + 1}, "should be for"),
        ({"amount_nusd": BID.quote_nusd - 1}, "should be for"),
        ({"to_step": 99}, "steps are missing"),
        ({"to_step": 50, "result": ZERO_HASH}, "covers no step"),
        ({"fill": ROOT}, "another fill"),
    ],
)
def test_a_buyer_refuses_a_receipt_that_is_not_right(values: dict[str, Any], why: str) -> None:
    assert why in refusal(altered(LAST, **values), FIRST.record)


def test_only_the_provider_signs_and_nothing_comes_after_the_last() -> None:
    assert "provider" in refusal(FIRST.record, None, BUYER.node)
    assert "after the last" in refusal(altered(LAST, number=3), LAST.record)


def test_a_provider_hears_of_its_own_mistakes() -> None:
    with pytest.raises(ValueError, match="steps are missing"):
        receipt(None, 50, result=RESULT)
    with pytest.raises(ValueError, match="101 of 100"):
        receipt(None, STEPS + 1)


def test_a_last_receipt_without_steps_keeps_the_state() -> None:
    stopping = msgspec.structs.replace(WORK, stop=Stop(0, 0, 10))
    same = altered(FIRST, number=2, from_step=50, root_from=HALF, result=RESULT)
    assert not isinstance(
        check_receipt(seal(same, SELLER.node).wire, FILL, BID, stopping, FIRST.record), Rejected
    )
    moved = msgspec.structs.replace(same, root_to=ROOT)
    assert "without a step" in refusal(moved, FIRST.record, work=stopping)


def test_without_fixed_charges_a_work_that_stops_early_is_paid_pro_rata() -> None:
    stopping = msgspec.structs.replace(WORK, stop=Stop(0, 0, 10))
    last = make_receipt(
        SELLER.node, FILL, BID, stopping, None, to_step=30, root_to=ROOT, result=RESULT
    )
    assert last.record.amount_nusd == BID.quote_nusd * 30 // 100


def charged(setup_nusd: int, min_charge_nusd: int) -> Any:
    """A bid on an ask with these, and its fill."""
    dear = ask(setup_nusd=setup_nusd, min_charge_nusd=min_charge_nusd)
    sealed = bid(BUYER, deals(SELLER.sheet(dear))[0])
    return sealed, make_fill(SELLER.node, sealed, now_ns=NOW_NS, delegation=SELLER.delegation)


@pytest.mark.parametrize("setup_nusd", [0, 1000, 9 * 10**6])
@pytest.mark.parametrize("min_charge_nusd", [0, 2000, 10**9])
def test_a_work_that_stops_early_pays_the_fixed_charges_whole(
    setup_nusd: int, min_charge_nusd: int
) -> None:
    sealed, fill = charged(setup_nusd, min_charge_nusd)
    bought, stopping = sealed.record, msgspec.structs.replace(WORK, stop=Stop(0, 0, 10))
    assert fixed_charges(bought) == (setup_nusd, min_charge_nusd)
    before = 0
    for steps in range(10, STEPS + 1, 10):
        last = make_receipt(
            SELLER.node, fill, bought, stopping, None, to_step=steps, root_to=ROOT, result=RESULT
        )
        metered = (bought.quote_nusd - setup_nusd) * steps // STEPS
        due = last.record.amount_nusd
        assert due == max(min_charge_nusd, setup_nusd + metered)
        assert amount_nusd(bought, WORK, steps) <= due <= bought.quote_nusd
        assert before <= due
        assert check_receipt(last.wire, fill, bought, stopping, None) == last
        before = due
    assert before == bought.quote_nusd
    assert closing_nusd(bought, WORK, 0) == 0


def test_what_was_begun_counts_the_setup_and_whole_steps() -> None:
    bought = charged(10**6, 0)[0].record
    assert begun_nusd(bought, WORK, 0, 0) == 10**6
    for steps in (1, 50, STEPS):
        whole = closing_nusd(bought, WORK, steps)
        assert begun_nusd(bought, WORK, steps, 0) == whole > 10**6
        assert begun_nusd(bought, WORK, steps - 1, None) == whole
        assert begun_nusd(bought, WORK, steps - 1, 10**15) == whole, "no more than the step costs"
        before = begun_nusd(bought, WORK, steps - 1, 0)
        assert begun_nusd(bought, WORK, steps - 1, 1) == before + 1, "what the time was worth"
    assert begun_nusd(bought, WORK, STEPS, None) == bought.quote_nusd
    least = charged(0, 10**9)[0].record
    assert begun_nusd(least, WORK, 0, 0) == 0
    assert begun_nusd(least, WORK, 0, None) == 10**9


def test_before_its_end_a_stretch_pays_for_the_metered_work_alone() -> None:
    sealed, fill = charged(10**6, 0)
    half = make_receipt(
        SELLER.node, fill, sealed.record, WORK, None, to_step=50, root_to=HALF
    ).record
    assert half.amount_nusd == (sealed.record.quote_nusd - 10**6) // 2 > 0
    least, _ = charged(0, 10**9)
    assert least.record.quote_nusd == 10**9
    assert amount_nusd(least.record, WORK, 50) == 0


def test_a_buyer_that_cancels_signs_what_it_owes_by_itself() -> None:
    sealed, fill = charged(10**6, 0)
    bought = sealed.record
    half = make_receipt(SELLER.node, fill, bought, WORK, None, to_step=50, root_to=HALF).record
    closing = close(BUYER.node, half, bought, WORK)
    assert closing is not None
    assert closing.record.amount_nusd == 10**6 + (bought.quote_nusd - 10**6) // 2
    assert (closing.record.from_step, closing.record.to_step) == (50, 50)
    assert closing.record.root_to == HALF
    assert check_closing(closing.wire, half, sealed, WORK) == closing
    for wrong, why in (
        (seal(closing.record, SELLER.node), "not by the buyer"),
        (seal(altered(closing, amount_nusd=closing.record.amount_nusd - 1), BUYER.node), "owed"),
        (seal(altered(closing, number=3), BUYER.node), "owed"),
        (seal(altered(closing, fill=ROOT), BUYER.node), "owed"),
    ):
        refused = check_closing(wrong.wire, half, sealed, WORK)
        assert isinstance(refused, Rejected)
        assert why in refused.reason
    assert isinstance(check_closing(b"junk", half, sealed, WORK), Rejected)
    assert close(BUYER.node, FIRST.record, BID, WORK) is None, "no fixed charges: nothing more"


def test_the_amount_follows_the_phases_that_were_due() -> None:
    train, test = 3 * 10**12, 5 * 10**12
    total = STEPS * train + STEPS // TEST_EVERY * test
    for steps, delivered in [(9, 9 * train), (10, 10 * train + test), (0, 0)]:
        assert amount_nusd(BID, WORK, steps) == BID.quote_nusd * delivered // total


def test_weights_born_from_the_seed_count_with_the_first_step() -> None:
    born = content_hash(b"init graph")
    work = msgspec.structs.replace(
        WORK,
        params=(
            WorkParam(11, (4,), 1, InitSource(born, 0)),
            WorkParam(11, (4,), 1, InitSource(born, 1)),
        ),
    )
    costs = (CostLine(born, 10**15, 1, 1), *COSTS)
    with_init = msgspec.structs.replace(BID, costs=costs, quote_nusd=10**6)
    total = sum(line.flop * line.times for line in costs)
    assert amount_nusd(with_init, work, 0) == 0
    assert amount_nusd(with_init, work, 1) == 10**6 * (10**15 + 3 * 10**12) // total
    resumed = msgspec.structs.replace(
        with_init, job=msgspec.structs.replace(BID.job, first_step=10)
    )
    assert amount_nusd(resumed, work, 1) == 10**6 * 3 * 10**12 // total


def test_one_graph_in_two_phases_counts_twice() -> None:
    work = msgspec.structs.replace(WORK, phases=(Phase(TRAIN, 1, 0, ()), Phase(TRAIN, 2, 0, ())))
    lines = (CostLine(TRAIN, 10, 1, STEPS), CostLine(TRAIN, 10, 1, STEPS // 2))
    twice = msgspec.structs.replace(BID, costs=lines, quote_nusd=15000)
    assert amount_nusd(twice, work, 2) == 300


def test_without_flop_bytes_count_and_without_bytes_steps() -> None:
    moving = msgspec.structs.replace(BID, costs=(CostLine(TRAIN, 0, 8, STEPS),), quote_nusd=1000)
    assert amount_nusd(moving, WORK, 10) == 100
    idle = msgspec.structs.replace(BID, costs=(CostLine(TRAIN, 0, 0, STEPS),), quote_nusd=1000)
    assert amount_nusd(idle, WORK, 10) == 100


def test_countersigned_is_the_same_body_by_the_buyer() -> None:
    signed = countersign(BUYER.node, FIRST)
    buyer = BUYER.node.public_key
    assert check_countersigned(signed.wire, FIRST.record, buyer) == signed
    assert signed.record == FIRST.record
    assert signed.id != FIRST.id
    for wire in (
        FIRST.wire,
        countersign(STRANGER.node, FIRST).wire,
        countersign(BUYER.node, LAST).wire,
    ):
        assert isinstance(check_countersigned(wire, FIRST.record, buyer), Rejected)
