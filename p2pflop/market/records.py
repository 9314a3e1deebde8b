"""The market's signed records, in wire order.

A purchase is a chain of ids: a **bid** names a provider's ask, a **fill** or **reject** names the
bid, a **confirm**, **commit**, **receipt** and **abandon** name the fill. A countersigned receipt
is the buyer's own envelope around the same receipt body. Prices are nano-dollars per PFLOP with at
most three significant digits; totals are exact nano-dollars. Records are signed by node keys; a
delegation inside says for which account, whose key signs nothing else here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

import msgspec

from p2pflop.ids import HASH_BYTES
from p2pflop.job.spec import Job
from p2pflop.wire import U32, U63, Ext, Hash, Key, Record, SignedRecord, Text

MAX_SHEET_BYTES: Final = 8 * 1024
MAX_SHEET_ORDERS: Final = 32
MAX_SHEET_LIFETIME_NS: Final = 3600 * 10**9
MAX_DELEGATION_BYTES: Final = 512
MAX_QUOTE_BYTES: Final = 512
MAX_TRADE_BYTES: Final = 2 * 1024
MAX_COST_LINES: Final = 64
NONCE_BYTES: Final = 16
ZERO_HASH: Final = bytes(HASH_BYTES)

Version = Literal[1]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
DelegationBytes = Annotated[bytes, msgspec.Meta(max_length=MAX_DELEGATION_BYTES)]


@dataclass(frozen=True, slots=True)
class Rejected:
    """An expected no, and why: what a check returns instead of the checked thing."""

    reason: str


class Delegation(SignedRecord, frozen=True):
    """Signed by an account key: node ``node`` acts for this account between the two times."""

    KIND: ClassVar[str] = "delegation"
    MAX_BYTES: ClassVar[int] = MAX_DELEGATION_BYTES

    version: Version
    node: Key
    valid_from_ns: U63
    valid_until_ns: U63
    ext: Ext = ()


class Ask(Record, frozen=True):
    """An offer to sell. ``flop_per_s`` is a claim that only turns FLOP into minutes for people."""

    number: U32
    class_id: Hash
    price_nusd: U63
    flop_per_byte: U63
    setup_nusd: U63
    min_charge_nusd: U63
    byte_price_nusd: U63
    memory_bytes: U63
    flop_per_s: U63
    valid_until_ns: U63
    firm_until_ns: U63


class Wish(Record, frozen=True):
    """A resting bid: what a buyer would pay, never what it would run.

    ``limit_nusd`` is the most that all of it may cost; ``class_id`` is ``ZERO_HASH`` for any class.
    Limit and sizes have three significant digits: exact ones would give a known job away.
    """

    number: U32
    class_id: Hash
    limit_nusd: U63
    flop: U63
    touched_bytes: U63
    moved_bytes: U63
    memory_bytes: U63
    commitment: Hash
    valid_until_ns: U63


LIMITS_EXT: Final = 1
"""Critical: a buyer that does not know it would bid for what is not taken."""


class Sheet(SignedRecord, frozen=True):
    """All the live orders of one node. Of two sheets of a node the higher number wins.

    What its asks do not take is in ``ext`` (``p2pflop.market.limits``).
    """

    KIND: ClassVar[str] = "sheet"
    MAX_BYTES: ClassVar[int] = MAX_SHEET_BYTES
    KNOWN_EXT: ClassVar[frozenset[int]] = frozenset({LIMITS_EXT})

    version: Version
    number: U63
    issued_ns: U63
    expires_ns: U63
    delegation: DelegationBytes
    addresses: Annotated[tuple[Text, ...], msgspec.Meta(max_length=8)]
    asks: Annotated[tuple[Ask, ...], msgspec.Meta(max_length=MAX_SHEET_ORDERS)]
    wishes: Annotated[tuple[Wish, ...], msgspec.Meta(max_length=MAX_SHEET_ORDERS)]
    ext: Ext = ()


class CostLine(Record, frozen=True):
    """One graph's metered cost, and how often it runs in the stretch that is bought."""

    graph: Hash
    flop: U63
    touched_bytes: U63
    times: U63


class Terms(Record, frozen=True):
    """What the buyer asks of the lease, beside the computation itself."""

    memory_bytes: U63
    moved_bytes: U63
    checkpoint_steps: U63
    deadline_ns: U63


QUOTE_EXT: Final = 3
"""Critical: a provider that does not know it would take the bid for one on its sheet."""
FIXED_EXT: Final = 1
SESSION_EXT: Final = 5
"""Critical: a provider that does not know it would look for a job behind the bid."""


class Bid(SignedRecord, frozen=True):
    """A directed bid: this stretch of this work, on that ask, for exactly ``quote_nusd``.

    ``provider`` is the node key that signed the sheet. ``root_from`` is the state root that the
    stretch starts from, ``ZERO_HASH`` at step 0; the addresses behind it travel beside the bid.
    """

    KIND: ClassVar[str] = "bid"
    KNOWN_EXT: ClassVar[frozenset[int]] = frozenset({FIXED_EXT, QUOTE_EXT, SESSION_EXT})

    version: Version
    provider: Key
    sheet_number: U63
    ask: U32
    nonce: Nonce
    class_id: Hash
    job: Job
    root_from: Hash
    meter_id: Text
    costs: Annotated[tuple[CostLine, ...], msgspec.Meta(max_length=MAX_COST_LINES)]
    terms: Terms
    quote_nusd: U63
    decided_at_ns: U63
    book_digest: Hash
    mandate_digest: Hash
    delegation: DelegationBytes
    ext: Ext = ()


def fixed_ext(setup_nusd: int, min_charge_nusd: int) -> Ext:
    """What a bid says of the fixed charges in its quote: setup and minimum charge of the ask, 8
    bytes each, big-endian; none where both are zero. Receipts follow from it, so it is critical."""
    if not setup_nusd and not min_charge_nusd:
        return ()
    return ((FIXED_EXT, setup_nusd.to_bytes(8, "big") + min_charge_nusd.to_bytes(8, "big")),)


def fixed_charges(bid: Bid) -> tuple[int, int]:
    """Setup and minimum charge in nano-dollars, as a bid says that was checked."""
    said = dict(bid.ext).get(FIXED_EXT, b"")
    return int.from_bytes(said[:8], "big"), int.from_bytes(said[8:], "big")


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices of an ask, by which a session's receipts are reckoned."""

    price_nusd: int
    flop_per_byte: int
    byte_price_nusd: int


def session_ext(ask: Ask) -> Ext:
    """What makes a bid one for a session: the prices that it goes by, price, FLOP a byte and price
    of moved bytes of the ask, 8 bytes each, big-endian."""
    prices = (ask.price_nusd, ask.flop_per_byte, ask.byte_price_nusd)
    return ((SESSION_EXT, b"".join(price.to_bytes(8, "big") for price in prices)),)


def session_prices(bid: Bid) -> Prices | None:
    """The prices that a session's bid goes by, if that was checked; None for the bid of a job."""
    said = dict(bid.ext).get(SESSION_EXT)
    if said is None:
        return None
    return Prices(*(int.from_bytes(said[start : start + 8], "big") for start in (0, 8, 16)))


CHECKPOINT_EXT: Final = 2
MIN_CHECKPOINT_SECONDS: Final = 30
MAX_CHECKPOINT_SECONDS: Final = 2**32 - 1


def checkpoint_ext(seconds: int) -> Ext:
    """What a bid says that would like a checkpoint so long after the last one, too; none for 0.

    Not critical, and not billed: a provider that does so is paid the sooner.
    """
    return ((CHECKPOINT_EXT, seconds.to_bytes(4, "big")),) if seconds else ()


def checkpoint_seconds(bid: Bid) -> int:
    """How long after the last checkpoint the buyer would like one, in seconds; 0 if it does not
    say so. At least ``MIN_CHECKPOINT_SECONDS``."""
    said = int.from_bytes(dict(bid.ext).get(CHECKPOINT_EXT, b"")[:4], "big")
    return max(said, MIN_CHECKPOINT_SECONDS) if said else 0


def ticket_ext(ticket: bytes) -> Ext:
    """What a bid on a quote shows for it (``p2pflop.market.wishes``); none for a bid on a sheet."""
    return ((QUOTE_EXT, ticket),) if ticket else ()


def ticket_of(bid: Bid) -> bytes:
    """The ticket of a bid on a quote; empty for a bid on a sheet."""
    return dict(bid.ext).get(QUOTE_EXT, b"")


class Quote(SignedRecord, frozen=True):
    """A provider's answer to one wish of the node ``buyer``: ``ask``, for that wish alone.

    ``ask`` bears the number of an ask on the provider's sheet and costs no more. Its price is firm
    until the quote expires, ``valid_until_ns`` and ``firm_until_ns`` of the ask.
    """

    KIND: ClassVar[str] = "quote"
    MAX_BYTES: ClassVar[int] = MAX_QUOTE_BYTES

    version: Version
    buyer: Key
    commitment: Hash
    ask: Ask
    issued_ns: U63
    nonce: Nonce
    ext: Ext = ()


class Fill(SignedRecord, frozen=True):
    """The provider accepts bid ``bid`` and holds the capacity until ``confirm_by_ns``."""

    KIND: ClassVar[str] = "fill"

    version: Version
    bid: Hash
    confirm_by_ns: U63
    lease_until_ns: U63
    delegation: DelegationBytes
    ext: Ext = ()


class Reject(SignedRecord, frozen=True):
    """The provider refuses bid ``bid``; ``sheet`` is its newest sheet, as an envelope, or empty."""

    KIND: ClassVar[str] = "reject"

    version: Version
    bid: Hash
    reason: Text
    sheet: Annotated[bytes, msgspec.Meta(max_length=MAX_SHEET_BYTES + 512)]
    ext: Ext = ()


class Confirm(SignedRecord, frozen=True):
    """The buyer's word that makes fill ``fill`` binding."""

    KIND: ClassVar[str] = "confirm"

    version: Version
    fill: Hash
    ext: Ext = ()


class Commit(SignedRecord, frozen=True):
    """Sent before any result byte: BLAKE3 of (provider key, salt, state root, result hash).

    The salt, 32 bytes, travels with the result and opens it.
    """

    KIND: ClassVar[str] = "commit"

    version: Version
    fill: Hash
    commitment: Hash
    ext: Ext = ()


class Receipt(SignedRecord, frozen=True):
    """Work delivered under a fill so far; ``amount_nusd`` is cumulative, at most the quote."""

    KIND: ClassVar[str] = "receipt"

    version: Version
    fill: Hash
    number: U32
    from_step: U63
    root_from: Hash
    to_step: U63
    root_to: Hash
    result: Hash
    amount_nusd: U63
    ext: Ext = ()


class Abandon(SignedRecord, frozen=True):
    """Either side gives the lease up; claims for steps from ``from_step`` on are void."""

    KIND: ClassVar[str] = "abandon"

    version: Version
    fill: Hash
    from_step: U63
    root: Hash
    reason: Text
    ext: Ext = ()


class Trade(SignedRecord, frozen=True):
    """What the public tape shows of a settled fill. Signed by the seller; the buyer is not in it.

    ``fill_digest`` is a hash that only who knows the fill can make, ``price_nusd`` the price per
    PFLOP of the ask, ``gflop_rounded`` what was delivered, to one digit. ``hour`` counts from 1970.
    """

    KIND: ClassVar[str] = "trade"
    MAX_BYTES: ClassVar[int] = MAX_TRADE_BYTES

    version: Version
    fill_digest: Hash
    class_id: Hash
    price_nusd: U63
    gflop_rounded: U63
    hour: U32
    delegation: DelegationBytes
    ext: Ext = ()
