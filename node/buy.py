"""The buying side: submissions, their ranking, and all purchases under way.

``purchase.py`` has one purchase; here is what they share, and what a restart does: a run that no
provider has filled is ranked again; one that was filled takes its conversation up where it was.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec
import trio

from p2pflop.dht.blobs import Store
from p2pflop.dht.planes import Dialer
from p2pflop.errors import BlobNotFoundError, ConfigError, JobError, P2PFlopError, StoreError
from p2pflop.market.ranking import Need, Policy, rank
from p2pflop.market.records import NONCE_BYTES
from p2pflop.node.execute import input_blobs
from p2pflop.node.identity import Identity
from p2pflop.node.ledger_book import LedgerBook
from p2pflop.node.orders import (
    Order,
    Ranking,
    describe_order,
    describe_ranking,
    open_order,
    order_card,
)
from p2pflop.node.purchase import RESULT_ROW, Purchase
from p2pflop.node.runs import Run, Runs
from p2pflop.node.service import Json, SubmitOptions
from p2pflop.node.sheets import SheetService

JOB_ROW: Final = "job"
MAX_RUNS_UNDER_WAY: Final = 256
SMALL_FILE_BYTES: Final = 1024
"""Up to here a job file is opened on the event loop: the hop to a thread would cost more."""

_log = logging.getLogger(__name__)


class _JobRow(msgspec.Struct, array_like=True, frozen=True):
    """A submission as the journal keeps it."""

    file: bytes
    max_nusd: int
    deadline_ns: int
    checkpoint_steps: int


@dataclass(slots=True)
class Buyer:
    """Everything that this node buys."""

    identity: Identity
    class_id: bytes
    store: Store
    dialer: Dialer
    sheets: SheetService
    runs: Runs
    ledger_book: LedgerBook
    nursery: trio.Nursery
    now_ns: Callable[[], int]

    async def submit(self, body: bytes, options: SubmitOptions) -> str:
        """Check, journal and start. Raises JobError, BlobNotFoundError, ConfigError."""
        if self.runs.under_way() >= MAX_RUNS_UNDER_WAY:
            raise ConfigError(
                f"{MAX_RUNS_UNDER_WAY} jobs are under way", hint="Wait for some, or cancel them."
            )
        if len(body) <= SMALL_FILE_BYTES:
            order = open_order(body, options, self.now_ns())
        else:
            order = await trio.to_thread.run_sync(open_order, body, options, self.now_ns())
        await self._check_inputs(order)
        row = _JobRow(body, order.max_nusd, order.deadline_ns, order.checkpoint_steps)
        run = self.runs.create(order_card(order))
        run.rows.add(JOB_ROW, msgspec.msgpack.encode(row))
        self.nursery.start_soon(self._buy, run, order)
        await run.rows.wait_flushed()
        return run.id

    def quote(self, body: bytes, options: SubmitOptions) -> Json:
        """What ``submit`` would choose from now."""
        order = open_order(body, options, self.now_ns())
        return describe_ranking(self.rank(order)) | describe_order(order)

    def rank(self, order: Order) -> Ranking:
        """Rank the book as it is now."""
        now_ns = self.now_ns()
        nonce = secrets.token_bytes(NONCE_BYTES)
        policy = Policy()
        view = self.sheets.book.view(now_ns)
        need = Need(
            class_ids=frozenset({self.class_id}),
            flop=order.checked.cost.flop,
            touched_bytes=order.checked.cost.touched_bytes,
            moved_bytes=order.moved_bytes,
            memory_bytes=order.terms.memory_bytes,
            deadline_ns=order.deadline_ns,
            max_nusd=order.max_nusd,
            nonce=nonce,
        )
        return Ranking(nonce, view, policy, rank(view.sheets, need, policy, now_ns))

    def job_file(self, run_id: str) -> bytes:
        """The encoded job file of a run."""
        return self._job_row(self.runs.get(run_id)).file

    def result_record(self, run_id: str) -> bytes:
        """The encoded Result of a run that has settled. Raises ConfigError before."""
        run = self.runs.get(run_id)
        rows = [row for row in self.runs.rows(run.id) if row.kind == RESULT_ROW]
        if not rows or run.card["end_state"] != "settled":
            raise ConfigError(
                f"job {run_id} has no result: it is {run.card['state']}",
                hint=f"See p2pflop watch {run_id}.",
            )
        return rows[-1].body

    def resume(self) -> None:
        """Take up every run that a restart found unfinished."""
        for head in self.runs.unfinished():
            self.nursery.start_soon(self._take_up, self.runs.adopt(head))

    async def _take_up(self, run: Run) -> None:
        try:
            row = self._job_row(run)
            options = SubmitOptions(row.max_nusd, None, row.checkpoint_steps)
            order = await trio.to_thread.run_sync(
                open_order, row.file, options, self.now_ns(), row.deadline_ns
            )
        except P2PFlopError as error:
            await self.fail(run, error)
            return
        await self._buy(run, order, resume=True)

    async def _buy(self, run: Run, order: Order, *, resume: bool = False) -> None:
        try:
            await Purchase(self, run, order).run(resume=resume)
        except P2PFlopError as error:
            await self.fail(run, error)
        except Exception as error:  # noqa: BLE001 - one job's bug must not end the node
            _log.exception("job %s", run.id)
            await self.fail(run, P2PFlopError(f"the node failed: {error!r}"))

    async def fail(self, run: Run, error: P2PFlopError) -> None:
        """End a run with an error."""
        if not run.over:
            await self.runs.emit(
                run, "failed", error=type(error).__name__, message=error.message, hint=error.hint
            )

    def _job_row(self, run: Run) -> _JobRow:
        for row in self.runs.rows(run.id):
            if row.kind == JOB_ROW:
                return msgspec.msgpack.decode(row.body, type=_JobRow)
        raise StoreError(f"the journal has no job file for {run.id}")

    async def _check_inputs(self, order: Order) -> None:
        for slot, source in input_blobs(order.checked):
            info = await self.store.stat(source.address)
            if info is None:
                name = order.file.labels.params[slot]
                raise BlobNotFoundError(
                    f"the input {name!r} ({source.address.hex()}) is not in this node's store",
                    hint="Put it first: pf.submit does, and p2pflop put FILE.",
                )
            if info.size_bytes != source.size_bytes:
                raise JobError(f"the input in slot {slot} is not of the size that the job says")
