"""What a sale computes: inputs brought, graphs lowered, a worker loaded and run, a result given.

It is told when the buyer has confirmed and when it may run, and tells the sale's lifecycle the
rest. Where the next to nothing of a buyer's small job is to be done by a worker that is there, it
begins while the fill is still on its way: what it computes then leaves only once that is confirmed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from p2pflop.errors import JobError, P2PFlopError, first_error
from p2pflop.job.buying import MAX_UNSIGNED_RECEIPTS
from p2pflop.job.events import Blame, Done, Fault, Ready, Reveal, Withdraw
from p2pflop.job.file import CheckedJob, JobBody
from p2pflop.job.spec import BlobSource, graphs_of
from p2pflop.keys import peer_id
from p2pflop.market.records import checkpoint_seconds
from p2pflop.node import messages as m
from p2pflop.node.execute import (
    Checkpoints,
    Execution,
    Outcome,
    is_too_dear,
    lower_all,
    worker_limits,
)
from p2pflop.node.feeding import Feeds
from p2pflop.node.outcomes import fault_told, reason_told
from p2pflop.node.supply import Supply
from p2pflop.node.window import COUNTERSIGN_WITHIN_S, Window, window_of
from p2pflop.node.worker_types import Rows

if TYPE_CHECKING:
    from p2pflop.node.sale import Sale
    from p2pflop.node.sell import Seller

MAX_FAULT_CHARS: Final = 200
WORKER_THREADS: Final = 1
LIGHT_FLOP: Final = 10_000_000
"""What a job that may begin before it is confirmed may cost, or touch in bytes: a millisecond."""
LIGHT_S: Final = 0.005
"""How long the confirm of such a job waits for its result, to go to disk with it."""
MAX_HELD_ROWS: Final = 16
"""Messages of rows that wait for the confirm to be on disk; then the worker waits."""

_log = logging.getLogger(__name__)


class Labour:
    """The work of one sale. ``at_hand`` has what came along with the confirm, by address."""

    def __init__(self, sale: Sale, seller: Seller, body: JobBody, checked: CheckedJob) -> None:
        self.checked = checked
        self.at_hand: dict[bytes, bytes] = {}
        self.done_to = sale.bid.record.job.first_step
        self.window: Window | None = None
        self._sale = sale
        self._seller = seller
        self._body = body
        self._execution: Execution | None = None
        self._scope = trio.CancelScope()
        self._begun = False
        self._confirmed, self._kept, self._may_run = trio.Event(), trio.Event(), trio.Event()
        self._rows: list[m.Rows] = []

    @property
    def may_run(self) -> bool:
        """Whether the lifecycle has let it run."""
        return self._may_run.is_set()

    @property
    def runs_on(self) -> bool:
        """Whether a step, or the checkpoint after it, is still to come."""
        return self._execution is not None and not self._execution.has_left

    @property
    def is_standing(self) -> bool:
        """Whether its worker waits for the buyer to countersign."""
        return self.window is not None and self.window.is_standing

    @property
    def is_light(self) -> bool:
        """Whether it may begin before its buyer confirms: it costs next to nothing, and a worker of
        this buyer is there that has just run the same."""
        cost, graphs = self.checked.cost, graphs_of(self.checked.work)
        is_cheap = max(cost.flop, cost.touched_bytes) <= LIGHT_FLOP
        needs_nothing = not self.checked.inputs and not self.checked.feeds
        return is_cheap and needs_nothing and self._seller.warm.lingers(self._sale.account, graphs)

    def inputs(self) -> list[BlobSource]:
        """Each input once."""
        return list({source.address: source for _, source in self.checked.inputs}.values())

    def note_confirm(self) -> None:
        """The buyer has confirmed."""
        self._confirmed.set()

    def let_run(self) -> None:
        """The lifecycle has heard that all is ready."""
        self._may_run.set()

    def leave(self) -> None:
        """Compute no further than the current step."""
        if self._execution is not None:
            self._execution.leave()
        if self.window is not None:
            self.window.wake()

    def stop(self) -> None:
        """End it."""
        self._scope.cancel()

    async def do(self) -> None:
        """Prepare, run and commit, once; whatever goes wrong is told to the lifecycle."""
        if self._begun:
            return
        self._begun = True
        with self._scope:
            try:
                await self._compute()
            except* JobError as group:
                await self._fault(fault_told(first_error(group)), job_fault=True)
            except* Exception as group:  # noqa: BLE001 - one sale's bug must not end the node
                failure = first_error(group)
                self.log_fault(failure)
                await self._fault(reason_told(failure), job_fault=False)
        self._seller.allocator.free(self._sale)

    def log_fault(self, error: Exception) -> None:
        """To the node's log; with its traceback if it is a bug."""
        known = isinstance(error, P2PFlopError | OSError)
        name = self._sale.rows.head.job[:12]
        _log.error("sale %s: %s", name, error, exc_info=None if known else error)

    async def _fault(self, reason: str, *, job_fault: bool) -> None:
        await self._confirmed.wait()
        await self._sale.driver.on(Fault(reason[:MAX_FAULT_CHARS], job_fault))

    async def _compute(self) -> None:
        seller, sale, checked = self._seller, self._sale, self.checked
        lease_ns = max(0, sale.bid.record.terms.deadline_ns - seller.now_ns())
        limits = worker_limits(checked, lease_ns, WORKER_THREADS)
        plans: dict[bytes, bytes] = {}
        supply = self._supply()
        feeds = Feeds(checked, seller.store, supply.bring, sale.hold)

        async def bring() -> None:
            self.checked = await supply.resolve(checked)
            await supply.fetch_all(self.inputs(), self.at_hand, self._tell_fetching)
            await feeds.open()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_confirm)
            async with trio.open_nursery() as bringing:
                bringing.start_soon(bring)
                plans = await lower_all(seller.workers, self._body.graphs, self._tell_lowering)
            if is_too_dear(seller.workers, checked, plans):
                await self._confirmed.wait()
                reason = "cost: it computes over four times what was metered"
                await sale.driver.on(Withdraw(reason))
                return
            if checked.feeds:
                nursery.start_soon(feeds.run)
            async with seller.warm.lease(sale.account, limits) as worker:
                execution = self._execution = Execution(
                    self.checked,
                    seller.workers.class_id,
                    seller.store,
                    worker,
                    feeds=feeds,
                    owner=sale.owner,
                    at_hand=self.at_hand,
                    hold=sale.hold,
                )
                await execution.load(plans)
                if self._confirmed.is_set():
                    await self._get_ready()
                else:
                    nursery.start_soon(self._get_ready)
                outcome = await execution.run(self._checkpoint_plan(), self._tell_rows)
            await self._may_run.wait()
            nursery.cancel_scope.cancel()
        if outcome is not None:
            salt = sale.keep_result(outcome)
            done = Done(outcome.done_to, outcome.result.state_root, outcome.hash, salt)
            await sale.driver.on(done, Reveal())

    async def _get_ready(self) -> None:
        await self._confirmed.wait()
        await self._sale.driver.on(Ready())
        await self._may_run.wait()

    async def _keep_confirm(self) -> None:
        if not self._confirmed.is_set():
            await self._confirmed.wait()
            await trio.sleep(LIGHT_S)
        await self._sale.rows.flush()
        self.note_kept()

    def note_kept(self) -> None:
        """The confirm is on disk: what waited for that is told."""
        self._kept.set()
        rows, self._rows = self._rows, []
        for each in rows:
            self._sale.offer(each)

    def _supply(self) -> Supply:
        return Supply(
            self._seller.store,
            self._seller.dialer,
            peer_id(self._sale.bid.signer),
            self._sale.owner,
            self._sale.hold,
        )

    async def _tell_fetching(self, done_bytes: int, total_bytes: int) -> None:
        self._sale.offer(m.Fetching(done_bytes, total_bytes))

    async def _tell_lowering(self, done: int, total: int) -> None:
        self._sale.offer(m.Lowering(done, total))

    async def _tell_rows(self, rows: Rows) -> None:
        if len(self._rows) >= MAX_HELD_ROWS:
            await self._kept.wait()
        self.done_to = rows.last_step + 1
        self._rows.append(m.Rows(rows.first_step, rows.last_step, rows.values))
        # Else a restart would not know of the confirm, and the buyer be told the rows twice.
        if self._kept.is_set():
            self.note_kept()

    def _checkpoint_plan(self) -> Checkpoints:
        bid = self._sale.bid.record
        limit_nusd = self._seller.allocator.window_nusd(self._sale.account)
        self.window = window_of(bid, self.checked.work, limit_nusd, self._give_up_unsigned)
        return Checkpoints(
            bid.terms.checkpoint_steps,
            checkpoint_seconds(bid),
            self._wants_checkpoint,
            self._keep_checkpoint,
            self.window,
        )

    async def _keep_checkpoint(self, outcome: Outcome) -> None:
        await self._may_run.wait()
        await self._sale.keep_checkpoint(outcome)

    async def _give_up_unsigned(self) -> None:
        seconds = COUNTERSIGN_WITHIN_S
        reason = f"nothing was countersigned for {seconds:.0f} s, and the window is full"
        await self._sale.driver.on(Withdraw(reason, Blame.BUYER))

    def _wants_checkpoint(self, late: bool) -> bool:
        """A buyer that lags behind is billed for more with a later one.

        One that is not in the quote is not in the disk reserved either: one such at a time.
        """
        unsigned = self._sale.unsigned
        return unsigned == 0 if late else unsigned < MAX_UNSIGNED_RECEIPTS
