"""One purchase: the buyer's lifecycle joined to a stream, the store, the ledger and a run's story.

The lifecycle decides what is signed and when (``p2pflop.job.buying``); here its actions become
frames, and what comes back becomes its events. A receipt is countersigned only when every blob that
it is about is here, verified and durable, and the ledger has the amount.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import trio

from p2pflop.dht.fetch import fetch
from p2pflop.dht.manifest import address_of
from p2pflop.errors import (
    BlobNotFoundError,
    JobError,
    MarketError,
    P2PFlopError,
    ProtocolError,
    ProviderError,
    VerificationError,
)
from p2pflop.job.buying import MAX_UNSIGNED_RECEIPTS
from p2pflop.job.buying import buyer as buyer_lifecycle
from p2pflop.job.delivery import (
    WantedBlob,
    check_result,
    check_trace,
    output_dtype,
    wanted_result,
    wanted_state,
)
from p2pflop.job.events import (
    Alive,
    Blame,
    Cancel,
    Finish,
    Lost,
    Ranked,
    Received,
    Refuted,
    Send,
    State,
    Verified,
)
from p2pflop.job.graph import Dtype
from p2pflop.job.meter import METER_ID
from p2pflop.job.naming import output_names
from p2pflop.job.results import result_hash, scalar
from p2pflop.job.spec import ROLE_STATE, Result, state_root
from p2pflop.keys import peer_id
from p2pflop.market.desk import BuyerDesk
from p2pflop.market.fills import make_bid
from p2pflop.market.ranking import no_deal
from p2pflop.market.records import ZERO_HASH, Bid, Receipt
from p2pflop.node import messages as m
from p2pflop.node.conversation import Conversation
from p2pflop.node.driver import Driver
from p2pflop.node.execute import input_blobs
from p2pflop.node.orders import Order, Ranking, describe_ranking
from p2pflop.node.runs import Run
from p2pflop.units import NS_PER_S
from p2pflop.wire import Sealed, decode, reopen

if TYPE_CHECKING:
    from p2pflop.node.buy import Buyer

JOB_PROTOCOL: Final = "/p2pflop/job/1"
RESULT_ROW: Final = "result"
OPEN_S: Final = 8.0
FAREWELL_S: Final = 3.0
RETRY_S: Final = 1.0
MAX_INLINE_INPUT_BYTES: Final = 16 * 1024
MAX_PARALLEL_FETCHES: Final = 4

_log = logging.getLogger(__name__)


class Purchase:
    """One run on its way from ranking to its end. The ``Hands`` of its driver."""

    def __init__(self, buyer: Buyer, run: Run, order: Order) -> None:
        self._buyer = buyer
        self._run = run
        self._order = order
        self._ranking: Ranking | None = None
        self._conversation: Conversation | None = None
        self._states: dict[int, tuple[bytes, ...]] = {}
        self._result: Result | None = None
        self._failure: P2PFlopError | None = None
        self._verifying = trio.Lock()
        self._names = output_names(order.file.labels)
        self._nursery: trio.Nursery
        desk = BuyerDesk(
            buyer.identity.node,
            order.checked.work,
            bid_on=self._bid_on,
            account_of=self._account_of,
            network=buyer.identity.network,
        )
        self._lifecycle = buyer_lifecycle(desk, order.deadline_ns)
        self._driver = Driver(self._lifecycle, run.rows, self, buyer.now_ns)

    async def run(self, *, resume: bool = False) -> None:
        """Buy, until the end. Raises what the run is to fail with; a result is told here."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await self._live(resume)
                nursery.cancel_scope.cancel()
        except* P2PFlopError as group:
            self._failure = self._failure or first_error(group)
        if self._failure is not None:
            raise self._failure

    async def _live(self, resume: bool) -> None:
        self._nursery.start_soon(self._watch_cancel)
        if resume:
            await self._resume()
        else:
            await self._driver.start()
        self._nursery.start_soon(self._driver.run_timers)
        if self._lifecycle.state is State.RANKING:
            await self._rank()
        await self._driver.over.wait()
        await self._farewell()

    # The driver's hands

    async def send(self, action: Send) -> None:
        """See Hands."""
        if action.kind == "bid":
            self._begin(self._offer(action.wire))
        elif action.kind == "confirm":
            await self._tell_filled()
            self._say(m.Confirmed(action.wire))
        elif action.kind == "countersign":
            await self._book(action.wire)
            self._say(m.Countersigned(action.wire))
        elif action.kind == "abandon":
            self._say(m.Abandoned(action.wire))
        else:
            raise AssertionError(f"a buyer does not send a {action.kind}")

    def start(self, task: str) -> None:
        """See Hands. The only task of a buyer is to verify."""
        del task
        self._nursery.start_soon(self._verify)

    def stop(self) -> None:
        """See Hands. What runs ends with the nursery, after the farewell."""

    async def finish(self, action: Finish) -> None:
        """See Hands."""
        if action.state is State.SETTLED:
            await self._tell_result()
        elif action.state is State.CANCELLED:
            await self._buyer.runs.emit(self._run, "cancelled")
        else:
            self._failure = _error(action)

    # Bidding

    async def _rank(self) -> None:
        self._ranking = self._buyer.rank(self._order)
        await self._buyer.runs.emit(self._run, "ranked", **describe_ranking(self._ranking))
        reason = no_deal(self._ranking.ranked)
        await self._driver.on(Ranked(reason.message))
        if self._failure is not None and not self._ranking.deals:
            self._failure = reason

    def _bid_on(self, attempt: int, now_ns: int) -> Sealed[Bid] | None:
        ranking = self._ranking
        if ranking is None or attempt >= len(ranking.deals):
            return None
        identity = self._buyer.identity
        return make_bid(
            identity.node,
            ranking.deals[attempt],
            job=self._order.checked.job,
            meter_id=METER_ID,
            costs=self._order.costs,
            terms=self._order.terms,
            nonce=ranking.nonce,
            now_ns=now_ns,
            book_digest=ranking.view.digest,
            policy_digest=ranking.policy.digest(),
            delegation=identity.delegation(now_ns),
            network=identity.network,
        )

    def _account_of(self, node: bytes) -> bytes | None:
        for deal in self._ranking.deals if self._ranking is not None else ():
            if deal.node == node:
                return deal.account
        sheet = self._buyer.sheets.book.get(node, self._buyer.now_ns())
        return None if sheet is None else sheet.account

    def _bid(self) -> Sealed[Bid]:
        return reopen(Bid, self._lifecycle.side.bid, self._buyer.identity.network)

    def _offer(self, bid: bytes) -> m.Offer:
        return m.Offer(bid, self._order.body, ())

    async def _tell_filled(self) -> None:
        if self._lifecycle.state is not State.CONFIRMING:
            return
        bid = self._bid().record
        for _, source in input_blobs(self._order.checked):
            await self._buyer.store.grant(source.address, bid.provider)
        provider = peer_id(bid.provider)
        self._run.card |= {"provider": provider, "quote_nusd": bid.quote_nusd}
        runs = self._buyer.runs
        await runs.emit(self._run, "filled", provider=provider, quote_nusd=bid.quote_nusd)

    # Talking

    def _begin(self, first: m.Message) -> None:
        if self._conversation is not None:
            self._conversation.cut("the next provider is asked")
            self._conversation = None
        self._nursery.start_soon(self._talk, first, self._lifecycle.side.attempt)

    def _say(self, message: m.Message) -> None:
        if self._conversation is None:
            self._nursery.start_soon(self._talk, message, self._lifecycle.side.attempt)
        else:
            self._conversation.tell(message)

    async def _talk(self, first: m.Message, attempt: int) -> None:
        provider = peer_id(self._bid().record.provider)
        try:
            with trio.fail_after(OPEN_S):
                stream = await self._buyer.dialer.open(provider, JOB_PROTOCOL)
        except (ProviderError, ProtocolError) as error:
            await self._lost(error.message, attempt)
            return
        except trio.TooSlowError:
            await self._lost(f"{provider} did not open a stream in {OPEN_S:.0f} s", attempt)
            return
        conversation = self._conversation = Conversation(stream)
        conversation.tell(first)

        async def on_message(message: m.Message) -> None:
            if self._conversation is conversation:
                await self._hear(message, conversation)

        why = await conversation.run(on_message)
        if self._conversation is conversation:
            self._conversation = None
            await self._lost(why, attempt)

    async def _lost(self, why: str, attempt: int) -> None:
        if self._lifecycle.side.attempt == attempt and not self._lifecycle.ended:
            before = self._lifecycle.state
            if before is State.BIDDING:
                await self._tell_rejected(f"lost: {why}")
            await self._driver.hear(Lost(why))

    async def _hear(self, message: m.Message, conversation: Conversation) -> None:
        match message:
            case m.Filled(wire) | m.Committed(wire) | m.Receipted(wire):
                await self._driver.hear(Received(wire))
            case m.Refused(wire):
                await self._hear_refusal(wire)
            case m.Abandoned(wire):
                await self._driver.hear(Received(wire))
            case m.Delivered():
                await self._hear_delivery(message)
            case m.Settled():
                conversation.finish()
            case m.Heartbeat():
                await self._driver.hear(Alive())
            case m.Fetching() | m.Lowering() | m.Rows() | m.Checkpoint():
                await self._driver.hear(Alive())
                await self._tell_progress(message)
            case _:
                conversation.cut(f"{conversation.peer} sent what only a buyer sends")

    async def _hear_refusal(self, wire: bytes) -> None:
        with suppress(ProtocolError):
            reason = self._lifecycle.side.desk.check_reject(wire, self._lifecycle.side.bid)
            await self._tell_rejected(reason)
        await self._driver.hear(Received(wire))

    async def _tell_rejected(self, reason: str) -> None:
        provider = peer_id(self._bid().record.provider)
        await self._buyer.runs.emit(self._run, "rejected", provider=provider, reason=reason)

    async def _tell_progress(self, message: m.Message) -> None:
        runs, run = self._buyer.runs, self._run
        match message:
            case m.Fetching(done_bytes, total_bytes):
                await runs.emit(run, "fetching", done_bytes=done_bytes, total_bytes=total_bytes)
            case m.Lowering(done, total):
                await runs.emit(run, "lowering", done=done, total=total)
            case m.Rows():
                await self._tell_rows(message)
            case m.Checkpoint(step, state, blobs):
                try:
                    await self._keep_inline(blobs)
                except VerificationError as error:
                    self._cut(error.message)
                    return
                self._states[step] = tuple(address for address, _ in state)
                if len(self._states) > MAX_UNSIGNED_RECEIPTS:
                    del self._states[min(self._states)]

    async def _tell_rows(self, message: m.Rows) -> None:
        names = self._names
        rows: dict[int, dict[str, float]] = {}
        for step, phase, output, value in message.values:
            try:
                dtype = output_dtype(self._order.checked, phase, output)
                rows.setdefault(step, {})[names[phase][output]] = scalar(dtype, value)
            except (IndexError, ProtocolError):
                self._cut("it told a value that the job does not have")
                return
        runs, run = self._buyer.runs, self._run
        if rows:
            told = [{"step": step, "values": values} for step, values in sorted(rows.items())]
            await runs.emit(run, "rows", rows=told)
        await runs.emit(run, "progress", step=message.last_step + 1, steps=run.card["steps"])

    def _cut(self, why: str) -> None:
        if self._conversation is not None:
            self._conversation.cut(why)

    # Delivery

    async def _hear_delivery(self, message: m.Delivered) -> None:
        try:
            result = decode(Result, message.result)
            await self._keep_inline(message.blobs)
        except (ProtocolError, VerificationError) as error:
            self._cut(error.message)
            return
        self._result = result
        self._run.rows.add(RESULT_ROW, message.result)
        await self._driver.hear(Received(message.receipt, message.salt))

    async def _keep_inline(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """Keep what came along, all in one commit. Raises VerificationError."""
        for address, data in blobs:
            if address_of(data) != address:
                raise VerificationError(f"{address.hex()} is not the address of its bytes")
        async with trio.open_nursery() as nursery:
            for _, data in blobs:
                nursery.start_soon(self._buyer.store.put, data)

    async def _verify(self) -> None:
        """Fetch and check what the receipts that wait are about, oldest first."""
        async with self._verifying:
            for number, wire in sorted(self._lifecycle.side.unsigned.items()):
                receipt = reopen(Receipt, wire, self._buyer.identity.network).record
                try:
                    await self._check_receipt(receipt)
                except (ProtocolError, VerificationError) as error:
                    await self._driver.on(Refuted(error.message))
                    return
                except (ProviderError, BlobNotFoundError) as error:
                    _log.info("job %s: delivery not fetched yet: %s", self._run.id, error)
                    self._nursery.start_soon(self._verify_later)
                    return
                fields = {"number": number, "amount_nusd": receipt.amount_nusd}
                await self._buyer.runs.emit(self._run, "receipt", to_step=receipt.to_step, **fields)
                await self._driver.on(Verified(number))

    async def _verify_later(self) -> None:
        await trio.sleep(RETRY_S)
        if not self._lifecycle.ended:
            await self._verify()

    async def _check_receipt(self, receipt: Receipt) -> None:
        checked = self._order.checked
        if receipt.result != ZERO_HASH:
            result = self._result
            if result is None:
                raise ProviderError("the result itself has not come yet")
            if result_hash(result) != receipt.result:
                raise ProtocolError("the receipt is for another result")
            refusal = check_result(checked, self._bid().record.class_id, result)
            if refusal is not None:
                raise ProtocolError(refusal.reason)
            if (result.state_root, result.first_step + result.steps_done) != (
                receipt.root_to,
                receipt.to_step,
            ):
                raise ProtocolError("the receipt is for another state")
            await self._fetch_all(wanted_result(checked, result))
            trace = await self._buyer.store.get(result.trace)
            refusal = check_trace(checked, result.steps_done, trace)
            if refusal is not None:
                raise ProtocolError(refusal.reason)
            return
        addresses = self._states.get(receipt.to_step)
        if addresses is None:
            raise ProviderError("the checkpoint itself has not come yet")
        if state_root(addresses) != receipt.root_to:
            raise ProtocolError("the receipt is for another checkpoint")
        await self._fetch_all(wanted_state(checked, addresses))
        root = receipt.root_to.hex()
        await self._buyer.runs.emit(self._run, "checkpoint", step=receipt.to_step, state_root=root)

    async def _fetch_all(self, wanted: list[WantedBlob]) -> None:
        provider = peer_id(self._bid().record.provider)
        limiter = trio.CapacityLimiter(MAX_PARALLEL_FETCHES)
        failures: list[P2PFlopError] = []

        async def one(blob: WantedBlob) -> None:
            async with limiter:
                if failures:
                    return
                try:
                    info = await fetch(
                        self._buyer.store,
                        blob.address,
                        [provider],
                        self._buyer.dialer,
                        max_bytes=blob.size_bytes,
                    )
                    if blob.exact and info.size_bytes != blob.size_bytes:
                        raise ProtocolError("a delivered tensor is not of its size")
                except P2PFlopError as error:
                    failures.append(error)

        async with trio.open_nursery() as nursery:
            for blob in {blob.address: blob for blob in wanted}.values():
                nursery.start_soon(one, blob)
        if failures:
            raise failures[0]

    async def _book(self, countersigned: bytes) -> None:
        receipt = reopen(Receipt, countersigned, self._buyer.identity.network).record
        account = self._account_of(self._bid().record.provider)
        if account is None:
            raise ProtocolError("the provider's account is not known")
        await self._buyer.ledger_book.delivered(receipt, account, self._buyer.now_ns())

    async def _tell_result(self) -> None:
        result = self._result
        if result is None:
            raise AssertionError("settled without a result")
        receipt = reopen(
            Receipt, self._lifecycle.side.countersigned, self._buyer.identity.network
        ).record
        self._run.card |= {
            "hash": result_hash(result).hex(),
            "cost_nusd": receipt.amount_nusd,
            "step": result.first_step + result.steps_done,
        }
        await self._buyer.runs.emit(
            self._run, "result", **self._describe(result, receipt.amount_nusd)
        )

    def _describe(self, result: Result, cost_nusd: int) -> dict[str, Any]:
        labels, work = self._order.file.labels, self._order.checked.work
        names = self._names
        slots = [slot for slot, param in enumerate(work.params) if param.role == ROLE_STATE]
        return {
            "hash": result_hash(result).hex(),
            "provider": peer_id(self._bid().record.provider),
            "outputs": {
                names[output.phase][output.output]: output.address.hex()
                for output in result.outputs
            },
            "state": {
                labels.params[slot]: {
                    "address": address.hex(),
                    "dtype": Dtype(work.params[slot].dtype).name.lower(),
                    "shape": list(work.params[slot].shape),
                }
                for slot, address in zip(slots, result.state, strict=True)
            },
            "trace": result.trace.hex(),
            "steps_done": result.steps_done,
            "cost_nusd": cost_nusd,
            "cost_usd": cost_nusd / NS_PER_S,
        }

    # Beginning again, and the end

    async def _resume(self) -> None:
        rows = self._buyer.runs.rows(self._run.id)
        for row in rows:
            if row.kind == RESULT_ROW:
                self._result = decode(Result, row.body)
        await self._driver.resume(rows)

    async def _watch_cancel(self) -> None:
        await self._run.cancel_requested.wait()
        await self._driver.on(Cancel())

    async def _farewell(self) -> None:
        """Give the last word time to leave, and the provider to acknowledge it."""
        conversation = self._conversation
        if conversation is None:
            return
        if self._lifecycle.state is not State.SETTLED:
            conversation.finish()
        with trio.move_on_after(FAREWELL_S):
            await conversation.over.wait()


def first_error(group: BaseExceptionGroup[P2PFlopError]) -> P2PFlopError:
    """The first error inside a group, however deep."""
    error = group.exceptions[0]
    return first_error(error) if isinstance(error, BaseExceptionGroup) else error


def _error(action: Finish) -> P2PFlopError:
    match action.blame:
        case Blame.JOB:
            return JobError(action.reason, hint="The job itself failed; change it, then submit.")
        case Blame.MARKET:
            return MarketError(action.reason, hint="See p2pflop book, and p2pflop quote.")
        case _:
            return ProviderError(action.reason, hint="Nothing more is owed. Submit it again.")
