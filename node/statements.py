"""A statement: every entry with one account, the balance after each, and what the book's head is.

Amounts are what an entry changed in what that account owes this one, so the other side's statement
has the same amounts with the other sign. Times are Unix nanoseconds, and ISO 8601 in UTC.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import trio

from p2pflop.errors import ConfigError
from p2pflop.market.ledger import statement
from p2pflop.node.ledger_book import LedgerBook
from p2pflop.node.service import Json
from p2pflop.units import NS_PER_S

MAX_STATEMENT_ENTRIES: Final = 50_000
ROWS_A_TURN: Final = 500


async def make_statement(book: LedgerBook, own: bytes, account: bytes, since_ns: int) -> Json:
    """The statement of ``account``: entries from ``since_ns`` on; before, ``opening_nusd``.

    Raises ConfigError for more than ``MAX_STATEMENT_ENTRIES`` entries.
    """
    entries, head = await book.entries_of(account)
    opening_nusd = balance_nusd = 0
    rows: list[Json] = []
    for place, row in enumerate(statement(entries, account)):
        if place % ROWS_A_TURN == 0:
            await trio.lowlevel.checkpoint()
        balance_nusd = row.owed_nusd
        if row.at_ns < since_ns and not rows:
            opening_nusd = balance_nusd
            continue
        if len(rows) == MAX_STATEMENT_ENTRIES:
            raise ConfigError(
                f"over {MAX_STATEMENT_ENTRIES} entries", hint="Ask for a shorter time with --since."
            )
        rows.append(
            {
                "at_ns": row.at_ns,
                "at": iso_utc(row.at_ns),
                "memo": row.memo,
                "reference": row.reference.hex(),
                "number": row.number,
                "amount_nusd": row.amount_nusd,
                "balance_nusd": row.owed_nusd,
            }
        )
    return {
        "account": account.hex(),
        "own_account": own.hex(),
        "since_ns": since_ns,
        "since": iso_utc(since_ns) if since_ns else "",
        "opening_nusd": opening_nusd,
        "entries": rows,
        "closing_nusd": balance_nusd,
        "head": head.hex(),
    }


def iso_utc(at_ns: int) -> str:
    """``2026-11-26T01:17:36Z``: whole seconds, rounded down."""
    moment = datetime.fromtimestamp(at_ns // NS_PER_S, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
