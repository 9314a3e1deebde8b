"""Payments: who says what about money that changed hands somewhere else.

Money moves outside (a bank, cash); here two accounts come to agree on it. A payment has an id of 32
random bytes, and each side books it once. The debtor's node says **claim**: paid. The creditor's
node answers with an **ack**: received, or with a **refusal** and its reason, after which the debtor
takes its entry back. An ack without a claim is good as well: the creditor has the money.

::

    debtor                                 creditor
    payable +amount  cash -amount          (nothing yet)                      claim
                                           cash +amount  receivable -amount   ack
    cash +amount  payable -amount          (nothing)                          refusal

Amounts are nano-dollars, at least one and at most ``MAX_PAYMENT_NUSD``; texts are printable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Generic, TypeVar

import msgspec

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.keys import PrivateKey
from p2pflop.market.records import DelegationBytes, Rejected, Version
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS, check_delegation
from p2pflop.units import KIB, NUSD_PER_USD
from p2pflop.wire import (
    DEFAULT_NETWORK,
    U63,
    Ext,
    Hash,
    Key,
    Sealed,
    SignedRecord,
    Text,
    open_sealed,
    seal,
)

MAX_PAYMENT_NUSD: Final = 10**6 * NUSD_PER_USD
MAX_TEXT_CHARS: Final = 200
MAX_RECORD_BYTES: Final = 3 * KIB

Amount = Annotated[int, msgspec.Meta(ge=1, le=MAX_PAYMENT_NUSD)]


class PaymentClaim(SignedRecord, frozen=True):
    """By the debtor's node: its account has paid the account ``creditor`` this much."""

    KIND: ClassVar[str] = "payment-claim"
    MAX_BYTES: ClassVar[int] = MAX_RECORD_BYTES

    version: Version
    payment: Hash
    creditor: Key
    amount_nusd: Amount
    at_ns: U63
    reference: Text
    delegation: DelegationBytes
    ext: Ext = ()

    @property
    def other(self) -> bytes:
        """The account that it is for."""
        return self.creditor

    @property
    def text(self) -> str:
        """What the signer says about it."""
        return self.reference


class PaymentAck(SignedRecord, frozen=True):
    """By the creditor's node: its account has received this much from the account ``debtor``."""

    KIND: ClassVar[str] = "payment-ack"
    MAX_BYTES: ClassVar[int] = MAX_RECORD_BYTES

    version: Version
    payment: Hash
    debtor: Key
    amount_nusd: Amount
    at_ns: U63
    reference: Text
    delegation: DelegationBytes
    ext: Ext = ()

    @property
    def other(self) -> bytes:
        """The account that it is for."""
        return self.debtor

    @property
    def text(self) -> str:
        """What the signer says about it."""
        return self.reference


class PaymentRefusal(SignedRecord, frozen=True):
    """By the creditor's node: its account has not received what ``debtor`` claims."""

    KIND: ClassVar[str] = "payment-refusal"
    MAX_BYTES: ClassVar[int] = MAX_RECORD_BYTES

    version: Version
    payment: Hash
    debtor: Key
    amount_nusd: Amount
    at_ns: U63
    reason: Text
    delegation: DelegationBytes
    ext: Ext = ()

    @property
    def other(self) -> bytes:
        """The account that it is for."""
        return self.debtor

    @property
    def text(self) -> str:
        """What the signer says about it."""
        return self.reason


PaymentRecord = PaymentClaim | PaymentAck | PaymentRefusal
P = TypeVar("P", PaymentClaim, PaymentAck, PaymentRefusal)


@dataclass(frozen=True, slots=True)
class OpenPayment(Generic[P]):
    """A payment record whose signature, delegation and rules were checked; whose word it is."""

    sealed: Sealed[P]
    account: bytes

    @property
    def record(self) -> P:
        """The record."""
        return self.sealed.record


def make_payment(
    kind: type[P],
    key: PrivateKey,
    *,
    payment: bytes,
    other: bytes,
    amount_nusd: int,
    at_ns: int,
    text: str,
    delegation: bytes,
    network: str = DEFAULT_NETWORK,
) -> bytes:
    """The envelope of a ``kind`` for the account ``other``; ``text`` is its reference or reason.

    Raises ValueError if ``check_payment`` would refuse it.
    """
    if not is_plain(text):
        raise ValueError(f"the text must be printable and at most {MAX_TEXT_CHARS} characters")
    return seal(kind(1, payment, other, amount_nusd, at_ns, text, delegation), key, network).wire


def check_payment(
    kind: type[P], data: bytes, *, own: bytes, now_ns: int, network: str = DEFAULT_NETWORK
) -> OpenPayment[P] | Rejected:
    """Open a payment record that is for the account ``own``. An old one is as good as a new one."""
    try:
        sealed = open_sealed(kind, data, network)
    except (ProtocolError, VerificationError) as error:
        return Rejected(error.message)
    record = sealed.record
    if record.other != own:
        return Rejected("it is for another account")
    if not is_plain(record.text):
        return Rejected("its text is not printable")
    if record.at_ns > now_ns + CLOCK_TOLERANCE_NS:
        return Rejected("it is from the future")
    account = check_delegation(
        record.delegation, sealed.signer, record.at_ns, record.at_ns, network
    )
    if isinstance(account, Rejected):
        return account
    if account == own:
        return Rejected("an account does not pay itself")
    return OpenPayment(sealed, account)


def is_plain(text: str) -> bool:
    """Whether ``text`` may be shown as it is: one line of printable characters, not too long."""
    return text.isprintable() and len(text) <= MAX_TEXT_CHARS
