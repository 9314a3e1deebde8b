"""The selling side: all sales under way, and who gets the next one.

``sale.py`` has one sale, ``allocator.py`` what is free. Here a bid is checked, weighed and granted
or refused. What is granted is in the journal before the buyer hears of it, and the same bid gets
the same fill, after a restart too. What is refused leaves nothing on disk, however many come; the
same bid gets the same refusal for as long as it is fresh.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import trio

from p2pflop.dht.blobs import Store
from p2pflop.dht.planes import Dialer, Stream
from p2pflop.dht.turns import Turn
from p2pflop.errors import (
    P2PFlopError,
    ProtocolError,
    ProviderError,
    VerificationError,
)
from p2pflop.job.events import Grant, State, Withdraw
from p2pflop.job.file import CheckedJob, JobBody
from p2pflop.keys import peer_id
from p2pflop.market.fills import OpenBid, check_bid, make_reject
from p2pflop.market.receipts import delivered_flop
from p2pflop.market.records import Abandon, Bid, Confirm, Fill, Receipt, Rejected
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS
from p2pflop.market.wishes import MAX_QUOTE_LIFETIME_NS
from p2pflop.node import messages as m
from p2pflop.node.allocator import SELLS_NOTHING, Allocator
from p2pflop.node.config import Settings
from p2pflop.node.conversation import Conversation
from p2pflop.node.guard import keep_going, survive
from p2pflop.node.handing_over import SHUTTING_DOWN, hand_over
from p2pflop.node.identity import Identity
from p2pflop.node.journal import PROVIDER, Head, JobRows, Journal
from p2pflop.node.lease_blobs import LeaseBlobs
from p2pflop.node.ledger_book import LedgerBook
from p2pflop.node.opening import Opener
from p2pflop.node.quoting import Quoting
from p2pflop.node.retelling import tell_again
from p2pflop.node.sale import Sale
from p2pflop.node.sale_rows import SaleRow, first_row
from p2pflop.node.service import Json
from p2pflop.node.sheets import SheetService
from p2pflop.node.tape import TapeService
from p2pflop.node.warm import WarmWorkers
from p2pflop.node.worker_types import Workers
from p2pflop.units import KIB
from p2pflop.wire import Sealed, envelope_kind, reopen

OFFER_S: Final = 10.0
MAX_REMEMBERED: Final = 256
MAX_REMEMBERED_BYTES: Final = 256 * KIB
"""Of the bodies of sales that are over; a body in memory is a hundred times its size."""

MAX_REFUSALS_REMEMBERED: Final = 1024

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Seller:
    """Everything that this node sells."""

    identity: Identity
    settings: Settings
    store: Store
    dialer: Dialer
    sheets: SheetService
    workers: Workers
    warm: WarmWorkers
    journal: Journal
    ledger_book: LedgerBook
    tape: TapeService
    nursery: trio.Nursery
    now_ns: Callable[[], int]
    started_ns: int = field(default_factory=time.monotonic_ns)
    stopping: bool = False
    allocator: Allocator = field(init=False)
    blobs: LeaseBlobs = field(init=False)
    opener: Opener = field(init=False)
    quoting: Quoting = field(init=False)
    _sales: dict[bytes, Sale] = field(default_factory=dict)
    _over: OrderedDict[bytes, Sale] = field(default_factory=OrderedDict)
    _over_bytes: int = 0
    _by_fill: dict[bytes, Sale] = field(default_factory=dict)
    _refusals: OrderedDict[bytes, bytes] = field(default_factory=OrderedDict)
    _reviving: Turn = field(default_factory=Turn)
    _deciding: Turn = field(default_factory=Turn)

    def __post_init__(self) -> None:
        own_account = self.identity.account.public_key
        self.allocator = Allocator(
            own_account,
            self.settings,
            self.workers,
            self.ledger_book,
            self.settings.resolved_disk_bytes(),
            subnet_of=self.sheets.relay.subnet,
        )
        for unpaid in self.journal.unpaid():
            self.allocator.note_unpaid(unpaid)
        self.blobs = LeaseBlobs(self.store, self.now_ns)
        self.opener = Opener(self.now_ns)
        self.quoting = Quoting(self)

    @property
    def busy(self) -> int:
        """Leases that hold capacity."""
        return self.allocator.busy

    async def handle(self, stream: Stream) -> None:
        """Answer one job stream. Raises ProtocolError, ProviderError for what the peer did."""
        try:
            with trio.fail_after(OFFER_S):
                first = m.decode_message(await stream.receive(), stream.peer)
            match first:
                case m.Offer():
                    sale = await self._offered(first, stream)
                case m.Confirmed(wire) | m.Countersigned(wire) | m.Abandoned(wire):
                    sale = await self._find(wire)
                case _:
                    raise ProtocolError("a job stream begins with an offer", peer=stream.peer)
        except trio.TooSlowError as error:
            raise ProviderError(f"{stream.peer} offered nothing in {OFFER_S:.0f} s") from error
        except VerificationError as error:
            raise ProtocolError(error.message, peer=stream.peer) from error
        if sale is not None:
            await sale.attend(Conversation(stream), first)

    def resume(self) -> None:
        """Bring every sale that a restart found unfinished to its end, and sweep old blobs; answer
        wishes; tell trades that were lost."""
        since_ns = self.now_ns() - MAX_QUOTE_LIFETIME_NS - CLOCK_TOLERANCE_NS
        granted = self.journal.bodies_since(SaleRow.BID, PROVIDER, since_ns)
        self.quoting.recall(reopen(Bid, wire, self.identity.network) for wire in granted)
        tell_again(self.journal, self.tape, self.identity.network, self.now_ns())
        self.nursery.start_soon(survive, self._take_all_up)
        self.nursery.start_soon(keep_going, self.quoting.run)

    def cards(self) -> list[Json]:
        """Sales that are not over, oldest first, as JSON. See ``NodeService.sales``."""
        return [
            {
                "id": bid_id.hex(),
                "account": sale.account.hex(),
                "state": sale.state.value,
                "paused": sale.is_standing,
                "step": sale.shown_to,
                "end_step": sale.bid.record.job.first_step + sale.bid.record.job.steps,
                "signed_nusd": sale.signed_nusd,
                "quote_nusd": sale.bid.record.quote_nusd,
            }
            for bid_id, sale in self._sales.items()
            if not sale.over
        ]

    async def stop(self) -> None:
        """Take no more bids; hand over what runs and give it back (``handing_over.py``)."""
        self.stopping = True
        sales = [sale for sale in self._sales.values() if not sale.over]
        async with trio.open_nursery() as nursery:
            for sale in sales:
                nursery.start_soon(hand_over, sale)

    def release(self, sale: Sale) -> None:
        """Called by a sale that has ended, once its worker has too."""
        self.allocator.close(sale)
        self.blobs.let_go(sale.bid.id)
        self._over[sale.bid.id] = sale
        self._over_bytes += sale.body_bytes
        self._forget()

    def forgive(self, rows: JobRows, paid_nusd: int) -> None:
        """Called when a buyer countersigns late: so much less of what a sale that is over showed
        counts against its credit, from the next flush on."""
        unpaid = self.journal.unpaid_of(rows.head.job)
        if unpaid is not None:
            left = replace(unpaid, amount_nusd=max(0, unpaid.amount_nusd - paid_nusd))
            self.allocator.replace_unpaid(unpaid, left)
            rows.add_unpaid(left)

    def tell_trade(self, sale: Sale) -> None:
        """Called by a sale that has settled."""
        if sale.begun.price_nusd is None:
            return  # it was granted by a version that had no tape
        bid = sale.bid.record
        self.tape.settled(
            fill_id=sale.fill_id,
            class_id=bid.class_id,
            price_nusd=sale.begun.price_nusd,
            flop=delivered_flop(bid, sale.signed_nusd),
            buyer=sale.account,
        )

    async def shows(self, address: bytes, reader: bytes) -> bool:
        """Whether a blob is for the buyer whose node is ``reader``: its account's, and of a lease.

        A lease holds whatever its job names as an input. To name a blob of another's, of which one
        knows the address alone, gives nobody a right to it.
        """
        accounts = {
            sale.account
            for bid_id, sale in self._sales.items()
            if sale.bid.signer == reader and self.blobs.holds(bid_id, address)
        }
        for account in accounts:
            is_own = account == self.identity.account.public_key
            if is_own or await self.store.may_read(address, account):
                return True
        return False

    def bind_fill(self, fill: bytes, sale: Sale) -> bytes:
        """Called by a sale that has a fill, so that a buyer who comes back finds it; its id."""
        sale.fill_id = reopen(Fill, fill, self.identity.network).id
        self._by_fill[sale.fill_id] = sale
        return sale.fill_id

    # Bids

    async def _offered(self, offer: m.Offer, stream: Stream) -> Sale | None:
        bid = reopen(Bid, offer.bid, self.identity.network)
        if peer_id(bid.signer) != stream.peer:
            raise ProtocolError("a bid that another peer signed", peer=stream.peer)
        known = self._sales.get(bid.id) or await self._revive(bid.id)
        if known is not None:
            return known
        refusal = self._refusals.get(bid.id)
        if refusal is None:
            decision = await self._decide(offer)
            if isinstance(decision, Sale):
                return decision
            refusal = self._refuse(bid.id, decision.reason)
        await stream.send(m.encode_message(m.Refused(refusal)))
        return None

    async def _decide(self, offer: m.Offer) -> Sale | Rejected:
        """What costs little is checked first: most refusals need no look at the job."""
        bid = check_bid(
            offer.bid,
            node=self.identity.node.public_key,
            sheets=self.sheets.honoured(),
            now_ns=self.now_ns(),
            network=self.identity.network,
        )
        if isinstance(bid, Rejected):
            return bid
        reason = self._objection(bid)
        if reason:
            return Rejected(reason)
        opened = await self.opener.open(bid.bid, offer.body, bid.peer)
        if isinstance(opened, Rejected):
            return opened
        body, checked = opened
        reason = self.allocator.objection_to_job(bid.bid, checked)
        if reason:
            self.opener.penalise(bid.peer)
            return Rejected(reason)
        async with self._deciding:
            # Others may have come first meanwhile, and this very bid over another stream.
            known = self._sales.get(bid.sealed.id)
            if known is not None:
                return known
            reason = self._objection(bid)
            return Rejected(reason) if reason else await self._grant(bid, body, checked, offer.body)

    def _objection(self, bid: OpenBid) -> str:
        if self.stopping:
            return SHUTTING_DOWN
        if self.quoting.is_filled(bid.quote_id):
            return "the quote is filled already"
        return self.allocator.objection(bid, self.now_ns())

    async def _grant(
        self, bid: OpenBid, body: JobBody, checked: CheckedJob, encoded: bytes
    ) -> Sale:
        head = Head(bid.sealed.id.hex(), PROVIDER, self.now_ns(), "", b"")
        sale = self._remember(bid.sealed, bid.account, body, checked, head)
        sale.body_bytes = len(encoded)
        self.allocator.take(sale)
        if bid.quote_id:
            self.quoting.fill(bid.quote_id)
        await self._hold_inputs(sale, checked)
        sale.rows.add(SaleRow.BID, bid.sealed.wire)
        sale.rows.add(SaleRow.ACCOUNT, bid.account)
        sale.rows.add(SaleRow.BODY, encoded)
        sale.begun.price_nusd = bid.ask.price_nusd
        self.allocator.note_speed(bid.ask.flop_per_s)
        sale.rows.add(SaleRow.PRICE, bid.ask.price_nusd.to_bytes(8, "big"))
        await sale.driver.start()
        await sale.tell(Grant())
        return sale

    def _refuse(self, bid_id: bytes, reason: str) -> bytes:
        identity, newest = self.identity, self.sheets.newest_wire
        reject = make_reject(identity.node, bid_id, reason, newest, identity.network)
        _log.info("bid %s refused: %s", bid_id.hex()[:12], reason)
        self._refusals[bid_id] = reject.wire
        if len(self._refusals) > MAX_REFUSALS_REMEMBERED:
            self._refusals.popitem(last=False)
        return reject.wire

    # Sales

    def _remember(
        self, bid: Sealed[Bid], account: bytes, body: JobBody, checked: CheckedJob, head: Head
    ) -> Sale:
        rows = JobRows(self.journal, head, self.now_ns)
        sale = self._sales[bid.id] = Sale(self, bid, account, body, checked, rows)
        self.nursery.start_soon(sale.live)
        self._forget()
        return sale

    def _forget(self) -> None:
        """Leave sales that are over to the journal, but for the latest and small ones."""
        while self._over and (
            len(self._sales) > MAX_REMEMBERED or self._over_bytes > MAX_REMEMBERED_BYTES
        ):
            bid_id, sale = self._over.popitem(last=False)
            self._over_bytes -= sale.body_bytes
            del self._sales[bid_id]
            self._by_fill.pop(sale.fill_id, None)

    async def _find(self, wire: bytes) -> Sale:
        record: Confirm | Receipt | Abandon
        match envelope_kind(wire):
            case Confirm.KIND:
                record = reopen(Confirm, wire, self.identity.network).record
            case Receipt.KIND:
                record = reopen(Receipt, wire, self.identity.network).record
            case _:
                record = reopen(Abandon, wire, self.identity.network).record
        sale = self._by_fill.get(record.fill)
        if sale is None:
            job = self.journal.job_of_fill(record.fill)
            bid_id = b"" if job is None else bytes.fromhex(job)
            sale = self._sales.get(bid_id) or await self._revive(bid_id)
        if sale is None:
            raise ProviderError("no such fill is known here")
        return sale

    async def _take_all_up(self) -> None:
        async with trio.open_nursery() as nursery:
            for head in self.journal.unfinished(PROVIDER):
                nursery.start_soon(self._take_up, bytes.fromhex(head.job))
        await keep_going(self.blobs.run)  # only now is everything held that is still needed

    async def _take_up(self, bid_id: bytes) -> None:
        try:
            if bid_id not in self._sales:  # else its buyer was faster
                await self._revive(bid_id)
        except Exception as error:  # noqa: BLE001 - see below
            # One damaged sale must not keep the node from starting, now or later.
            known = isinstance(error, P2PFlopError)
            exc_info = None if known else error
            _log.error("sale %s is given up: %s", bid_id.hex()[:12], error, exc_info=exc_info)
            await self._give_up(bid_id, str(error))

    async def _give_up(self, bid_id: bytes, reason: str) -> None:
        head = self.journal.head(bid_id.hex())
        if head is not None:
            rows = JobRows(self.journal, head, self.now_ns)
            rows.set_head(summary=reason.encode(), end_state=State.FAILED)
            await rows.flush()

    async def _revive(self, bid_id: bytes) -> Sale | None:
        """A sale that only the journal remembers; one at a time, since each costs a look at it."""
        async with self._reviving:
            known = self._sales.get(bid_id)
            return known if known is not None else await self._revive_alone(bid_id)

    async def _revive_alone(self, bid_id: bytes) -> Sale | None:
        head = self.journal.head(bid_id.hex())
        if head is None or head.side != PROVIDER:
            return None
        rows = self.journal.rows(head.job)
        if head.end_state and not any(row.kind == SaleRow.BODY for row in rows):
            raise ProviderError("that bid was granted, not confirmed, and is over")
        bid = reopen(Bid, first_row(rows, SaleRow.BID), self.identity.network)
        account = first_row(rows, SaleRow.ACCOUNT)
        encoded = first_row(rows, SaleRow.BODY)
        body, checked = await self.opener.reopen(encoded)
        sale = self._remember(bid, account, body, checked, head)
        sale.body_bytes = len(encoded)
        # Work that was under way died with the node: only what was not begun needs room.
        self.allocator.take(sale, capacity=False)
        await sale.resume(rows)
        if sale.state in (State.OFFERED, State.LEASED):
            if self.allocator.serves(account):
                self.allocator.take(sale)
            else:
                await sale.tell(Withdraw(SELLS_NOTHING))
        await self._hold_inputs(sale, checked)
        if sale.over:
            self.blobs.let_go(sale.bid.id)  # it may have been released before it held anything
        return sale

    async def _hold_inputs(self, sale: Sale, checked: CheckedJob) -> None:
        named = [source.address for _, source in checked.inputs]
        await self.blobs.hold(sale.bid.id, [*named, *checked.collections])
