"""Running one checked job in one worker, from its inputs to its result record.

The same few steps serve a provider's lease and nothing else: lower what is not in the plan cache,
load, write inputs, initialise, run, and keep what came out. The node hashes every byte itself while
it reads it from the worker; what the worker says of itself is never believed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import trio

from p2pflop.dht.blobs import BlobWriter, Store
from p2pflop.dht.manifest import address_of
from p2pflop.errors import JobError, P2PFlopError, ProviderError
from p2pflop.job.delivery import check_result
from p2pflop.job.file import CheckedJob
from p2pflop.job.graph import graph_hash
from p2pflop.job.results import build_result, result_hash
from p2pflop.job.spec import NamedOutput, Result, ResultSource, collected, is_due, state_slots
from p2pflop.node.feeding import Feeds, Hold
from p2pflop.node.gathering import Gathering
from p2pflop.node.messages import MAX_INLINE_BLOBS, MAX_INLINE_BYTES
from p2pflop.node.window import Window
from p2pflop.node.worker_types import Paused, Rows, Worker, WorkerLimits, Workers
from p2pflop.units import MIB, NS_PER_S
from p2pflop.wire import encode

WORKER_BASE_BYTES: Final = 256 * MIB
"""What a lease takes beside the job's tensors: the interpreter, tinygrad, linked kernels."""
WORKER_SLACK_BYTES: Final = 64 * MIB
"""Of that, what the job's own limit allows for reading and writing tensors."""
MAX_OPEN_LOWERERS: Final = 2
DRAIN_S: Final = 30.0
"""How long a run that has failed may take to bring its last checkpoint to disk."""
WANT_AGAIN_S: Final = 5.0
"""After this a checkpoint that was due by the clock and not wanted is tried again."""
ASK_AGAIN_S: Final = 1.0
"""A worker that was asked to stand still does so after its step, which may be long."""
MAX_STEP_SECONDS: Final = 600.0
HOUR_NS: Final = 3600 * NS_PER_S
MAX_COST_RATIO: Final = 4
MIN_DEAR_FLOP: Final = 10**10
"""A job of less is done in seconds, whatever its meter said."""

OnLowering = Callable[[int, int], Awaitable[None]]
OnRows = Callable[[Rows], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """When there is a checkpoint, and who gets it.

    Every ``steps`` steps (0: never), and after ``seconds`` without one (0: never), if it is
    ``wanted`` then (told whether it is one of the latter); ``give`` takes what came out since the
    checkpoint before it. A ``window`` has one of the latter, too, and may have the worker wait.
    """

    steps: int
    seconds: float
    wanted: Callable[[bool], bool]
    give: Callable[[Outcome], Awaitable[None]]
    window: Window | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """Something that a run gave. ``data`` if it goes along with the delivery, else in the store."""

    address: bytes
    size_bytes: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave: the record, its hash, and everything that it names."""

    result: Result
    hash: bytes
    kept: tuple[Kept, ...]

    @property
    def done_to(self) -> int:
        """The step after the last one that was done."""
        return self.result.first_step + self.result.steps_done


def inline_blobs(kept: Sequence[Kept]) -> tuple[tuple[bytes, bytes], ...]:
    """What goes along with a delivery, each address once."""
    return tuple({k.address: k.data for k in kept if k.data is not None}.items())


def memory_bytes(checked: CheckedJob) -> int:
    """What a lease of this job must hold: the metered peak and the worker itself."""
    return checked.cost.peak_bytes + WORKER_BASE_BYTES


def unsupported(checked: CheckedJob) -> str:
    """Why this version cannot run the job, or an empty string."""
    if any(isinstance(param.source, ResultSource) for param in checked.work.params):
        return "inputs from other jobs' results are not supported yet"
    return ""


def worker_limits(checked: CheckedJob, lease_ns: int, threads: int) -> WorkerLimits:
    """What the worker of a lease that lasts ``lease_ns`` may use."""
    # Whole hours, so that a worker which lingers fits the same buyer's next lease of equal length.
    cpu_seconds = (lease_ns // HOUR_NS + 1) * HOUR_NS // NS_PER_S * threads
    return WorkerLimits(checked.cost.peak_bytes + WORKER_SLACK_BYTES, cpu_seconds, MAX_STEP_SECONDS)


def is_too_dear(pool: Workers, checked: CheckedJob, plans: Mapping[bytes, bytes]) -> bool:
    """Whether the lowered kernels compute so much more than the meter counted that a provider may
    give the lease back: fusion may compute an element anew for each of its readers."""
    lines = checked.cost.lines
    lowered_flop = sum(pool.flop_of(plans[line.graph]) * line.times for line in lines)
    return is_dear(lowered_flop, checked.cost.flop)


def is_dear(lowered_flop: int, metered_flop: int) -> bool:
    """Whether kernels compute so much more than was metered, that is than is paid for."""
    return lowered_flop > max(MAX_COST_RATIO * metered_flop, MIN_DEAR_FLOP)


async def lower_all(
    pool: Workers, graphs: Sequence[bytes], on_lowering: OnLowering
) -> dict[bytes, bytes]:
    """The plan of every encoded graph, by graph hash; from the cache, or lowered now."""
    plans, graphs = await _plans_at_hand(pool, graphs)
    if not graphs:
        return plans
    counts: dict[bytes, tuple[int, int]] = {}
    told, news = (0, 0), trio.Event()
    limiter = trio.CapacityLimiter(MAX_OPEN_LOWERERS)

    async def lower(graph: bytes) -> None:
        name = graph_hash(graph)

        def progress(done: int, total: int) -> None:
            counts[name] = (done, total)
            news.set()

        async with limiter:
            plans[name] = await pool.lower(graph, progress)

    async def tell() -> None:
        nonlocal news, told
        while True:
            await news.wait()
            news = trio.Event()
            now = (sum(d for d, _ in counts.values()), sum(t for _, t in counts.values()))
            if now != told:
                told = now
                await on_lowering(*now)

    async with trio.open_nursery() as outer:
        outer.start_soon(tell)
        async with trio.open_nursery() as inner:
            for graph in graphs:
                inner.start_soon(lower, graph)
        outer.cancel_scope.cancel()
    return plans


async def _plans_at_hand(
    pool: Workers, graphs: Sequence[bytes]
) -> tuple[dict[bytes, bytes], list[bytes]]:
    """The plans that need no lowering, and the graphs that do."""
    found = {graph: pool.plan_at_hand(graph) for graph in graphs}
    plans = {graph_hash(graph): plan for graph, plan in found.items() if plan is not None}
    return plans, [graph for graph, plan in found.items() if plan is None]


class Execution:
    """One job in one worker. What it gives belongs to ``owner``, and is told to ``hold`` as soon as
    it is in the store. Inputs are taken from ``at_hand``, by address, or else from the store."""

    def __init__(
        self,
        checked: CheckedJob,
        class_id: bytes,
        store: Store,
        worker: Worker,
        *,
        feeds: Feeds,
        owner: bytes,
        at_hand: Mapping[bytes, bytes],
        hold: Hold,
    ) -> None:
        self._checked = checked
        self._class_id = class_id
        self._store = store
        self._worker = worker
        self._feeds = feeds
        self._owner = owner
        self._at_hand = at_hand
        self._hold = hold
        self._done_to = checked.job.first_step
        self._whole = Gathering(checked, self._done_to)
        self._interval = Gathering(checked, self._done_to)
        self._states = state_slots(checked.work)
        self._nursery: trio.Nursery
        self._drained = trio.Event()
        self._drained.set()
        self._late = False
        self._checkpointed_at = trio.current_time()
        self._leaving = trio.Event()
        self._worker_stopped = self._has_left = False

    @property
    def has_left(self) -> bool:
        """Whether it has ended early because of ``leave``; its last checkpoint is given by then."""
        return self._has_left

    def leave(self) -> None:
        """End the run after the current step, with a checkpoint there."""
        self._leaving.set()

    async def load(self, plans: dict[bytes, bytes]) -> None:
        """Give the worker its plans and inputs, and let the weights be born."""
        await self._worker.load(encode(self._checked.work), plans)
        for slot, source in self._checked.inputs:
            await self._fill(slot, source.address, source.size_bytes, "input")
        await self._feed(self._checked.job.first_step, first=True)

    async def _feed(self, step: int, *, first: bool = False) -> None:
        async for slot, address in self._feeds.due(step, first=first):
            await self._fill(slot, address, self._checked.slot_bytes(slot), "shard")

    async def _fill(self, slot: int, address: bytes, size_bytes: int, what: str) -> None:
        """Raises JobError for a blob of another size: nothing of an earlier one may be left."""
        offset_bytes = 0
        async for chunk in self._read_input(address):
            if offset_bytes + len(chunk) <= size_bytes:
                await self._worker.write(slot, offset_bytes, chunk)
            offset_bytes += len(chunk)
        if offset_bytes != size_bytes:
            raise JobError(
                f"the {what} {address.hex()[:12]} of slot {slot} is of {offset_bytes} bytes, "
                f"not of the {size_bytes} that the job says"
            )

    async def _read_input(self, address: bytes) -> AsyncIterator[bytes]:
        if address in self._at_hand:
            yield self._at_hand[address]
            return
        manifest = await self._store.manifest(address)
        for index in range(len(manifest.chunks)):
            yield await self._store.read_chunk(address, index)

    async def run(self, checkpoints: Checkpoints, on_rows: OnRows) -> Outcome | None:
        """Run to the end, or to the work's own stop. None if it was left before.

        The worker stands still while the state of a checkpoint is read, and no longer: it goes on
        while that is brought to disk and told. Where the window is full it stands still, too.
        """
        job = self._checked.job
        end = job.first_step + job.steps
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if job.steps > 1:
                nursery.start_soon(self._ask_to_leave)
            if checkpoints.seconds and job.steps > 1:
                nursery.start_soon(self._run_clock, checkpoints.seconds)
            try:
                async for event in self._worker.run(job.first_step, job.steps, checkpoints.steps):
                    if isinstance(event, Rows):
                        self._note(event)
                        await on_rows(event)
                        await self._watch_window(event.last_step + 1, checkpoints)
                    elif isinstance(event, Paused):
                        await self._pause(event, checkpoints)
            except P2PFlopError:
                with trio.move_on_after(DRAIN_S):
                    await self._drained.wait()  # the buyer may go on from there
                raise
            await self._drained.wait()
            nursery.cancel_scope.cancel()
        if self._worker_stopped:
            self._has_left = True
            return None
        if not job.first_step < self._done_to <= end:
            raise ProviderError(f"the worker stopped at step {self._done_to}")
        return await self._finish()

    async def try_out(self, steps: int) -> None:
        """Run ``steps`` steps, or fewer where the work stops, and keep nothing. Raises JobError,
        ProviderError."""
        async for event in self._worker.run(self._checked.job.first_step, steps, 0):
            if isinstance(event, Paused) and not event.ended:
                await self._feed(event.step)

    async def _pause(self, event: Paused, checkpoints: Checkpoints) -> None:
        self._done_to = event.step
        await self._collect(event.step - 1)
        if event.ended:
            return
        due = checkpoints.steps > 0 and event.step % checkpoints.steps == 0
        if due or self._late:
            await self._checkpoint(event.step, checkpoints, late=not due)
        if not self._leaving.is_set():
            await self._feed(event.step)
            if checkpoints.window is not None:
                await self._stand(event.step, checkpoints, checkpoints.window)
        if self._leaving.is_set():
            if self._interval.first_step < event.step:
                await self._checkpoint(event.step, checkpoints, late=False)
            self._worker_stopped = True
            await self._worker.stop()

    async def _watch_window(self, step: int, checkpoints: Checkpoints) -> None:
        """Have the worker stand still in time for a receipt, or for want of room."""
        window = checkpoints.window
        if window is None or self._late or not window.wants_receipt(step):
            return
        if window.is_full(step):
            await self._worker.pause()
        elif self._drained.is_set() and checkpoints.wanted(True):
            self._late = True
            await self._worker.pause()

    async def _stand(self, step: int, checkpoints: Checkpoints, window: Window) -> None:
        """Wait before ``step`` while the window is full; only a receipt gets a countersignature."""
        while window.is_full(step) and not self._leaving.is_set():
            news = window.news
            await self._drained.wait()
            if checkpoints.wanted(True):
                await self._checkpoint(step, checkpoints, late=True)
            else:
                await window.wait(news)

    async def _checkpoint(self, step: int, checkpoints: Checkpoints, *, late: bool) -> None:
        await self._drained.wait()  # one at a time: the disk may be slower than the steps
        if checkpoints.wanted(late and not self._leaving.is_set()):
            self._late, self._checkpointed_at = False, trio.current_time()
            interval, self._interval = self._interval, Gathering(self._checked, step)
            drafts = await self._draft(interval, step)
            self._drained = trio.Event()
            self._nursery.start_soon(self._drain, interval, step, drafts, checkpoints)
        elif late:
            self._late = False
            self._checkpointed_at = trio.current_time() - checkpoints.seconds + WANT_AGAIN_S

    async def _drain(
        self, interval: Gathering, step: int, drafts: _Drafts, checkpoints: Checkpoints
    ) -> None:
        await checkpoints.give(await self._outcome(interval, step, drafts))
        self._drained.set()

    async def _run_clock(self, seconds: float) -> None:
        """Have the worker stand still when the last checkpoint is too old."""
        while True:
            wait_s = self._checkpointed_at + seconds - trio.current_time()
            if wait_s > 0:
                await trio.sleep(wait_s)
            elif self._late:
                await trio.sleep(ASK_AGAIN_S)
            else:
                self._late = True
                await self._worker.pause()

    async def _ask_to_leave(self) -> None:
        """Have the worker stand still; while it does so for another reason it does not hear."""
        await self._leaving.wait()
        while True:
            await self._worker.pause()
            await trio.sleep(ASK_AGAIN_S)

    def _note(self, rows: Rows) -> None:
        work = self._checked.work
        for step, phase, output, value in rows.values:
            if (
                phase >= len(work.phases)
                or not is_due(work.phases[phase], step)
                or output >= len(work.phases[phase].modes)
            ):
                raise ProviderError("the worker told a value that was not due")
            self._whole.note(phase, output, value)
            self._interval.note(phase, output, value)

    async def _collect(self, step: int) -> None:
        for phase, output in collected(self._checked.work, step):
            if not self._whole.has(phase, output, step):
                value = await self._keeper().store(self._worker.read_output(phase, output))
                self._whole.collect(phase, output, step, value.address)
                self._interval.collect(phase, output, step, value.address)

    async def _finish(self) -> Outcome:
        checked, end = self._checked, self._done_to
        outcome = await self._outcome(self._whole, end, await self._draft(self._whole, end))
        refusal = check_result(checked, self._class_id, outcome.result)
        if refusal is not None:
            raise ProviderError(f"the worker gave what cannot be delivered: {refusal.reason}")
        return outcome

    def _keeper(self) -> _Keeper:
        return _Keeper(self._store, self._owner, self._hold)

    async def _draft(self, gathering: Gathering, end: int) -> _Drafts:
        """All that a result up to the step ``end`` names, read in one go; to be finished."""
        keeper, outputs = self._keeper(), gathering.outputs(end)
        drafts = _Drafts(
            keeper.draft(),
            {slot: keeper.draft() for slot in self._states},
            {place: keeper.draft() for place in outputs},
        )
        try:
            await drafts.trace.add(gathering.trace())
            async for slot, chunk in self._worker.read_slots(self._states):
                await drafts.state[slot].add(chunk)
            for place, data in outputs.items():
                parts = self._worker.read_output(*place) if data is None else _once(data)
                async for part in parts:
                    await drafts.outputs[place].add(part)
        except BaseException:
            await _drop(drafts.all())
            raise
        return drafts

    async def _outcome(self, gathering: Gathering, end: int, drafts: _Drafts) -> Outcome:
        try:
            trace = await drafts.trace.finish()
            state = [await draft.finish() for draft in drafts.state.values()]
            outputs = {place: await draft.finish() for place, draft in drafts.outputs.items()}
        finally:
            await _drop(drafts.all())
        job = gathering.job(end)
        result = build_result(
            self._checked.work,
            job,
            class_id=self._class_id,
            steps_done=job.steps,
            outputs=[NamedOutput(*p, kept.address, kept.size_bytes) for p, kept in outputs.items()],
            trace=trace.address,
            state=[kept.address for kept in state],
        )
        return Outcome(result, result_hash(result), (trace, *state, *outputs.values()))


class _Keeper:
    """Holds one delivery: what is small in memory, as far as there is room, the rest in the store.

    What is in memory goes into the journal and along with the delivery, so that small jobs cost
    neither commits of the store nor fetches.
    """

    def __init__(self, store: Store, owner: bytes, hold: Hold) -> None:
        self._store = store
        self._owner = owner
        self._hold = hold
        self._room_bytes = MAX_INLINE_BYTES
        self._room_blobs = MAX_INLINE_BLOBS

    def draft(self) -> _Draft:
        """A value that is still to come."""
        return _Draft(self)

    def take_room(self, size_bytes: int) -> bool:
        """Take room in memory, if there is any left."""
        fits = size_bytes <= self._room_bytes and self._room_blobs > 0
        if fits:
            self._room_bytes -= size_bytes
            self._room_blobs -= 1
        return fits

    async def store(self, parts: AsyncIterator[bytes]) -> Kept:
        """Keep it in the store, however small."""
        async with self.writer() as writer:
            async for part in parts:
                await writer.write(part)
            return await self.stored(writer)

    def writer(self) -> BlobWriter:
        """For a value that goes to the store."""
        return self._store.writer(owner=self._owner)

    async def stored(self, writer: BlobWriter) -> Kept:
        """What was written, on disk and held."""
        info = await writer.finish()
        await self._hold([info.address])
        return Kept(info.address, info.size_bytes, None)


class _Draft:
    """A value on its way. Only ``finish`` waits for the disk to have it for good. Close it."""

    def __init__(self, keeper: _Keeper) -> None:
        self._keeper = keeper
        self._stack = AsyncExitStack()
        self._data = bytearray()
        self._writer: BlobWriter | None = None

    async def add(self, part: bytes) -> None:
        """The next bytes."""
        if self._writer is None:
            self._data += part
            if len(self._data) > MAX_INLINE_BYTES:
                await self._begin_to_store()
        else:
            await self._writer.write(part)

    async def finish(self) -> Kept:
        """Keep it."""
        if self._writer is None and self._keeper.take_room(len(self._data)):
            return Kept(address_of(self._data), len(self._data), bytes(self._data))
        writer = self._writer or await self._begin_to_store()
        return await self._keeper.stored(writer)

    async def aclose(self) -> None:
        """Let go of what was begun and not finished."""
        await self._stack.aclose()

    async def _begin_to_store(self) -> BlobWriter:
        writer = self._writer = await self._stack.enter_async_context(self._keeper.writer())
        await writer.write(bytes(self._data))
        self._data = bytearray()
        return writer


@dataclass(frozen=True, slots=True)
class _Drafts:
    """What a result names, by state slot and by phase and output."""

    trace: _Draft
    state: dict[int, _Draft]
    outputs: dict[tuple[int, int], _Draft]

    def all(self) -> list[_Draft]:
        return [self.trace, *self.state.values(), *self.outputs.values()]


async def _drop(drafts: Iterable[_Draft]) -> None:
    with trio.CancelScope(shield=True):
        for draft in drafts:
            await draft.aclose()


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
