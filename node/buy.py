"""The buying side: submissions, their ranking, and all purchases under way.

``purchase.py`` has one purchase; here is what they share, and what a restart does: a run that no
provider has filled is ranked again; one that was filled takes its conversation up where it was.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec
import trio

from p2pflop.dht.blobs import Store
from p2pflop.dht.manifest import address_of
from p2pflop.dht.planes import Dialer
from p2pflop.errors import BlobNotFoundError, ConfigError, JobError, P2PFlopError, StoreError
from p2pflop.job.collection import numbered_bytes
from p2pflop.job.events import Trial
from p2pflop.job.file import CheckedJob
from p2pflop.job.spec import FeedSource, class_id
from p2pflop.job.validate import Refusal
from p2pflop.kernels.classes import chosen_family, descriptor
from p2pflop.market.mandate import SALT_BYTES, Mandate
from p2pflop.market.ranking import MAX_POLICY_ACCOUNTS, Accounts, Deal, Miss, Policy, Quoted, rank
from p2pflop.market.records import NONCE_BYTES, Bid
from p2pflop.market.views import BookView
from p2pflop.node import messages as m
from p2pflop.node.earlier import answer, find_earlier, result_record
from p2pflop.node.evidence import evidence_of
from p2pflop.node.experience import Experience
from p2pflop.node.feeding import open_feed
from p2pflop.node.franchise import Franchise
from p2pflop.node.identity import Identity
from p2pflop.node.ledger_book import LedgerBook
from p2pflop.node.letters import Letters
from p2pflop.node.orders import (
    Order,
    Ranking,
    describe_order,
    describe_ranking,
    open_order,
    order_card,
    starting_from,
)
from p2pflop.node.outcomes import what_is_left
from p2pflop.node.purchase import Purchase
from p2pflop.node.runs import Run, Runs
from p2pflop.node.service import Json, SubmitOptions
from p2pflop.node.sheets import SheetService
from p2pflop.node.trying import try_out
from p2pflop.node.waiting_room import WaitingRoom
from p2pflop.node.wishes import Wishes
from p2pflop.node.worker_types import Workers
from p2pflop.wire import encode

JOB_ROW: Final = "job"
ANY_CLASS: Final = "any"
MAX_RUNS_UNDER_WAY: Final = 256
_CLASS_ID: Final = re.compile("[0-9a-f]{64}")
SMALL_FILE_BYTES: Final = 1024
"""Up to here a job file is opened on the event loop: the hop to a thread would cost more."""

Ranker = Callable[[BookView, bytes, Policy, Accounts], list[Deal | Miss]]
"""Ranks the asks of a view for something, with the nonce of the bid that may follow, by a policy
and by which accounts are admitted."""

_log = logging.getLogger(__name__)


class _JobRow(msgspec.Struct, array_like=True, frozen=True):
    """A submission as the journal keeps it."""

    file: bytes
    max_nusd: int
    deadline_ns: int
    checkpoint_steps: int
    checkpoint_s: int
    classes: tuple[bytes, ...]
    rests: bool = False


@dataclass(slots=True)
class Buyer:
    """Everything that this node buys. ``workers`` try out, with ``memory_bytes`` at most, whether
    a job faults as others say."""

    identity: Identity
    store: Store
    dialer: Dialer
    sheets: SheetService
    runs: Runs
    ledger_book: LedgerBook
    letters: Letters
    franchise: Franchise
    workers: Workers
    memory_bytes: int
    nursery: trio.Nursery
    now_ns: Callable[[], int]
    experience: Experience = field(init=False)
    waiting: WaitingRoom = field(init=False)
    wishes: Wishes = field(init=False)
    _trials: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(1))
    _needed: dict[str, frozenset[bytes]] = field(default_factory=dict)
    _lent: Counter[tuple[bytes, bytes]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.experience = Experience(self.identity.account.public_key)
        self.waiting = WaitingRoom(self.nursery)
        self.wishes = Wishes(
            self.identity,
            self.sheets,
            self.nursery,
            self.now_ns,
            self.waiting.wake,
            self.franchise,
            secrets.SystemRandom().random,
        )

    @property
    def class_id(self) -> bytes:
        """Of this node's own workers: in which a job is computed unless told otherwise."""
        return self.workers.class_id

    def may_try(self, bid: Bid) -> bool:
        """Whether the job of ``bid`` can be run here, in its class."""
        fits = bid.terms.memory_bytes <= self.memory_bytes
        return fits and bid.class_id == self.class_id and not self.workers.broken

    async def try_out(self, order: Order) -> tuple[Trial, str]:
        """Whether what is left of a job faults here, and how. One job at a time."""
        async with self._trials:
            return await try_out(order, self.workers, self.store)

    async def submit(
        self,
        body: bytes,
        options: SubmitOptions,
        inputs: Sequence[bytes] = (),
        rows: Sequence[tuple[str, bytes]] = (),
    ) -> str:
        """Check, journal and start. Raises JobError, BlobNotFoundError, ConfigError, StoreError.

        What has been bought before ends at once with the earlier run's result, unless the options
        want it fresh. A submission with the id of a run that there is changes nothing. ``inputs``,
        of ``SMALL_BYTES`` each at most, are kept and ``rows`` journalled with it.
        """
        if options.run_id is not None and await self._has_run(options.run_id, body):
            return options.run_id
        if self.runs.under_way() >= MAX_RUNS_UNDER_WAY:
            raise ConfigError(
                f"{MAX_RUNS_UNDER_WAY} jobs are under way", hint="Wait for some, or cancel them."
            )
        classes = await self.classes_named(options.classes)
        if len(body) <= SMALL_FILE_BYTES:
            order = open_order(body, options, classes, self.now_ns())
        else:
            order = await trio.to_thread.run_sync(open_order, body, options, classes, self.now_ns())
        given = _given(order, inputs)
        order = await self._with_members(self._with_start(order))
        await self._check_inputs(order, given)
        earlier = None
        if not options.fresh:
            earlier = await find_earlier(order, self.class_id, self.runs, self.store)
        if options.run_id is not None and await self._has_run(options.run_id, body):
            return options.run_id
        staged = self.store.stage(tuple(given.values())) if given else None
        run = self.runs.create(order_card(order), options.run_id)
        self.add_job(run, order, body)
        if staged is not None:
            run.rows.add_blobs(staged)
        for kind, data in rows:
            run.rows.add(kind, data)
        if earlier is not None:
            try:
                await answer(run, order, earlier, self.runs)
            except StoreError as error:
                await self.fail(run, error)
            return run.id
        self.nursery.start_soon(self._buy, run, order)
        await run.rows.wait_flushed()
        return run.id

    def add_job(self, run: Run, order: Order, body: bytes) -> None:
        """Have a submission journalled with the run's next flush; ``body`` is its job file."""
        row = _JobRow(
            body,
            order.max_nusd,
            order.deadline_ns,
            order.checkpoint_steps,
            order.checkpoint_s,
            tuple(sorted(order.classes)),
            order.rests,
        )
        run.rows.add(JOB_ROW, msgspec.msgpack.encode(row))

    async def _has_run(self, run_id: str, body: bytes) -> bool:
        """Whether that run exists. Raises ConfigError if it is of another job."""
        if not await self.runs.knows(run_id):
            return False
        if self.job_file(run_id) != body:
            raise ConfigError(f"job {run_id} is another job", hint="Give each job its own id.")
        return True

    async def quote(self, body: bytes, options: SubmitOptions) -> Json:
        """What ``submit`` would choose from now."""
        classes = await self.classes_named(options.classes)
        order = self._with_start(open_order(body, options, classes, self.now_ns()))
        return describe_ranking(self.rank(order, order.classes)) | describe_order(order)

    async def classes_named(self, names: Sequence[str]) -> frozenset[bytes]:
        """The classes that a submission's names stand for; empty for any. Raises ConfigError."""
        if not names:
            return frozenset({self.class_id})
        if tuple(names) == (ANY_CLASS,):
            return frozenset()
        if ANY_CLASS in names:
            raise ConfigError("any class and others beside it", hint="Give 'any' alone.")
        return frozenset({await _class_named(name) for name in names})

    def rank(
        self,
        order: Order,
        classes: frozenset[bytes],
        quoted: Sequence[Quoted] = (),
        *,
        only: Sequence[bytes] = (),
        excluded: Sequence[bytes] = (),
    ) -> Ranking:
        """Rank the book as it is now, of these classes or, if there are none, of all, and what is
        ``quoted``; of ``only`` these accounts, if any are named, and of none that is ``excluded``.
        """

        def ranked(
            view: BookView, nonce: bytes, policy: Policy, admitted: Accounts
        ) -> list[Deal | Miss]:
            need = order.need(classes or frozenset(view.by_price), nonce)
            return rank(view.sheets, need, policy, view.at_ns, admitted, quoted)

        return self.look(ranked, classes, order.max_nusd, only=only, excluded=excluded)

    def look(
        self,
        ranked: Ranker,
        classes: frozenset[bytes],
        max_nusd: int,
        *,
        excluded: Sequence[bytes] = (),
        only: Sequence[bytes] = (),
    ) -> Ranking:
        """The book as it is now, ``ranked`` for ``classes``, or any if there are none, a budget and
        this node's policy: who has failed lately is avoided if anybody else does, ``excluded``
        accounts are in any case, as are others than ``only``."""
        now_ns = self.now_ns()
        nonce = secrets.token_bytes(NONCE_BYTES)
        kept = self.sheets.view(now_ns)
        view = BookView(kept.sheets, now_ns, kept.shelf)
        avoided = self.experience.pauses(now_ns)
        is_strict, admitted = self.franchise.is_strict, self.franchise.admitted(view.at_ns)
        # Better one that has failed before than none.
        for left_alone in (avoided, ()):
            accounts = sorted({*excluded, *(each.account for each in left_alone)})
            policy = Policy(
                excluded=tuple(accounts[:MAX_POLICY_ACCOUNTS]),
                only=tuple(only[:MAX_POLICY_ACCOUNTS]),
                attested_only=is_strict,
            )
            entries = ranked(view, nonce, policy, admitted)
            if any(isinstance(entry, Deal) for entry in entries):
                break
        salt = secrets.token_bytes(SALT_BYTES)
        mandate = Mandate(policy.canonical(), max_nusd, tuple(sorted(classes)), salt)
        return Ranking(nonce, view, mandate, entries, admitted, left_alone)

    def job_file(self, run_id: str) -> bytes:
        """The encoded job file of a run. Raises ConfigError for a session, which has none."""
        if self.runs.get(run_id).is_session:
            raise ConfigError(
                f"{run_id} is the session of a script, and has no job file",
                hint=f"See p2pflop show {run_id}.",
            )
        return self._job_row(self.runs.get(run_id)).file

    def result_record(self, run_id: str) -> bytes:
        """The encoded Result of a run that has settled. Raises ConfigError before."""
        return result_record(self.runs, run_id)

    def evidence(self, run_id: str) -> bytes:
        """The encoded Evidence of how a run's providers were chosen, or those of its pack."""
        run = self.runs.get(run_id)
        run = self.runs.get(run.card.get("pack", run_id))
        network = self.identity.network
        return encode(evidence_of(self.runs.rows(run.id), self.runs.sheet, network))

    def resume(self) -> None:
        """Take up every run that a restart found unfinished."""
        for head in self.runs.unfinished():
            self.nursery.start_soon(self._take_up, self.runs.adopt(head))
        self.letters.resume()

    async def lend(self, order: Order, provider: bytes) -> list[bytes]:
        """Let a provider's node read the inputs of an order; their addresses. Raises StoreError."""
        addresses = await self._inputs(order)
        self._lent.update((address, provider) for address in addresses)
        return addresses

    async def small_inputs(self, order: Order) -> tuple[tuple[bytes, bytes], ...]:
        """What goes along with the confirm, so that the provider need not ask for it."""
        room_bytes = m.MAX_INLINE_BYTES
        small: dict[bytes, bytes] = {}
        for _, source in order.checked.named_inputs:
            known = source.address in small
            if known or source.size_bytes > room_bytes or len(small) == m.MAX_INLINE_BLOBS:
                continue
            room_bytes -= source.size_bytes
            small[source.address] = await self.store.get(source.address)
        return tuple(small.items())

    def take_back(self, addresses: Sequence[bytes], provider: bytes) -> None:
        """The end of ``lend``, unless another purchase from that provider goes on."""
        self._lent.subtract((address, provider) for address in addresses)
        for address in addresses:
            if self._lent[address, provider] <= 0:
                del self._lent[address, provider]

    def lends(self, address: bytes, reader: bytes) -> bool:
        """Whether ``reader``, a provider's node, may read an input now."""
        return (address, reader) in self._lent

    async def need(self, run_id: str, order: Order) -> None:
        """The inputs of ``order`` are needed until the run is over. Raises StoreError."""
        self._needed[run_id] = frozenset(await self._inputs(order))

    def needed_by(self, address: bytes) -> str:
        """A run under way that has that blob as an input; empty if there is none."""
        return next((run for run, needed in self._needed.items() if address in needed), "")

    async def _take_up(self, run: Run) -> None:
        try:
            row = self._job_row(run)
            options = SubmitOptions(
                row.max_nusd, None, row.checkpoint_steps, row.checkpoint_s, rest=row.rests
            )
            order = await trio.to_thread.run_sync(
                open_order,
                row.file,
                options,
                frozenset(row.classes),
                self.now_ns(),
                row.deadline_ns,
            )
            order = await self._with_members(self._with_start(order))
        except P2PFlopError as error:
            await self.fail(run, error)
        except Exception as error:  # noqa: BLE001 - likewise
            _log.exception("job %s", run.id)
            await self.fail(run, P2PFlopError(f"the node failed: {error!r}"))
        else:
            await self._buy(run, order, resume=True)

    async def _buy(self, run: Run, order: Order, *, resume: bool = False) -> None:
        purchase: Purchase | None = None
        try:
            await self.need(run.id, order)
            purchase = Purchase(self, run, order)
            await purchase.run(resume=resume)
        except P2PFlopError as error:
            await self.fail(run, error)
        except Exception as error:  # noqa: BLE001 - one job's bug must not end the node
            _log.exception("job %s", run.id)
            await self.fail(run, P2PFlopError(f"the node failed: {error!r}"))
        finally:
            self._needed.pop(run.id, None)
            if purchase is not None:
                purchase.leave_room()

    async def fail(self, run: Run, error: P2PFlopError) -> None:
        """End a run with an error. Never raises: without a disk, only this process knows of it."""
        if run.over:
            return
        with suppress(StoreError):
            await run.rows.flush()
        await self.runs.fail(run, error, self.what_is_left(run))

    async def tell_cancelled(self, run: Run, cost_nusd: int) -> None:
        """End a run as cancelled, with what it has cost. Raises StoreError."""
        left = self.what_is_left(run)
        run.card["cost_nusd"] = cost_nusd
        await self.runs.emit(run, "cancelled", cost_nusd=cost_nusd, hint=left)

    def what_is_left(self, run: Run) -> str:
        """How to go on from the last checkpoint of a run that ends early; may be empty."""
        work = bytes.fromhex(run.card["work"])
        computed_in = bytes.fromhex(run.card.get("class_id", self.class_id.hex()))
        return what_is_left(
            run,
            lambda step: computed_in in self.runs.states(work, step),
            "" if computed_in == self.class_id else computed_in.hex(),
        )

    def _job_row(self, run: Run) -> _JobRow:
        for row in self.runs.rows(run.id):
            if row.kind == JOB_ROW:
                return msgspec.msgpack.decode(row.body, type=_JobRow)
        raise StoreError(f"the journal has no job file for {run.id}")

    def _with_start(self, order: Order) -> Order:
        """``order`` with the state that it starts from. Raises JobError if that is not known."""
        checked = order.checked
        if checked.starts:
            return order
        states = self.runs.states(checked.work_id, checked.job.first_step)
        return starting_from(order, states, self.class_id)

    async def _with_members(self, order: Order) -> Order:
        """``order`` with the blobs known that its collections name.

        Raises BlobNotFoundError, JobError, StoreError.
        """
        checked, collections = order.checked, {}
        for slot, source in checked.member_slots:
            address, size_bytes = source.collection, source.collection_bytes
            if address not in collections:
                await self._check_input(order, slot, address, size_bytes)
                collections[address] = await self.store.get(address, size_bytes)
        resolved = checked.resolve(collections)
        if isinstance(resolved, Refusal):
            raise JobError(f"the job is not valid: {resolved.reason}")
        return replace(order, checked=resolved)

    async def _inputs(self, order: Order) -> list[bytes]:
        """The blobs that a provider needs, collections and those of feeds too."""
        checked = order.checked
        addresses = [*checked.collections, *(source.address for _, source in checked.inputs)]
        for slot, source in checked.feeds:
            addresses += [source.collection, *await self._shards(checked, slot, source)]
        return addresses

    async def _check_inputs(self, order: Order, given: Mapping[bytes, bytes]) -> None:
        checked = order.checked
        for slot, source in checked.inputs:
            if source.address not in given:
                await self._check_input(order, slot, source.address, source.size_bytes)
            elif len(given[source.address]) != source.size_bytes:
                raise _wrong_size(slot)
        for slot, feed in checked.feeds:
            size_bytes = checked.slot_bytes(slot)
            collection_bytes = numbered_bytes(feed.shards, size_bytes)
            await self._check_input(order, slot, feed.collection, collection_bytes)
            for address in await self._shards(checked, slot, feed):
                await self._check_input(order, slot, address, size_bytes)

    async def _check_input(self, order: Order, slot: int, address: bytes, size_bytes: int) -> None:
        info = await self.store.stat(address)
        if info is None:
            name = order.file.labels.params[slot]
            raise BlobNotFoundError(
                f"the input {name!r} ({address.hex()}) is not in this node's store",
                hint="Put it first: pf.submit does, and p2pflop put FILE.",
            )
        if info.size_bytes != size_bytes:
            raise _wrong_size(slot)
        if info.owner:
            # Here for a stranger's lease, and gone an hour after it: from now on it is this node's.
            async with await self.store.begin(await self.store.manifest(address)) as partial:
                await partial.finish()

    async def _shards(self, checked: CheckedJob, slot: int, source: FeedSource) -> list[bytes]:
        size_bytes = checked.slot_bytes(slot)
        data = await self.store.get(source.collection, numbered_bytes(source.shards, size_bytes))
        return open_feed(slot, source, size_bytes, data)


def _given(order: Order, inputs: Sequence[bytes]) -> dict[bytes, bytes]:
    """What came along with a job, by address. Raises JobError if it is no input of it."""
    given = {address_of(data): data for data in inputs}
    if not given.keys() <= {source.address for _, source in order.checked.named_inputs}:
        raise JobError("what came along with the job is no input of it")
    return given


def _wrong_size(slot: int) -> JobError:
    return JobError(f"the input in slot {slot} is not of the size that the job says")


async def _class_named(name: str) -> bytes:
    """A class by its id in hex, or by the name of one of this machine's. Raises ConfigError."""
    if _CLASS_ID.fullmatch(name):
        return bytes.fromhex(name)
    chosen_family(name)
    # Asks compilers and drivers for their versions, the first time.
    return class_id(await trio.to_thread.run_sync(descriptor, name))
