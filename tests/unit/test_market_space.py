"""Who has a place in a full book: identities are free, so their number must not decide."""

from __future__ import annotations

import pytest

from p2pflop.market import book as book_module
from p2pflop.market.book import (
    KNOWN_AFTER_NS,
    MAX_STRANGERS,
    SOURCE_WINDOW_NS,
    Applied,
    Book,
)
from p2pflop.market.records import Rejected
from p2pflop.market.samples import NOW_NS, Party, ask, party
from p2pflop.market.sheets import OpenSheet
from p2pflop.units import NS_PER_S

OWN = party(0)
FRIENDS = [party(number) for number in range(1, 4)]


def knows(*parties: Party) -> book_module.IsKnown:
    keys = {each.node.public_key for each in parties}
    return lambda sheet: sheet.node in keys


def flood(made: Book, count: int, now_ns: int = NOW_NS, source: str = "") -> list[OpenSheet]:
    """Sheets of ``count`` identities that nobody has seen before; those that were taken."""
    sheets = [party(number).sheet(ask(), now_ns=now_ns) for number in range(1000, 1000 + count)]
    return [sheet for sheet in sheets if isinstance(made.apply(sheet, now_ns, source), Applied)]


def holds(made: Book, *parties: Party, now_ns: int = NOW_NS) -> bool:
    return all(made.get(each.node.public_key, now_ns) is not None for each in parties)


def test_a_flood_evicts_neither_own_nor_known_sheets() -> None:
    own = OWN.node.public_key
    made = Book(bytes(32), own=own, is_known=knows(*FRIENDS), max_strangers=6, max_known=3)
    for each in (OWN, *FRIENDS):
        made.apply(each.sheet(ask()), NOW_NS)
    flood(made, 60)
    assert holds(made, OWN, *FRIENDS)
    assert len(made) == 6 + 1, "its own sheet takes nobody's place"
    for each in (OWN, *FRIENDS):
        assert made.apply(each.sheet(ask(), number=2), NOW_NS) == Applied(changed=True)


def test_own_sheets_are_safe_from_every_bound() -> None:
    own = OWN.node.public_key
    for bounds in ({"max_sheets": 1}, {"max_strangers": 1}, {"max_per_account": 1}):
        made = Book(bytes(32), own=own, is_attested=lambda *_: True, **bounds)  # type: ignore[arg-type]
        made.apply(OWN.sheet(ask()), NOW_NS)
        for number in range(10, 30):
            made.apply(party(number, account=0).sheet(ask()), NOW_NS)
            made.apply(party(number + 100).sheet(ask()), NOW_NS)
        assert holds(made, OWN)


def test_known_nodes_come_in_even_when_strangers_fill_the_book() -> None:
    made = Book(bytes(32), is_known=knows(*FRIENDS), max_strangers=6, max_known=3)
    flood(made, 60)
    for each in FRIENDS:
        assert made.apply(each.sheet(ask()), NOW_NS) == Applied(changed=True)
    flood(made, 60)
    assert holds(made, *FRIENDS)
    assert len(made) == 6


def test_who_has_been_here_long_stays_and_the_first_come_first() -> None:
    made = Book(bytes(32), max_strangers=6, max_known=3)
    early = [party(number) for number in range(20, 26)]
    now_ns = NOW_NS
    for each in early:
        made.apply(each.sheet(ask(), now_ns=now_ns), now_ns)
        now_ns += NS_PER_S
    now_ns += KNOWN_AFTER_NS
    made.expire(now_ns)
    flood(made, 100, now_ns)
    assert holds(made, *early[:3], now_ns=now_ns)
    assert len(made) == 6


def test_newcomers_keep_a_share_whoever_is_known() -> None:
    made = Book(bytes(32), is_known=lambda _: True, max_strangers=6, max_known=3)
    for number in range(20, 40):
        made.apply(party(number).sheet(ask()), NOW_NS)
    assert len(made) == 6
    before = made.digest(NOW_NS)
    for number in range(40, 80):
        made.apply(party(number).sheet(ask()), NOW_NS)
    assert made.digest(NOW_NS) != before, "some of the later ones won a place by their hash"


def test_one_who_is_known_takes_the_place_of_one_who_was_only_long_here() -> None:
    friend = FRIENDS[0]
    made = Book(bytes(32), is_known=knows(friend), max_strangers=3, max_known=2)
    now_ns = NOW_NS
    old = [party(number) for number in (20, 21)]
    for each in old:
        made.apply(each.sheet(ask(), now_ns=now_ns), now_ns)
        now_ns += NS_PER_S
    now_ns += KNOWN_AFTER_NS
    made.expire(now_ns)
    made.apply(friend.sheet(ask(), now_ns=now_ns), now_ns)
    flood(made, 50, now_ns)
    assert holds(made, friend, old[0], now_ns=now_ns)
    assert not holds(made, old[1], now_ns=now_ns)


def test_who_is_known_no_more_competes_again() -> None:
    known = [FRIENDS[0].node.public_key]
    made = Book(bytes(32), is_known=lambda s: s.node in known, max_strangers=3, max_known=2)
    made.apply(FRIENDS[0].sheet(ask()), NOW_NS)
    known.clear()
    made.expire(NOW_NS)
    flood(made, 100)
    assert not holds(made, FRIENDS[0])


def test_a_source_brings_a_bounded_number_of_new_nodes_in_a_time() -> None:
    made = Book(bytes(32), max_per_source=5)
    taken = flood(made, 20, source="stranger")
    assert len(taken) == 5
    renewed = party(1000).sheet(ask(), number=2)
    assert made.apply(renewed, NOW_NS, "stranger") == Applied(changed=True)
    assert isinstance(made.apply(party(2000).sheet(ask()), NOW_NS, "stranger"), Rejected)
    assert made.apply(party(2000).sheet(ask()), NOW_NS, "another") == Applied(changed=True)
    later_ns = NOW_NS + SOURCE_WINDOW_NS
    sheet = party(2001).sheet(ask(), now_ns=later_ns)
    assert made.apply(sheet, later_ns, "stranger") == Applied(changed=True)


def test_sources_are_forgotten_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book_module, "MAX_SOURCES", 3)
    made = Book(bytes(32))
    for number in range(10):
        made.apply(party(number).sheet(ask()), NOW_NS, f"source {number}")
    assert len(made._sources) == 3
    made.expire(NOW_NS + SOURCE_WINDOW_NS)
    assert not made._sources


def test_a_source_over_its_bound_still_brings_known_and_attested_nodes() -> None:
    attested = party(50).account.public_key
    made = Book(
        bytes(32),
        is_known=knows(*FRIENDS),
        is_attested=lambda account, _: account == attested,
        max_per_source=2,
    )
    flood(made, 10, source="stranger")
    for each in (*FRIENDS, party(50)):
        assert made.apply(each.sheet(ask()), NOW_NS, "stranger") == Applied(changed=True)


def test_the_share_of_one_source_is_less_than_what_newcomers_have() -> None:
    """So that a single peer cannot turn over the book, with the constants as they are."""
    assert book_module.MAX_NEW_PER_SOURCE <= MAX_STRANGERS - book_module.MAX_KNOWN


def test_an_account_has_as_many_places_as_it_may_have_nodes() -> None:
    most = [3]
    made = Book(bytes(32), is_attested=lambda *_: True, max_nodes=lambda *_: most[0])
    nodes = [party(number, account=0) for number in range(10, 16)]
    for each in nodes:
        made.apply(each.sheet(ask()), NOW_NS)
    assert len(made) == 3
    account = OWN.account.public_key
    assert len(made.sellers_of(account, NOW_NS)) == 3
    made.apply(party(50).sheet(ask()), NOW_NS)
    assert len(made) == 3 + 1 + 0, "others have places of their own"
    most[0] = 1
    made.expire(NOW_NS)
    assert len(made.sellers_of(account, NOW_NS)) == 1


def test_a_node_that_sells_nothing_takes_no_place_from_one_that_does() -> None:
    made = Book(bytes(32), is_attested=lambda *_: True, max_nodes=lambda *_: 1)
    for number in range(10, 30):
        made.apply(party(number, account=0).sheet(), NOW_NS)
    for number in range(30, 34):
        made.apply(party(number, account=0).sheet(ask()), NOW_NS)
        assert len(made.sellers_of(OWN.account.public_key, NOW_NS)) == 1
        for seller in made.sellers_of(OWN.account.public_key, NOW_NS):
            made.apply(party(number, account=0).sheet(number=2), NOW_NS)
            assert seller == party(number, account=0).node.public_key
    assert len(made) == 24, "what guards against replay stays"


def test_the_own_node_is_the_last_to_lose_its_place() -> None:
    own = OWN.node.public_key
    made = Book(bytes(32), own=own, is_attested=lambda *_: True, max_nodes=lambda *_: 1)
    made.apply(OWN.sheet(ask()), NOW_NS)
    for number in range(10, 20):
        made.apply(party(number, account=0).sheet(ask()), NOW_NS)
    assert made.sellers_of(OWN.account.public_key, NOW_NS) == [own]
