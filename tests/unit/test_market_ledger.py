"""The ledger's rules: what a receipt and a payment book, and what it refuses."""

from __future__ import annotations

from dataclasses import asdict

import msgspec
import pytest

from p2pflop.errors import VerificationError
from p2pflop.ids import content_hash
from p2pflop.market.ledger import Entry, Kind, Ledger, Posting, statement
from p2pflop.market.records import ZERO_HASH, Receipt
from p2pflop.market.samples import NOW_NS, RESULT, ROOT, party
from p2pflop.wire import decode, encode

BUYER, SELLER = party(1).account.public_key, party(2).account.public_key
FILL = content_hash(b"fill")


def receipt(number: int, amount_nusd: int, fill: bytes = FILL) -> Receipt:
    return Receipt(1, fill, number, 0, ZERO_HASH, number, ROOT, RESULT, amount_nusd)


def test_a_receipt_books_what_is_new_in_it_on_both_sides() -> None:
    buyer, seller = Ledger(), Ledger()
    for number, amount in [(1, 100), (3, 250)]:
        buyer.book_delivered(receipt(number, amount), SELLER, NOW_NS)
        seller.book_earned(receipt(number, amount), BUYER, NOW_NS)
    assert buyer.due_nusd(SELLER) == -250
    assert seller.due_nusd(BUYER) == 250
    assert buyer.balance_nusd(SELLER, Kind.EXPENSE) == 250
    assert seller.balance_nusd(BUYER, Kind.REVENUE) == -250
    assert sum(buyer.totals().values()) == sum(seller.totals().values()) == 0


def test_a_receipt_again_or_late_books_nothing() -> None:
    ledger = Ledger()
    assert ledger.book_earned(receipt(2, 250), BUYER, NOW_NS) is not None
    assert ledger.book_earned(receipt(2, 250), BUYER, NOW_NS) is None
    assert ledger.book_earned(receipt(1, 100), BUYER, NOW_NS) is None
    assert ledger.book_earned(receipt(3, 250), BUYER, NOW_NS) is None
    assert ledger.due_nusd(BUYER) == 250


@pytest.mark.parametrize(("number", "amount"), [(2, 251), (2, 249), (3, 249), (1, 251)])
def test_a_receipt_that_contradicts_the_book_is_refused(number: int, amount: int) -> None:
    ledger = Ledger()
    ledger.book_earned(receipt(2, 250), BUYER, NOW_NS)
    with pytest.raises(ValueError, match="contradicts"):
        ledger.book_earned(receipt(number, amount), BUYER, NOW_NS)
    assert ledger.due_nusd(BUYER) == 250


def test_a_payment_settles_once() -> None:
    buyer, seller = Ledger(), Ledger()
    payment = content_hash(b"payment")
    buyer.book_delivered(receipt(1, 100), SELLER, NOW_NS)
    seller.book_earned(receipt(1, 100), BUYER, NOW_NS)
    assert buyer.book_paid(payment, SELLER, 100, NOW_NS) is not None
    assert buyer.book_paid(payment, SELLER, 100, NOW_NS) is None
    assert seller.book_received(payment, BUYER, 100, NOW_NS) is not None
    assert buyer.due_nusd(SELLER) == seller.due_nusd(BUYER) == 0
    assert buyer.totals()[Kind.CASH] == -100
    assert seller.balances() == {(BUYER, Kind.REVENUE): -100, (BUYER, Kind.CASH): 100}
    with pytest.raises(ValueError, match="payment"):
        seller.book_received(payment, BUYER, 0, NOW_NS)


def test_a_refused_payment_is_taken_back_once_and_never_counts_as_paid() -> None:
    buyer = Ledger()
    payment = content_hash(b"payment")
    buyer.book_delivered(receipt(1, 100), SELLER, NOW_NS)
    with pytest.raises(ValueError, match="never booked"):
        buyer.book_returned(payment, SELLER, 100, NOW_NS)
    buyer.book_paid(payment, SELLER, 100, NOW_NS)
    assert buyer.book_returned(payment, SELLER, 100, NOW_NS) is not None
    assert buyer.book_returned(payment, SELLER, 100, NOW_NS) is None
    assert buyer.due_nusd(SELLER) == -100
    assert buyer.totals()[Kind.CASH] == 0
    assert buyer.received_nusd(SELLER) == 0


def test_money_that_is_given_back_is_no_credit_any_more() -> None:
    seller = Ledger()
    payments = [content_hash(b"payment %d" % number) for number in range(4)]
    seller.book_received(payments[0], BUYER, 100, NOW_NS)
    assert (seller.credit_nusd(BUYER), seller.uncovered_nusd(BUYER)) == (100, -200)
    seller.book_paid(payments[1], BUYER, 60, NOW_NS)
    assert (seller.due_nusd(BUYER), seller.credit_nusd(BUYER)) == (-40, 40)
    assert seller.uncovered_nusd(BUYER) == -80
    seller.book_paid(payments[2], BUYER, 40, NOW_NS)
    assert (seller.due_nusd(BUYER), seller.uncovered_nusd(BUYER)) == (0, 0)
    seller.book_returned(payments[2], BUYER, 40, NOW_NS)
    assert seller.uncovered_nusd(BUYER) == -80, "refused: it is still here"
    seller.book_paid(payments[3], BUYER, 500, NOW_NS)
    assert (seller.credit_nusd(BUYER), seller.uncovered_nusd(BUYER)) == (0, 460)
    assert seller.uncovered_nusd() == 460


def test_an_account_that_buys_from_itself_owes_itself_nothing() -> None:
    ledger = Ledger()
    assert ledger.book_delivered(receipt(1, 100), SELLER, NOW_NS) is not None
    assert ledger.book_earned(receipt(1, 100), SELLER, NOW_NS) is not None
    assert ledger.due_nusd(SELLER) == 0


def book_some() -> tuple[Ledger, list[Entry]]:
    ledger = Ledger()
    entries = [
        ledger.book_earned(receipt(1, 100), BUYER, NOW_NS, "first"),
        ledger.book_delivered(receipt(1, 30, ROOT), SELLER, NOW_NS + 1, "second"),
        ledger.book_earned(receipt(2, 170), BUYER, NOW_NS + 2, "third"),
        ledger.book_received(RESULT, BUYER, 50, NOW_NS + 3, "fourth"),
    ]
    return ledger, [entry for entry in entries if entry is not None]


def test_stored_entries_load_to_the_same_book_and_it_goes_on() -> None:
    ledger, entries = book_some()
    again = Ledger.load(decode(Entry, encode(entry)) for entry in entries)
    assert again.balances() == ledger.balances()
    assert again.head == ledger.head
    assert again.book_earned(receipt(2, 170), BUYER, NOW_NS) is None
    assert again.book_received(RESULT, BUYER, 50, NOW_NS) is None
    assert again.book_earned(receipt(3, 171), BUYER, NOW_NS) is not None


def test_a_book_that_was_changed_does_not_load() -> None:
    _, entries = book_some()
    first = entries[0]
    unbalanced = (Posting(BUYER, 0, 100), Posting(BUYER, 2, -99))
    edits = {
        "dropped": entries[1:],
        "swapped": [entries[1], entries[0], *entries[2:]],
        "repeated": [first, first],
        "reworded": [msgspec.structs.replace(first, memo="gift"), *entries[1:]],
        "unbalanced": [msgspec.structs.replace(first, postings=unbalanced)],
    }
    for edited in edits.values():
        with pytest.raises(VerificationError, match="ledger entry"):
            Ledger.load(edited)
    assert Ledger.load(entries[:2]).due_nusd(SELLER) == -30


def test_a_statement_shows_one_counterparty_with_the_balance_after_each_row() -> None:
    _, entries = book_some()
    rows = [asdict(row) for row in statement(entries, BUYER)]
    assert [(row["memo"], row["amount_nusd"], row["owed_nusd"]) for row in rows] == [
        ("first", 100, 100),
        ("third", 70, 170),
        ("fourth", -50, 120),
    ]
    assert [row.owed_nusd for row in statement(entries, SELLER)] == [-30]
