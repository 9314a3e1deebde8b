"""One lease of a session, on the provider's side: fill, work, receipts, end.

The buyer says how the lease ends: with Close it has the minimum charge to pay. Whatever else
ends it (the deadline, silence, this node's user, a command that faults) leaves it at what was
metered. In each case what is obeyed is billed once more, and the buyer has ``SIGN_S`` to sign.

A slot is held for money: beyond the first seconds, which every lease pays for, the buyer is told
after each ``STOOD_S`` in which there was nothing to do, and has ``HOLD_WITHIN_S`` for the Hold that
pays for them.

What is read comes before its batch is billed, and a batch may take long. So a buyer that breaks off
in the middle, or has a command that faults, owes nothing for it, but it counts against its credit;
and one that takes a lease and has nothing obeyed waits a while for the next, as after a fill that
it does not confirm.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

import trio
from msgspec.structs import replace

from p2pflop.errors import (
    JobError,
    P2PFlopError,
    ProtocolError,
    ProviderError,
    StoreError,
    first_error,
)
from p2pflop.job.commands import Batch, Close, Data, Failed, Hold, Ran
from p2pflop.job.session import Mark, OpenGraph
from p2pflop.market.fills import OpenBid, check_confirm, make_fill
from p2pflop.market.limits import exceeded
from p2pflop.market.receipts import check_countersigned
from p2pflop.market.records import Bid, Fill, Receipt, Rejected
from p2pflop.market.sessions import (
    FIRST_HELD_SECONDS,
    due_receipt,
    full_nusd,
    mark_figures,
    metered_nusd,
    worked_s,
)
from p2pflop.node import messages as m
from p2pflop.node.execute import (
    HOUR_NS,
    MAX_STEP_SECONDS,
    WORKER_BASE_BYTES,
    WORKER_SLACK_BYTES,
)
from p2pflop.node.journal import Head, JobRows, Unpaid
from p2pflop.node.service import Json
from p2pflop.node.session_loads import LeaseLoads
from p2pflop.node.session_messages import Leaving, Raise, Raised, SessionMessage, Stood
from p2pflop.node.session_state import SESSION_PROVIDER, LeaseState
from p2pflop.node.session_talk import SessionTalk
from p2pflop.node.session_work import OWN_ACCOUNT, SessionWork
from p2pflop.node.worker_types import SessionWorker, WorkerLimits
from p2pflop.units import MAX_NUSD, NS_PER_S
from p2pflop.wire import Sealed, seal

if TYPE_CHECKING:
    from p2pflop.node.session_sell import SessionSeller

CONFIRM_S: Final = 2.0
GIVEN_BACK_S: Final = 3.0
"""A lease that is given back so soon costs its buyer no pause, whatever was obeyed."""
RECEIPT_S: Final = 5.0
SIGN_S: Final = 5.0
"""For the last receipt of a lease."""
SIGN_WITHIN_S: Final = 60.0
"""A buyer that lets the worker stand for so long with the window full loses the lease."""
IDLE_S: Final = 60.0
"""Without a command; a buyer gives its lease back long before."""
STOOD_S: Final = 5
HOLD_WITHIN_S: Final = 20.0
"""On a slow line a Hold may come behind what is large."""
FINISH_S: Final = 10.0
"""For what the worker has begun, when the lease ends by this side's will."""
LOOK_S: Final = 0.25
MAX_FAULT_CHARS: Final = 200
CLOSED: Final = "closed"
DISK_FAILED: Final = "the provider's disk failed"

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _End:
    """Why the lease is over, with the ``number`` of a command if that is to blame. ``ours``: this
    side wants or has to, whatever the buyer did."""

    reason: str
    number: int = -1
    closing: bool = False
    ours: bool = False


@dataclass(slots=True)
class SessionSale:
    """See the head of this module. A ``Claim`` of the allocator."""

    seller: SessionSeller
    opened: OpenBid
    is_standing: bool = False
    ended: trio.Event = field(default_factory=trio.Event)
    fill: Sealed[Fill] = field(init=False)
    work: SessionWork = field(init=False)
    _state: LeaseState = field(init=False)
    _rows: JobRows = field(init=False)
    _talk: SessionTalk = field(init=False)
    _terms: Bid = field(init=False)
    _unsigned: Receipt | None = None
    _last: Receipt | None = None
    _signed_nusd: int = 0
    _unheld_seconds: int = 0
    _end: _End | None = None
    _working: trio.CancelScope = field(default_factory=trio.CancelScope)
    _news: trio.Event = field(default_factory=trio.Event)
    _heard_at: float = field(default_factory=trio.current_time)

    def __post_init__(self) -> None:
        base, bid = self.seller.base, self.bid
        self._terms = bid.record
        self._state = LeaseState(self.account, bid.wire)
        head = Head(bid.id.hex(), SESSION_PROVIDER, base.now_ns(), "", self._state.encode())
        self._rows = JobRows(base.journal, head, base.now_ns)
        loads = LeaseLoads(
            base.store,
            base.dialer,
            base.blobs,
            bid.id,
            self.opened.peer,
            b"" if self.is_own else self.account,
            bid.record.terms.moved_bytes,
        )
        memory_bytes = max(0, bid.record.terms.memory_bytes - WORKER_BASE_BYTES)
        self.work = SessionWork(
            base.workers,
            base.store,
            self._open_graph,
            loads,
            self._report,
            memory_bytes,
            OWN_ACCOUNT if self.is_own else self.account,
            refuses_dear=not self.is_own,
        )

    @property
    def bid(self) -> Sealed[Bid]:
        """See Claim."""
        return self.opened.sealed

    @property
    def account(self) -> bytes:
        """See Claim."""
        return self.opened.account

    @property
    def is_own(self) -> bool:
        """Whether this node's own account buys."""
        return self.account == self.seller.base.identity.account.public_key

    @property
    def quote_nusd(self) -> int:
        """See Claim."""
        return self._terms.quote_nusd

    @property
    def signed_nusd(self) -> int:
        """See Claim."""
        return self._signed_nusd

    @property
    def fill_id(self) -> bytes:
        """Empty before there is a fill."""
        return self.fill.id if self._state.fill else b""

    def card(self) -> Json:
        """As the cards of sales of jobs; steps are commands."""
        return {
            "id": self.bid.id.hex(),
            "account": self.account.hex(),
            "state": "session",
            "paused": self.is_standing,
            "step": self.work.done.count,
            "end_step": self.work.table.count,
            "signed_nusd": self.signed_nusd,
            "quote_nusd": self.quote_nusd,
        }

    def leave(self, reason: str) -> None:
        """End the lease after what the worker is at, by this side's own will."""
        self._finish(_End(reason, ours=True))

    async def serve(self, talk: SessionTalk) -> None:
        """From the fill to the end. Raises ProviderError, ProtocolError for what the peer did."""
        self._talk = talk
        confirmed, began = False, trio.current_time()
        try:
            confirmed = await self._is_confirmed()
            if confirmed:
                began = trio.current_time()
                await self._live()
        finally:
            if not confirmed or self._was_for_nothing(trio.current_time() - began):
                self.seller.base.allocator.note_lapse(self, self.seller.base.now_ns())
            with trio.CancelScope(shield=True):
                await self._close(confirmed=confirmed)
        await talk.part()

    def _was_for_nothing(self, lasted_s: float) -> bool:
        """Whether its buyer kept a place from others, and had nothing obeyed in it. A script that
        fails at its first line gives it back at once."""
        ours = self._end is not None and self._end.ours
        return not (self.work.done.count or ours or lasted_s < GIVEN_BACK_S)

    async def _is_confirmed(self) -> bool:
        base, network = self.seller.base, self.seller.base.identity.network
        now_ns = base.now_ns()
        self.fill = make_fill(
            base.identity.node,
            self.bid,
            now_ns=now_ns,
            delegation=base.identity.delegation(now_ns),
            network=network,
        )
        self._rows.add_fill(self.fill.id)
        await self._save(replace(self._state, fill=self.fill.wire))
        await self._talk.say(m.Filled(self.fill.wire))
        with trio.move_on_after(CONFIRM_S):
            message = await self._talk.hear()
            if not isinstance(message, m.Confirmed):
                raise ProtocolError("a fill is answered by a confirm", peer=self._talk.peer)
            confirm = check_confirm(message.confirm, self.bid, self.fill, network)
            if isinstance(confirm, Rejected):
                raise ProtocolError(confirm.reason, peer=self._talk.peer)
            return True
        return False

    async def _live(self) -> None:
        failure: Exception
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._talk.run, self._hear)
                nursery.start_soon(self._bill)
                nursery.start_soon(self._watch)
                nursery.start_soon(self._count_idle)
                await self._compute()
                await self._settle()
                nursery.cancel_scope.cancel()
        except* P2PFlopError as group:
            failure = first_error(group)
            self._finish(_End(failure.message, ours=isinstance(failure, StoreError)))
            if isinstance(failure, ProtocolError):
                raise failure from None

    # Work

    async def _compute(self) -> None:
        """Obey what comes until the end is known; the worker has ended then."""
        base = self.seller.base
        try:
            with self._working:
                async with base.workers.worker(self._limits()) as worker:
                    await self.work.run(cast(SessionWorker, worker), self._admit)
            self._finish(_End(CLOSED, closing=True))
        except* JobError as group:
            error = first_error(group)
            text = f"{error.message}. {error.hint}" if error.hint else error.message
            self._finish(_End(text, self.work.suspect))
        except* (ProviderError, StoreError) as group:
            failure = first_error(group)
            _log.error("session %s: %s", self.bid.id.hex()[:12], failure)
            is_disk = isinstance(failure, StoreError)
            self._finish(_End(DISK_FAILED if is_disk else failure.message, ours=True))
        base.allocator.free(self)

    def _limits(self) -> WorkerLimits:
        terms = self.bid.record.terms
        lease_ns = max(0, terms.deadline_ns - self.seller.base.now_ns())
        memory_bytes = max(0, terms.memory_bytes - WORKER_BASE_BYTES) + WORKER_SLACK_BYTES
        cpu_seconds = (lease_ns // HOUR_NS + 1) * HOUR_NS // NS_PER_S
        return WorkerLimits(memory_bytes, cpu_seconds, MAX_STEP_SECONDS)

    async def _open_graph(self, data: bytes) -> OpenGraph:
        graphs = self.seller.graphs
        return await graphs.open(data, graphs.user if self.is_own else graphs.strangers)

    async def _report(self, said: Ran | Data) -> None:
        await self._talk.say(said)
        if isinstance(said, Ran):
            self._wake()

    async def _admit(self) -> None:
        """Wait while as much as the window allows is obeyed and not countersigned."""
        limit_nusd = self.seller.base.allocator.window_nusd(self.account)
        if self._end is not None:
            await trio.sleep_forever()
        while limit_nusd is not None and self._unpaid_nusd(self.work.fed) > limit_nusd:
            self.is_standing = True
            news = self._news
            with trio.move_on_after(SIGN_WITHIN_S) as waiting:
                await news.wait()
            if waiting.cancelled_caught:
                self._finish(_End(f"nothing was countersigned for {SIGN_WITHIN_S:.0f} s"))
                await trio.sleep_forever()
        self.is_standing = False

    def _unpaid_nusd(self, mark: Mark) -> int:
        return metered_nusd(self._terms, mark) - self._signed_nusd

    async def _watch(self) -> None:
        """End the lease at its deadline, and when nothing comes."""
        base = self.seller.base
        while self._end is None:
            await trio.sleep(LOOK_S)
            idle = trio.current_time() - self._heard_at > IDLE_S
            if base.now_ns() >= self.bid.record.terms.deadline_ns:
                self._finish(_End("the lease has reached its deadline"))
            elif idle and self.work.done.count == self.work.table.count:
                self._finish(_End(f"nothing came for {IDLE_S:.0f} s"))
        with trio.move_on_after(FINISH_S):
            while self.work.done.count < self.work.fed.count:
                await self._news.wait()
        self._working.cancel()

    async def _count_idle(self) -> None:
        """Have the buyer pay for the time that the lease stands."""
        table = self.work.table
        while self._end is None:
            await trio.sleep(LOOK_S)
            seconds = int(self._stood_s()) - FIRST_HELD_SECONDS
            if seconds - table.held_seconds < STOOD_S:
                continue
            await self._talk.say(Stood(seconds))
            with trio.move_on_after(HOLD_WITHIN_S) as waiting:
                while table.held_seconds < seconds:
                    await self._news.wait()
            if waiting.cancelled_caught:
                self._unheld_seconds = seconds - table.held_seconds
                self._finish(_End(f"{seconds} s in which it stood are not paid"))

    def _stood_s(self) -> float:
        """How long there was nothing to do, or what was done counted next to nothing."""
        idle = self.work.idle
        return idle.idle_s + max(0.0, idle.busy_s - worked_s(self._terms, self.work.fed))

    def _finish(self, end: _End) -> None:
        if self._end is None:
            self._end = end
            self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    # Talk

    async def _hear(self, message: SessionMessage) -> None:
        match message:
            case Batch() if not self.work.is_finishing:
                if self._end is None:
                    await self._take(message)
            case Raise(quote_nusd):
                await self._raise(quote_nusd)
            case m.Countersigned(wire):
                await self.countersigned(wire)
            case Close() if not self.work.is_finishing:
                self.work.finish()
            case _:
                raise ProtocolError("a buyer does not send that", peer=self._talk.peer)

    async def _take(self, batch: Batch) -> None:
        holds = sum(isinstance(command, Hold) for command in batch.commands)
        if holds < len(batch.commands):
            self._heard_at = trio.current_time()
        try:
            await self.work.take(batch, self._allows)
        except JobError as error:
            self._finish(_End(error.message, self.work.table.count))
        if holds:
            self._wake()

    # Money

    async def _raise(self, quote_nusd: int) -> None:
        base, more_nusd = self.seller.base, quote_nusd - self.quote_nusd
        if more_nusd <= 0 or quote_nusd > MAX_NUSD:
            raise ProtocolError(f"a quote is not raised to {quote_nusd} nusd", peer=self._talk.peer)
        if not base.stopping:
            reason = base.allocator.objection_to_more(self.account, more_nusd, base.now_ns())
            if reason:
                _log.info("session %s stays at its quote: %s", self.bid.id.hex()[:12], reason)
            else:
                self._terms = replace(self._terms, quote_nusd=quote_nusd)
        await self._talk.say(Raised(self.quote_nusd))

    def _allows(self, mark: Mark) -> bool:
        """Whether a lease may come to that: by its quote, and by the limits of this node's ask."""
        limits = self.seller.base.settings.limits
        is_within = not limits or exceeded(limits, mark_figures(mark)) is None
        return is_within and full_nusd(self._terms, mark) <= self.quote_nusd

    async def countersigned(self, wire: bytes) -> None:
        """The buyer's word on the receipt that it was sent. Raises ProtocolError, StoreError."""
        if self._unsigned is None:
            raise ProtocolError("there is no receipt to countersign", peer=self.opened.peer)
        network = self.seller.base.identity.network
        signed = check_countersigned(wire, self._unsigned, self.bid.signer, network)
        if isinstance(signed, Rejected):
            raise ProtocolError(signed.reason, peer=self.opened.peer)
        self._state = await self.seller.book(self._rows, self._state, wire)
        self._unsigned, self._signed_nusd = None, signed.record.amount_nusd
        self._wake()

    async def _bill(self) -> None:
        """A receipt now and then, at half a window, and when the worker stands."""
        billed_at = trio.current_time()
        while True:
            news = self._news
            with trio.move_on_after(RECEIPT_S):
                await news.wait()
            limit_nusd = self.seller.base.allocator.window_nusd(self.account)
            unpaid_nusd = self._unpaid_nusd(self.work.done)
            presses = limit_nusd is not None and 2 * unpaid_nusd > limit_nusd
            late = trio.current_time() - billed_at >= RECEIPT_S
            if self._end is None and self._unsigned is None and (presses or late):
                await self._send_receipt(closing=False)
                billed_at = trio.current_time()

    async def _send_receipt(self, *, closing: bool) -> None:
        base, done = self.seller.base, self.work.done
        due = due_receipt(self.fill.id, self._terms, self._last, done, closing=closing)
        if due.amount_nusd == self._signed_nusd and not closing:
            return
        if due.from_step == due.to_step and not closing:
            return
        sealed = seal(due, base.identity.node, base.identity.network)
        self._unsigned = self._last = due
        await self._save(replace(self._state, receipt=sealed.wire))
        await self._talk.say(m.Receipted(sealed.wire))

    async def _settle(self) -> None:
        """The last receipt, its signature, and the last word."""
        end = self._end
        if end is None:
            raise RuntimeError("a lease ends for no reason")
        with trio.move_on_after(SIGN_S):
            await self._wait_signed()
            if self.work.done.count:
                await self._send_receipt(closing=end.closing)
            await self._wait_signed()
        if end.closing and self._unsigned is None:
            await self._talk.say(m.Settled())
        elif end.number >= 0:
            await self._talk.say(Failed(end.number, True, end.reason[:MAX_FAULT_CHARS], ""))
        else:
            await self._talk.say(Leaving(end.reason[:MAX_FAULT_CHARS]))

    def _shown(self) -> Mark:
        """What the buyer has had: the time for which there is no Hold too, and, unless the end was
        this side's doing or in order, what was begun."""
        end, mark = self._end, self.work.begun
        if end is not None and (end.closing or end.ours):
            mark = self.work.done
        return dataclasses.replace(mark, held_seconds=mark.held_seconds + self._unheld_seconds)

    async def _wait_signed(self) -> None:
        while self._unsigned is not None:
            await self._news.wait()

    async def _save(self, state: LeaseState, *, end_state: str = "") -> None:
        self._state = state
        self._rows.set_head(summary=state.encode(), end_state=end_state)
        await self._rows.flush()

    async def _close(self, *, confirmed: bool) -> None:
        base = self.seller.base
        base.allocator.free(self)
        shown = self._shown() if confirmed else Mark()
        shown_nusd = max(0, metered_nusd(self._terms, shown) - self._signed_nusd)
        unpaid = Unpaid(self.account, base.now_ns(), shown_nusd)
        if base.allocator.note_unpaid(unpaid):
            self._rows.add_unpaid(unpaid)
        end = self._end
        settled = end is not None and self._unsigned is None
        if settled and end is not None and end.closing and self._signed_nusd:
            base.allocator.note_settled(self.account)
        try:
            await self._save(self._state, end_state="settled" if settled else "failed")
        except StoreError as error:
            _log.error("session %s: %s", self.bid.id.hex()[:12], error)
        self.seller.release(self)
        reason = "" if end is None else end.reason
        _log.info("session %s is over: %s", self.bid.id.hex()[:12], reason)
        self.ended.set()
