"""What a node must never lose, in one SQLite file: its journal and its account's ledger.

One file and not two, so that one commit makes both true: that something is signed, and that the
money for it is owed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from p2pflop.dht.database import Database
from p2pflop.node import journal, ledger_book

FILE_NAME: Final = "journal.db"
_FORMAT: Final = 3


def open_books(folder: Path) -> Database:
    """The database that ``Journal`` and ``LedgerBook`` share. Raises StoreError."""
    return Database(folder / FILE_NAME, f"{journal.SCHEMA}; {ledger_book.SCHEMA}", _FORMAT)
