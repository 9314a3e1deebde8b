"""Trades: what is let on the tape and what is not; limits, prices and volumes."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from p2pflop.market import tape as tape_module
from p2pflop.market.records import MAX_TRADE_BYTES, Rejected, Trade
from p2pflop.market.samples import CLASS_ID, NOW_NS, Party, party
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS, make_delegation
from p2pflop.market.tape import (
    HOUR_NS,
    KEPT_HOURS,
    LAST_PRICE_ACCOUNTS,
    MAX_TRADE_GFLOP,
    OpenTrade,
    Tape,
    TapeDump,
    check_hour,
    figures,
    fill_digest,
    hour_of,
    last_price,
    make_trade,
    open_trade,
    round_gflop,
)
from p2pflop.wire import seal

SELLER = party(1)
HOUR = hour_of(NOW_NS)
GFLOP = 10**9


def trade(
    number: int = 1,
    seller: Party = SELLER,
    *,
    price_nusd: int = 10**6,
    gflop: int = 7,
    class_id: bytes = CLASS_ID,
    hours_ago: int = 0,
) -> OpenTrade:
    """Trade ``number`` of a seller."""
    return make_trade(
        seller.node,
        fill_id=b"fill %d" % number,
        class_id=class_id,
        price_nusd=price_nusd,
        flop=gflop * GFLOP,
        now_ns=NOW_NS - hours_ago * HOUR_NS,
        delegation=seller.delegation,
    )


def signed(seller: Party = SELLER, **changes: Any) -> bytes:
    """A trade signed after it was changed."""
    return seal(replace(trade().trade, **changes), seller.node).wire


def reason(outcome: object) -> str:
    assert isinstance(outcome, Rejected), outcome
    return outcome.reason


@pytest.fixture
def tape() -> Tape:
    return Tape(b"s" * 32)


@pytest.mark.parametrize(
    ("flop", "gflop"),
    [
        (0, 1),
        (GFLOP, 1),
        (94 * GFLOP, 90),
        (95 * GFLOP, 100),
        (104 * GFLOP, 100),
        (150 * GFLOP, 200),
        (10**40, MAX_TRADE_GFLOP),
    ],
)
def test_the_tape_shows_one_digit(flop: int, gflop: int) -> None:
    assert round_gflop(flop) == gflop
    assert round_gflop(gflop * GFLOP) == gflop


def test_a_trade_says_class_price_size_and_hour_and_who_sold() -> None:
    opened = open_trade(trade(gflop=123).sealed.wire)
    assert opened == trade(gflop=123)
    assert isinstance(opened, OpenTrade)
    assert opened.account == SELLER.account.public_key
    assert opened.trade == Trade(
        1, fill_digest(b"fill 1"), CLASS_ID, 10**6, 100, HOUR, SELLER.delegation
    )


def test_its_fill_is_named_by_a_hash_that_only_its_parties_can_make() -> None:
    assert fill_digest(b"fill") not in (b"fill", fill_digest(b"another"))
    assert b"fill 1" not in trade().sealed.wire


@pytest.mark.parametrize(
    ("wire", "why"),
    [
        (b"junk", "envelope"),
        (bytes(MAX_TRADE_BYTES * 2), "over its limit"),
        (SELLER.sheet().sealed.wire, "expected a trade"),
        (trade().sealed.wire[:-1] + b"\0", "signature"),
        (signed(price_nusd=1234), "three significant digits"),
        (signed(gflop_rounded=12), "over one digit"),
        (signed(gflop_rounded=0), "over one digit"),
        (signed(gflop_rounded=MAX_TRADE_GFLOP + 10**17), "over one digit"),
        (signed(delegation=b""), "delegation"),
        (signed(delegation=party(2).delegation), "names another node"),
        (signed(delegation=signed()), "delegation"),
        (signed(party(2)), "names another node"),
        (signed(hour=2**32 - 1), "does not cover"),
        (signed(hour=0), "does not cover"),
    ],
)
def test_what_is_wrong_is_refused_with_its_reason(wire: bytes, why: str) -> None:
    assert why in reason(open_trade(wire))


def test_another_network_is_another_market() -> None:
    assert "signature" in reason(open_trade(trade().sealed.wire, "test"))


def test_a_delegation_that_began_in_the_hour_will_do_and_one_that_ended_in_it_will_not() -> None:
    node, start_ns = SELLER.node.public_key, HOUR * HOUR_NS

    def with_delegation(from_ns: int, until_ns: int) -> object:
        made = make_delegation(SELLER.account, node, from_ns, until_ns)
        return open_trade(signed(delegation=made))

    end_ns = start_ns + HOUR_NS
    assert isinstance(with_delegation(start_ns + 1, end_ns), OpenTrade)
    assert isinstance(with_delegation(start_ns, end_ns - 1), OpenTrade)
    assert "cover" in reason(with_delegation(start_ns, end_ns - 2))
    assert "cover" in reason(with_delegation(end_ns, end_ns + 1))


def test_only_what_can_be_sold_is_signed() -> None:
    with pytest.raises(ValueError, match="significant"):
        trade(price_nusd=1001)


def test_clocks_may_differ_a_little_and_the_past_ends() -> None:
    start_ns = HOUR * HOUR_NS
    assert check_hour(trade(), start_ns - CLOCK_TOLERANCE_NS) is None
    assert "future" in reason(check_hour(trade(), start_ns - CLOCK_TOLERANCE_NS - 1))
    assert check_hour(trade(), start_ns + KEPT_HOURS * HOUR_NS - 1) is None
    assert "old" in reason(check_hour(trade(), start_ns + KEPT_HOURS * HOUR_NS))


def test_what_is_added_is_there_once_until_it_is_too_old(tape: Tape) -> None:
    assert tape.add(trade(), NOW_NS) is True
    assert tape.add(trade(), NOW_NS) is False
    assert tape.trades(NOW_NS) == [trade()]
    assert tape.ids(NOW_NS) == {HOUR: [trade().sealed.id]}
    assert tape.trades(NOW_NS + KEPT_HOURS * HOUR_NS) == []
    assert len(tape) == 0
    assert "future" in reason(tape.add(trade(hours_ago=-1), NOW_NS))


def test_one_fill_is_told_of_once(tape: Tape) -> None:
    first, second = sorted(
        (trade(price_nusd=1), trade(price_nusd=2)), key=lambda each: each.sealed.id
    )
    assert tape.add(second, NOW_NS) is True
    assert tape.add(first, NOW_NS) is True, "the lower id stays, whichever came first"
    assert "about that fill" in reason(tape.add(second, NOW_NS))
    assert tape.trades(NOW_NS) == [first]


def limit(monkeypatch: pytest.MonkeyPatch, **limits: int) -> Tape:
    for name, value in limits.items():
        monkeypatch.setattr(tape_module, name, value)
    return Tape(b"s" * 32)


def fill_up(tape: Tape, trades: list[OpenTrade]) -> list[OpenTrade]:
    for each in trades:
        tape.add(each, NOW_NS)
    assert len(tape) == len(tape.trades(NOW_NS))
    return tape.trades(NOW_NS)


def test_an_account_has_so_many_trades_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    tape = limit(monkeypatch, MAX_TRADES_AN_ACCOUNT=3)
    other_node = party(9, account=1)
    many = [trade(n, (SELLER, other_node)[n % 2]) for n in range(10)]
    assert len(fill_up(tape, many)) == 3
    earlier = [trade(n, hours_ago=1) for n in range(5)]
    assert len(fill_up(tape, earlier)) == 6
    refused = [each for each in many if each not in tape.trades(NOW_NS)]
    assert "enough trades" in reason(tape.add(refused[0], NOW_NS))


def test_an_hour_has_room_for_each_accounts_first_before_anybodys_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tape = limit(monkeypatch, MAX_TRADES_AN_HOUR=5)
    flood = [trade(n) for n in range(8)]
    quiet = [trade(n, party(number)) for number in (2, 3, 4) for n in range(1)]
    kept = fill_up(tape, [*flood, *quiet])
    assert len(kept) == 5
    assert set(quiet) <= set(kept)
    assert "no room" in reason(tape.add(next(t for t in flood if t not in kept), NOW_NS))


def test_the_newest_hours_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    tape = limit(monkeypatch, MAX_TRADES=4)
    trades = [trade(n, hours_ago=ago) for ago in (2, 0, 1) for n in range(2)]
    kept = fill_up(tape, trades)
    assert [HOUR - each.trade.hour for each in kept] == [0, 0, 1, 1]
    assert "no room" in reason(tape.add(trades[0], NOW_NS))


def test_a_tape_has_a_secret() -> None:
    with pytest.raises(ValueError, match="has 32 bytes, not 5"):
        Tape(b"short")


def test_what_is_saved_is_checked_again(tape: Tape) -> None:
    for each in (trade(1), trade(2, hours_ago=KEPT_HOURS - 1)):
        tape.add(each, NOW_NS)
    bad = TapeDump((*tape.dump().trades, b"junk", signed(gflop_rounded=12)))
    again = Tape(b"t" * 32)
    again.load(bad, NOW_NS)
    assert again.trades(NOW_NS) == tape.trades(NOW_NS)
    assert again.dump() == tape.dump()
    later = Tape(b"t" * 32)
    later.load(bad, NOW_NS + HOUR_NS)
    assert later.trades(NOW_NS + HOUR_NS) == [trade(1)]


# Figures


def test_one_account_has_one_voice_in_the_last_price() -> None:
    flood = [trade(n, price_nusd=10**9) for n in range(30)]
    others = [trade(1, party(n), price_nusd=100 + n) for n in range(2, 6)]
    assert last_price([]) is None
    assert last_price(flood) == 10**9
    assert last_price([*flood, *others]) == last_price([*others, flood[0]]) == 104


def test_the_last_price_goes_back_until_enough_accounts_have_spoken() -> None:
    trades = [
        trade(1, party(n), price_nusd=n, hours_ago=n) for n in range(1, LAST_PRICE_ACCOUNTS + 4)
    ]
    assert LAST_PRICE_ACCOUNTS == 5
    assert last_price(trades) == 3, "of the five newest"
    assert last_price(trades[:2]) == 1, "of two the lower"
    again = trade(2, party(1), price_nusd=900, hours_ago=0)
    assert last_price([*trades, again]) == 4, "an account's newest hour is what counts"


def test_all_of_one_hour_count_alike() -> None:
    trades = [trade(1, party(n), price_nusd=n) for n in range(1, 10)]
    assert last_price(trades) == 5


def test_volume_and_range_are_of_the_hour_and_the_day() -> None:
    other_class = bytes(32)
    trades = [
        trade(1, price_nusd=30, gflop=4),
        trade(2, price_nusd=10, gflop=3),
        trade(1, party(2), price_nusd=20, gflop=20, hours_ago=23),
        trade(1, party(3), price_nusd=999, gflop=500, hours_ago=24),
        trade(9, party(4), class_id=other_class, price_nusd=1, gflop=1, hours_ago=30),
    ]
    other, own = figures(trades, HOUR)
    assert (own.class_id, own.low_nusd, own.high_nusd) == (CLASS_ID, 10, 30)
    assert (own.hour_gflop, own.day_gflop, own.day_trades, own.day_accounts) == (7, 27, 3, 2)
    assert (other.class_id, other.last_nusd) == (other_class, 1)
    assert (other.low_nusd, other.high_nusd, other.day_gflop, other.day_trades) == (
        None,
        None,
        0,
        0,
    )
