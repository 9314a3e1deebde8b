"""The ledger on disk: entries in the order of their chain, each durable before anybody is told.

An entry is written together with the rows of the job that it is about, in one commit.

A book whose chain does not hold is not opened: somebody changed it, or the disk did.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from typing import Final

from p2pflop.dht.database import Database, Operation
from p2pflop.dht.turns import Turn
from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.market.ledger import Entry, Kind, Ledger
from p2pflop.market.records import Receipt
from p2pflop.node.service import Json
from p2pflop.wire import decode, encode

MAX_LISTED: Final = 200
SCHEMA: Final = "CREATE TABLE entries (seq INTEGER PRIMARY KEY, body BLOB NOT NULL)"

Write = Callable[[Operation | None], Awaitable[None]]
"""Puts an entry on disk, if there is one, and with it whatever else the caller has to."""


class LedgerBook:
    """The double-entry book of this node's account. Raises VerificationError if it was tampered
    with."""

    def __init__(self, database: Database, own_account: bytes) -> None:
        self._database = database
        self._own_account = own_account
        self._lock = Turn()
        self._ledger = self._load()

    async def delivered(self, receipt: Receipt, provider: bytes, at_ns: int, write: Write) -> None:
        """The buyer's entry for a receipt that it countersigns. ``write`` is called once.

        Raises ProtocolError if it contradicts what is booked, and what ``write`` raises.
        """

        def post() -> Entry | None:
            return self._ledger.book_delivered(receipt, provider, at_ns)

        await self._book(provider, post, write)

    async def earned(self, receipt: Receipt, buyer: bytes, at_ns: int, write: Write) -> None:
        """The provider's entry for a countersigned receipt; else as ``delivered``."""

        def post() -> Entry | None:
            return self._ledger.book_earned(receipt, buyer, at_ns)

        await self._book(buyer, post, write)

    def has_bought_from(self, provider: bytes) -> bool:
        """Whether that account has ever delivered something to this one."""
        return self._ledger.balance_nusd(provider, Kind.EXPENSE) > 0

    def due_nusd(self, counterparty: bytes) -> int:
        """What that account owes this one in nano-dollars; negative if this one owes it."""
        return self._ledger.due_nusd(counterparty)

    def owed_nusd(self) -> int:
        """What all other accounts together owe this one, in nano-dollars."""
        return self._ledger.totals()[Kind.RECEIVABLE]

    def report(self) -> Json:
        """Balances by account, totals, and the newest entries, as JSON."""
        accounts = sorted({account for account, _ in self._ledger.balances()})
        totals = self._ledger.totals()
        return {
            "account": self._own_account.hex(),
            "balances": [
                {"account": account.hex(), "due_nusd": self._ledger.due_nusd(account)}
                for account in accounts
            ],
            "owed_nusd": totals[Kind.RECEIVABLE],
            "owing_nusd": -totals[Kind.PAYABLE],
            "earned_nusd": -totals[Kind.REVENUE],
            "spent_nusd": totals[Kind.EXPENSE],
            "entries": [_describe(entry) for entry in self._entries(MAX_LISTED)],
            "head": self._ledger.head.hex(),
        }

    async def _book(
        self, counterparty: bytes, post: Callable[[], Entry | None], write: Write
    ) -> None:
        """Post in memory, then on disk; if the disk fails, memory forgets it again."""
        if counterparty == self._own_account:
            await write(None)  # Nobody owes himself.
            return
        async with self._lock:
            try:
                entry = post()
            except ValueError as error:
                raise ProtocolError(str(error)) from error
            if entry is None:
                await write(None)
                return
            body = encode(entry)

            def insert(connection: sqlite3.Connection) -> None:
                connection.execute("INSERT INTO entries (body) VALUES (?)", (body,))

            try:
                await write(insert)
            except BaseException:
                self._ledger = self._load()
                raise

    def _load(self) -> Ledger:
        rows = self._database.read("SELECT body FROM entries ORDER BY seq")
        try:
            return Ledger.load(decode(Entry, body) for (body,) in rows)
        except ProtocolError as error:
            raise VerificationError(
                f"{self._database.path} holds what is no ledger entry: {error.message}",
                hint="Restore it from a backup.",
            ) from error

    def _entries(self, limit: int) -> list[Entry]:
        rows = self._database.read("SELECT body FROM entries ORDER BY seq DESC LIMIT ?", limit)
        return [decode(Entry, body) for (body,) in rows]


def _describe(entry: Entry) -> Json:
    return {
        "at_ns": entry.at_ns,
        "memo": entry.memo,
        "reference": entry.reference.hex(),
        "number": entry.number,
        "postings": [
            {
                "account": posting.counterparty.hex(),
                "kind": Kind(posting.kind).name.lower(),
                "amount_nusd": posting.amount_nusd,
            }
            for posting in entry.postings
        ],
    }
