"""The total, and why an ask does not do."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from p2pflop.errors import MarketError
from p2pflop.market.limits import Limit, Over
from p2pflop.market.mandate import SALT_BYTES
from p2pflop.market.ranking import (
    Deal,
    Experience,
    Miss,
    MissReason,
    Policy,
    best,
    no_deal,
    rank,
    total_nusd,
)
from p2pflop.market.samples import (
    ASK_LIFE_NS,
    CLASS_ID,
    DEADLINE_NS,
    MANDATE,
    NOW_NS,
    ask,
    book,
    deals,
    need,
    party,
)
from p2pflop.units import NS_PER_S

SELLER = party(1)
ACCOUNT = SELLER.account.public_key


@pytest.mark.parametrize(
    ("fields", "flop", "touched", "moved", "total"),
    [
        ({"price_nusd": 1000}, 10**15, 0, 0, 1000),
        ({"price_nusd": 1000}, 1, 0, 0, 1),
        ({"price_nusd": 1000}, 10**15 + 1, 0, 0, 1001),
        ({"price_nusd": 1000, "setup_nusd": 7}, 10**15, 0, 0, 1007),
        ({"price_nusd": 1000, "setup_nusd": 7, "min_charge_nusd": 5000}, 10**15, 0, 0, 5000),
        ({"price_nusd": 1000, "flop_per_byte": 10}, 10**15, 2 * 10**14, 0, 2000),
        ({"price_nusd": 1000, "flop_per_byte": 10}, 10**15, 10**13, 0, 1000),
        ({"price_nusd": 0, "byte_price_nusd": 100}, 10**15, 0, 10**9, 100),
        ({"price_nusd": 0, "byte_price_nusd": 100}, 10**15, 0, 1, 1),
        ({"price_nusd": 1, "byte_price_nusd": 1}, 1, 0, 1, 2),
        ({"price_nusd": 0}, 10**30, 10**30, 10**30, 0),
        ({"price_nusd": 1000}, 0, 0, 0, 0),
    ],
)
def test_the_total_by_the_formula(
    fields: dict[str, int], flop: int, touched: int, moved: int, total: int
) -> None:
    assert total_nusd(ask(1, **fields), flop, touched, moved) == total


def miss(
    asked: object = None, policy: Policy | None = None, now_ns: int = NOW_NS, **needs: object
) -> Miss:
    (found,) = rank(
        [SELLER.sheet(asked or ask())],  # type: ignore[arg-type]
        need(**needs),
        policy or Policy(),
        now_ns,
    )
    assert isinstance(found, Miss)
    return found


def test_each_reason_for_a_miss() -> None:
    late = NOW_NS + ASK_LIFE_NS
    assert miss(class_ids=frozenset({bytes(32)})).reason is MissReason.CLASS
    assert miss(memory_bytes=2**33 + 1).reason is MissReason.MEMORY
    assert miss(now_ns=late, deadline_ns=late + 1).reason is MissReason.EXPIRED
    assert miss(deadline_ns=NOW_NS).reason is MissReason.DEADLINE
    assert miss(own_node=SELLER.node.public_key).reason is MissReason.OWN_NODE
    assert miss(policy=Policy(excluded=(ACCOUNT,))).reason is MissReason.POLICY
    assert miss(policy=Policy(only=(bytes(32),))).reason is MissReason.POLICY
    assert miss(policy=Policy(attested_only=True)).reason is MissReason.ATTESTATION
    assert miss(policy=Policy(max_price_nusd=10**6 - 1)).reason is MissReason.PRICE
    assert miss(max_nusd=1).reason is MissReason.BUDGET


def test_limits_are_inclusive() -> None:
    (deal,) = deals(SELLER.sheet(ask()))
    exact = need(max_nusd=deal.total_nusd, memory_bytes=2**33)
    policy = Policy(only=(ACCOUNT,), max_price_nusd=10**6)
    assert isinstance(rank([deal.sheet], exact, policy, NOW_NS)[0], Deal)
    assert miss(max_nusd=deal.total_nusd - 1).total_nusd == deal.total_nusd


def test_an_ask_need_not_outlive_the_job() -> None:
    """An ask's validity is for taking it; the fill's lease lasts until the deadline."""
    later = need(deadline_ns=NOW_NS + 10 * ASK_LIFE_NS)
    assert isinstance(rank([SELLER.sheet(ask())], later, Policy(), NOW_NS)[0], Deal)


def test_only_own_experience_calls_a_provider_slow() -> None:
    crawling = ask(1, flop_per_s=1)
    assert isinstance(rank([SELLER.sheet(crawling)], need(), Policy(), NOW_NS)[0], Deal)
    seconds = (DEADLINE_NS - NOW_NS) // NS_PER_S
    enough = -(-need().flop // seconds)
    for speed, expected in ((enough, None), (enough - 1, MissReason.SLOW)):
        policy = Policy(experience=(Experience(ACCOUNT, CLASS_ID, speed),))
        (found,) = rank([SELLER.sheet(ask())], need(), policy, NOW_NS)
        assert (found.reason if isinstance(found, Miss) else None) == expected
    elsewhere = Policy(experience=(Experience(ACCOUNT, bytes(32), 1),))
    assert isinstance(rank([SELLER.sheet(ask())], need(), elsewhere, NOW_NS)[0], Deal)


def test_attestation_is_asked_of_whoever_knows() -> None:
    (found,) = rank(
        [SELLER.sheet(ask())],
        need(),
        Policy(attested_only=True),
        NOW_NS,
        {ACCOUNT},
    )
    assert isinstance(found, Deal)


def test_a_deal_tells_its_total_and_the_claimed_time() -> None:
    (deal,) = deals(SELLER.sheet(ask(1, 10**9, byte_price_nusd=1000, setup_nusd=5)))
    assert deal.total_nusd == 350_000_000 + 1 + 5
    assert deal.claimed_ns == need().flop // 10**12 * NS_PER_S
    (silent,) = deals(SELLER.sheet(ask(1, flop_per_s=0)))
    assert silent.claimed_ns is None


def test_deals_come_cheapest_first_then_misses() -> None:
    sheet = SELLER.sheet(ask(1, 900), ask(2, 100), ask(3, 500), ask(4, 1, memory_bytes=0))
    ranked = rank([sheet], need(), Policy(), NOW_NS)
    assert [entry.ask.number for entry in ranked] == [2, 3, 1, 4]
    assert isinstance(ranked[-1], Miss)


def test_the_nonce_draws_among_equal_totals() -> None:
    sheets = [party(number).sheet(ask()) for number in range(5)]
    winners = {
        rank(sheets, need(nonce=bytes([n]) * 16), Policy(), NOW_NS)[0].account for n in range(64)
    }
    assert len(winners) == 5


def test_an_account_has_one_lot_however_many_nodes_it_has() -> None:
    many = [party(number, account=1).sheet(ask()) for number in range(9)]
    single = party(50).sheet(ask())
    wins = sum(
        rank([*many, single], need(nonce=bytes([n]) * 16), Policy(), NOW_NS)[0].account
        == single.account
        for n in range(200)
    )
    assert 70 < wins < 130


def test_best_is_the_first_of_the_ranking() -> None:
    made = book(*(party(number).sheet(ask(1, 100 + number % 3)) for number in range(9)))
    view = made.view(NOW_NS)
    assert best(view, need(), Policy(), NOW_NS) == rank(view.sheets, need(), Policy(), NOW_NS)[0]
    assert best(view, need(max_nusd=0), Policy(), NOW_NS) is None


def test_a_policy_has_one_form_however_it_is_written() -> None:
    one, two = bytes(32), b"\1" * 32
    assert Policy(excluded=(two, one, two)).canonical() == Policy(excluded=(one, two))


def test_a_mandate_has_another_digest_if_anything_in_it_is_another() -> None:
    others = (
        msgspec.structs.replace(MANDATE, policy=Policy(only=(bytes(32),))),
        msgspec.structs.replace(MANDATE, policy=Policy(excluded=(bytes(32),))),
        msgspec.structs.replace(MANDATE, max_nusd=MANDATE.max_nusd - 1),
        msgspec.structs.replace(MANDATE, class_ids=(bytes(32),)),
        msgspec.structs.replace(MANDATE, salt=b"\1" * SALT_BYTES),
    )
    assert len({each.digest() for each in (MANDATE, *others)}) == len(others) + 1


def test_no_deal_says_why_and_what_to_do() -> None:
    dear = party(2).sheet(ask(1, 10**9))
    ranked = rank([SELLER.sheet(ask(1, memory_bytes=0)), dear], need(max_nusd=5), Policy(), NOW_NS)
    error = no_deal(ranked)
    assert isinstance(error, MarketError)
    assert "1 x too little memory" in error.message
    assert "1 x over the budget" in error.message
    assert "$0.35" in error.hint
    assert "empty" in no_deal([]).message


def test_the_advice_is_about_the_ask_that_comes_nearest() -> None:
    small = [party(number).sheet(ask(1, memory_bytes=number * 10**9)) for number in (1, 2)]
    dear = party(3).sheet(ask(1, 10**9))
    wanted = need(max_nusd=5, memory_bytes=3 * 10**9)
    error = no_deal(rank([*small, dear], wanted, Policy(), NOW_NS))
    assert error.message.endswith("1 x over the budget, 2 x too little memory")
    assert "over the budget would cost" in error.hint
    for reason in MissReason:
        over = Over(Limit.FLOP, 2, 1) if reason is MissReason.LIMIT else None
        fitting = [
            Miss(dear, dear.sheet.asks[0], reason, 10**9, wanted, over),
            Miss(small[0], small[0].sheet.asks[0], reason, 10**9, wanted, over),
        ]
        assert f"2 x {reason}" in no_deal(fitting).message
        assert no_deal(fitting).hint


def test_too_little_memory_does_not_hide_behind_asks_of_other_classes() -> None:
    other = [
        party(number).sheet(ask(1, class_id=b"\7" * 32, memory_bytes=number * 10**9))
        for number in (1, 2)
    ]
    small = party(3).sheet(ask(1, memory_bytes=10**9))
    wanted = need(memory_bytes=3 * 10**9)
    error = no_deal(rank([*other, small], wanted, Policy(), NOW_NS))
    assert error.message.endswith("1 x too little memory, 2 x wrong class")
    assert "largest ask has 1 GB" in error.hint
    error = no_deal(rank(other, wanted, Policy(), NOW_NS))
    assert error.message.endswith(": 2 x wrong class")
    assert "the class that was asked for" in error.hint
    assert (
        "Nor have they the memory. The job needs 3 GB, and the largest ask has 2 GB" in error.hint
    )
    error = no_deal(rank(other, need(memory_bytes=2 * 10**9), Policy(), NOW_NS))
    assert "memory" not in error.hint


def test_an_own_ask_is_no_obstacle() -> None:
    other = party(1).sheet(ask(1, class_id=b"\7" * 32))
    wanted = need(own_node=SELLER.node.public_key)
    error = no_deal(rank([SELLER.sheet(ask()), other], wanted, Policy(), NOW_NS))
    assert error.message.endswith("1 x wrong class, 1 x own node")


def test_a_quote_beyond_all_money_is_over_any_budget() -> None:
    huge = replace(need(max_nusd=2**80), flop=2**90)
    (found,) = rank([SELLER.sheet(ask(1, 10**9))], huge, Policy(), NOW_NS)
    assert isinstance(found, Miss)
    assert found.reason is MissReason.BUDGET
