"""The ledger on disk: entries in the order of their chain, each durable before anybody is told.

An entry is written together with the rows of the job that it is about, in one commit.

A book whose chain does not hold is not opened: somebody changed it, or the disk did.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import trio

from p2pflop.dht.database import Database, Operation
from p2pflop.dht.turns import Turn
from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.market.ledger import Entry, Kind, Ledger
from p2pflop.market.records import Receipt
from p2pflop.market.take import Take, take_of
from p2pflop.node.service import Json
from p2pflop.wire import decode, encode

MAX_LISTED: Final = 200
MAX_NODES: Final = 8
"""Of one account, that are remembered as having traded with this one: the latest."""

PAGE_ENTRIES: Final = 500
"""Read at once, between which other tasks have their turn."""

SCHEMA: Final = """
CREATE TABLE entries (seq INTEGER PRIMARY KEY, account BLOB NOT NULL, body BLOB NOT NULL);
CREATE INDEX entries_of ON entries (account);
CREATE TABLE traders (
    account BLOB NOT NULL, node BLOB NOT NULL, at_ns INTEGER NOT NULL, PRIMARY KEY (account, node)
) WITHOUT ROWID
"""

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
        self._take: tuple[bytes, Take] | None = None

    async def delivered(
        self, receipt: Receipt, provider: bytes, at_ns: int, write: Write, *, node: bytes
    ) -> None:
        """The buyer's entry for a receipt that it countersigns. ``write`` is called once.

        ``node`` is the key of the node that signed it: where payments are told. Raises
        ProtocolError if it contradicts what is booked, and what ``write`` raises.
        """

        def post() -> Entry | None:
            return self._ledger.book_delivered(receipt, provider, at_ns)

        await self._book(provider, post, write, node)

    async def earned(
        self, receipt: Receipt, buyer: bytes, at_ns: int, write: Write, *, node: bytes
    ) -> None:
        """The provider's entry for a countersigned receipt; else as ``delivered``."""

        def post() -> Entry | None:
            return self._ledger.book_earned(receipt, buyer, at_ns)

        await self._book(buyer, post, write, node)

    async def paid(
        self, payment: bytes, creditor: bytes, amount_nusd: int, at_ns: int, text: str, write: Write
    ) -> None:
        """The debtor's entry for money given. ``write`` is called once; raises what it raises."""

        def post() -> Entry | None:
            memo = _memo("paid", text)
            return self._ledger.book_paid(payment, creditor, amount_nusd, at_ns, memo)

        await self._book(creditor, post, write)

    async def received(
        self, payment: bytes, debtor: bytes, amount_nusd: int, at_ns: int, text: str, write: Write
    ) -> None:
        """The creditor's entry for money got; else as ``paid``."""

        def post() -> Entry | None:
            memo = _memo("received", text)
            return self._ledger.book_received(payment, debtor, amount_nusd, at_ns, memo)

        await self._book(debtor, post, write)

    async def returned(
        self, payment: bytes, creditor: bytes, amount_nusd: int, at_ns: int, text: str, write: Write
    ) -> None:
        """The debtor's entry that takes back what was booked by ``paid`` and refused."""

        def post() -> Entry | None:
            memo = _memo("refused", text)
            return self._ledger.book_returned(payment, creditor, amount_nusd, at_ns, memo)

        await self._book(creditor, post, write)

    def has_bought_from(self, provider: bytes) -> bool:
        """Whether that account has ever delivered something to this one."""
        return self._ledger.balance_nusd(provider, Kind.EXPENSE) > 0

    def due_nusd(self, counterparty: bytes) -> int:
        """What that account owes this one in nano-dollars; negative if this one owes it."""
        return self._ledger.due_nusd(counterparty)

    def received_nusd(self, counterparty: bytes) -> int:
        """All money ever received from that account, in nano-dollars."""
        return self._ledger.received_nusd(counterparty)

    def credit_nusd(self, counterparty: bytes) -> int:
        """See ``Ledger.credit_nusd``."""
        return self._ledger.credit_nusd(counterparty)

    def uncovered_nusd(self, counterparty: bytes | None = None) -> int:
        """See ``Ledger.uncovered_nusd``."""
        return self._ledger.uncovered_nusd(counterparty)

    def has_traded_with(self, counterparty: bytes) -> bool:
        """Whether anything was ever booked with that account."""
        return bool(
            self._database.read("SELECT 1 FROM entries WHERE account = ? LIMIT 1", counterparty)
        )

    def nodes_of(self, account: bytes) -> list[bytes]:
        """The keys of nodes of that account that traded with this one, the latest first."""
        found = self._database.read(
            "SELECT node FROM traders WHERE account = ? ORDER BY at_ns DESC LIMIT ?",
            account,
            MAX_NODES,
        )
        return [bytes(node) for (node,) in found]

    async def entries_of(self, account: bytes) -> tuple[list[Entry], bytes]:
        """All entries with that account, oldest first, and the hash of the book's newest entry."""
        async with self._lock:
            [(last,)] = self._database.read("SELECT COALESCE(MAX(seq), 0) FROM entries")
            head = self._ledger.head
        entries: list[Entry] = []
        seq = 0
        while True:
            page = self._database.read(
                "SELECT seq, body FROM entries WHERE account = ? AND seq > ? AND seq <= ?"
                " ORDER BY seq LIMIT ?",
                *(account, seq, last, PAGE_ENTRIES),
            )
            entries += [decode(Entry, body) for _, body in page]
            if len(page) < PAGE_ENTRIES:
                return entries, head
            seq = page[-1][0]
            await trio.lowlevel.checkpoint()

    def report(self) -> Json:
        """Balances by account, totals, and the newest entries, as JSON.

        What one account has paid ahead takes nothing from what another owes: ``owed_nusd`` sums the
        balances of those that owe this account, ``owing_nusd`` of those that it owes.
        """
        accounts = sorted({account for account, _ in self._ledger.balances()})
        due_nusd = {account: self._ledger.due_nusd(account) for account in accounts}
        totals = self._ledger.totals()
        [(count,)] = self._database.read("SELECT COUNT(*) FROM entries")
        return {
            "account": self._own_account.hex(),
            "balances": [
                {
                    "account": account.hex(),
                    "due_nusd": nusd,
                    "received_nusd": self._ledger.received_nusd(account),
                }
                for account, nusd in due_nusd.items()
            ],
            "owed_nusd": sum(nusd for nusd in due_nusd.values() if nusd > 0),
            "owing_nusd": -sum(nusd for nusd in due_nusd.values() if nusd < 0),
            "earned_nusd": -totals[Kind.REVENUE],
            "spent_nusd": totals[Kind.EXPENSE],
            "entries": [_describe(entry) for entry in self._entries(MAX_LISTED)],
            "entry_count": count,
            "head": self._ledger.head.hex(),
        }

    async def take(self, receipts: Callable[[], Iterable[Receipt]]) -> Take:
        """See ``take_of``. Reckoned anew, and ``receipts`` called, if the ledger has changed.

        Not while an entry is on its way to disk: its receipt goes there in the same commit.
        """
        async with self._lock:
            if self._take is None or self._take[0] != self._ledger.head:
                self._take = (self._ledger.head, take_of(self._ledger, receipts()))
            return self._take[1]

    async def _book(
        self,
        counterparty: bytes,
        post: Callable[[], Entry | None],
        write: Write,
        node: bytes = b"",
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
            body, at_ns = encode(entry), entry.at_ns

            def insert(connection: sqlite3.Connection) -> None:
                connection.execute(
                    "INSERT INTO entries (account, body) VALUES (?, ?)", (counterparty, body)
                )
                if node:
                    connection.execute(
                        "INSERT OR REPLACE INTO traders VALUES (?, ?, ?)",
                        (counterparty, node, at_ns),
                    )

            try:
                await write(insert)
            except BaseException:
                self._ledger = self._load()
                raise

    def _load(self) -> Ledger:
        rows = self._database.read("SELECT account, body FROM entries ORDER BY seq")
        try:
            return Ledger.load(_filed(account, decode(Entry, body)) for account, body in rows)
        except ProtocolError as error:
            raise VerificationError(
                f"{self._database.path} holds what is no ledger entry: {error.message}",
                hint="Restore it from a backup.",
            ) from error

    def _entries(self, limit: int) -> list[Entry]:
        rows = self._database.read("SELECT body FROM entries ORDER BY seq DESC LIMIT ?", limit)
        return [decode(Entry, body) for (body,) in rows]


def _filed(account: bytes, entry: Entry) -> Entry:
    """An entry that statements of its account have. Raises ProtocolError."""
    if any(posting.counterparty != account for posting in entry.postings):
        raise ProtocolError("one is filed under another account than its own")
    return entry


def _memo(what: str, text: str) -> str:
    return f"{what}: {text}" if text else what


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
