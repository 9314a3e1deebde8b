"""The buying side: submissions, their ranking, and all purchases under way.

``purchase.py`` has one purchase; here is what they share, and what a restart does: a run that no
provider has filled is ranked again; one that was filled takes its conversation up where it was.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec
import trio

from p2pflop.dht.blobs import Store
from p2pflop.dht.planes import Dialer
from p2pflop.errors import BlobNotFoundError, ConfigError, JobError, P2PFlopError, StoreError
from p2pflop.job.events import State
from p2pflop.job.lifecycle import PROVIDER_LIMITS
from p2pflop.market.ranking import Need, Policy, rank
from p2pflop.market.records import NONCE_BYTES
from p2pflop.node import messages as m
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
from p2pflop.node.purchase import LETTER_ROW, RESULT_ROW, Letter, Purchase, leave_word
from p2pflop.node.runs import Run, Runs
from p2pflop.node.service import Json, SubmitOptions
from p2pflop.node.sheets import SheetService
from p2pflop.units import NS_PER_S

JOB_ROW: Final = "job"
MAX_RUNS_UNDER_WAY: Final = 256
DELIVER_WITHIN_NS: Final = 24 * 3600 * NS_PER_S
REMIND_WITHIN_NS: Final = PROVIDER_LIMITS[State.RECEIPTED].after_ns
"""After a restart, whatever ended so recently is told again: acknowledgements are not kept."""
DELIVER_AGAIN_S: Final = 1.0
MAX_DELIVER_AGAIN_S: Final = 300.0
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
    _lent: Counter[tuple[bytes, bytes]] = field(default_factory=Counter)

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
        for run_id in self.runs.ended_since(self.now_ns() - REMIND_WITHIN_NS):
            for row in self.runs.rows(run_id):
                if row.kind == LETTER_ROW:
                    letter = msgspec.msgpack.decode(row.body, type=Letter)
                    self.nursery.start_soon(self.deliver, letter)

    async def lend(self, order: Order, provider: bytes) -> None:
        """Let a provider's node read the inputs of an order. Raises StoreError."""
        for _, source in input_blobs(order.checked):
            self._lent[source.address, provider] += 1
            await self.store.grant(source.address, provider)

    async def take_back(self, order: Order, provider: bytes) -> None:
        """The end of ``lend``, unless another purchase from that provider goes on. Never raises."""
        for _, source in input_blobs(order.checked):
            key = (source.address, provider)
            self._lent[key] -= 1
            if self._lent[key] <= 0:
                del self._lent[key]
                try:
                    await self.store.revoke(*key)
                except StoreError as error:
                    _log.warning("an input stays readable for its provider: %s", error)

    async def deliver(self, letter: Letter) -> None:
        """Bring a countersignature to a provider that is away, for as long as a day.

        The ledger here says already that the money is owed; this makes the provider's say so.
        """
        until_ns = self.now_ns() + DELIVER_WITHIN_NS
        wait_s = DELIVER_AGAIN_S
        while self.now_ns() < until_ns:
            if await leave_word(self.dialer, letter.peer, m.Countersigned(letter.wire)):
                return
            await trio.sleep(wait_s)
            wait_s = min(2 * wait_s, MAX_DELIVER_AGAIN_S)
        _log.warning("%s never acknowledged what is owed to it", letter.peer)

    async def _take_up(self, run: Run) -> None:
        try:
            row = self._job_row(run)
            options = SubmitOptions(row.max_nusd, None, row.checkpoint_steps)
            order = await trio.to_thread.run_sync(
                open_order, row.file, options, self.now_ns(), row.deadline_ns
            )
        except P2PFlopError as error:
            await self.fail(run, error)
        except Exception as error:  # noqa: BLE001 - likewise
            _log.exception("job %s", run.id)
            await self.fail(run, P2PFlopError(f"the node failed: {error!r}"))
        else:
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
        """End a run with an error. Never raises: without a disk, only this process knows of it."""
        if run.over:
            return
        told = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        try:
            await self.runs.emit(run, "failed", **told)
        except StoreError as fault:
            _log.error("job %s: its end is not on disk: %s", run.id, fault)
            self.runs.lose(run, **told)

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
