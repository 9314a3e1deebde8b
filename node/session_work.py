"""Obeying the commands of one session in one worker, in order and as early as possible.

``take`` checks a Batch against the session's table and begins at once with what takes long: the
graphs that it defines are lowered, the blobs that it loads are fetched. ``run`` feeds the worker,
which may be several batches behind, and compares its answers with what was asked: it is hostile
native code, so number, size and order of what it says are counted here. Who pays, and who is told,
is not known here: a lease that is sold and a session in its own user's node do the same.

``idle`` counts the time in which neither the worker nor the lowerer has anything to do: it waits
for commands then, for blobs, or for somebody to take what was read.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import trio
from msgspec.structs import replace

from p2pflop.dht.blobs import Store
from p2pflop.dht.manifest import chunk_count
from p2pflop.errors import JobError, ProtocolError, ProviderError
from p2pflop.job.commands import (
    Batch,
    Check,
    Data,
    Define,
    Hold,
    Load,
    Ran,
    Read,
    WorkedCommand,
)
from p2pflop.job.meter import MAX_LINE_VALUE
from p2pflop.job.session import Mark, OpenGraph, SessionTable
from p2pflop.node.execute import is_dear
from p2pflop.node.idle_clock import IdleClock
from p2pflop.node.session_messages import WINDOW_BYTES, WINDOW_COMMANDS
from p2pflop.node.worker_types import SessionWorker, Workers
from p2pflop.units import NS_PER_S
from p2pflop.wire import encode

OWN_ACCOUNT: Final = b""
"""The user of this node, as an account whose graphs are lowered."""
MAX_LOWERING: Final = 2
MAX_FETCHING: Final = 2
MAX_CHECKS: Final = 65_536
"""In one batch."""
PLACES_AT_ONCE: Final = 65_536
"""Of the bindings that run: to look at so many takes some 10 ms, and then others have a turn."""
MAX_KERNELS: Final = 2**32 - 1
MAX_BUSY_NS: Final = 3600 * NS_PER_S
"""Of one batch; what a worker says beyond is cut."""

Opened = Callable[[bytes], Awaitable[OpenGraph]]
Allows = Callable[[Mark], bool]
Report = Callable[[Ran | Data], Awaitable[None]]


class Blobs(Protocol):
    """What brings the blobs of Loads into the store. Both may raise JobError, ProviderError,
    StoreError."""

    async def bring(self, load: Load) -> None:
        """Have a blob, of just that size. Called in the order of the commands."""

    async def used(self, load: Load) -> None:
        """It is in the worker's memory."""


@dataclass(slots=True)
class _Later:
    """What a Define or Load waits for: the plan of a graph, or a blob."""

    command: Define | Load
    graph: bytes = b""
    flop: int = 0
    nodes: int = 0
    plan: bytes = b""
    done: trio.Event = field(default_factory=trio.Event)


@dataclass(frozen=True, slots=True)
class _Taken:
    """A batch, what it comes to with all before it, and, by place, what its commands wait for and
    what is looked at before them."""

    batch: Batch
    size_bytes: int
    mark: Mark
    later: dict[int, _Later]
    checks: dict[int, tuple[Check, ...]]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the worker has yet to report of one ``obey``: the numbers of its commands, their Reads
    as ``[number, bytes left]``, and whether it was the last of its batch."""

    numbers: list[int]
    reads: deque[list[int]]
    ends: bool


class SessionWork:
    """One session. ``take`` comes from one task, ``run`` is another.

    ``table`` has what was taken, ``fed`` what the worker was given of it, ``done`` what it has
    obeyed.
    """

    def __init__(
        self,
        workers: Workers,
        store: Store,
        opened: Opened,
        blobs: Blobs,
        report: Report,
        memory_bytes: int,
        account: bytes,
        *,
        refuses_dear: bool = False,
    ) -> None:
        self.table = SessionTable(memory_bytes)
        self.done = self.fed = Mark()
        self._workers = workers
        self._store = store
        self._opened = opened
        self._blobs = blobs
        self._report = report
        self._waiting_bytes = self._told = 0
        self._known: set[bytes] = set()
        self._queue, self._taken = trio.open_memory_channel[_Taken](WINDOW_COMMANDS)
        self._graphs, self._to_lower = trio.open_memory_channel[_Later](WINDOW_COMMANDS)
        self._loads, self._to_bring = trio.open_memory_channel[_Later](WINDOW_COMMANDS)
        self._under_way: deque[_Taken] = deque()
        self._asked: deque[_Asked] = deque()
        self._account = account
        self._refuses_dear = refuses_dear
        self._begun_nodes = 0
        self.is_finishing = False
        self.idle = IdleClock()
        self._reported = 0
        self._worker: SessionWorker | None = None
        self._ran = Ran(0, 0, 0, 0, 0)
        self._progress = trio.Event()

    @property
    def suspect(self) -> int:
        """The command to blame if the worker gives up."""
        place = 0 if self._worker is None else self._worker.reached - self._reported
        for asked in self._asked:
            if place < len(asked.numbers):
                return asked.numbers[place]
            place -= len(asked.numbers)
        return self.done.count

    @property
    def begun(self) -> Mark:
        """As ``done``, with the batch that the worker is at, and all graphs whose lowering has
        begun."""
        mark = self._under_way[0].mark if self._asked else self.done
        return dataclasses.replace(
            mark,
            count=max(1, mark.count),
            lowered_nodes=max(mark.lowered_nodes, self._begun_nodes),
        )

    async def take(self, batch: Batch, allows: Allows = lambda _: True) -> None:
        """Check a batch and have it obeyed. Raises ProtocolError for what no honest peer sends,
        such as commands that come to more than is allowed, JobError for a command that is refused:
        the one that the table then counts up to."""
        if batch.first != self.table.count or not batch.commands:
            raise ProtocolError(f"commands from {batch.first}, where {self.table.count} is due")
        waiting = self.table.count - self._told
        if waiting + len(batch.commands) > WINDOW_COMMANDS or self._waiting_bytes > WINDOW_BYTES:
            raise ProtocolError("more commands than the window lets through")
        later: dict[int, _Later] = {}
        checks: dict[int, tuple[Check, ...]] = {}
        places = looked = 0
        for place, command in enumerate(batch.commands):
            graph = await self._opened(command.graph) if isinstance(command, Define) else None
            places += self.table.places(command)
            if places > PLACES_AT_ONCE:
                places = 0
                await trio.lowlevel.checkpoint()
            if due := self.table.checks(command):
                checks[place] = due
                looked += len(due)
                if looked > MAX_CHECKS:
                    raise JobError(f"over {MAX_CHECKS} views of bools are new in one batch")
            if not allows(self.table.foresee(command, graph)):
                raise ProtocolError("commands that come to more than the quote or a limit allows")
            self.table.apply(command, graph)
            if isinstance(command, Load):
                later[place] = _Later(command)
                self._loads.send_nowait(later[place])
            elif isinstance(command, Define) and graph and graph.hash not in self._known:
                self._known.add(graph.hash)
                later[place] = _Later(command, graph.hash, graph.cost.flop, graph.nodes)
                self._graphs.send_nowait(later[place])
        taken = _Taken(batch, len(encode(batch)), self.table.mark(), later, checks)
        self._waiting_bytes += taken.size_bytes
        self._under_way.append(taken)
        self._queue.send_nowait(taken)

    def finish(self) -> None:
        """Nothing more will come: ``run`` returns once all is obeyed."""
        self.is_finishing = True
        self._queue.close()

    async def run(self, worker: SessionWorker, admit: Callable[[], Awaitable[None]]) -> None:
        """Obey all that is taken; ``admit`` is awaited before each batch. Raises JobError,
        ProviderError, StoreError, and what ``bring`` and ``report`` raise."""
        self._worker = worker
        await worker.open_session()
        self.idle = IdleClock()
        async with trio.open_nursery() as nursery:
            for _ in range(MAX_LOWERING):
                nursery.start_soon(self._lower_all)
            for _ in range(MAX_FETCHING):
                nursery.start_soon(self._bring_all)
            nursery.start_soon(self._listen, worker)
            async for taken in self._taken:
                await admit()
                await self._feed(worker, taken)
            while self.done.count < self.fed.count:
                await self._progress.wait()
            nursery.cancel_scope.cancel()

    async def _lower_all(self) -> None:
        async for later in self._to_lower:
            if isinstance(later.command, Define):
                graph = later.command.graph
                self._begun_nodes += later.nodes
                self.idle.begin()
                plan = self._workers.plan_at_hand(graph, self._account)
                if plan is None:
                    plan = await self._workers.lower(graph, account=self._account)
                later.plan = plan
                self.idle.end()
                lowered_flop = self._workers.flop_of(later.plan)
                if self._refuses_dear and is_dear(lowered_flop, later.flop):
                    raise ProviderError("cost: a graph computes over four times what was metered")
                later.done.set()

    async def _bring_all(self) -> None:
        async for later in self._to_bring:
            if isinstance(later.command, Load):
                await self._blobs.bring(later.command)
                later.done.set()

    async def _feed(self, worker: SessionWorker, taken: _Taken) -> None:
        self.fed = taken.mark
        group: list[WorkedCommand] = []
        asked = _Asked([], deque(), ends=False)
        for place, command in enumerate(taken.batch.commands):
            number = taken.batch.first + place
            if not isinstance(command, Define | Load | Hold):
                given = (*taken.checks.get(place, ()), command)
                group.extend(given)
                asked.numbers.extend([number] * len(given))
                if isinstance(command, Read):
                    asked.reads.append([number, command.size_bytes])
                continue
            later = taken.later.get(place)
            if later is None or isinstance(command, Hold):
                continue
            await later.done.wait()
            if isinstance(command, Define):
                await worker.define(later.graph, later.plan)
                later.plan = b""
                continue
            if group:
                await self._ask(worker, asked, group)
                group, asked = [], _Asked([], deque(), ends=False)
            await self._put(worker, command)
        await self._ask(worker, _Asked(asked.numbers, asked.reads, ends=True), group)

    async def _ask(
        self, worker: SessionWorker, asked: _Asked, commands: Sequence[WorkedCommand]
    ) -> None:
        self._asked.append(asked)
        self.idle.begin()
        await worker.obey(commands)

    async def _put(self, worker: SessionWorker, load: Load) -> None:
        at = load.offset_bytes
        for index in range(chunk_count(load.size_bytes)):
            self.idle.begin()
            data = await self._store.read_chunk(load.address, index)
            await worker.put(load.buffer, at, data)
            self.idle.end()
            at += len(data)
        await self._blobs.used(load)

    async def _listen(self, worker: SessionWorker) -> None:
        async for report in worker.reports():
            if not self._asked:
                raise ProviderError("the worker answers what nobody asked")
            asked = self._asked[0]
            if isinstance(report, Data):
                await self._pass_on(asked, report)
                continue
            if asked.reads:
                raise ProviderError("the worker left a Read unanswered")
            self._asked.popleft()
            self.idle.end()
            self._reported += len(asked.numbers)
            self._add(report)
            if asked.ends:
                await self._complete()
        raise ProviderError("the worker ended")

    async def _pass_on(self, asked: _Asked, data: Data) -> None:
        if not asked.reads:
            raise ProviderError("the worker answers what nobody asked")
        read = asked.reads[0]
        read[1] -= len(data.data)
        if read[1] < 0 or data.last != (read[1] == 0):
            raise ProviderError("the worker's answer is not as long as what was asked")
        if data.last:
            asked.reads.popleft()
        elif not data.data:
            raise ProviderError("the worker sends nothing, and more of it")
        self.idle.end()
        await self._report(Data(read[0], data.data, data.last))
        self.idle.begin()

    def _add(self, ran: Ran) -> None:
        before = self._ran
        self._ran = Ran(
            0,
            min(MAX_KERNELS, before.kernels + ran.kernels),
            min(MAX_LINE_VALUE, before.flop + ran.flop),
            min(MAX_LINE_VALUE, before.touched_bytes + ran.touched_bytes),
            min(MAX_BUSY_NS, before.busy_ns + ran.busy_ns),
        )

    async def _complete(self) -> None:
        taken = self._under_way.popleft()
        self._waiting_bytes -= taken.size_bytes
        self._told = taken.mark.count
        ran, self._ran = replace(self._ran, upto=taken.mark.count), Ran(0, 0, 0, 0, 0)
        await self._report(ran)
        self.done = taken.mark  # only now: no receipt comes before the Ran that it follows from
        self._progress.set()
        self._progress = trio.Event()
