"""The desks of a lifecycle: the node's key and the market's rules behind bytes.

A desk serves one job. It keeps what it has signed or verified, so that each record of a purchase
costs about one signature check, and none if it was made here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Final, TypeVar

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.job.spec import Work
from p2pflop.keys import PrivateKey
from p2pflop.market.fills import (
    check_abandon,
    check_commit,
    check_confirm,
    check_fill,
    check_opening,
    check_reject,
    make_abandon,
    make_commit,
    make_confirm,
    make_fill,
    make_reject,
)
from p2pflop.market.receipts import (
    check_closing,
    check_countersigned,
    check_receipt,
    close,
    countersign,
    make_receipt,
)
from p2pflop.market.records import (
    ZERO_HASH,
    Abandon,
    Bid,
    Commit,
    Fill,
    Receipt,
    Rejected,
)
from p2pflop.wire import DEFAULT_NETWORK, Sealed, SignedRecord, reopen

MAX_KEPT_RECORDS: Final = 256

S = TypeVar("S", bound=SignedRecord)
T = TypeVar("T")


class BuyerDesk:
    """A ``job.buying.BuyerDesk``.

    ``bid_on(attempt, now_ns)`` gives the sealed bid for the deal to try next, or None;
    ``account_of(node)`` the account whose sheet offers for that node, or None if it has none;
    ``own_account`` is the buyer's; ``knows`` tells which accounts have delivered to it before, and
    ``may_try`` of which bids the job can be run in its own sandbox.
    """

    def __init__(
        self,
        key: PrivateKey,
        work: Work,
        *,
        bid_on: Callable[[int, int], Sealed[Bid] | None],
        account_of: Callable[[bytes], bytes | None],
        own_account: bytes,
        knows: Callable[[bytes], bool],
        may_try: Callable[[Bid], bool],
        network: str = DEFAULT_NETWORK,
    ) -> None:
        self._key = key
        self._work = work
        self._knows = knows
        self._may_try = may_try
        self._bid_on = bid_on
        self._account_of = account_of
        self._own_account = own_account
        self._records = _Records(network)
        self._network = network

    def bid(self, attempt: int, now_ns: int) -> bytes | None:
        """See the protocol."""
        bid = self._bid_on(attempt, now_ns)
        return None if bid is None else self._records.keep(bid)

    def check_fill(self, wire: bytes, bid: bytes, now_ns: int) -> None:
        """See the protocol. The fill must be for the account that the ask was of."""
        opened = self._records.get(Bid, bid)
        account = self._account_of(opened.record.provider)
        if account is None:
            raise ProtocolError("the provider's sheet is gone")
        self._records.keep(_accept(check_fill(wire, opened, account, now_ns, self._network)))

    def check_reject(self, wire: bytes, bid: bytes) -> str:
        """See the protocol."""
        opened = self._records.get(Bid, bid)
        return _accept(check_reject(wire, opened, self._network)).record.reason

    def confirm(self, fill: bytes) -> bytes:
        """See the protocol."""
        return make_confirm(self._key, self._records.get(Fill, fill), self._network).wire

    def account_of(self, bid: bytes) -> bytes:
        """See the protocol. A node whose account is not known any more counts as one."""
        node = self._records.get(Bid, bid).record.provider
        return self._account_of(node) or node

    def is_own(self, bid: bytes) -> bool:
        """See the protocol."""
        return self.account_of(bid) == self._own_account

    def knows(self, account: bytes) -> bool:
        """See the protocol."""
        return self._knows(account)

    def may_try(self, bid: bytes) -> bool:
        """See the protocol."""
        return self._may_try(self._records.get(Bid, bid).record)

    def check_commit(self, wire: bytes, fill: bytes) -> None:
        """See the protocol."""
        opened = self._records.get(Fill, fill)
        self._records.keep(_accept(check_commit(wire, opened, self._network)))

    def receipt_number(self, wire: bytes, fill: bytes) -> int:
        """See the protocol."""
        receipt = self._records.get(Receipt, wire)
        opened = self._records.get(Fill, fill)
        if receipt.signer != opened.signer or receipt.record.fill != opened.id:
            raise ProtocolError("receipt is not the provider's for this fill")
        return receipt.record.number

    def check_receipt(
        self, wire: bytes, bid: bytes, fill: bytes, previous: bytes, commit: bytes, salt: bytes
    ) -> bool:
        """See the protocol. The last receipt must be the one that was committed to."""
        opened = self._records.get(Fill, fill)
        before = self._records.get(Receipt, previous).record if previous else None
        bought = self._records.get(Bid, bid).record
        record = _accept(
            check_receipt(wire, opened, bought, self._work, before, self._network)
        ).record
        if record.result == ZERO_HASH:
            return False
        if not commit:
            raise ProtocolError("a result before its commit")
        committed = self._records.get(Commit, commit)
        wrong = check_opening(committed, salt, record.root_to, record.result)
        if wrong is not None:
            raise ProtocolError(wrong.reason)
        return True

    def countersign(self, receipt: bytes) -> bytes:
        """See the protocol."""
        return countersign(self._key, self._records.get(Receipt, receipt), self._network).wire

    def close(self, bid: bytes, countersigned: bytes) -> bytes:
        """See the protocol."""
        last, bought = self._records.get(Receipt, countersigned), self._records.get(Bid, bid)
        closing = close(self._key, last.record, bought.record, self._work, self._network)
        return b"" if closing is None else closing.wire

    def abandon(self, bid: bytes, fill: bytes, countersigned: bytes, reason: str) -> bytes:
        """See the protocol."""
        return self._records.abandon(self._key, bid, fill, countersigned, reason)

    def check_abandon(self, wire: bytes, bid: bytes, fill: bytes) -> str:
        """See the protocol."""
        return self._records.check_abandon(wire, bid, fill)


class ProviderDesk:
    """A ``job.selling.ProviderDesk``. ``sheet()`` gives the envelope of the newest sheet."""

    def __init__(
        self,
        key: PrivateKey,
        work: Work,
        *,
        delegation: bytes,
        sheet: Callable[[], bytes] = bytes,
        network: str = DEFAULT_NETWORK,
    ) -> None:
        self._key = key
        self._work = work
        self._delegation = delegation
        self._sheet = sheet
        self._records = _Records(network)
        self._network = network

    def fill(self, bid: bytes, now_ns: int) -> bytes:
        """See the protocol."""
        opened = self._records.get(Bid, bid)
        fill = make_fill(
            self._key, opened, now_ns=now_ns, delegation=self._delegation, network=self._network
        )
        return self._records.keep(fill)

    def reject(self, bid: bytes, reason: str) -> bytes:
        """See the protocol."""
        bid_id = self._records.get(Bid, bid).id
        return make_reject(self._key, bid_id, reason, self._sheet(), self._network).wire

    def check_confirm(self, wire: bytes, bid: bytes, fill: bytes) -> None:
        """See the protocol."""
        bought, opened = self._records.get(Bid, bid), self._records.get(Fill, fill)
        _accept(check_confirm(wire, bought, opened, self._network))

    def receipt(
        self, bid: bytes, fill: bytes, previous: bytes, step: int, root: bytes, result: bytes
    ) -> tuple[bytes, int]:
        """See the protocol."""
        receipt = make_receipt(
            self._key,
            self._records.get(Fill, fill),
            self._records.get(Bid, bid).record,
            self._work,
            self._records.get(Receipt, previous).record if previous else None,
            to_step=step,
            root_to=root,
            result=result or ZERO_HASH,
            network=self._network,
        )
        return self._records.keep(receipt), receipt.record.number

    def commit(self, fill: bytes, root: bytes, result: bytes, salt: bytes) -> bytes:
        """See the protocol."""
        opened = self._records.get(Fill, fill)
        commit = make_commit(
            self._key, opened, salt=salt, state_root=root, result=result, network=self._network
        )
        return commit.wire

    def check_countersigned(
        self, wire: bytes, bid: bytes, receipts: Mapping[int, bytes]
    ) -> int | None:
        """See the protocol."""
        signed = self._records.get(Receipt, wire).record
        receipt = receipts.get(signed.number)
        if receipt is None:
            return None
        record = self._records.get(Receipt, receipt).record
        buyer = self._records.get(Bid, bid).signer
        if _is_closing(signed):
            return None
        _accept(check_countersigned(wire, record, buyer, self._network))
        return signed.number

    def check_closing(
        self, wire: bytes, bid: bytes, fill: bytes, receipts: Collection[bytes]
    ) -> int | None:
        """See the protocol."""
        signed = self._records.get(Receipt, wire).record
        if signed.fill != self._records.get(Fill, fill).id or not _is_closing(signed):
            return None
        for receipt in receipts:
            last = self._records.get(Receipt, receipt).record
            if last.number + 1 == signed.number and not _is_closing(last):
                bought = self._records.get(Bid, bid)
                _accept(check_closing(wire, last, bought, self._work, self._network))
                return signed.number
        return None

    def abandon(self, bid: bytes, fill: bytes, countersigned: bytes, reason: str) -> bytes:
        """See the protocol."""
        return self._records.abandon(self._key, bid, fill, countersigned, reason)

    def check_abandon(self, wire: bytes, bid: bytes, fill: bytes) -> str:
        """See the protocol."""
        return self._records.check_abandon(wire, bid, fill)


class _Records:
    """What of one purchase has been signed or verified here, by its envelope."""

    def __init__(self, network: str) -> None:
        self._network = network
        self._kept: dict[bytes, Sealed[SignedRecord]] = {}

    def keep(self, sealed: Sealed[S]) -> bytes:
        if len(self._kept) >= MAX_KEPT_RECORDS:
            del self._kept[next(iter(self._kept))]
        self._kept[sealed.wire] = Sealed(sealed.record, sealed.signer, sealed.id, sealed.wire)
        return sealed.wire

    def get(self, kind: type[S], wire: bytes) -> Sealed[S]:
        known = self._kept.get(wire)
        if known is not None and isinstance(known.record, kind):
            return Sealed(known.record, known.signer, known.id, known.wire)
        try:
            return reopen(kind, wire, self._network)
        except VerificationError as error:
            raise ProtocolError(error.message) from error

    def abandon(
        self, key: PrivateKey, bid: bytes, fill: bytes, countersigned: bytes, reason: str
    ) -> bytes:
        """Fenced at the last step that is countersigned, or at the start of the stretch."""
        bought = self.get(Bid, bid).record
        step, root = bought.job.first_step, bought.root_from
        if countersigned:
            last = self.get(Receipt, countersigned).record
            step, root = last.to_step, last.root_to
        opened = self.get(Fill, fill)
        return make_abandon(
            key, opened, from_step=step, root=root, reason=reason, network=self._network
        ).wire

    def check_abandon(self, wire: bytes, bid: bytes, fill: bytes) -> str:
        bought, opened = self.get(Bid, bid), self.get(Fill, fill)
        abandon: Sealed[Abandon] = _accept(check_abandon(wire, bought, opened, self._network))
        return abandon.record.reason


def _is_closing(receipt: Receipt) -> bool:
    """Whether only a buyer that cancels may have made it: it covers no step and has no result."""
    return receipt.from_step == receipt.to_step and receipt.result == ZERO_HASH


def _accept(checked: T | Rejected) -> T:
    if isinstance(checked, Rejected):
        raise ProtocolError(checked.reason)
    return checked
