"""Payments on disk: what each side has said about it, and whether the other side knows.

A payment's row is written together with the ledger's entry that goes with it. What this node has
said last of it (a claim; an ack or a refusal) is brought to the other side until that has answered
that it is noted: ``told``.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from p2pflop.dht.database import Database, Operation
from p2pflop.node.ledger_book import MAX_NODES

MAX_LISTED: Final = 1000

SCHEMA: Final = """
CREATE TABLE payments (
    id BLOB PRIMARY KEY, side TEXT NOT NULL, account BLOB NOT NULL, amount_nusd INTEGER NOT NULL,
    at_ns INTEGER NOT NULL, reference TEXT NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL,
    node BLOB NOT NULL, said BLOB NOT NULL, heard BLOB NOT NULL, told INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX payments_by_state ON payments (state, side, account);
CREATE INDEX payments_untold ON payments (at_ns) WHERE NOT told
"""
_SELECT: Final = (
    "SELECT id, side, account, amount_nusd, at_ns, reference, state, reason, node, said, heard,"
    " told FROM payments "
)


class Side(StrEnum):
    """Which way the money went, as this account sees it."""

    PAID = "paid"
    RECEIVED = "received"


class State(StrEnum):
    """What has been said of a payment."""

    CLAIMED = "claimed"
    ACKNOWLEDGED = "acknowledged"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Payment:
    """One payment to or from ``account``.

    ``node`` is the key of the other side's node, empty until one is found; ``said`` and ``heard``
    are the latest envelopes of this node and of that one, or empty.
    """

    id: bytes
    side: Side
    account: bytes
    amount_nusd: int
    at_ns: int
    reference: str
    state: State
    reason: str = ""
    node: bytes = b""
    said: bytes = b""
    heard: bytes = b""
    told: bool = True

    def is_same(self, side: Side, account: bytes, amount_nusd: int) -> bool:
        """Whether it is that very payment, and not another under the same id."""
        return (self.side, self.account, self.amount_nusd) == (side, account, amount_nusd)


class PaymentBook:
    """All payments of this node's account. Raises StoreError when the disk fails."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, payment: bytes) -> Payment | None:
        """The payment of that id, or None."""
        found = self._read("WHERE id = ?", payment)
        return found[0] if found else None

    def listed(self) -> list[Payment]:
        """Claims that wait here, then the others, newest first; at most ``MAX_LISTED``."""
        return self._read(
            "ORDER BY state = ? AND side = ? DESC, at_ns DESC LIMIT ?",
            State.CLAIMED,
            Side.RECEIVED,
            MAX_LISTED,
        )

    def untold(self) -> list[Payment]:
        """Those that the other side does not know the latest of, oldest first."""
        return self._read("WHERE NOT told ORDER BY at_ns")

    def waiting(self) -> dict[bytes, int]:
        """How many claims wait here, by account."""
        found = self._database.read(
            "SELECT account, COUNT(*) FROM payments WHERE state = ? AND side = ? GROUP BY account",
            State.CLAIMED,
            Side.RECEIVED,
        )
        return {bytes(account): count for account, count in found}

    def count_unasked(self, account: bytes, since_ns: int) -> int:
        """Payments to that account which only it has told of, since that time."""
        [(count,)] = self._database.read(
            "SELECT COUNT(*) FROM payments WHERE state = ? AND side = ? AND account = ?"
            " AND said = x'' AND at_ns >= ?",
            *(State.ACKNOWLEDGED, Side.PAID, account, since_ns),
        )
        return int(count)

    def nodes_of(self, account: bytes) -> list[bytes]:
        """The keys of nodes of that account whose word about a payment was heard, the latest first;
        at most ``MAX_NODES``."""
        found = self._database.read(
            "SELECT node FROM payments WHERE account = ? AND heard != x''"
            " GROUP BY node ORDER BY MAX(at_ns) DESC LIMIT ?",
            *(account, MAX_NODES),
        )
        return [bytes(node) for (node,) in found]

    async def put(self, payment: Payment, entry: Operation | None = None) -> None:
        """Write a payment as it is now, and the ledger's ``entry``, in one commit."""
        values = (
            payment.id,
            payment.side,
            payment.account,
            payment.amount_nusd,
            payment.at_ns,
            payment.reference,
            payment.state,
            payment.reason,
            payment.node,
            payment.said,
            payment.heard,
            payment.told,
        )

        def change(connection: sqlite3.Connection) -> None:
            if entry is not None:
                entry(connection)
            connection.execute(
                "INSERT OR REPLACE INTO payments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )

        await self._database.write(change)

    def _read(self, where: str, *values: object) -> list[Payment]:
        rows = self._database.read(_SELECT + where, *values)
        return [_payment(row) for row in rows]


def _payment(row: tuple[object, ...]) -> Payment:
    fields = dict(zip(Payment.__slots__, row, strict=True))
    side, state, told = Side(str(row[1])), State(str(row[6])), bool(row[-1])
    return Payment(**{**fields, "side": side, "state": state, "told": told})  # type: ignore[arg-type]
