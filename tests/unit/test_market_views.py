"""A view made step by step equals one made afresh, whatever changed and expired on the way."""

from __future__ import annotations

import random

import pytest

from p2pflop.market import views as views_module
from p2pflop.market.samples import CLASS_ID, NOW_NS, ask, party
from p2pflop.market.sheets import OpenSheet
from p2pflop.market.views import MIN_REBUILT, BookView, Shelf
from p2pflop.units import NS_PER_S


def fresh(shown: dict[bytes, OpenSheet], now_ns: int) -> BookView:
    live = [shown[node] for node in sorted(shown) if shown[node].sheet.expires_ns > now_ns]
    return BookView(tuple(live), now_ns)


@pytest.mark.parametrize("seed", range(5))
def test_step_by_step_as_afresh(seed: int) -> None:
    random_ = random.Random(seed)  # noqa: S311 - no secrets
    shelf, now_ns = Shelf(), NOW_NS
    shown: dict[bytes, OpenSheet] = {}
    kept: list[tuple[BookView, BookView]] = []
    for number in range(1, 120):
        for _ in range(random_.choice([0, 1, 3, 2 * MIN_REBUILT])):
            maker = party(random_.randrange(40))
            asks = [
                ask(n, random_.randrange(1, 9), class_id=bytes([n]) * 32, valid_until_ns=now_ns)
                for n in range(random_.randrange(4))
            ]
            life_ns = random_.choice([1, 5, 600]) * NS_PER_S
            sheet = maker.sheet(*asks, number=number, now_ns=now_ns, lifetime_ns=life_ns)
            if random_.random() < 0.2:
                shelf.drop(sheet.node)
                shown.pop(sheet.node, None)
            else:
                shelf.put(sheet)
                shown[sheet.node] = sheet
        now_ns += random_.choice([0, 1, 2]) * NS_PER_S
        view, expected = shelf.view(now_ns), fresh(shown, now_ns)
        assert view.sheets == expected.sheets
        assert view.buckets == expected.buckets
        assert view.digest == expected.digest
        assert view.by_price == expected.by_price
        kept.append((view, expected))
    for view, expected in kept:
        assert view.by_price == expected.by_price, "a view has changed"


def test_expiries_are_bounded() -> None:
    shelf = Shelf()
    for number in range(1, 50 * MIN_REBUILT):
        shelf.put(party(1).sheet(number=number))
        shelf.view(NOW_NS)
    assert len(shelf._expiries) <= 2 + MIN_REBUILT


def test_few_changes_do_not_sort_the_book_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf()
    for number in range(MIN_REBUILT + 1):
        shelf.put(party(number).sheet(ask()))
    shelf.view(NOW_NS)
    monkeypatch.setattr(views_module.Shelf, "_rebuild", None)
    shelf.put(party(1).sheet(ask(), number=2))
    assert len(shelf.view(NOW_NS).sheets) == MIN_REBUILT + 1


def test_a_view_names_every_sheet_that_it_is_given() -> None:
    """A sheet too many, as in made-up evidence, is not hidden by another of its node."""
    old, new = (party(1).sheet(ask(), number=number) for number in (1, 2))
    alone = BookView((new,), NOW_NS)
    both = BookView((old, new), NOW_NS)
    assert both.digest != alone.digest != BookView((old,), NOW_NS).digest
    assert [len(view.by_price[CLASS_ID]) for view in (both, alone)] == [2, 1]
