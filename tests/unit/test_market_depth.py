"""Depth: asks and accounts at or below each price."""

from __future__ import annotations

from p2pflop.market.book import Book
from p2pflop.market.depth import MAX_LEVELS, Level, depths
from p2pflop.market.samples import ASK_LIFE_NS, CLASS_ID, NOW_NS, ask, book, party

OTHER = bytes(32)


def sample() -> Book:
    return book(
        party(1).sheet(ask(1, 300), ask(2, 100), ask(3, 7, class_id=OTHER)),
        party(2, account=1).sheet(ask(1, 100)),
        party(3).sheet(ask(1, 200), ask(2, 100, valid_until_ns=NOW_NS + 1)),
    )


def test_asks_and_accounts_add_up_over_rising_prices() -> None:
    found = depths(sample().view(NOW_NS), NOW_NS)
    assert set(found) == {CLASS_ID, OTHER}
    assert found[CLASS_ID].levels == (Level(100, 3, 2), Level(200, 4, 2), Level(300, 5, 2))
    assert found[CLASS_ID].total == Level(300, 5, 2)
    assert found[OTHER].levels == (Level(7, 1, 1),)


def test_what_has_expired_is_no_depth() -> None:
    made = sample()
    later_ns = NOW_NS + 1
    assert depths(made.view(NOW_NS), later_ns)[CLASS_ID].levels[0] == Level(100, 2, 1)
    assert depths(made.view(NOW_NS), NOW_NS + ASK_LIFE_NS) == {}
    assert depths(book().view(NOW_NS), NOW_NS) == {}


def test_only_so_many_levels_are_told_and_the_total_is_of_all() -> None:
    sheets = [party(n).sheet(ask(1, 100 + n)) for n in range(MAX_LEVELS + 3)]
    found = depths(book(*sheets).view(NOW_NS), NOW_NS)[CLASS_ID]
    assert len(found.levels) == MAX_LEVELS
    assert found.total == Level(100 + MAX_LEVELS + 2, MAX_LEVELS + 3, MAX_LEVELS + 3)
