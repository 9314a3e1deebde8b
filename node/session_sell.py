"""The selling side of sessions: bids on session streams, and all leases of sessions under way.

Slots, memory, credit and disk are those of the allocator, which gives them to jobs too. A lease
lives as long as its stream: what a restart finds of one is closed, and stays for the buyer that
brings a countersignature late.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from p2pflop.dht.database import Operation
from p2pflop.dht.planes import Stream
from p2pflop.errors import ProtocolError, ProviderError, VerificationError
from p2pflop.job.meter import METER_ID
from p2pflop.keys import peer_id
from p2pflop.market.fills import OpenBid, make_reject
from p2pflop.market.receipts import check_countersigned
from p2pflop.market.records import Bid, Receipt, Rejected
from p2pflop.market.sessions import check_session_bid
from p2pflop.node import messages as m
from p2pflop.node.execute import WORKER_BASE_BYTES
from p2pflop.node.guard import survive
from p2pflop.node.handing_over import HAND_OVER_S, SHUTTING_DOWN
from p2pflop.node.journal import JobRows, Unpaid
from p2pflop.node.service import Json
from p2pflop.node.session_graphs import Graphs
from p2pflop.node.session_messages import Wanted
from p2pflop.node.session_sale import SessionSale
from p2pflop.node.session_state import SESSION_PROVIDER, LeaseState, lease_state
from p2pflop.node.session_talk import SessionTalk
from p2pflop.wire import reopen

if TYPE_CHECKING:
    from p2pflop.node.sell import Seller

OFFER_S: Final = 10.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class SessionSeller:
    """Every session that runs here for others. ``base`` is what it shares with sales of jobs."""

    base: Seller
    graphs: Graphs
    _sales: dict[bytes, SessionSale] = field(default_factory=dict)

    async def handle(self, stream: Stream) -> None:
        """Answer one session stream. Raises ProtocolError, ProviderError for what the peer did."""
        talk = SessionTalk(stream)
        try:
            with trio.fail_after(OFFER_S):
                first = await talk.hear()
            match first:
                case Wanted(wire):
                    await self._offered(wire, talk)
                case m.Countersigned(wire):
                    await self._late(wire, talk)
                case _:
                    raise ProtocolError("a session stream begins with a bid", peer=stream.peer)
        except trio.TooSlowError as error:
            raise ProviderError(f"{stream.peer} offered nothing in {OFFER_S:.0f} s") from error
        except VerificationError as error:
            raise ProtocolError(error.message, peer=stream.peer) from error

    def cards(self) -> list[Json]:
        """Leases that are not over, oldest first. See ``NodeService.sales``."""
        return [sale.card() for sale in self._sales.values()]

    def resume(self) -> None:
        """Close what a restart found."""
        self.base.nursery.start_soon(survive, self._close_all)

    async def stop(self) -> None:
        """Give every lease back once its worker is done with what it is at."""
        sales = list(self._sales.values())
        for sale in sales:
            sale.leave(SHUTTING_DOWN)
        with trio.move_on_after(HAND_OVER_S):
            for sale in sales:
                await sale.ended.wait()

    def release(self, sale: SessionSale) -> None:
        """Called by a lease that is over, once its worker is too."""
        base, bid = self.base, sale.bid
        base.allocator.close(sale)
        base.blobs.let_go(bid.id)
        self._sales.pop(bid.id, None)
        if sale.signed_nusd:
            base.tape.settled(
                fill_id=sale.fill.id,
                class_id=bid.record.class_id,
                price_nusd=sale.opened.ask.price_nusd,
                flop=sale.work.done.flop,
                buyer=sale.account,
            )

    async def book(self, rows: JobRows, state: LeaseState, wire: bytes) -> LeaseState:
        """Have what a buyer countersigned in the ledger and the journal, in one commit; the state
        with it. ``state`` is that before. Raises ProtocolError, StoreError."""
        base, network = self.base, self.base.identity.network
        after = state.signed(wire)
        rows.set_head(summary=after.encode())

        async def write(entry: Operation | None) -> None:
            await rows.flush(None, entry)

        receipt = reopen(Receipt, wire, network).record
        node = state.open_bid(network).signer
        await base.ledger_book.earned(receipt, state.account, base.now_ns(), write, node=node)
        return after

    async def _offered(self, wire: bytes, talk: SessionTalk) -> None:
        base = self.base
        bid = reopen(Bid, wire, base.identity.network)
        if peer_id(bid.signer) != talk.peer:
            raise ProtocolError("a bid that another peer signed", peer=talk.peer)
        decided = self._decide(wire)
        if isinstance(decided, SessionSale):
            await decided.serve(talk)
            return
        node, network = base.identity.node, base.identity.network
        reject = make_reject(node, bid.id, decided.reason, base.sheets.newest_wire, network)
        _log.info("session %s refused: %s", bid.id.hex()[:12], decided.reason)
        await talk.say(m.Refused(reject.wire))
        await talk.part()

    def _decide(self, wire: bytes) -> SessionSale | Rejected:
        """Without a pause, so that a slot is given once."""
        base = self.base
        opened = check_session_bid(
            wire,
            node=base.identity.node.public_key,
            sheets=base.sheets.honoured(),
            meter_id=METER_ID,
            now_ns=base.now_ns(),
            network=base.identity.network,
        )
        if isinstance(opened, Rejected):
            return opened
        reason = self._objection(opened)
        if reason:
            return Rejected(reason)
        sale = self._sales[opened.sealed.id] = SessionSale(self, opened)
        base.allocator.take(sale)
        if opened.quote_id:
            base.quoting.fill(opened.quote_id)
        return sale

    def _objection(self, opened: OpenBid) -> str:
        base = self.base
        if base.stopping:
            return SHUTTING_DOWN
        if base.journal.head(opened.sealed.id.hex()) is not None:
            return "the bid was filled before"
        if opened.sealed.id in self._sales or base.quoting.is_filled(opened.quote_id):
            return "the bid is filled already"
        if opened.bid.terms.memory_bytes < WORKER_BASE_BYTES:
            return f"a session needs {WORKER_BASE_BYTES} bytes of memory and more"
        return base.allocator.objection(opened, base.now_ns())

    async def _late(self, wire: bytes, talk: SessionTalk) -> None:
        """What a buyer countersigned for a lease whose stream broke."""
        base, network = self.base, self.base.identity.network
        fill = reopen(Receipt, wire, network).record.fill
        for sale in self._sales.values():
            if sale.fill_id == fill:
                await sale.ended.wait()  # its stream is dead, though this end may not know yet
                break
        name = base.journal.job_of_fill(fill)
        head = None if name is None else base.journal.head(name)
        if head is None or head.side != SESSION_PROVIDER:
            raise ProviderError("no such fill is known here")
        state = lease_state(head.summary)
        if state.countersigned != wire:
            issued = state.open_receipt(network)
            if issued is None:
                raise ProtocolError("there is no receipt to countersign", peer=talk.peer)
            signer = state.open_bid(network).signer
            signed = check_countersigned(wire, issued, signer, network)
            if isinstance(signed, Rejected):
                raise ProtocolError(signed.reason, peer=talk.peer)
            rows, before = JobRows(base.journal, head, base.now_ns), state.signed_receipt(network)
            before_nusd = 0 if before is None else before.amount_nusd
            base.forgive(rows, signed.record.amount_nusd - before_nusd)
            await self.book(rows, state, wire)
        await talk.say(m.Settled())
        await talk.part()

    async def _close_all(self) -> None:
        base, network = self.base, self.base.identity.network
        for head in base.journal.unfinished(SESSION_PROVIDER):
            if bytes.fromhex(head.job) in self._sales:
                continue
            state = lease_state(head.summary)
            issued, signed = state.open_receipt(network), state.signed_receipt(network)
            billed_nusd = 0 if issued is None else issued.amount_nusd
            signed_nusd = 0 if signed is None else signed.amount_nusd
            rows = JobRows(base.journal, head, base.now_ns)
            unpaid = Unpaid(state.account, base.now_ns(), billed_nusd - signed_nusd)
            if base.allocator.note_unpaid(unpaid):
                rows.add_unpaid(unpaid)
            rows.set_head(summary=head.summary, end_state="failed")
            await rows.flush()
