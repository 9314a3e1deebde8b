"""The registry's money: what accounts have paid and what was charged, in double entry.

The entries are those of ``market.ledger`` and form its chain; the registry is on the side of a
provider. Money moves outside::

    a payment           cash       +amount   receivable -amount
    a period's fee      receivable +fee      revenue    -fee
    a payment returned  receivable +amount   cash       -amount

So below zero, what an account owes is credit for later periods. An entry is named by what it is
about, and there once: whoever does the same again after a crash changes nothing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from p2pflop.errors import ConfigError, ProtocolError, VerificationError
from p2pflop.ids import content_hash
from p2pflop.market.ledger import Entry, Kind, Ledger, Posting, entry_hash
from p2pflop.market.payments import MAX_PAYMENT_NUSD
from p2pflop.market.records import ZERO_HASH
from p2pflop.registry.log import Query, query_of
from p2pflop.units import format_usd
from p2pflop.wire import decode, encode

MAX_REFERENCE_CHARS: Final = 100
PAGE_ENTRIES: Final = 500


@dataclass(frozen=True, slots=True)
class Line:
    """An entry as a statement shows it. ``credit_nusd`` is what the account has left after it."""

    at_ns: int
    account: bytes
    memo: str
    amount_nusd: int
    credit_nusd: int


def credit_nusd(query: Query, account: bytes) -> int:
    """What the account has paid beyond what it was charged; below zero, it owes."""
    [(due,)] = query(
        "SELECT COALESCE(SUM(amount_nusd), 0) FROM postings WHERE account = ? AND kind = ?",
        account,
        int(Kind.RECEIVABLE),
    )
    return -int(due)


def book_payment(
    connection: sqlite3.Connection, account: bytes, amount_nusd: int, reference: str, at_ns: int
) -> bool:
    """Book money that came; False if it is booked already. Raises ConfigError."""
    check_reference(reference)
    if not 0 < amount_nusd <= MAX_PAYMENT_NUSD:
        limit = format_usd(MAX_PAYMENT_NUSD)
        raise ConfigError(f"a payment is more than nothing and at most {limit}")
    return _post(
        connection,
        _payment_id(account, reference),
        account,
        (Kind.CASH, Kind.RECEIVABLE),
        amount_nusd,
        f"paid: {reference}",
        at_ns,
    )


def book_return(connection: sqlite3.Connection, account: bytes, reference: str, at_ns: int) -> int:
    """Take back a payment that bounced; its amount, 0 if that is done already.

    Raises ConfigError if there was no such payment.
    """
    payment = _payment_id(account, reference)
    entry = _entry(query_of(connection), payment)
    if entry is None:
        raise ConfigError(
            f"account {account.hex()[:12]} has no payment with the reference {reference[:100]!r}",
            hint="See 'p2pflop registry export'.",
        )
    amount_nusd = entry.postings[0].amount_nusd
    booked = _post(
        connection,
        content_hash(b"returned" + payment),
        account,
        (Kind.RECEIVABLE, Kind.CASH),
        amount_nusd,
        f"returned: {reference}",
        at_ns,
    )
    return amount_nusd if booked else 0


def book_fee(
    connection: sqlite3.Connection, account: bytes, fee_nusd: int, serial: int, at_ns: int
) -> None:
    """Charge the period of attestation ``serial``."""
    if fee_nusd:
        kinds = (Kind.RECEIVABLE, Kind.REVENUE)
        entry_id = content_hash(b"fee" + account + serial.to_bytes(8, "big"))
        memo = f"fee of attestation {serial}"
        _post(connection, entry_id, account, kinds, fee_nusd, memo, at_ns)


def check_reference(reference: str) -> None:
    """Raises ConfigError for what cannot be a payment's reference."""
    if not 0 < len(reference.strip()) <= MAX_REFERENCE_CHARS or not reference.isprintable():
        raise ConfigError(
            f"a reference has 1 to {MAX_REFERENCE_CHARS} printable characters",
            hint="Give what tells this payment from others: the bank's number, an invoice's.",
        )


def lines(query: Query, account: bytes | None = None) -> Iterator[Line]:
    """All entries, or those of one account, oldest first."""
    credit: dict[bytes, int] = {}
    for entry in entries(query):
        for posting in entry.postings:
            if posting.kind != Kind.RECEIVABLE or account not in (None, posting.counterparty):
                continue
            change = -posting.amount_nusd
            left = credit.get(posting.counterparty, 0) + change
            credit[posting.counterparty] = left
            yield Line(entry.at_ns, posting.counterparty, entry.memo, change, left)


def entries(query: Query) -> Iterator[Entry]:
    """All entries, oldest first. Raises VerificationError if one is not what was written."""
    seq = 0
    while True:
        page = query(
            "SELECT seq, body FROM entries WHERE seq > ? ORDER BY seq LIMIT ?", seq, PAGE_ENTRIES
        )
        for seq, body in page:
            try:
                yield decode(Entry, bytes(body))
            except ProtocolError as error:
                raise VerificationError(
                    f"entry {seq} of the books is none: {error.message}",
                    hint="Restore the registry from a backup.",
                ) from error
        if len(page) < PAGE_ENTRIES:
            return


def check_books(query: Query) -> int:
    """How many entries there are. Raises VerificationError if the chain or a balance is wrong."""
    ledger = Ledger.load(entries(query))
    postings = {
        (bytes(account), Kind(kind)): int(amount)
        for account, kind, amount in query(
            "SELECT account, kind, SUM(amount_nusd) FROM postings GROUP BY account, kind"
        )
        if amount
    }
    if postings != ledger.balances():
        raise VerificationError(
            "the balances are not those of the entries",
            hint="Restore the registry from a backup.",
        )
    [(count,)] = query("SELECT COUNT(*) FROM entries")
    return int(count)


def _payment_id(account: bytes, reference: str) -> bytes:
    return content_hash(b"payment" + account + reference.strip().encode())


def _entry(query: Query, entry_id: bytes) -> Entry | None:
    found = query("SELECT body FROM entries WHERE id = ?", entry_id)
    return decode(Entry, bytes(found[0][0])) if found else None


def _post(
    connection: sqlite3.Connection,
    entry_id: bytes,
    account: bytes,
    kinds: tuple[Kind, Kind],
    amount_nusd: int,
    memo: str,
    at_ns: int,
) -> bool:
    """Debit the first kind, credit the second; False if it is there. Raises ConfigError."""
    query = query_of(connection)
    known = _entry(query, entry_id)
    if known is not None:
        if known.postings[0].amount_nusd != amount_nusd:
            raise ConfigError(
                f"{memo!r} is booked already, with another amount: "
                f"{format_usd(known.postings[0].amount_nusd)}",
                hint="Give every payment a reference of its own.",
            )
        return False
    last = query("SELECT body FROM entries ORDER BY seq DESC LIMIT 1")
    entry = Entry(
        version=1,
        id=entry_id,
        at_ns=at_ns,
        memo=memo,
        reference=entry_id,
        number=0,
        postings=(
            Posting(account, int(kinds[0]), amount_nusd),
            Posting(account, int(kinds[1]), -amount_nusd),
        ),
        previous=entry_hash(decode(Entry, bytes(last[0][0]))) if last else ZERO_HASH,
    )
    cursor = connection.execute(
        "INSERT INTO entries (id, body) VALUES (?, ?)", (entry_id, encode(entry))
    )
    connection.executemany(
        "INSERT INTO postings VALUES (?, ?, ?, ?, ?)",
        [
            (posting.counterparty, posting.kind, cursor.lastrowid, place, posting.amount_nusd)
            for place, posting in enumerate(entry.postings)
        ],
    )
    return True
