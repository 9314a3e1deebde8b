"""What a node must never lose, in one SQLite file: journal, its account's ledger, and payments.

One file and not three, so that one commit makes both true: that something is signed, and that the
money for it is owed or paid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from p2pflop.dht.database import Database
from p2pflop.node import journal, ledger_book, payment_book

FILE_NAME: Final = "journal.db"
_FORMAT: Final = 3


def open_books(folder: Path) -> Database:
    """What ``Journal``, ``LedgerBook`` and ``PaymentBook`` share. Raises StoreError."""
    schemas = (journal.SCHEMA, ledger_book.SCHEMA, payment_book.SCHEMA)
    return Database(folder / FILE_NAME, "; ".join(schemas), _FORMAT)
