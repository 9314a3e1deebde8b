"""Sheets: how a node's signed list of orders is made and checked, and who stands behind it.

A node signs with its own key; a **delegation**, signed by an account key, says that the account
answers for that node. The rules about a sheet's own times (lifetime, delegation, orders inside the
sheet) do not look at the clock, so that all peers agree on them; only "not yet" and "no more" do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.keys import PrivateKey, peer_id
from p2pflop.market.limits import NO_LIMITS, AskLimits, SheetLimits, limits_ext, read_limits
from p2pflop.market.records import (
    MAX_SHEET_LIFETIME_NS,
    MAX_SHEET_ORDERS,
    Ask,
    Delegation,
    Rejected,
    Sheet,
    Wish,
)
from p2pflop.units import NS_PER_S, is_price, round_price
from p2pflop.wire import DEFAULT_NETWORK, Sealed, open_sealed, seal

CLOCK_TOLERANCE_NS: Final = 30 * NS_PER_S
DELEGATION_CACHE: Final = 4096


@dataclass(frozen=True, slots=True)
class OpenSheet:
    """A sheet whose signature, delegation and rules were checked. ``account`` is a public key,
    ``limits`` are those of its asks by their numbers."""

    sealed: Sealed[Sheet]
    account: bytes
    limits: SheetLimits = field(compare=False)

    @property
    def node(self) -> bytes:
        """The public key of the node that signed it."""
        return self.sealed.signer

    @property
    def peer(self) -> str:
        """The libp2p id of that node."""
        return peer_id(self.sealed.signer)

    @property
    def sheet(self) -> Sheet:
        """The record."""
        return self.sealed.record

    def limits_of(self, ask: Ask) -> AskLimits:
        """Those of one of its asks."""
        return self.limits.get(ask.number, ())


def make_delegation(
    account: PrivateKey,
    node: bytes,
    valid_from_ns: int,
    valid_until_ns: int,
    network: str = DEFAULT_NETWORK,
) -> bytes:
    """The envelope by which ``account`` answers for ``node`` (a public key) in that time."""
    return seal(Delegation(1, node, valid_from_ns, valid_until_ns), account, network).wire


def check_delegation(
    data: bytes, node: bytes, from_ns: int, until_ns: int, network: str = DEFAULT_NETWORK
) -> bytes | Rejected:
    """The account that answers for ``node`` during the whole of ``from_ns`` to ``until_ns``."""
    try:
        sealed = _open_delegation(data, network)
    except (ProtocolError, VerificationError) as error:
        return Rejected(f"delegation: {error.message}")
    if sealed.record.node != node:
        return Rejected("delegation names another node")
    if not sealed.record.valid_from_ns <= from_ns <= until_ns <= sealed.record.valid_until_ns:
        return Rejected("delegation does not cover the time")
    return sealed.signer


@lru_cache(maxsize=DELEGATION_CACHE)
def _open_delegation(data: bytes, network: str) -> Sealed[Delegation]:
    # A node repeats one delegation in every sheet, bid and fill; the check costs a signature.
    return open_sealed(Delegation, data, network)


def make_ask(
    number: int,
    class_id: bytes,
    price_nusd: int,
    valid_until_ns: int,
    *,
    memory_bytes: int,
    flop_per_s: int,
    flop_per_byte: int = 0,
    setup_nusd: int = 0,
    min_charge_nusd: int = 0,
    byte_price_nusd: int = 0,
    firm_until_ns: int = 0,
) -> Ask:
    """An ask with its prices rounded to three significant digits.

    ``price_nusd`` is per PFLOP, ``byte_price_nusd`` per GB (10^9 bytes) moved.
    """
    return Ask(
        number=number,
        class_id=class_id,
        price_nusd=round_price(price_nusd),
        flop_per_byte=flop_per_byte,
        setup_nusd=round_price(setup_nusd),
        min_charge_nusd=round_price(min_charge_nusd),
        byte_price_nusd=round_price(byte_price_nusd),
        memory_bytes=memory_bytes,
        flop_per_s=flop_per_s,
        valid_until_ns=valid_until_ns,
        firm_until_ns=firm_until_ns,
    )


def make_sheet(
    key: PrivateKey,
    *,
    number: int,
    now_ns: int,
    delegation: bytes,
    asks: Sequence[Ask] = (),
    wishes: Sequence[Wish] = (),
    addresses: Sequence[str] = (),
    limits: SheetLimits = NO_LIMITS,
    lifetime_ns: int = MAX_SHEET_LIFETIME_NS,
    network: str = DEFAULT_NETWORK,
) -> OpenSheet:
    """Sign a sheet that ``check_sheet`` accepts. Raises ValueError if it would not.

    ``number`` must exceed every number this node has used; ``now_ns`` itself serves well.
    ``limits`` are those of asks, by their numbers. A sheet without orders withdraws everything.
    """
    sheet = Sheet(
        version=1,
        number=number,
        issued_ns=now_ns,
        expires_ns=now_ns + lifetime_ns,
        delegation=delegation,
        addresses=tuple(addresses),
        asks=tuple(asks),
        wishes=tuple(wishes),
        ext=limits_ext(limits),
    )
    opened = _check_rules(seal(sheet, key, network), network)
    if isinstance(opened, Rejected):
        raise ValueError(f"sheet: {opened.reason}")
    return opened


def check_sheet(data: bytes, network: str, now_ns: int) -> OpenSheet | Rejected:
    """Open a sheet from anywhere. Costs at most two signature checks; touches no state."""
    opened = open_sheet(data, network)
    if isinstance(opened, Rejected):
        return opened
    return check_clock(opened, now_ns) or opened


def check_clock(sheet: OpenSheet, now_ns: int) -> Rejected | None:
    """Why a sheet is not for now: peers' clocks may differ by ``CLOCK_TOLERANCE_NS``."""
    if sheet.sheet.issued_ns > now_ns + CLOCK_TOLERANCE_NS:
        return Rejected("sheet is from the future")
    if sheet.sheet.expires_ns <= now_ns:
        return Rejected("sheet has expired")
    return None


def open_sheet(data: bytes, network: str) -> OpenSheet | Rejected:
    """All of ``check_sheet`` but the clock."""
    try:
        sealed = open_sealed(Sheet, data, network)
    except (ProtocolError, VerificationError) as error:
        return Rejected(error.message)
    return _check_rules(sealed, network)


def _check_rules(sealed: Sealed[Sheet], network: str) -> OpenSheet | Rejected:
    sheet = sealed.record
    if not 0 < sheet.expires_ns - sheet.issued_ns <= MAX_SHEET_LIFETIME_NS:
        return Rejected("sheet must live for up to an hour")
    if len(sheet.asks) + len(sheet.wishes) > MAX_SHEET_ORDERS:
        return Rejected(f"sheet has over {MAX_SHEET_ORDERS} orders")
    if not all(address.isascii() and address.isprintable() for address in sheet.addresses):
        return Rejected("sheet has an address that is not printable ASCII")
    numbers = [ask.number for ask in sheet.asks] + [wish.number for wish in sheet.wishes]
    if len(set(numbers)) != len(numbers):
        return Rejected("sheet numbers two orders alike")
    wrong = _check_orders(sheet)
    if wrong is not None:
        return wrong
    limits = read_limits(sheet) if sheet.ext else NO_LIMITS
    if isinstance(limits, Rejected):
        return limits
    account = check_delegation(
        sheet.delegation, sealed.signer, sheet.issued_ns, sheet.expires_ns, network
    )
    return account if isinstance(account, Rejected) else OpenSheet(sealed, account, limits)


def _check_orders(sheet: Sheet) -> Rejected | None:
    for ask in sheet.asks:
        prices = (ask.price_nusd, ask.setup_nusd, ask.min_charge_nusd, ask.byte_price_nusd)
        if not all(is_price(price) for price in prices):
            return Rejected(f"ask {ask.number} has a price of over three significant digits")
        if not ask.firm_until_ns <= ask.valid_until_ns <= sheet.expires_ns:
            return Rejected(f"ask {ask.number} outlives its sheet or is firm for too long")
    for wish in sheet.wishes:
        sizes = (wish.flop, wish.touched_bytes, wish.moved_bytes, wish.memory_bytes)
        if not all(is_price(number) for number in (wish.limit_nusd, *sizes)):
            return Rejected(f"wish {wish.number} has over three significant digits")
        if wish.valid_until_ns > sheet.expires_ns:
            return Rejected(f"wish {wish.number} outlives its sheet")
    return None
