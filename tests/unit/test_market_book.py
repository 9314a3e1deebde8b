"""The book: which sheet of a node counts, who has space, what two books tell each other."""

from __future__ import annotations

import pytest

from p2pflop.market.book import (
    MAX_PROOFS,
    Applied,
    Book,
    Dump,
    Equivocation,
    open_equivocation,
)
from p2pflop.market.records import MAX_SHEET_LIFETIME_NS, Rejected
from p2pflop.market.samples import NOW_NS, ROOT, ask, book, party
from p2pflop.market.sheets import OpenSheet
from p2pflop.units import NS_PER_S

SELLER = party(1)


def proof_of(one: OpenSheet, other: OpenSheet) -> Equivocation:
    proof = open_equivocation(one.sealed.wire, other.sealed.wire, "main")
    assert isinstance(proof, Equivocation)
    return proof


def test_the_latest_number_wins_in_either_order() -> None:
    first, second = SELLER.sheet(ask(1), number=1), SELLER.sheet(ask(2), number=2)
    for sheets in ([first, second], [second, first]):
        made = book(*sheets)
        assert made.view(NOW_NS).sheets == (second,)


def test_the_same_sheet_again_changes_nothing() -> None:
    made = book()
    sheet = SELLER.sheet(ask())
    assert made.apply(sheet, NOW_NS) == Applied(changed=True)
    assert made.apply(sheet, NOW_NS) == Applied(changed=False)
    assert len(made) == 1


def test_an_older_or_expired_sheet_is_refused() -> None:
    made = book(SELLER.sheet(ask(), number=5))
    assert isinstance(made.apply(SELLER.sheet(ask(), number=4), NOW_NS), Rejected)
    late = NOW_NS + MAX_SHEET_LIFETIME_NS
    assert isinstance(made.apply(party(2).sheet(ask()), late), Rejected)


def test_two_bodies_under_one_number_go_both_and_leave_a_proof() -> None:
    one, other = SELLER.sheet(ask(1), number=3), SELLER.sheet(ask(2), number=3)
    made = book(one)
    proof = made.apply(other, NOW_NS)
    until_ns = NOW_NS + MAX_SHEET_LIFETIME_NS
    assert proof == Equivocation(one.node, 3, one.sealed.wire, other.sealed.wire, until_ns)
    assert proof == proof_of(one, other)
    assert made.view(NOW_NS).sheets == ()
    assert made.proofs() == (proof,)
    for sheet in (one, other, SELLER.sheet(ask(), number=2)):
        assert isinstance(made.apply(sheet, NOW_NS), Rejected)
    later = SELLER.sheet(ask(), number=4)
    assert made.apply(later, NOW_NS) == Applied(changed=True)


def test_a_proof_convinces_another_book_once() -> None:
    one, other = SELLER.sheet(ask(1), number=3), SELLER.sheet(ask(2), number=3)
    made = book(SELLER.sheet(ask(), number=2))
    proof = proof_of(one, other)
    assert made.apply_equivocation(proof, NOW_NS) == proof
    assert len(made) == 0
    assert made.apply_equivocation(proof, NOW_NS) == Applied(changed=False)
    assert isinstance(made.apply(one, NOW_NS), Rejected)


def test_what_proves_nothing_is_refused() -> None:
    one = SELLER.sheet(ask(1), number=3)
    other = SELLER.sheet(ask(2), number=4).sealed.wire
    stranger = party(2).sheet(ask(2), number=3).sealed.wire
    for second in (one.sealed.wire, other, stranger, b"junk"):
        assert isinstance(open_equivocation(one.sealed.wire, second, "main"), Rejected)
    conflict = proof_of(one, SELLER.sheet(ask(2), number=3))
    made = book()
    assert isinstance(made.apply_equivocation(conflict, NOW_NS + MAX_SHEET_LIFETIME_NS), Rejected)
    assert made.proofs() == ()


def test_a_proof_of_the_past_does_not_remove_a_later_sheet() -> None:
    later = SELLER.sheet(ask(), number=9)
    made = book(later)
    proof = proof_of(SELLER.sheet(ask(1), number=3), SELLER.sheet(ask(2), number=3))
    made.apply_equivocation(proof, NOW_NS)
    assert made.view(NOW_NS).sheets == (later,)


def test_proofs_are_bounded() -> None:
    made = book()
    for number in range(MAX_PROOFS + 1):
        seller = party(number)
        made.apply(seller.sheet(ask(1)), NOW_NS)
        made.apply(seller.sheet(ask(2)), NOW_NS)
    assert len(made.proofs()) == MAX_PROOFS
    assert made.proofs()[0].node == party(1).node.public_key


def test_a_withdrawn_sheet_cannot_be_replayed() -> None:
    """The newer sheet expires first; the older, longer-lived one must not come back."""
    old = SELLER.sheet(ask(), number=1)
    withdrawal = SELLER.sheet(number=2, lifetime_ns=60 * NS_PER_S)
    made = book(old, withdrawal)
    now_ns = NOW_NS + 120 * NS_PER_S
    made.expire(now_ns)
    assert made.view(now_ns).sheets == ()
    assert isinstance(made.apply(old, now_ns), Rejected)


def test_expired_sheets_leave_view_and_memory() -> None:
    made = book(SELLER.sheet(lifetime_ns=60 * NS_PER_S), party(2).sheet(ask()))
    now_ns = NOW_NS + 60 * NS_PER_S
    assert [sheet.node for sheet in made.view(now_ns).sheets] == [party(2).node.public_key]
    assert made.get(SELLER.node.public_key, now_ns) is None
    made.expire(NOW_NS + MAX_SHEET_LIFETIME_NS)
    assert len(made) == 0


def test_the_digest_names_exactly_the_live_sheets() -> None:
    one, two = SELLER.sheet(ask()), party(2).sheet(ask())
    assert book(one, two).digest(NOW_NS) == book(two, one).digest(NOW_NS)
    digests = {
        book().digest(NOW_NS),
        book(one).digest(NOW_NS),
        book(one, two).digest(NOW_NS),
        book(SELLER.sheet(ask(), number=2), two).digest(NOW_NS),
        book(SELLER.sheet(ask(2)), two).digest(NOW_NS),
    }
    assert len(digests) == 5


def test_a_view_does_not_change_with_the_book() -> None:
    made = book(SELLER.sheet(ask()))
    view = made.view(NOW_NS)
    before = view.digest
    made.apply(party(2).sheet(ask()), NOW_NS)
    assert len(view.sheets) == 1
    assert view.digest == before != made.digest(NOW_NS)


def test_attested_accounts_come_first() -> None:
    attested = {party(number).account.public_key for number in range(4)}
    made = Book(
        bytes(32), is_attested=lambda account, _: account in attested, max_sheets=5, max_strangers=3
    )
    for number in range(20, 40):
        made.apply(party(number).sheet(ask()), NOW_NS)
    assert len(made) == 3
    for number in range(4):
        assert made.apply(party(number).sheet(ask()), NOW_NS) == Applied(changed=True)
    held = {sheet.account for sheet in made.view(NOW_NS).sheets}
    assert len(made) == 5
    assert attested < held


def test_strangers_places_do_not_depend_on_the_order_of_arrival() -> None:
    sheets = [party(number).sheet(ask()) for number in range(30)]
    held = []
    for order in (sheets, sheets[::-1]):
        made = Book(bytes(32), max_strangers=7)
        for sheet in order:
            made.apply(sheet, NOW_NS)
        assert len(made) == 7
        held.append(made.digest(NOW_NS))
    assert held[0] == held[1]
    other = Book(b"s" * 32, max_strangers=7)
    for sheet in sheets:
        other.apply(sheet, NOW_NS)
    assert other.digest(NOW_NS) != held[0], "which strangers stay is this book's secret"


def test_one_account_has_a_bounded_share() -> None:
    made = Book(bytes(32), max_per_account=3)
    for number in range(10):
        made.apply(party(number, account=1).sheet(ask()), NOW_NS)
    assert len(made) == 3
    assert made.apply(party(77).sheet(ask()), NOW_NS) == Applied(changed=True)


def test_a_newer_sheet_keeps_its_nodes_place_in_a_full_book() -> None:
    made = Book(bytes(32), max_strangers=3)
    sellers = [party(number) for number in range(3)]
    for seller in sellers:
        made.apply(seller.sheet(ask()), NOW_NS)
    for seller in sellers:
        assert made.apply(seller.sheet(ask(), number=2), NOW_NS) == Applied(changed=True)
    assert len(made) == 3


def test_who_loses_attestation_becomes_a_stranger() -> None:
    until_ns = NOW_NS + 10
    made = Book(bytes(32), is_attested=lambda _, now_ns: now_ns < until_ns, max_strangers=2)
    for number in range(5):
        made.apply(party(number).sheet(ask()), NOW_NS)
    assert len(made) == 5
    made.expire(until_ns)
    assert len(made) == 2


def test_a_book_lacks_what_is_newer_or_in_conflict() -> None:
    here = book(SELLER.sheet(ask(1), number=2))
    node = SELLER.node.public_key
    held = here.get(node, NOW_NS)
    assert held is not None
    assert not here.lacks(node, 1, ROOT)
    assert not here.lacks(node, 2, held.sealed.id)
    assert here.lacks(node, 2, ROOT)
    assert here.lacks(node, 3, ROOT)
    assert here.lacks(party(2).node.public_key, 1, ROOT)
    here.apply(SELLER.sheet(ask(2), number=2), NOW_NS)
    assert here.convicted() == {node: 2}
    assert not here.lacks(node, 2, ROOT)
    assert here.lacks(node, 3, ROOT)


def test_the_clock_may_go_back() -> None:
    short, long = SELLER.sheet(lifetime_ns=60 * NS_PER_S), party(2).sheet(ask())
    made = book(short, long)
    later = made.view(NOW_NS + 60 * NS_PER_S)
    assert later.sheets == (long,)
    assert set(made.view(NOW_NS).sheets) == {short, long}
    assert made.view(NOW_NS + 60 * NS_PER_S).digest == later.digest


def test_a_dump_loads_with_its_proofs() -> None:
    made = book(party(2).sheet(ask()), SELLER.sheet(ask(1)))
    made.apply(SELLER.sheet(ask(2)), NOW_NS)
    again = book()
    again.load(made.dump(), NOW_NS)
    assert again.digest(NOW_NS) == made.digest(NOW_NS)
    assert {proof.node for proof in again.proofs()} == {proof.node for proof in made.proofs()}


def test_a_restart_forgets_no_guard_against_replay() -> None:
    old, withdrawal = SELLER.sheet(ask()), SELLER.sheet(number=2, lifetime_ns=60 * NS_PER_S)
    convicted = [party(2).sheet(lifetime_ns=number * NS_PER_S) for number in (60, 61)]
    made = book(old, withdrawal, *convicted)
    now_ns = NOW_NS + 120 * NS_PER_S
    again = book()
    again.load(made.dump(), now_ns)
    assert isinstance(again.apply(old, now_ns), Rejected)
    assert isinstance(again.apply(party(2).sheet(ask()), now_ns), Rejected)


def test_junk_in_a_dump_is_skipped() -> None:
    made = book()
    sheet = party(2).sheet(ask())
    made.load(Dump((b"", b"junk", sheet.sealed.wire), ((b"", b""),)), NOW_NS)
    assert made.view(NOW_NS).sheets == (sheet,)


def test_a_secret_has_a_fixed_length() -> None:
    with pytest.raises(ValueError, match="secret"):
        Book(b"short")
