"""The selling side: the one allocator of this node's capacity, and all sales under way.

``sale.py`` has one sale. Here a bid is checked, weighed against what is free and what its account
already owes, and granted or denied; the same bid always gets the same answer, after a restart too.
There is no waiting list: whoever comes first gets the slot, everybody else at once a no.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from p2pflop.dht.blobs import Store
from p2pflop.dht.planes import Dialer, Stream
from p2pflop.errors import ProtocolError, ProviderError, StoreError
from p2pflop.job.events import Deny, Grant, Withdraw
from p2pflop.job.file import CheckedJob, JobBody, decode_body, open_job
from p2pflop.job.meter import METER_ID
from p2pflop.job.validate import Refusal
from p2pflop.market.fills import OpenBid, check_bid, check_costs, make_reject
from p2pflop.market.records import Abandon, Bid, Confirm, Fill, Receipt, Rejected
from p2pflop.node import messages as m
from p2pflop.node.config import Settings
from p2pflop.node.conversation import Conversation
from p2pflop.node.execute import memory_bytes, unsupported
from p2pflop.node.identity import Identity
from p2pflop.node.journal import PROVIDER, Head, JobRows, Journal
from p2pflop.node.ledger_book import LedgerBook
from p2pflop.node.orders import cost_lines
from p2pflop.node.sale import Sale, SaleRow, first_row
from p2pflop.node.sheets import SheetService
from p2pflop.node.warm import WarmWorkers
from p2pflop.node.worker_types import Workers
from p2pflop.units import format_usd
from p2pflop.wire import Sealed, envelope_kind, open_sealed

OFFER_S: Final = 10.0
MAX_REMEMBERED: Final = 256
SAFE_LEVEL: Final = 2
SMALL_BODY_BYTES: Final = 1024

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Seller:
    """Everything that this node sells. ``busy`` counts the leases under way."""

    identity: Identity
    settings: Settings
    store: Store
    dialer: Dialer
    sheets: SheetService
    workers: Workers
    warm: WarmWorkers
    journal: Journal
    ledger_book: LedgerBook
    nursery: trio.Nursery
    now_ns: Callable[[], int]
    started_ns: int = field(default_factory=time.monotonic_ns)
    stopping: bool = False
    _sales: OrderedDict[bytes, Sale] = field(default_factory=OrderedDict)
    _by_fill: dict[bytes, Sale] = field(default_factory=dict)
    _held: dict[bytes, Sale] = field(default_factory=dict)
    _deciding: trio.Lock = field(default_factory=trio.Lock)

    @property
    def busy(self) -> int:
        """Leases under way."""
        return len(self._held)

    async def handle(self, stream: Stream) -> None:
        """Answer one job stream."""
        with trio.fail_after(OFFER_S):
            first = m.decode_message(await stream.receive(), stream.peer)
        match first:
            case m.Offer():
                sale = await self._offered(first, stream)
            case m.Confirmed(wire) | m.Countersigned(wire) | m.Abandoned(wire):
                sale = await self._find(wire)
            case _:
                raise ProtocolError("a job stream begins with an offer", peer=stream.peer)
        if sale is not None:
            await sale.attend(Conversation(stream), first)

    def resume(self) -> None:
        """Bring every sale that a restart found unfinished to its end."""
        for head in self.journal.unfinished(PROVIDER):
            self.nursery.start_soon(self._take_up, bytes.fromhex(head.job))

    async def stop(self) -> None:
        """Take no more bids and give running leases back."""
        self.stopping = True
        for sale in list(self._held.values()):
            await sale.tell(Withdraw("the provider is shutting down"))

    def release(self, sale: Sale) -> None:
        """Called by a sale that has ended."""
        self._held.pop(sale.bid.id, None)

    def bind_fill(self, fill: bytes, sale: Sale) -> None:
        """Called by a sale that has a fill, so that a buyer who comes back finds it."""
        self._by_fill[open_sealed(Fill, fill, self.identity.network).id] = sale

    # Bids

    async def _offered(self, offer: m.Offer, stream: Stream) -> Sale | None:
        now_ns = self.now_ns()
        bid = open_sealed(Bid, offer.bid, self.identity.network)
        known = self._sales.get(bid.id) or await self._revive(bid.id)
        if known is not None:
            return known
        opened = check_bid(
            offer.bid,
            node=self.identity.node.public_key,
            sheets=self.sheets.honoured(),
            now_ns=now_ns,
            network=self.identity.network,
        )
        if isinstance(opened, Rejected):
            await self._refuse(stream, bid.id, opened.reason)
            return None
        if opened.peer != stream.peer:
            raise ProtocolError("a bid that another peer signed", peer=stream.peer)
        body, checked = await _open_offered(offer.body)
        if isinstance(checked, Refusal):
            await self._refuse(stream, bid.id, f"the job is not valid: {checked.reason}")
            return None
        for _, data in offer.blobs:
            await self.store.put(data, owner=self._owner(opened.account))
        return await self._decide(opened, body, checked, offer.body)

    async def _decide(
        self, bid: OpenBid, body: JobBody, checked: CheckedJob, encoded: bytes
    ) -> Sale:
        """One decision at a time: two takers of one slot get one fill."""
        async with self._deciding:
            head = Head(bid.sealed.id.hex(), PROVIDER, self.now_ns(), "", b"")
            sale = self._remember(bid.sealed, bid.account, body, checked, head)
            sale.rows.add(SaleRow.BID, bid.sealed.wire)
            sale.rows.add(SaleRow.ACCOUNT, bid.account)
            sale.rows.add(SaleRow.BODY, encoded)
            await sale.driver.start()
            reason = self._objection(bid, checked)
            if reason:
                await sale.tell(Deny(reason))
            else:
                self._held[sale.bid.id] = sale
                await sale.tell(Grant())
            return sale

    def _objection(self, bid: OpenBid, checked: CheckedJob) -> str:
        """Why this bid is not taken, or nothing."""
        own = bid.account == self.identity.account.public_key
        wrong = check_costs(bid.bid, METER_ID, cost_lines(checked))
        if wrong is not None:
            return wrong.reason
        needed = memory_bytes(checked)
        held = sum(other.bid.record.terms.memory_bytes for other in self._held.values())
        reasons = (
            (self.stopping, "the provider is shutting down"),
            (self.workers.broken, "the provider's workers are broken"),
            (self.workers.level < SAFE_LEVEL and not own, "the sandbox here is not safe enough"),
            (bid.bid.job != checked.job, "the bid is for another job than the one sent"),
            (bool(why := unsupported(checked)), why),
            (bid.bid.terms.memory_bytes < needed, f"the job needs {needed} bytes of memory"),
            (len(self._held) >= self.settings.slots, "every slot is taken"),
            (
                held + bid.bid.terms.memory_bytes > self.settings.resolved_memory_bytes(),
                "too little memory is free",
            ),
            (not own and self._over_credit(bid), self._credit_reason()),
        )
        return next((reason for holds, reason in reasons if holds), "")

    def _over_credit(self, bid: OpenBid) -> bool:
        """Unknown buyers share one pool: what they owe, and what runs for them, stays within it."""
        due_nusd = self.ledger_book.owed_nusd()
        running = sum(other.bid.record.quote_nusd for other in self._held.values())
        return due_nusd + running + bid.bid.quote_nusd > self.settings.credit_nusd

    def _credit_reason(self) -> str:
        return f"over the credit of {format_usd(self.settings.credit_nusd)} for unknown buyers"

    async def _refuse(self, stream: Stream, bid_id: bytes, reason: str) -> None:
        newest = self.sheets.newest
        wire = b"" if newest is None else newest.sealed.wire
        reject = make_reject(self.identity.node, bid_id, reason, wire, self.identity.network)
        _log.info("bid %s refused: %s", bid_id.hex()[:12], reason)
        await stream.send(m.encode_message(m.Refused(reject.wire)))

    # Sales

    def _remember(
        self, bid: Sealed[Bid], account: bytes, body: JobBody, checked: CheckedJob, head: Head
    ) -> Sale:
        rows = JobRows(self.journal, head, self.now_ns)
        sale = self._sales[bid.id] = Sale(self, bid, account, body, checked, rows)
        self.nursery.start_soon(sale.live)
        while len(self._sales) > MAX_REMEMBERED:
            oldest = next((key for key, s in self._sales.items() if s.over), None)
            if oldest is None:
                break
            forgotten = self._sales.pop(oldest)
            self._by_fill = {k: s for k, s in self._by_fill.items() if s is not forgotten}
        return sale

    async def _find(self, wire: bytes) -> Sale | None:
        record: Confirm | Receipt | Abandon
        match envelope_kind(wire):
            case Confirm.KIND:
                record = open_sealed(Confirm, wire, self.identity.network).record
            case Receipt.KIND:
                record = open_sealed(Receipt, wire, self.identity.network).record
            case _:
                record = open_sealed(Abandon, wire, self.identity.network).record
        sale = self._by_fill.get(record.fill)
        if sale is None:
            raise ProviderError("no such fill is known here")
        return sale

    async def _take_up(self, bid_id: bytes) -> None:
        try:
            await self._revive(bid_id)
        except StoreError as error:
            _log.error("sale %s cannot be taken up: %s", bid_id.hex()[:12], error)

    async def _revive(self, bid_id: bytes) -> Sale | None:
        """A sale that only the journal remembers."""
        head = self.journal.head(bid_id.hex())
        if head is None or head.side != PROVIDER:
            return None
        rows = self.journal.rows(head.job)
        bid = open_sealed(Bid, first_row(rows, SaleRow.BID), self.identity.network)
        account = first_row(rows, SaleRow.ACCOUNT)
        body, checked = _open_body(first_row(rows, SaleRow.BODY))
        if isinstance(checked, Refusal):
            raise StoreError(f"the journal's job is not valid: {checked.reason}")
        sale = self._remember(bid, account, body, checked, head)
        await sale.resume(rows)
        return sale

    def _owner(self, account: bytes) -> bytes:
        return b"" if account == self.identity.account.public_key else account


async def _open_offered(data: bytes) -> tuple[JobBody, CheckedJob | Refusal]:
    """As ``_open_body``, in a thread unless the hop would cost more than the work."""
    if len(data) <= SMALL_BODY_BYTES:
        return _open_body(data)
    return await trio.to_thread.run_sync(_open_body, data)


def _open_body(data: bytes) -> tuple[JobBody, CheckedJob | Refusal]:
    body = decode_body(data)
    return body, open_job(body)
