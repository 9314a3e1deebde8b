"""What a node must never lose, in one SQLite file: journal, its account's ledger, payments, and the
index of its blobs.

One file and not four, so that one commit makes all true: that something is signed, that the money
for it is owed or paid, and that what it is for is here, as far as that is small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from p2pflop.dht import index
from p2pflop.dht.database import Database
from p2pflop.node import journal, ledger_book, payment_book

FILE_NAME: Final = "journal.db"
_FORMAT: Final = 4


def open_books(folder: Path) -> Database:
    """What ``Journal``, ``LedgerBook``, ``PaymentBook`` and the store share. Raises StoreError."""
    schemas = (journal.SCHEMA, ledger_book.SCHEMA, payment_book.SCHEMA, index.SCHEMA)
    return Database(folder / FILE_NAME, "; ".join(schemas), _FORMAT)
