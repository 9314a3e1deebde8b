"""What a tape keeps: a function of what it was told, not of the order, and within its limits."""

from __future__ import annotations

from collections import Counter
from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from p2pflop.market import tape as tape_module
from p2pflop.market.samples import CLASS_ID, NOW_NS, party
from p2pflop.market.tape import HOUR_NS, OpenTrade, Tape, figures, hour_of, last_price, make_trade

LIMITS = {"MAX_TRADES_AN_ACCOUNT": 2, "MAX_TRADES_AN_HOUR": 4, "MAX_TRADES": 7}


@cache
def trade(account: int, node: int, fill: int, hours_ago: int, price_nusd: int) -> OpenTrade:
    seller = party(10 * account + node, account)
    return make_trade(
        seller.node,
        fill_id=b"%d" % fill,
        class_id=CLASS_ID,
        price_nusd=price_nusd,
        flop=10**9,
        now_ns=NOW_NS - hours_ago * HOUR_NS,
        delegation=seller.delegation,
    )


def few(highest: int) -> st.SearchStrategy[int]:
    return st.integers(0, highest)


TRADES = st.builds(trade, few(4), few(1), few(4), few(3), few(2))


def kept(trades: list[OpenTrade], start: Tape | None = None) -> list[OpenTrade]:
    """What a tape of small limits keeps of these."""
    before = {name: getattr(tape_module, name) for name in LIMITS}
    try:
        for name, value in LIMITS.items():
            setattr(tape_module, name, value)
        tape = Tape(bytes(32))
        for each in trades:
            was = tape.trades(NOW_NS)
            added = tape.add(each, NOW_NS)
            assert (added is True) == (each in tape.trades(NOW_NS) and each not in was)
            assert (added is False) == (each in was)
        assert len(tape) == len(tape.trades(NOW_NS))
        return tape.trades(NOW_NS)
    finally:
        for name, value in before.items():
            setattr(tape_module, name, value)


@given(st.lists(TRADES, max_size=40), st.randoms(use_true_random=False))
def test_the_order_in_which_trades_come_does_not_matter(
    trades: list[OpenTrade], random: object
) -> None:
    shuffled = list(trades)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert kept(trades) == kept(shuffled)


@given(st.lists(TRADES, max_size=30), st.lists(TRADES, max_size=30))
def test_what_was_dropped_would_not_be_missed(
    first: list[OpenTrade], second: list[OpenTrade]
) -> None:
    assert kept(kept(first) + second) == kept(first + second)


@given(st.lists(TRADES, max_size=40))
def test_limits_hold_and_room_is_used(trades: list[OpenTrade]) -> None:
    found = kept(trades)
    hours = Counter(each.trade.hour for each in found)
    accounts = Counter((each.trade.hour, each.account) for each in found)
    assert len(found) <= LIMITS["MAX_TRADES"]
    assert max(hours.values(), default=0) <= LIMITS["MAX_TRADES_AN_HOUR"]
    assert max(accounts.values(), default=0) <= LIMITS["MAX_TRADES_AN_ACCOUNT"]
    told = Counter(
        (hour, account)
        for hour, account, _ in {(t.trade.hour, t.account, t.trade.fill_digest) for t in trades}
    )
    for hour in hours:
        of_hour = [
            min(n, LIMITS["MAX_TRADES_AN_ACCOUNT"]) for (h, _), n in told.items() if h == hour
        ]
        wanted = min(sum(of_hour), LIMITS["MAX_TRADES_AN_HOUR"])
        assert hours[hour] == wanted or hour == min(hours)
        shares = [accounts[hour, account] for (h, account) in told if h == hour]
        if hour != min(hours):
            assert max(shares) <= min(shares) + 1 or min(shares) == min(of_hour)


@given(st.lists(TRADES, min_size=1, max_size=20), st.lists(few(10**6), max_size=8))
def test_an_account_moves_the_last_price_by_one_voice_only(
    trades: list[OpenTrade], flood: list[int]
) -> None:
    """However much one account says: the price lies between what it would be if the account told
    nothing at all in its favour, or as high, or as low as can be."""
    hour = hour_of(NOW_NS)
    others = [each for each in trades if each.trade.hour <= hour]
    liar = [trade(7, 0, number, 0, _price(nusd)) for number, nusd in enumerate(flood)]
    if not liar:
        return
    lowest = last_price([*others, trade(7, 0, 0, 0, 0)])
    highest = last_price([*others, trade(7, 0, 0, 0, 999_000)])
    price = last_price([*others, *liar])
    assert lowest is not None
    assert highest is not None
    assert price is not None
    assert lowest <= price <= highest


@given(st.lists(TRADES, max_size=30))
def test_figures_are_of_what_is_there(trades: list[OpenTrade]) -> None:
    distinct = list(dict.fromkeys(trades))
    hour = hour_of(NOW_NS)
    for each in figures(distinct, hour):
        prices = {t.trade.price_nusd for t in distinct}
        assert {each.last_nusd, each.low_nusd, each.high_nusd} <= prices
        assert each.low_nusd is not None
        assert each.high_nusd is not None
        assert each.low_nusd <= each.high_nusd
        assert each.hour_gflop <= each.day_gflop == each.day_trades
        assert each.day_accounts == len({t.account for t in distinct})


def _price(nusd: int) -> int:
    return min(nusd // 10**4 * 10**4, 990_000)
