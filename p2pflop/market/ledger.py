"""The ledger: an account's own double-entry book. Whoever owes, it is in here, twice.

An **entry** has postings that sum to zero: debits positive, credits negative. A ledger account is
(counterparty account key, kind). Delivered work, from the cumulative amounts of countersigned
receipts::

    provider     receivable +delta    revenue -delta
    buyer        expense    +delta    payable -delta

and money that changes hands::

    provider     cash       +amount   receivable -amount
    buyer        payable    +amount   cash       -amount

A payment that was refused is taken back by an entry of its own; nothing is ever struck out::

    buyer        cash       +amount   payable    -amount

So what a buyer's ledger says it owes a provider is what the provider's ledger says is due from it.
Entries form a chain: each holds the hash of the one before it, so that a book that was changed
afterwards does not load. The ledger keeps balances; entries are handed out to be stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Final, Literal

import msgspec

from p2pflop.errors import VerificationError
from p2pflop.ids import content_hash
from p2pflop.market.credit import uncovered_nusd
from p2pflop.market.records import ZERO_HASH, Receipt
from p2pflop.wire import U32, U63, Hash, Key, Record, Text, encode

MAX_POSTINGS: Final = 16

I64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Kind(IntEnum):
    """What a balance is."""

    RECEIVABLE = 0
    PAYABLE = 1
    REVENUE = 2
    EXPENSE = 3
    CASH = 4


class Posting(Record, frozen=True):
    """Debit (positive) or credit (negative) of one ledger account."""

    counterparty: Key
    kind: Annotated[int, msgspec.Meta(ge=0, le=4)]
    amount_nusd: I64


class Entry(Record, frozen=True):
    """One line of the book. ``reference`` is what it is about: a fill id or a payment id."""

    version: Literal[1]
    id: Hash
    at_ns: U63
    memo: Text
    reference: Hash
    number: U32
    postings: Annotated[tuple[Posting, ...], msgspec.Meta(min_length=2, max_length=MAX_POSTINGS)]
    previous: Hash


@dataclass(frozen=True, slots=True)
class StatementRow:
    """An entry as one counterparty's statement shows it, with the balance after it."""

    at_ns: int
    memo: str
    reference: bytes
    number: int
    amount_nusd: int
    owed_nusd: int


def entry_hash(entry: Entry) -> bytes:
    """What the next entry must hold as ``previous``."""
    return content_hash(encode(entry))


class Ledger:
    """Balances and the head of the chain. ``load`` brings back what was stored."""

    def __init__(self) -> None:
        self._balances: dict[tuple[bytes, Kind], int] = {}
        self._booked: dict[tuple[bytes, Kind], tuple[int, int]] = {}
        self._received: dict[bytes, int] = {}
        self._uncovered_nusd = 0
        self._ids: set[bytes] = set()
        self._head = ZERO_HASH

    @property
    def head(self) -> bytes:
        """The hash of the newest entry, ``ZERO_HASH`` of an empty book."""
        return self._head

    @classmethod
    def load(cls, entries: Iterable[Entry]) -> Ledger:
        """Rebuild from all stored entries, oldest first. Raises VerificationError."""
        ledger = cls()
        for place, entry in enumerate(entries):
            try:
                ledger._apply(entry)
            except ValueError as error:
                raise VerificationError(
                    f"ledger entry {place} is not what was written: {error}",
                    hint="Restore the book from a backup.",
                ) from error
        return ledger

    def book_delivered(
        self, receipt: Receipt, provider: bytes, at_ns: int, memo: str = "work delivered"
    ) -> Entry | None:
        """The buyer's entry for a receipt that it countersigns; None if nothing is new in it.

        Raises ValueError if the receipt contradicts one that is booked.
        """
        return self._book(receipt, provider, (Kind.EXPENSE, Kind.PAYABLE), at_ns, memo)

    def book_earned(
        self, receipt: Receipt, buyer: bytes, at_ns: int, memo: str = "work delivered"
    ) -> Entry | None:
        """The provider's entry for a receipt that the buyer countersigned; else as above."""
        return self._book(receipt, buyer, (Kind.RECEIVABLE, Kind.REVENUE), at_ns, memo)

    def book_paid(
        self, payment: bytes, provider: bytes, amount_nusd: int, at_ns: int, memo: str = "paid"
    ) -> Entry | None:
        """Money given. ``payment`` is a 32-byte id; the same one is booked once."""
        kinds = (Kind.PAYABLE, Kind.CASH)
        return self._pay(payment, provider, kinds, amount_nusd, at_ns, memo)

    def book_received(
        self, payment: bytes, buyer: bytes, amount_nusd: int, at_ns: int, memo: str = "received"
    ) -> Entry | None:
        """Money got. ``payment`` is a 32-byte id; the same one is booked once."""
        kinds = (Kind.CASH, Kind.RECEIVABLE)
        return self._pay(payment, buyer, kinds, amount_nusd, at_ns, memo)

    def book_returned(
        self, payment: bytes, provider: bytes, amount_nusd: int, at_ns: int, memo: str = "refused"
    ) -> Entry | None:
        """Money that was booked as given and was not received: the entry of ``book_paid`` undone.

        Raises ValueError if that payment was never booked.
        """
        if _id(b"payment", payment, 0, (Kind.PAYABLE, Kind.CASH)) not in self._ids:
            raise ValueError("the payment was never booked")
        kinds = (Kind.CASH, Kind.PAYABLE)
        return self._pay(payment, provider, kinds, amount_nusd, at_ns, memo)

    def received_nusd(self, counterparty: bytes) -> int:
        """All money ever received from that account."""
        return self._received.get(counterparty, 0)

    def credit_nusd(self, counterparty: bytes) -> int:
        """What that account may owe: the money received from it, less what it has got back beyond
        what it was owed."""
        given_nusd = max(0, self.balance_nusd(counterparty, Kind.PAYABLE))
        return max(0, self.received_nusd(counterparty) - given_nusd)

    def uncovered_nusd(self, counterparty: bytes | None = None) -> int:
        """What that account owes beyond its credit; below zero, what it still may.

        Without an account, what all those owe together that owe more than that.
        """
        if counterparty is None:
            return self._uncovered_nusd
        return uncovered_nusd(self.due_nusd(counterparty), self.credit_nusd(counterparty))

    def balance_nusd(self, counterparty: bytes, kind: Kind) -> int:
        """Debits less credits."""
        return self._balances.get((counterparty, kind), 0)

    def due_nusd(self, counterparty: bytes) -> int:
        """What that account owes this one; negative if this one owes it."""
        return self.balance_nusd(counterparty, Kind.RECEIVABLE) + self.balance_nusd(
            counterparty, Kind.PAYABLE
        )

    def balances(self) -> Mapping[tuple[bytes, Kind], int]:
        """Every ledger account that is not zero."""
        return {key: amount for key, amount in self._balances.items() if amount}

    def booked(self) -> dict[tuple[bytes, Kind], int]:
        """What was booked for each fill by the kind that was debited: expense or receivable."""
        return {key: amount for key, (_, amount) in self._booked.items()}

    def totals(self) -> dict[Kind, int]:
        """Balances over all counterparties; their sum is zero."""
        totals = dict.fromkeys(Kind, 0)
        for (_, kind), amount in self._balances.items():
            totals[kind] += amount
        return totals

    def _book(
        self,
        receipt: Receipt,
        counterparty: bytes,
        kinds: tuple[Kind, Kind],
        at_ns: int,
        memo: str,
    ) -> Entry | None:
        number, amount = self._booked.get((receipt.fill, kinds[0]), (0, 0))
        delta = receipt.amount_nusd - amount
        older = receipt.number < number
        if (delta and receipt.number == number) or (delta > 0 if older else delta < 0):
            raise ValueError(
                f"receipt {receipt.number} for {receipt.amount_nusd} nusd contradicts "
                f"receipt {number} for {amount} nusd of the same fill"
            )
        if older or delta == 0:
            return None
        entry_id = _id(b"receipt", receipt.fill, receipt.number, kinds)
        postings = _transfer(counterparty, kinds, delta)
        return self._post(entry_id, at_ns, memo, receipt.fill, receipt.number, postings)

    def _pay(
        self,
        payment: bytes,
        counterparty: bytes,
        kinds: tuple[Kind, Kind],
        amount_nusd: int,
        at_ns: int,
        memo: str,
    ) -> Entry | None:
        if amount_nusd <= 0:
            raise ValueError(f"a payment of {amount_nusd} nusd")
        entry_id = _id(b"payment", payment, 0, kinds)
        if entry_id in self._ids:
            return None
        postings = _transfer(counterparty, kinds, amount_nusd)
        return self._post(entry_id, at_ns, memo, payment, 0, postings)

    def _post(
        self,
        entry_id: bytes,
        at_ns: int,
        memo: str,
        reference: bytes,
        number: int,
        postings: Sequence[Posting],
    ) -> Entry:
        entry = Entry(
            version=1,
            id=entry_id,
            at_ns=at_ns,
            memo=memo[:200],
            reference=reference,
            number=number,
            postings=tuple(postings),
            previous=self._head,
        )
        self._apply(entry)
        return entry

    def _apply(self, entry: Entry) -> None:
        if entry.previous != self._head:
            raise ValueError("it does not follow the entry before it")
        if sum(posting.amount_nusd for posting in entry.postings) != 0:
            raise ValueError("its postings do not sum to zero")
        if entry.id in self._ids:
            raise ValueError("its id is used twice")
        parties = {posting.counterparty for posting in entry.postings}
        self._uncovered_nusd -= self._uncovered_by(parties)
        for posting in entry.postings:
            key = (posting.counterparty, Kind(posting.kind))
            self._balances[key] = self._balances.get(key, 0) + posting.amount_nusd
        first, second = entry.postings[:2]
        if (first.kind, second.kind) == (Kind.CASH, Kind.RECEIVABLE):
            before = self.received_nusd(first.counterparty)
            self._received[first.counterparty] = before + first.amount_nusd
        self._uncovered_nusd += self._uncovered_by(parties)
        if entry.number:
            # Keyed by the debited kind too: an account that buys from itself books both sides.
            debit = entry.postings[0]
            booked = (entry.reference, Kind(debit.kind))
            _, amount = self._booked.get(booked, (0, 0))
            self._booked[booked] = (entry.number, amount + debit.amount_nusd)
        self._ids.add(entry.id)
        self._head = entry_hash(entry)

    def _uncovered_by(self, parties: Iterable[bytes]) -> int:
        return sum(max(0, self.uncovered_nusd(party)) for party in parties)


def statement(
    entries: Iterable[Entry], counterparty: bytes, owed_nusd: int = 0
) -> Iterator[StatementRow]:
    """What each entry changed in what ``counterparty`` owes (receivable and payable).

    ``owed_nusd`` is the balance before the first of them.
    """
    for entry in entries:
        change = sum(
            posting.amount_nusd
            for posting in entry.postings
            if posting.counterparty == counterparty
            and posting.kind in (Kind.RECEIVABLE, Kind.PAYABLE)
        )
        if change:
            owed_nusd += change
            yield StatementRow(
                entry.at_ns, entry.memo, entry.reference, entry.number, change, owed_nusd
            )


def _transfer(
    counterparty: bytes, kinds: tuple[Kind, Kind], amount_nusd: int
) -> tuple[Posting, Posting]:
    """Debit the first kind, credit the second: zero in sum, whatever the amount."""
    debit, credit = kinds
    return (
        Posting(counterparty, int(debit), amount_nusd),
        Posting(counterparty, int(credit), -amount_nusd),
    )


def _id(what: bytes, reference: bytes, number: int, kinds: tuple[Kind, Kind]) -> bytes:
    return content_hash(what + reference + number.to_bytes(4, "big") + bytes(kinds))
