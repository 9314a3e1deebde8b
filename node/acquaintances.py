"""Whom this node knows: their sheets keep their places in the book, however many strangers come."""

from __future__ import annotations

from p2pflop.market.sheets import OpenSheet
from p2pflop.node.ledger_book import LedgerBook


class Acquaintances:
    """Nodes that are connected now, and accounts that have delivered something to this one."""

    def __init__(self, ledger_book: LedgerBook) -> None:
        self._ledger_book = ledger_book
        self._connected: set[str] = set()

    def met(self, peer: str) -> None:
        """A peer has connected."""
        self._connected.add(peer)

    def left(self, peer: str) -> None:
        """It is connected no more."""
        self._connected.discard(peer)

    def is_known(self, sheet: OpenSheet) -> bool:
        """See ``p2pflop.market.book.IsKnown``."""
        return sheet.peer in self._connected or self._ledger_book.has_bought_from(sheet.account)
