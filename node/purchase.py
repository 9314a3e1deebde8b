"""One purchase: the buyer's lifecycle joined to a stream, the store, the ledger and a run's story.

The lifecycle decides what is signed and when (``p2pflop.job.buying``); here its actions become
frames, and what comes back becomes its events. A receipt is countersigned only when every blob that
it is about is here, verified and durable, and the ledger has the amount.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import trio

from p2pflop.errors import (
    P2PFlopError,
    ProtocolError,
    ProviderError,
    StoreError,
    first_error,
)
from p2pflop.job.buying import BUSY_PREFIX, PASSED_PREFIX
from p2pflop.job.buying import buyer as buyer_lifecycle
from p2pflop.job.events import (
    Again,
    Alive,
    Blame,
    Cancel,
    Event,
    Finish,
    Lost,
    Ranked,
    Received,
    Send,
    State,
    Tried,
)
from p2pflop.job.lifecycle import Edge
from p2pflop.job.naming import output_names
from p2pflop.job.patience import stall_ns
from p2pflop.job.results import result_hash
from p2pflop.keys import peer_id
from p2pflop.market.ranking import no_deal
from p2pflop.market.records import Bid, Receipt
from p2pflop.node import messages as m
from p2pflop.node.bidding import Bidding
from p2pflop.node.conversation import Conversation
from p2pflop.node.driver import Driver
from p2pflop.node.evidence import REJECT_ROW
from p2pflop.node.goods import Goods, by_step
from p2pflop.node.guard import survive
from p2pflop.node.journal import Letter
from p2pflop.node.letters import FAREWELL_S, JOB_PROTOCOL, leave_word
from p2pflop.node.orders import Order, describe_ranking
from p2pflop.node.outcomes import describe_result, error_of
from p2pflop.node.packs import is_pack
from p2pflop.node.printable import printable
from p2pflop.node.returning import BOUND, OPEN_S, UNCONFIRMED, Returns
from p2pflop.node.runs import Last, Run
from p2pflop.node.stretches import RESULT_ROW, Stretches, owed_nusd
from p2pflop.node.verifying import Verifier
from p2pflop.wire import Sealed, reopen

if TYPE_CHECKING:
    from p2pflop.node.buy import Buyer

_log = logging.getLogger(__name__)


class Purchase:
    """One run on its way from ranking to its end. The ``Hands`` of its driver."""

    def __init__(self, buyer: Buyer, run: Run, order: Order) -> None:
        self._buyer = buyer
        self._run = run
        self._stretches = Stretches(order, run.rows)
        self._bidding = Bidding(buyer, run.id, order, run.rows)
        self._conversation: Conversation | None = None
        self._returns = Returns()
        self._lent_to = b""
        self._lent: list[bytes] = []
        self._unanswered = b""
        self._acknowledged = False
        self._has_left_room = False
        self._booked = b""
        self._last: Last | None = None
        self._failure: P2PFlopError | None = None
        self._names = output_names(order.file.labels)
        self._nursery: trio.Nursery
        desk, patience_ns = self._bidding.desk(), stall_ns(order.checked)
        self._lifecycle = buyer_lifecycle(
            desk, order.deadline_ns, rests=order.rests, stall_ns=patience_ns
        )
        self._driver = Driver(self._lifecycle, run.rows, self, buyer.now_ns)
        self._verifier = Verifier(buyer, run, self._lifecycle, self._driver, self._fail)

    async def run(self, *, resume: bool = False) -> None:
        """Buy, until the end. Raises what the run is to fail with; a result is told here."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await self._live(resume)
                nursery.cancel_scope.cancel()
        except* P2PFlopError as group:
            self._failure = self._failure or first_error(group)
        finally:
            self._bidding.end()
        self._take_back()
        if self._failure is not None:
            raise self._failure

    async def _live(self, resume: bool) -> None:
        if resume:
            await self._resume()
        else:
            await self._driver.start()
        self._nursery.start_soon(self._watch_cancel)
        self._nursery.start_soon(self._driver.run_timers)
        self._nursery.start_soon(self._verifier.run)
        if self._lifecycle.state is State.RANKING:
            await self._begin_ranking()
        await self._driver.over.wait()
        if self._driver.failure is not None:
            raise self._driver.failure
        await self._farewell()

    # The driver's hands

    async def write(self) -> None:
        """See Hands. What is countersigned is booked, and the end of it all told, in one commit."""
        countersigned = self._lifecycle.side.countersigned
        if not countersigned or countersigned == self._booked:
            await self._run.rows.flush()
            return
        receipt = reopen(Receipt, countersigned, self._buyer.identity.network).record
        node = self._bid().record.provider
        account = self._bidding.account_of(node)
        goods = self._verifier.goods
        if account is None or goods is None:
            raise StoreError("the journal does not tell the provider's account")
        ending, staged = None, goods.staged
        if self._lifecycle.state is State.SETTLED:
            self._last = await self._result_event(goods)
            ending = self._last.ending()
            self._add_letter()
        write, now_ns = partial(self._run.rows.flush, ending, staged.keep), self._buyer.now_ns()
        await self._buyer.ledger_book.delivered(receipt, account, now_ns, write, node=node)
        self._booked = countersigned
        self._run.card["cost_nusd"] = self._owed_nusd()
        await staged.settle()

    async def send(self, action: Send) -> None:
        """See Hands."""
        if action.kind == "bid":
            await self._begin(action.wire)
        elif action.kind == "confirm":
            await self._tell_filled()
            self._say(m.Confirmed(action.wire, await self._buyer.small_inputs(self._stretches.now)))
        elif action.kind == "countersign":
            if self._conversation is not None or not self._lifecycle.ended:
                self._say(m.Countersigned(action.wire))
        elif action.kind == "abandon":
            self._give_up(m.Abandoned(action.wire))
        else:
            raise AssertionError(f"a buyer does not send a {action.kind}")
        await self._tell_state()

    async def _tell_state(self) -> None:
        state = self._lifecycle.state
        if not self._lifecycle.ended and self._run.card["state"] != state:
            await self._buyer.runs.emit(self._run, "state", state=state.value)

    def keep(self, edge: str) -> None:
        """See Hands. The first fill decides in which class the job is computed."""
        if edge == Edge.FILL:
            self._unanswered = b""
            self._fix_class()
            self._stretches.fix_limit(self._bid().record.quote_nusd)
        elif edge == Edge.COUNTERSIGN and self._verifier.part is not None:
            self._stretches.add(self._verifier.part)
        elif edge in (Edge.NEXT, Edge.WAIT, Edge.RESUBMIT, Edge.DOUBT):
            self._leave()
        if edge in (Edge.NEXT, Edge.WAIT, Edge.EXHAUSTED) and self._unanswered:
            self._note_unanswered(is_over=edge == Edge.EXHAUSTED)

    def _fix_class(self) -> None:
        class_id = self._bid().record.class_id
        self._bidding.fix_class(class_id)
        self._run.card["class_id"] = class_id.hex()

    def start(self, task: str) -> None:
        """See Hands."""
        if task == "verify":
            self._verifier.look()
        elif task in ("wait", "rest", "check"):
            self._note_failure()
            if self._conversation is not None:
                self._conversation.finish()
                self._conversation = None
            if task == "check":
                self._nursery.start_soon(self._try_out, self._lifecycle.side.attempt)
            else:
                self._bidding.wait(self)
            if self._lifecycle.side.rounds:
                self._nursery.start_soon(self._tell_loss, "")
            self._nursery.start_soon(self._tell_state)
        else:
            self._buyer.waiting.leave(self._run.id)
            self._nursery.start_soon(self._rank)

    def leave_room(self) -> None:
        """All is computed, or over: whoever waits may have its slot."""
        if not self._has_left_room:
            self._has_left_room = True
            self._buyer.waiting.room_freed(self._bidding.account_of(self._lent_to))

    @property
    def wants_room_for(self) -> Order | None:
        """See Waiting."""
        was_busy = BUSY_PREFIX in self._lifecycle.side.outcome()[0]
        return self._stretches.now if was_busy else None

    async def try_again(self) -> None:
        """Somebody may have room now. Never raises."""
        if not self._driver.over.is_set():
            with suppress(P2PFlopError):
                await self._driver.on(Again())

    def stop(self) -> None:
        """See Hands. What runs ends with the nursery, after the farewell."""

    async def finish(self, action: Finish) -> None:
        """See Hands."""
        if action.state is State.SETTLED:
            account = self._bidding.account_of(self._lent_to)
            self._buyer.experience.note_success(account or b"")
            if self._last is None:
                raise StoreError("the journal has a settled job without its result")
            self._buyer.runs.tell_last(self._run, self._last)
            return
        if self._lifecycle.side.countersigned:
            self._add_letter()
        if action.state is State.CANCELLED and self._failure is None:
            await self._buyer.tell_cancelled(self._run, self._owed_nusd())
        elif action.state is not State.CANCELLED:
            if action.blame is Blame.PROVIDER:
                self._note_failure()
            self._failure = error_of(action)

    # Bidding

    async def _begin_ranking(self) -> None:
        """Behind those of this node that wait for room, if there are any that want no more."""
        order = self._stretches.now
        if order.rests or not self._buyer.waiting.is_hopeless(order):
            await self._rank()
            return
        await self._run.rows.flush()
        self._nursery.start_soon(self._queue, order)

    async def _queue(self, order: Order) -> None:
        await self._buyer.waiting.queue(self._run.id, order)
        if not self._lifecycle.ended:
            await self._rank()

    async def _rank(self) -> None:
        order = self._stretches.begin(self._stretches.done_to, self._owed_nusd())
        await self._buyer.need(self._run.id, order)
        await self._bidding.forget_looks()
        ranking = self._bidding.rank(self._lifecycle.side.attempt, order)
        # The variants of a pack alone may be within.
        is_final = ranking.is_over_limits and is_pack(self._buyer.runs, self._run.id)
        await self._buyer.runs.emit(self._run, "ranked", **describe_ranking(ranking))
        reason = no_deal(ranking.ranked)
        try:
            await self._driver.on(Ranked(reason.message, is_final))
        except ProtocolError:
            if not self._lifecycle.ended:  # the user was faster
                raise
        if self._failure is not None and not ranking.deals:
            self._failure = reason

    async def _try_out(self, attempt: int) -> None:
        """Others say that the job faults: see what it does here."""
        order = self._stretches.begin(self._stretches.done_to, self._owed_nusd())
        await self._buyer.need(self._run.id, order)
        trial, reason = await self._buyer.try_out(order)
        await self._driver.on(Tried(attempt, trial, reason))

    def _bid(self) -> Sealed[Bid]:
        return reopen(Bid, self._lifecycle.side.bid, self._buyer.identity.network)

    @property
    def _peer(self) -> str:
        return peer_id(self._bid().record.provider)

    async def _tell_filled(self) -> None:
        bid = self._bid().record
        if self._lent_to != bid.provider:
            self._take_back()
            self._lent = await self._buyer.lend(self._stretches.now, bid.provider)
            self._lent_to = bid.provider
        if self._lifecycle.state is not State.CONFIRMING:
            return
        told = self._bidding.describe(bid) | {"limit_nusd": self._stretches.whole.max_nusd}
        total_nusd = self._owed_nusd() + bid.quote_nusd
        self._run.card |= {"provider": self._peer, "quote_nusd": total_nusd}
        await self._buyer.runs.emit(self._run, "filled", provider=self._peer, **told)

    def _note_failure(self) -> None:
        """Whoever had the lease did not do the job: not to be asked again for a while."""
        account, experience = self._bidding.account_of(self._lent_to), self._buyer.experience
        if account is not None:
            was_handed_over = self._lifecycle.side.was_handed_over
            note = experience.note_excused if was_handed_over else experience.note_failure
            note(account, self._buyer.now_ns())
        self._take_back()

    def _note_unanswered(self, *, is_over: bool) -> None:
        """Whoever was bid to said neither yes nor no."""
        node, self._unanswered = self._unanswered, b""
        reason = self._lifecycle.side.outcome()[0]
        self._bidding.note_unanswered(node, reason, self._buyer.now_ns())
        if not is_over:  # else the end of the run says it
            self._nursery.start_soon(self._tell_rejected, peer_id(node), reason)

    def _take_back(self) -> None:
        """The inputs are no longer for the provider to read."""
        self._buyer.take_back(self._lent, self._lent_to)
        self._lent, self._lent_to = [], b""

    def _leave(self) -> None:
        """Somebody else is to go on: what is due to the last one is sent to it all the same."""
        if not self._lent_to:
            return
        side, peer = self._lifecycle.side, peer_id(self._lent_to)
        goods = self._verifier.goods
        told_to = 0 if goods is None else goods.leave()
        self._stretches.lose(peer, side.outcome()[0], told_to)
        if side.was_paid:
            letter = self._run.rows.add_letter(peer, side.delivered[-1], len(side.delivered))
            spoken = None if self._conversation is None else self._conversation.over
            self._buyer.nursery.start_soon(survive, self._buyer.letters.deliver, letter, spoken)

    async def _tell_loss(self, next_provider: str) -> None:
        if (told := self._stretches.tell_loss(next_provider)) is not None:
            await self._buyer.runs.emit(self._run, "resubmitted", **told)

    # Talking

    async def _begin(self, bid: bytes) -> None:
        if self._conversation is not None:
            self._conversation.finish()
            self._conversation = None
        buyer, order = self._buyer, self._stretches.now
        self._note_failure()
        self._returns, self._has_left_room = Returns(), False
        goods = Goods(order.checked, buyer.store, buyer.dialer, self._peer, self._moved)
        self._verifier.begin(goods)
        await self._tell_loss(self._peer)
        self._unanswered = self._bid().record.provider
        self._say(m.Offer(bid, order.body))

    def _say(self, message: m.Message) -> None:
        if self._conversation is None:
            side, words = self._lifecycle.side, [message]
            if isinstance(message, m.Countersigned):
                # What came after the last stream broke is lost: a confirm has it said again.
                words.insert(0, m.Confirmed(side.confirm, ()))
            self._nursery.start_soon(self._talk, words, self._peer, side.attempt)
        else:
            self._conversation.tell(message)

    def _give_up(self, message: m.Abandoned) -> None:
        """Said before the next provider is asked, so that the last one stops."""
        if self._conversation is None:
            provider = peer_id(self._lent_to) if self._lent_to else self._peer
            self._buyer.nursery.start_soon(
                survive, leave_word, self._buyer.dialer, provider, message
            )
        else:
            self._conversation.tell(message)

    async def _talk(
        self, words: list[m.Message], provider: str, attempt: int, within_s: float = OPEN_S
    ) -> None:
        began_at = trio.current_time()
        try:
            with trio.fail_after(within_s):
                stream = await self._buyer.dialer.open(provider, JOB_PROTOCOL)
        except (ProviderError, ProtocolError) as error:
            await self._come_back(error.message, provider, attempt)
            return
        except trio.TooSlowError:
            await self._come_back(f"{provider} did not open a stream", provider, attempt)
            return
        conversation = Conversation(stream, speaks=self._lifecycle.state in BOUND)
        if self._lifecycle.side.attempt != attempt:
            await stream.aclose()
            return
        self._conversation = conversation
        for word in words:
            conversation.tell(word)
        patience_s = self._bidding.patience_s(attempt, trio.current_time() - began_at)
        if self._lifecycle.state is State.BIDDING and patience_s is not None:
            self._nursery.start_soon(self._pass_over, attempt, patience_s)

        async def on_message(message: m.Message) -> None:
            if self._conversation is conversation:
                await self._hear(message, conversation)

        began_at = trio.current_time()
        why = await conversation.run(on_message)
        if self._conversation is conversation:
            self._conversation = None
            lasted_s = trio.current_time() - began_at
            self._returns.broke(lasted_s, fell_silent=conversation.fell_silent)
            if conversation.at_fault:
                await self._lost(why, attempt)
            else:
                await self._come_back(why, provider, attempt)

    async def _pass_over(self, attempt: int, patience_s: float) -> None:
        """Ask the next one if a stranger says nothing for a while."""
        await trio.sleep(patience_s)
        why = f"{PASSED_PREFIX}it said nothing for {patience_s:.1f} s"
        await self._driver.hear(Lost(why, attempt))

    async def _come_back(self, why: str, provider: str, attempt: int) -> None:
        """A stream broke after the confirm: try another before giving the provider up."""
        pause_s = self._returns.next_pause_s() if self._lifecycle.state in BOUND else None
        if pause_s is None:
            await self._lost(why, attempt)
            return
        await trio.sleep(pause_s)
        side = self._lifecycle.side
        still = self._lifecycle.state in BOUND and side.attempt == attempt
        if still and self._conversation is None:
            words = [m.Confirmed(side.confirm, ())]
            within_s = self._returns.open_within_s()
            self._nursery.start_soon(self._talk, words, provider, attempt, within_s)

    async def _lost(self, why: str, attempt: int) -> None:
        if self._lifecycle.side.attempt == attempt and not self._lifecycle.ended:
            why = printable(why)
            if self._lifecycle.state is State.VERIFYING:
                self._verifier.lose(why)
            await self._driver.hear(Lost(why))

    async def _hear(self, message: m.Message, conversation: Conversation) -> None:
        why = await self._heard(message)
        await self._tell_state()
        if why:
            conversation.cut(f"{conversation.peer}: {why}", at_fault=True)
        elif isinstance(message, m.Settled):
            self._acknowledged = True
            self._buyer.letters.acknowledge(self._run.id)
            conversation.finish()

    async def _heard(self, message: m.Message) -> str:
        """Take a message in; what was wrong with it, or nothing."""
        match message:
            case m.Filled(wire) | m.Committed(wire) | m.Receipted(wire):
                return await self._driver.hear(Received(wire))
            case m.Abandoned(wire):
                await self._verifier.verify_the_last()
                return await self._driver.hear(Received(wire))
            case m.Refused(wire):
                return await self._hear_refusal(wire)
            case m.Settled():
                signed = self._lifecycle.ended and self._lifecycle.side.countersigned
                return "" if signed else "it settled what was not countersigned"
            case m.Heartbeat():
                return await self._driver.hear(Alive())
            case m.Fetching() | m.Lowering() | m.Rows() | m.Checkpoint() | m.Delivered():
                return await self._hear_work(message)
            case _:
                return "it sent what only a buyer sends"

    async def _hear_refusal(self, wire: bytes) -> str:
        if self._lifecycle.state is State.BIDDING:
            with suppress(ProtocolError):
                bid = self._lifecycle.side.bid
                reason = self._lifecycle.side.desk.check_reject(wire, bid)
                self._run.rows.add(REJECT_ROW, wire)
                self._bidding.refused(self._bid().record, reason, wire)
                self._unanswered = b""
                await self._tell_rejected(self._peer, reason)
        return await self._driver.hear(Received(wire))

    async def _tell_rejected(self, provider: str, reason: str) -> None:
        reason = printable(reason)
        await self._buyer.runs.emit(self._run, "rejected", provider=provider, reason=reason)

    async def _hear_work(self, message: m.Message) -> str:
        goods = self._verifier.goods
        if self._lifecycle.ended:
            return ""
        if goods is None or self._lifecycle.state in UNCONFIRMED:
            return "it worked before it was confirmed"
        event: Event = Alive(worked=goods.is_progress(message))
        if isinstance(message, m.Delivered):
            event = Received(message.receipt, message.salt)
            self.leave_room()
        try:
            await self._note(message, goods)
        except ProtocolError as error:
            await self._driver.hear(Lost(printable(error.message)))
            return error.message
        return await self._driver.hear(event)

    async def _note(self, message: m.Message, goods: Goods) -> None:
        """Keep or tell what a message is about. Raises ProtocolError if that cannot be."""
        runs, run = self._buyer.runs, self._run
        match message:
            case m.Rows():
                await self._tell_rows(message, goods)
            case m.Checkpoint():
                goods.note_checkpoint(message)
            case m.Delivered(_, result, _, blobs):
                if goods.note_result(result, blobs):
                    run.rows.add(RESULT_ROW, result)
            case m.Fetching(done_bytes, total_bytes):
                await runs.emit(run, "fetching", done_bytes=done_bytes, total_bytes=total_bytes)
            case m.Lowering(done, total):
                await runs.emit(run, "lowering", done=done, total=total)

    async def _tell_rows(self, message: m.Rows, goods: Goods) -> None:
        runs, run = self._buyer.runs, self._run
        rows = by_step(goods.note_rows(message), self._names)
        if rows:
            await runs.emit(run, "rows", rows=rows)
        await runs.emit(run, "progress", step=message.last_step + 1, steps=run.end_step)

    def _owed_nusd(self) -> int:
        """What all stretches so far have cost."""
        return owed_nusd(self._lifecycle.side, self._buyer.identity.network)

    async def _result_event(self, goods: Goods) -> Last:
        result = await self._stretches.join(goods, self._buyer.store)
        cost_nusd = self._owed_nusd()
        self._run.card |= {
            "hash": result_hash(result).hex(),
            "cost_nusd": cost_nusd,
            "step": result.first_step + result.steps_done,
        }
        told = describe_result(self._stretches.whole, result, cost_nusd)
        return self._buyer.runs.last(self._run, "result", provider=self._peer, **told)

    def _moved(self) -> None:
        self._nursery.start_soon(self._verifier.moved)

    def _fail(self, error: P2PFlopError) -> None:
        self._failure = error

    # Beginning again, and the end

    async def _resume(self) -> None:
        buyer = self._buyer
        rows = buyer.runs.rows(self._run.id)
        result = self._stretches.recall(rows)
        checked = self._stretches.now.checked
        goods = Goods(checked, buyer.store, buyer.dialer, on_moved=self._moved)
        self._verifier.begin(goods)
        if result:
            goods.recall_result(result)
        self._bidding.recall(rows, self._stretches.now)
        await buyer.need(self._run.id, self._stretches.now)
        await self._driver.resume(rows)
        if cost_nusd := self._owed_nusd():
            self._run.card["cost_nusd"] = cost_nusd
        if self._lifecycle.side.bid:
            goods.peer = self._peer
            if self._lifecycle.state not in UNCONFIRMED:
                self._fix_class()

    async def _watch_cancel(self) -> None:
        await self._run.cancel_requested.wait()
        while not self._driver.over.is_set():  # a limit that has just passed comes first
            await self._driver.on(Cancel())

    async def _farewell(self) -> None:
        """Give the last word time to leave, and the provider to acknowledge it."""
        conversation = self._conversation
        if conversation is not None:
            if self._lifecycle.state is not State.SETTLED:
                conversation.finish()
            with trio.move_on_after(FAREWELL_S):
                await conversation.over.wait()
        if self._lifecycle.side.countersigned and not self._acknowledged:
            wire, now_ns = self._lifecycle.side.countersigned, self._buyer.now_ns()
            letter = Letter(self._run.id, now_ns, self._peer, wire)
            self._buyer.nursery.start_soon(survive, self._buyer.letters.deliver, letter)

    def _add_letter(self) -> None:
        self._run.rows.add_letter(self._peer, self._lifecycle.side.countersigned)
