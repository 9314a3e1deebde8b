"""One sale: the provider's lifecycle joined to a worker, the store, the ledger and a stream.

A buyer may lose its stream and come back with another; what was said meanwhile is said again by the
lifecycle. The worker goes on without it, as long as the lifecycle lets it.

A buyer cannot reach an embedded node, unless that has dialled it. So there the clock of a sale from
before a crash stands still: what was delivered waits for its countersignature, and the bound on
that wait begins anew where the home sells again.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import trio

from p2pflop.dht.database import Operation
from p2pflop.errors import (
    P2PFlopError,
    ProtocolError,
    StoreError,
    first_error,
)
from p2pflop.job.events import (
    Alive,
    Blame,
    Checkpointed,
    Event,
    Finish,
    Lost,
    Received,
    Reveal,
    Send,
    State,
)
from p2pflop.job.file import CheckedJob, JobBody
from p2pflop.job.lifecycle import Edge
from p2pflop.job.selling import provider as provider_lifecycle
from p2pflop.keys import peer_id
from p2pflop.market.desk import ProviderDesk
from p2pflop.market.fills import SALT_BYTES
from p2pflop.market.records import Bid, Receipt
from p2pflop.node import messages as m
from p2pflop.node.begun import Begun
from p2pflop.node.conversation import Conversation
from p2pflop.node.driver import Driver
from p2pflop.node.execute import (
    Outcome,
    inline_blobs,
)
from p2pflop.node.goods import check_inline
from p2pflop.node.journal import JobRows, Row, Unpaid
from p2pflop.node.labour import Labour
from p2pflop.node.outcomes import reason_told
from p2pflop.node.sale_rows import Delivery, SaleRow, named
from p2pflop.wire import Sealed, decode, encode, reopen

if TYPE_CHECKING:
    from p2pflop.node.sell import Seller

_log = logging.getLogger(__name__)


class Sale:
    """One bid and what becomes of it. The ``Hands`` of its driver."""

    def __init__(
        self,
        seller: Seller,
        bid: Sealed[Bid],
        account: bytes,
        body: JobBody,
        checked: CheckedJob,
        rows: JobRows,
    ) -> None:
        identity = seller.identity
        self.bid = bid
        self.account = account
        self.rows = rows
        self.body_bytes = 0
        self.fill_id = b""
        self.begun = Begun(bid.record, checked.work, bid.record.job.first_step)
        self._had_ended = bool(rows.head.end_state)
        self._was_taken_up = False
        self._seller = seller
        self._labour = Labour(self, seller, body, checked)
        self._conversation: Conversation | None = None
        self._checkpoints: dict[int, m.Checkpoint] = {}
        self._delivery: Delivery | None = None
        self._booked = b""
        self._tasks, self._due = trio.open_memory_channel[str](16)
        desk = ProviderDesk(
            identity.node,
            checked.work,
            delegation=identity.delegation(seller.now_ns()),
            sheet=lambda: seller.sheets.newest_wire,
            network=identity.network,
        )
        deadline_ns = bid.record.terms.deadline_ns
        self._lifecycle = provider_lifecycle(desk, bid.wire, deadline_ns)
        began_ns = seller.now_ns()
        is_served = seller.allocator.serves(account)
        clock = seller.now_ns if is_served else lambda: began_ns
        self.driver = Driver(self._lifecycle, rows, self, clock)

    @property
    def over(self) -> bool:
        """Whether the sale has ended."""
        return self.driver.over.is_set()

    @property
    def state(self) -> State:
        """Of its lifecycle."""
        return self._lifecycle.state

    @property
    def is_standing(self) -> bool:
        """Whether its worker waits for the buyer to countersign."""
        return self._labour.is_standing

    @property
    def shown_to(self) -> int:
        """The step before which the buyer was told all rows."""
        return self.begun.shown_to

    @property
    def quote_nusd(self) -> int:
        """See Claim."""
        return self.bid.record.quote_nusd

    @property
    def signed_nusd(self) -> int:
        """What the buyer has countersigned so far."""
        return self._amount_nusd(self._lifecycle.side.countersigned)

    async def live(self) -> None:
        """Run timers and tasks until the end. Never raises."""
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.driver.run_timers)
                nursery.start_soon(self._run_tasks)
                await self.driver.over.wait()
                nursery.cancel_scope.cancel()
        except* Exception as group:  # noqa: BLE001 - one sale's bug must not end the node
            failure = first_error(group)
            self._labour.log_fault(failure)
        finally:
            failure = self.driver.failure or failure
            if failure is not None:
                self._break_off(failure)
            self._seller.release(self)

    @property
    def attended(self) -> bool:
        """Whether its buyer has a stream to it."""
        return self._conversation is not None

    @property
    def waits_for(self) -> str:
        """What a node that is to stop waits for, in words: nothing once all is handed over."""
        state = self.state
        if self.over or self.driver.failure is not None:
            return ""
        if state is State.RUNNING:
            if self._labour.runs_on:
                return "the running step and its checkpoint"
            return "the buyer to verify the checkpoint" if self._lifecycle.side.unsigned else ""
        delivered = state in (State.COMMITTED, State.RECEIPTED)
        return "the buyer to verify the result" if delivered and self.attended else ""

    def leave(self) -> None:
        """Compute no further than the current step."""
        self._labour.leave()

    async def tell(self, event: Event) -> None:
        """Tell the lifecycle of something that happened here."""
        await self.driver.on(event)

    async def part(self) -> None:
        """Return once the buyer has heard the last word, or is gone."""
        if self._conversation is not None:
            await self._conversation.over.wait()

    async def resume(self, rows: list[Row]) -> None:
        """Take up what the journal remembers."""
        self._was_taken_up = True
        for row in rows:
            if row.kind == SaleRow.RESULT:
                self._delivery = msgspec.msgpack.decode(row.body, type=Delivery)
            elif row.kind == SaleRow.INTERVAL:
                checkpoint = decode(m.Checkpoint, row.body)
                self._checkpoints[checkpoint.step] = checkpoint
            elif row.kind == SaleRow.PRICE:
                self.begun.price_nusd = int.from_bytes(row.body, "big")
        await self.driver.resume(rows)
        if billed := self._lifecycle.side.receipt:
            self.begun.shown_to = self._reopened(billed).to_step
        self._bind()
        if self._delivery is not None and not self.over:
            await self.hold(named(self._delivery.result))
        for told in self._checkpoints.values():
            await self.hold(named(told.interval))

    async def attend(self, conversation: Conversation, first: m.Message) -> None:
        """Talk with the buyer over this stream, from now on the only one."""
        if conversation.peer != peer_id(self.bid.signer):
            raise ProtocolError("a sale to another peer", peer=conversation.peer)
        if self._conversation is not None:
            self._conversation.cut("the buyer came back over another stream")
        self._conversation = conversation

        async def on_message(message: m.Message) -> None:
            if self._conversation is conversation:
                await self._hear(message)

        why = "this node failed"
        failure: P2PFlopError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._begin, first)
                why = await conversation.run(on_message)
                nursery.cancel_scope.cancel()
        except* P2PFlopError as group:
            failure = first_error(group)
            why = failure.message
        if self._conversation is conversation:
            self._conversation = None
            if not self.over:
                await self.driver.hear(Lost(why))
        if failure is not None:
            raise failure

    async def _begin(self, first: m.Message) -> None:
        if self.driver.failure is not None:
            self._break_off(self.driver.failure)
            return
        if isinstance(first, m.Offer):
            await self._told(Received(self.bid.wire))
        else:
            await self._hear(first)
        if self.over:
            self._finish_talk()

    async def _hear(self, message: m.Message) -> None:
        match message:
            case m.Confirmed(wire, blobs):
                check_inline(
                    "the confirm", blobs, {source.address for source in self._labour.inputs()}
                )
                self._labour.at_hand |= dict(blobs)
                await self._told(Received(wire))
            case m.Abandoned(wire):
                await self._told(Received(wire))
            case m.Countersigned(wire):
                await self._told(Received(wire))
                # What ends it while this is booked tells so itself.
                ended = self._lifecycle.ended
                if self._lifecycle.side.countersigned == wire:
                    if self._labour.window is not None:
                        self._labour.window.note_signed(self.signed_nusd)
                    await self.write()
                    await self._forget_checkpoints(wire)
                if ended:
                    if self._lifecycle.side.countersigned == wire:
                        self._say(m.Settled())
                    self._finish_talk()
            case m.Heartbeat():
                await self._told(Alive())
            case _:
                self._cut("a buyer does not send that")

    def _break_off(self, failure: Exception) -> None:
        """Give the lease back without a journal; after a restart it is given back once more."""
        side = self._lifecycle.side
        if side.confirm:
            reason = reason_told(failure)
            wire = side.desk.abandon(self.bid.wire, side.fill, side.countersigned, reason)
            self._say(m.Abandoned(wire))
        self._finish_talk()

    async def _told(self, event: Event) -> None:
        why = await self.driver.hear(event)
        if why:
            self._cut(why)

    def _cut(self, why: str) -> None:
        if self._conversation is not None:
            self._conversation.cut(why, at_fault=True)

    # The driver's hands

    async def write(self) -> None:
        """See Hands. What the buyer has countersigned is booked in the same commit."""
        countersigned = self._lifecycle.side.countersigned
        if not countersigned or countersigned == self._booked:
            await self.rows.flush()
            return
        seller = self._seller
        receipt = reopen(Receipt, countersigned, seller.identity.network).record

        async def write(entry: Operation | None) -> None:
            await self.rows.flush(None, entry)

        node = self.bid.signer
        await seller.ledger_book.earned(receipt, self.account, seller.now_ns(), write, node=node)
        self._booked = countersigned

    async def send(self, action: Send) -> None:
        """See Hands."""
        wire = action.wire
        match action.kind:
            case "fill":
                self._say(m.Filled(wire))
                if self._labour.is_light:
                    self._tasks.send_nowait("prepare")
            case "reject":
                self._say(m.Refused(wire))
                self._finish_talk()
            case "commit":
                self._labour.note_kept()
                self._say(m.Committed(wire))
            case "receipt":
                self._labour.note_kept()
                await self._send_receipt(wire, action.salt)
            case "abandon":
                self._say(m.Abandoned(wire))
                self._finish_talk()
            case _:
                raise AssertionError(f"a provider does not send a {action.kind}")

    def keep(self, edge: str) -> None:
        """See Hands. A buyer who comes back with the fill must find the sale."""
        if edge == Edge.GRANT:
            self._bind()
        elif edge == Edge.COUNTERSIGN and self._lifecycle.ended:
            booked_nusd = self._amount_nusd(self._booked)
            self._seller.forgive(self.rows, self.signed_nusd - booked_nusd)

    def start(self, task: str) -> None:
        """See Hands."""
        if task == "run":
            self.begun.start(trio.current_time())
            self._labour.let_run()
            return
        if task == "prepare":
            self._say(m.Heartbeat())
            self._labour.note_confirm()
        self._tasks.send_nowait(task)

    def stop(self) -> None:
        """See Hands."""
        self._labour.stop()

    async def finish(self, action: Finish) -> None:
        """See Hands."""
        side = self._lifecycle.side
        if not self.over and not self._had_ended:
            allocator, at_ns = self._seller.allocator, self._seller.now_ns()
            allocator.note_speed(self.begun.flop_per_s())
            unpaid = Unpaid(self.account, at_ns, self._worked_nusd(action.blame) - self.signed_nusd)
            if allocator.note_unpaid(unpaid):
                self.rows.add_unpaid(unpaid)
            is_lapse = side.fill and not side.confirm and action.blame is Blame.BUYER
            if is_lapse and not self._was_taken_up:  # else its confirm may have found nobody here
                allocator.note_lapse(self, at_ns)
        self.rows.set_head(summary=action.reason.encode(), end_state=action.state)
        # Nobody can ask for these any more; of what was never confirmed, not even for the job.
        kinds = [SaleRow.RESULT, SaleRow.INTERVAL, *([] if side.confirm else [SaleRow.BODY])]
        self.rows.forget(*kinds)
        await self.write()
        if action.state is State.SETTLED and not self._had_ended:
            self._seller.allocator.note_settled(self.account)
            self._seller.tell_trade(self)
        if not self.over and action.state is not State.SETTLED:
            self._finish_talk()  # what is signed is acknowledged first
        why = f": {action.reason}" if action.reason else ""
        _log.info("sale %s: %s%s", self.rows.head.job[:12], action.state, why)

    async def _run_tasks(self) -> None:
        async for task in self._due:
            if task == "prepare":
                await self._labour.do()
            elif task == "reveal" and self._lifecycle.state is State.COMMITTED:
                await self.driver.on(Reveal())  # a restart found the commit without its receipt

    @property
    def unsigned(self) -> int:
        """How many receipts the buyer has not countersigned yet."""
        return len(self._lifecycle.side.unsigned)

    def keep_result(self, outcome: Outcome) -> bytes:
        """Have the last delivery journalled with the next flush; the salt of its commit."""
        self._delivery = Delivery(encode(outcome.result), inline_blobs(outcome.kept))
        self.rows.add(SaleRow.RESULT, msgspec.msgpack.encode(self._delivery))
        return secrets.token_bytes(SALT_BYTES)

    async def keep_checkpoint(self, outcome: Outcome) -> None:
        """Tell the lifecycle of one, and have it journalled."""
        step, interval = outcome.done_to, encode(outcome.result)
        checkpoint = m.Checkpoint(step, interval, inline_blobs(outcome.kept))
        self._checkpoints[step] = checkpoint
        self.rows.add(SaleRow.INTERVAL, encode(checkpoint))
        await self.driver.on(Checkpointed(step, outcome.result.state_root))

    async def _forget_checkpoints(self, countersigned: bytes) -> None:
        """The buyer has all up to here: what only these needed makes room."""
        receipt = self._reopened(countersigned)
        kept = self._checkpoints.items()
        past = [told for step, told in kept if step <= receipt.to_step]
        self._checkpoints = {step: told for step, told in kept if step > receipt.to_step}
        needed = {source.address for source in self._labour.inputs()}
        needed |= {
            address for told in self._checkpoints.values() for address in named(told.interval)
        }
        of_past = {address for told in past for address in named(told.interval)}
        if self._delivery is None:  # else the result may name them too
            await self._seller.blobs.drop(self.bid.id, of_past - needed)

    @property
    def owner(self) -> bytes:
        """Whose the blobs of this sale are in the store; nothing for the node's own account."""
        own = self.account == self._seller.identity.account.public_key
        return b"" if own else self.account

    async def hold(self, addresses: Sequence[bytes]) -> None:
        """Keep these in the store for as long as the sale needs them."""
        await self._seller.blobs.hold(self.bid.id, addresses)

    # Talk

    async def _send_receipt(self, wire: bytes, salt: bytes) -> None:
        receipt = self._reopened(wire)
        if not salt:
            checkpoint = self._checkpoints.get(receipt.to_step)
            if checkpoint is not None:
                self._say(checkpoint)
            self._say(m.Receipted(wire))
            return
        if self._delivery is None:
            raise StoreError("the journal has no result for this sale")
        self._say(m.Delivered(wire, self._delivery.result, salt, self._delivery.blobs))

    def _worked_nusd(self, blame: Blame) -> int:
        """What was billed, or, if that is more and the buyer broke it off, what was begun."""
        billed_nusd = self._amount_nusd(self._lifecycle.side.receipt)
        if blame is Blame.PROVIDER or not self._lifecycle.side.confirm:
            return billed_nusd
        is_stepping = self._labour.may_run and self._delivery is None and not self.is_standing
        worked_nusd = self.begun.nusd(
            trio.current_time(),
            is_stepping=is_stepping,
            flop_per_s=self._seller.allocator.flop_per_s,
        )
        return max(billed_nusd, worked_nusd)

    def _amount_nusd(self, receipt: bytes) -> int:
        """What a receipt, or none, bills."""
        return self._reopened(receipt).amount_nusd if receipt else 0

    def _reopened(self, receipt: bytes) -> Receipt:
        return reopen(Receipt, receipt, self._seller.identity.network).record

    def _bind(self) -> None:
        fill = self._lifecycle.side.fill
        if fill:
            self.rows.add_fill(self._seller.bind_fill(fill, self))

    def _say(self, message: m.Message) -> None:
        if self._conversation is not None:
            self._conversation.tell(message)

    def offer(self, message: m.Message) -> None:
        """Tell the buyer, if it listens, what it can do without."""
        if self._conversation is not None:
            self._conversation.offer(message)

    def _finish_talk(self) -> None:
        if self._conversation is not None:
            self._conversation.finish()
