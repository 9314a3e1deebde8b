"""A lease of a session that is bought: bid, fill, confirm, the talk, and what is countersigned.

A receipt is countersigned if this end's table says the same of commands that the provider has
obeyed. The ledger has it, in the same commit as the journal, before it leaves; one that the
provider may not have heard becomes a letter (``letters.py``), so that nothing is lost or paid
twice, whichever node dies when.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio
from msgspec.structs import replace

from p2pflop.dht.database import Operation
from p2pflop.errors import P2PFlopError, ProtocolError, ProviderError, StoreError, first_error
from p2pflop.job.commands import AnyCommand, Close, Data, Failed, Hold, Ran
from p2pflop.job.session import OpenGraph
from p2pflop.keys import peer_id
from p2pflop.market.fills import check_fill, check_reject, make_confirm
from p2pflop.market.limits import AskLimits, exceeded
from p2pflop.market.receipts import countersign
from p2pflop.market.records import Bid, Fill, Receipt, Reject, Rejected
from p2pflop.market.sessions import (
    FIRST_HELD_SECONDS,
    check_session_receipt,
    full_nusd,
    mark_figures,
    worked_s,
)
from p2pflop.node import messages as m
from p2pflop.node.guard import survive
from p2pflop.node.journal import Head, JobRows, Letter
from p2pflop.node.letters import SESSION_PREFIX
from p2pflop.node.printable import printable
from p2pflop.node.session_lease import Answer, CommandFault, HandedOver, Outstanding, QuoteUsedUp
from p2pflop.node.session_messages import (
    SESSION_PROTOCOL,
    Leaving,
    Raise,
    Raised,
    SessionMessage,
    Stood,
    Wanted,
)
from p2pflop.node.session_state import SESSION_BUYER, LeaseState
from p2pflop.node.session_talk import SessionTalk
from p2pflop.units import NS_PER_S
from p2pflop.wire import Sealed

if TYPE_CHECKING:
    from p2pflop.node.session_service import SessionBuyer

FILL_S: Final = 5.0
LEAVE_S: Final = 20
"""So long before its deadline a lease is given back, while there is time to do so in order."""
RAISE_S: Final = 30.0
"""For a higher quote, which may come behind what the script has yet to read."""
CLOSE_S: Final = 10.0
"""For the closing receipt, once all is obeyed."""
LAST_WORD_S: Final = 1.0
STOOD_SLACK_S: Final = 1.0
"""Between the clocks of both ends, over the time that a lease can have stood."""
MAX_WAITING_RECEIPTS: Final = 4

More = Callable[[Bid], int]
"""What a lease on that bid may come to, once it has come to its quote; no more than it if that is
all."""

_log = logging.getLogger(__name__)

OnReceipt = Callable[[bytes, Receipt], Awaitable[None]]
"""Called with the provider's key and what was countersigned."""


async def _unheard(_provider: bytes, _receipt: Receipt) -> None:
    pass


@dataclass(slots=True)
class RemoteLease:
    """``session_lease.Lease`` at a provider. Made by ``open_lease``."""

    buyer: SessionBuyer
    account: bytes
    bid: Sealed[Bid]
    fill: Sealed[Fill]
    talk: SessionTalk
    outstanding: Outstanding
    more: More
    limits: AskLimits = ()
    closed: bool = False
    on_receipt: OnReceipt = _unheard
    _terms: Bid = field(init=False)
    _asked_nusd: int = field(init=False)
    _raised: trio.Event = field(default_factory=trio.Event)
    _rows: JobRows = field(init=False)
    _state: LeaseState = field(init=False)
    _receipts: trio.MemorySendChannel[bytes] = field(init=False)
    _to_sign: trio.MemoryReceiveChannel[bytes] = field(init=False)
    _last: Receipt | None = None
    _stood_seconds: int = 0
    _begun_at: float = field(default_factory=trio.current_time)
    _failure: P2PFlopError | None = None
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    _settled: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self._terms = self.bid.record
        self._asked_nusd = self._terms.quote_nusd
        self._state = LeaseState(self.account, self.bid.wire, self.fill.wire)
        name = SESSION_PREFIX + self.bid.id.hex()
        now_ns = self.buyer.base.now_ns
        head = Head(name, SESSION_BUYER, now_ns(), "", self._state.encode())
        self._rows = JobRows(self.buyer.journal, head, now_ns)
        self._receipts, self._to_sign = trio.open_memory_channel[bytes](MAX_WAITING_RECEIPTS)

    @property
    def peer(self) -> str:
        """The provider's node."""
        return peer_id(self.bid.record.provider)

    @property
    def owed_nusd(self) -> int:
        """See Lease."""
        return 0 if self._last is None else self._last.amount_nusd

    @property
    def is_due(self) -> bool:
        """See Lease."""
        deadline_ns = self.bid.record.terms.deadline_ns
        return self.buyer.base.now_ns() + LEAVE_S * NS_PER_S >= deadline_ns

    async def obey(
        self, command: AnyCommand, graph: OpenGraph | None = None, answer: Answer | None = None
    ) -> None:
        """See Lease."""
        table = self.outstanding.table
        mark = table.foresee(command, graph)
        if self.limits and exceeded(self.limits, mark_figures(mark)) is not None:
            raise QuoteUsedUp(mark.since(table.mark()))
        due_nusd = full_nusd(self._terms, mark)
        while due_nusd > self._terms.quote_nusd:
            if not await self._raise():
                raise QuoteUsedUp(mark.since(table.mark()))
        self.outstanding.add(command, graph, answer)

    async def _raise(self) -> bool:
        """Have a higher quote; whether there is one."""
        before_nusd, quote_nusd = self._terms.quote_nusd, self.more(self._terms)
        if quote_nusd > before_nusd:
            self._raised, self._asked_nusd = trio.Event(), quote_nusd
            await self.talk.say(Raise(quote_nusd))
            with trio.move_on_after(RAISE_S) as waiting:
                await self._raised.wait()
            if waiting.cancelled_caught:
                raise ProviderError(f"{self.peer} said nothing of a quote in {RAISE_S:.0f} s")
        return self._terms.quote_nusd > before_nusd

    def _agree(self, quote_nusd: int) -> None:
        if quote_nusd not in (self._terms.quote_nusd, self._asked_nusd):
            raise ProtocolError(f"nobody asked for a quote of {quote_nusd}", peer=self.peer)
        self._terms = replace(self._terms, quote_nusd=quote_nusd)
        self._asked_nusd = quote_nusd
        self._raised.set()

    async def hold(self) -> None:
        """See Lease."""
        seconds = self._stood_seconds - self.outstanding.table.held_seconds
        if seconds > 0:
            await self.obey(Hold(seconds))

    async def flush(self, upto: int) -> None:
        """See Lease."""
        with suppress(QuoteUsedUp):
            await self.hold()
        batch = await self.outstanding.next_batch(upto)
        if batch is None:
            return
        try:
            await self.talk.say(batch)
        except ProviderError:
            await trio.sleep(LAST_WORD_S)  # why it broke may still be on its way here
            raise

    async def close(self) -> None:
        """See Lease."""
        await self.outstanding.wait_obeyed()
        await self.talk.say(Close())
        with trio.move_on_after(CLOSE_S):
            await self._settled.wait()
        self.closed = True

    @asynccontextmanager
    async def live(self) -> AsyncIterator[None]:
        """The lease, while it is used. Raises what ended it."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._run)
                    yield
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                letter = await self._end()
            # A node that stops brings its letters when it is back.
            if letter is not None and trio.current_effective_deadline() > -math.inf:
                base = self.buyer.base
                base.nursery.start_soon(survive, base.letters.deliver, letter)
        if self._failure is not None and not self.closed:
            raise self._failure

    async def _run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.talk.run, self._hear)
                nursery.start_soon(self._sign_all)
                nursery.start_soon(self._watch)
        except* P2PFlopError as group:
            self._failure = self._failure or first_error(group)
            self._scope.cancel()

    async def _watch(self) -> None:
        while True:
            await trio.sleep(1)
            if self.outstanding.stalled:
                raise ProviderError(f"{self.peer} obeys nothing")

    async def _hear(self, message: SessionMessage) -> None:
        match message:
            case Ran() | Data():
                await self.outstanding.take(message)
            case Stood(seconds):
                self._stand(seconds)
            case Raised(quote_nusd):
                self._agree(quote_nusd)
            case m.Receipted(wire):
                try:
                    self._receipts.send_nowait(wire)
                except trio.WouldBlock:
                    raise ProtocolError("receipts faster than they are signed") from None
            case Leaving(reason):
                raise HandedOver(printable(reason))
            case Failed(number, _, text, hint):
                raise CommandFault(number, printable(text), printable(hint))
            case m.Settled():
                self._settled.set()
            case _:
                raise ProtocolError("a provider does not send that", peer=self.peer)

    def _stand(self, seconds: int) -> None:
        """The provider had nothing to do for so long, if that can be. Raises ProtocolError."""
        busy_s = self.outstanding.busy_ns / NS_PER_S
        paid_s = min(busy_s, worked_s(self._terms, self.outstanding.obeyed))
        idle_s = trio.current_time() - self._begun_at - paid_s
        if FIRST_HELD_SECONDS + seconds > idle_s + STOOD_SLACK_S:
            raise ProtocolError(f"the lease cannot have stood for {seconds} s", peer=self.peer)
        self._stood_seconds = max(seconds, self._stood_seconds)
        self.outstanding.on_stood()

    async def _sign_all(self) -> None:
        async for wire in self._to_sign:
            await self._sign(wire)

    async def _sign(self, wire: bytes) -> None:
        base, network = self.buyer.base, self.buyer.base.identity.network
        marks = self.outstanding.marks
        receipt = check_session_receipt(wire, self.fill, self._terms, self._last, marks, network)
        if isinstance(receipt, Rejected):
            raise ProtocolError(receipt.reason, peer=self.peer)
        signed = countersign(base.identity.node, receipt, network)
        state = self._state.signed(signed.wire)
        self._rows.set_head(summary=state.encode())

        async def write(entry: Operation | None) -> None:
            await self._rows.flush(None, entry)

        node = self.bid.record.provider
        now_ns = base.now_ns()
        await base.ledger_book.delivered(signed.record, self.account, now_ns, write, node=node)
        self._state, self._last = state, signed.record
        await self.on_receipt(node, signed.record)
        for count in [count for count in marks if count < signed.record.to_step]:
            del marks[count]
        await self.talk.say(m.Countersigned(signed.wire))

    async def _end(self) -> Letter | None:
        """Tell the journal that it is over; the letter for what is signed and may not have come."""
        await self.talk.aclose()
        if not self._state.countersigned:
            return None
        letter = None
        if not self._settled.is_set():
            letter = self._rows.add_letter(self.peer, self._state.countersigned)
        end_state = "settled" if self._settled.is_set() else "failed"
        self._rows.set_head(summary=self._state.encode(), end_state=end_state)
        try:
            await self._rows.flush()
        except StoreError as error:
            _log.error("the end of a lease is not on disk: %s", error)
        return letter


async def open_lease(
    buyer: SessionBuyer,
    bid: Sealed[Bid],
    account: bytes,
    outstanding: Outstanding,
    more: More,
    limits: AskLimits = (),
) -> RemoteLease | Sealed[Reject]:
    """Offer a bid; the lease, or why there is none. ``account`` is whose ask it is on, ``limits``
    are those of the ask, ``more`` tells how far its quote is to be raised once it is used up.

    Raises ProviderError, ProtocolError.
    """
    base, peer = buyer.base, peer_id(bid.record.provider)
    network = base.identity.network
    talk: SessionTalk | None = None
    lease: RemoteLease | None = None
    try:
        with trio.fail_after(FILL_S):
            talk = SessionTalk(await base.dialer.open(peer, SESSION_PROTOCOL))
            await talk.say(Wanted(bid.wire))
            said = await talk.hear()
            match said:
                case m.Filled(wire):
                    fill = check_fill(wire, bid, account, base.now_ns(), network)
                    if isinstance(fill, Rejected):
                        raise ProtocolError(fill.reason, peer=peer)
                    confirm = make_confirm(base.identity.node, fill, network)
                    await talk.say(m.Confirmed(confirm.wire, ()))
                    lease = RemoteLease(buyer, account, bid, fill, talk, outstanding, more, limits)
                    return lease
                case m.Refused(wire):
                    reject = check_reject(wire, bid, network)
                    if isinstance(reject, Rejected):
                        raise ProtocolError(reject.reason, peer=peer)
                    base.sheets.learn(
                        reject.record.sheet, bid.record.provider, bid.record.sheet_number
                    )
                    return reject
                case _:
                    raise ProtocolError("a bid is answered by a fill or a reject", peer=peer)
    except trio.TooSlowError as error:
        raise ProviderError(f"{peer} did not answer a bid in {FILL_S:.0f} s") from error
    finally:
        if talk is not None and lease is None:
            await talk.aclose()
