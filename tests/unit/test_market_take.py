"""The take rate: zero for honest books, and what was taken for others."""

from __future__ import annotations

from msgspec.structs import replace

from p2pflop.market.ledger import Entry, Kind, Ledger, Posting
from p2pflop.market.records import ZERO_HASH, Receipt
from p2pflop.market.samples import NOW_NS
from p2pflop.market.take import Take, take_of

PROVIDER, BUYER, HOUSE = bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32


def receipt(fill: int, number: int, amount_nusd: int) -> Receipt:
    root = bytes([number]) * 32
    return Receipt(
        1, bytes([fill]) * 32, number, 0, ZERO_HASH, number, root, ZERO_HASH, amount_nusd
    )


def traded() -> tuple[Ledger, list[Receipt]]:
    """A purchase in two receipts, one of another fill, and a sale."""
    ledger = Ledger()
    bought = [receipt(1, 1, 40), receipt(1, 2, 100), receipt(2, 1, 7)]
    sold = [receipt(3, 1, 50)]
    for each in bought:
        ledger.book_delivered(each, PROVIDER, NOW_NS)
    for each in sold:
        ledger.book_earned(each, BUYER, NOW_NS)
    ledger.book_paid(b"p" * 32, PROVIDER, 60, NOW_NS)
    ledger.book_received(b"q" * 32, BUYER, 20, NOW_NS)
    return ledger, [*bought, *sold]


def post(ledger: Ledger, number: int, *postings: tuple[bytes, Kind, int], fill: int = 9) -> None:
    """An entry that no honest version would write; its postings sum to zero all the same."""
    ledger._apply(
        Entry(
            version=1,
            id=bytes([100 + number + fill]) * 32,
            at_ns=NOW_NS,
            memo="",
            reference=bytes([fill]) * 32,
            number=number,
            postings=tuple(Posting(who, int(kind), nusd) for who, kind, nusd in postings),
            previous=ledger.head,
        )
    )
    assert sum(ledger.totals().values()) == 0


def test_nothing_is_taken() -> None:
    ledger, receipts = traded()
    assert take_of(ledger, receipts) == Take(fills=3, paid_nusd=157, got_nusd=157)
    assert take_of(ledger, reversed(receipts)).take_nusd == 0
    assert take_of(Ledger(), []) == Take(0, 0, 0)
    assert take_of(Ledger(), receipts) == Take(0, 0, 0), "nobody owes himself"


def test_receipts_that_were_not_looked_at_change_nothing() -> None:
    ledger, receipts = traded()
    assert take_of(ledger, receipts[:2]) == Take(fills=1, paid_nusd=100, got_nusd=100)


def test_a_fee_on_top_of_a_purchase_is_seen() -> None:
    ledger, receipts = traded()
    post(
        ledger,
        1,
        (PROVIDER, Kind.EXPENSE, 105),
        (PROVIDER, Kind.PAYABLE, -100),
        (HOUSE, Kind.PAYABLE, -5),
    )
    assert take_of(ledger, [*receipts, receipt(9, 1, 100)]).take_nusd == 5


def test_a_fee_beside_a_purchase_is_seen() -> None:
    ledger, receipts = traded()
    post(
        ledger,
        1,
        (PROVIDER, Kind.EXPENSE, 100),
        (PROVIDER, Kind.PAYABLE, -100),
        (HOUSE, Kind.EXPENSE, 5),
        (HOUSE, Kind.PAYABLE, -5),
    )
    assert take_of(ledger, [*receipts, receipt(9, 1, 100)]).take_nusd == 5
    post(ledger, 0, (HOUSE, Kind.EXPENSE, 3), (HOUSE, Kind.PAYABLE, -3))
    assert take_of(ledger, [*receipts, receipt(9, 1, 100)]).take_nusd == 8


def test_a_share_of_a_sale_is_seen() -> None:
    ledger, receipts = traded()
    post(
        ledger,
        1,
        (BUYER, Kind.RECEIVABLE, 100),
        (BUYER, Kind.REVENUE, -90),
        (HOUSE, Kind.PAYABLE, -10),
    )
    assert take_of(ledger, [*receipts, receipt(9, 1, 100)]).take_nusd == 10
    post(ledger, 1, (BUYER, Kind.RECEIVABLE, 80), (BUYER, Kind.REVENUE, -80), fill=8)
    assert take_of(ledger, [*receipts, receipt(9, 1, 100), receipt(8, 1, 82)]).take_nusd == 12


def test_a_receipt_below_what_was_charged_is_seen() -> None:
    ledger, receipts = traded()
    lower = replace(receipts[1], amount_nusd=99)
    assert take_of(ledger, [receipts[0], lower]).take_nusd == 1
