"""The take rate: what buyers paid less what providers got. Here it is zero, and anybody can see.

It is reckoned from two things that are written by different hands: the account's own double-entry
ledger, and the receipts that both sides of a purchase signed. A purchase is as its countersigned
receipt says: that much the provider is to get. Whatever the ledger charges beyond that, with the
purchase or apart from it, went to somebody else.

============ =============================================== ====================================
of           buyers paid                                     providers got
============ =============================================== ====================================
a purchase   what the ledger charges for its fill            what its receipt says
a sale       what its receipt says                           what the ledger books for its fill
no fill      whatever else the ledger charges as expense     less what revenue falls short of sales
============ =============================================== ====================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from p2pflop.market.ledger import Kind, Ledger
from p2pflop.market.records import Receipt


@dataclass(frozen=True, slots=True)
class Take:
    """Sums over ``fills`` purchases and sales, in nano-dollars."""

    fills: int
    paid_nusd: int
    got_nusd: int

    @property
    def take_nusd(self) -> int:
        """What is left with neither side."""
        return self.paid_nusd - self.got_nusd


def take_of(ledger: Ledger, receipts: Iterable[Receipt]) -> Take:
    """Over these countersigned receipts, of which the newest of a fill counts.

    Those of fills that the ledger does not know are passed over: nobody owes himself.
    """
    newest: dict[bytes, Receipt] = {}
    for receipt in receipts:
        known = newest.get(receipt.fill)
        if known is None or receipt.number > known.number:
            newest[receipt.fill] = receipt
    booked, totals = ledger.booked(), ledger.totals()
    paid = totals[Kind.EXPENSE] - _sum(booked, Kind.EXPENSE)
    got = -totals[Kind.REVENUE] - _sum(booked, Kind.RECEIVABLE)
    fills = 0
    for fill, receipt in newest.items():
        charged = booked.get((fill, Kind.EXPENSE))
        earned = booked.get((fill, Kind.RECEIVABLE))
        if charged is not None:
            paid, got, fills = paid + charged, got + receipt.amount_nusd, fills + 1
        if earned is not None:
            paid, got, fills = paid + receipt.amount_nusd, got + earned, fills + 1
    return Take(fills, paid, got)


def _sum(booked: dict[tuple[bytes, Kind], int], kind: Kind) -> int:
    return sum(amount for (_, each), amount in booked.items() if each is kind)
