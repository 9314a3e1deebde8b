"""The worker pool: lowering and running jobs in sandboxed processes, from trio, without tinygrad.

The pool keeps a **crew** (zygote and compile helper) alive. ``lower`` gives the plan of a graph:
from the cache, from a lowering that is already under way, or from a lowerer of its own. ``worker``
leases a locked process. A crew that ends takes its children with it; their callers get
ProviderError and a new crew starts. ``MAX_CRASHES`` ends within ``CRASH_WINDOW_SECONDS`` break the
pool for good: it calls ``on_broken`` and refuses everything, so that a node can withdraw its asks.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from p2pflop.errors import ConfigError, JobError, P2PFlopError, ProviderError
from p2pflop.ids import content_hash
from p2pflop.job.graph import graph_hash
from p2pflop.job.spec import ClassDescriptor, class_id
from p2pflop.kernels import classes
from p2pflop.kernels.engine import DEFAULT_ENGINE
from p2pflop.kernels.frames import MAX_GRAPH_BYTES, WORKER
from p2pflop.kernels.plan import decode_plan
from p2pflop.node.crew import Crew
from p2pflop.node.lowerers import Lowerers, Lowering, is_shared
from p2pflop.node.plans import PlanCache
from p2pflop.node.worker_process import ProcessWorker
from p2pflop.node.worker_types import PoolStatistics, WorkerLimits
from p2pflop.units import MIB

MAX_WORKERS: Final = 64
MAX_LOWERINGS: Final = 256
MAX_LOWERERS: Final = 8  # each takes a compile server too, see compiler.MAX_SERVERS
MAX_CRASHES: Final = 3
CRASH_WINDOW_SECONDS: Final = 60.0
_KEEP_VARIABLES: Final = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


class WorkerPool:
    """``worker_types.Workers`` by processes. ``engine`` and ``variables`` are seams for tests."""

    def __init__(
        self,
        plans_dir: Path,
        *,
        on_broken: Callable[[], None] | None = None,
        lowerers: int | None = None,
        class_name: str = classes.CLASS_NAME,
        engine: str = DEFAULT_ENGINE,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._class_name = class_name
        self._plans = PlanCache(plans_dir)
        self._on_broken = on_broken
        self._slots = trio.CapacityLimiter(min(lowerers or os.cpu_count() or 1, MAX_LOWERERS))
        self._engine = engine
        self._variables = variables or {}
        self._crew: Crew | None = None
        self._descriptor: ClassDescriptor | None = None
        self._lowerers = Lowerers(self._ready_crew)
        self._lowerings: dict[bytes, Lowering] = {}
        self._nursery: trio.Nursery | None = None
        self._changed = trio.Event()
        self._workers = 0
        self._crashes: deque[float] = deque(maxlen=MAX_CRASHES)
        self._crash_count = self._lowered = self._reused = 0
        self._broken = False
        self._scope = trio.CancelScope()
        self._first = trio.Event()
        self._first_error: P2PFlopError | None = None
        self._over = trio.Event()

    @property
    def descriptor(self) -> ClassDescriptor:
        """The determinism class of every worker here."""
        if self._descriptor is None:
            raise RuntimeError("the pool has not been started")
        return self._descriptor

    @property
    def class_id(self) -> bytes:
        """The hash of the descriptor."""
        return class_id(self.descriptor)

    @property
    def level(self) -> int:
        """The sandbox level, 1 to 3, as the zygote probed it; 0 while there is none."""
        return self._crew.started.level if self._crew and self._crew.ready.is_set() else 0

    @property
    def broken(self) -> bool:
        """Whether the sandbox crashed too often and has been given up."""
        return self._broken

    async def start(self, nursery: trio.Nursery | None = None) -> None:
        """Start the crew and wait until it is warm; it lives in ``nursery``, else beside main.

        Raises ConfigError if this machine cannot compute (no clang, no tinygrad, no class).
        """
        # Asks clang for its version: tens of milliseconds.
        self._descriptor = await trio.to_thread.run_sync(classes.descriptor, self._class_name)
        if nursery is not None:
            nursery.start_soon(self._keep_crew)
        else:
            trio.lowlevel.spawn_system_task(self._keep_crew)
        try:
            await self._first.wait()
        except trio.Cancelled:
            self._scope.cancel()
            raise
        if self._first_error is not None:
            raise self._first_error

    async def aclose(self) -> None:
        """End every worker, lowerer and helper process; wait until they are gone."""
        self._scope.cancel()
        if self._descriptor is not None:
            with trio.CancelScope(shield=True):
                await self._over.wait()

    def statistics(self) -> PoolStatistics:
        """Counters and process ids."""
        ready = self._crew is not None and self._crew.ready.is_set()
        return PoolStatistics(
            level=self.level,
            notes=self._crew.started.notes if self._crew is not None and ready else (),
            workers=self._workers,
            lowering=len(self._lowerings),
            plans_lowered=self._lowered,
            plans_reused=self._reused,
            crashes=self._crash_count,
            broken=self._broken,
            process_ids=self._crew.process_ids if self._crew is not None else (),
        )

    async def lower(
        self,
        graph: bytes,
        progress: Callable[[int, int], None] | None = None,
        *,
        account: bytes | None = None,
    ) -> bytes:
        """See ``Workers``. Callers for one graph share one lowerer. Raises JobError,
        ProviderError."""
        if len(graph) > MAX_GRAPH_BYTES:
            raise JobError(f"graph of {len(graph)} bytes is over the limit of {MAX_GRAPH_BYTES}")
        keys = self._plan_keys(graph, await self._ready_crew(), account)
        key = keys[-1]
        lowering = self._lowerings.get(key)
        if lowering is None:
            for known in keys:
                plan = await self._plans.get(known)
                if plan is not None:
                    self._reused += 1
                    return plan
            # Another caller may have begun while the disk was looked at.
            lowering = self._lowerings.get(key)
        if lowering is None:
            if len(self._lowerings) >= MAX_LOWERINGS:
                raise ProviderError(f"{MAX_LOWERINGS} graphs are waiting to be lowered")
            if self._nursery is None:
                raise ProviderError("the pool is closed")
            lowering = self._lowerings[key] = Lowering(key, graph, account)
            self._nursery.start_soon(self._lower, lowering, self._nursery)
        try:
            return await lowering.wait(progress)
        finally:
            if lowering.abandoned and self._lowerings.get(key) is lowering:
                del self._lowerings[key]  # the next caller must not join what is being ended

    def plan_at_hand(self, graph: bytes, account: bytes | None = None) -> bytes | None:
        """See ``Workers``."""
        if self._crew is None or not self._crew.ready.is_set():
            return None
        keys = self._plan_keys(graph, self._crew, account)
        plan = next(filter(None, map(self._plans.recent, keys)), None)
        self._reused += plan is not None
        return plan

    def flop_of(self, plan: bytes) -> int:
        """See ``Workers``."""
        return decode_plan(plan).flop

    @asynccontextmanager
    async def worker(self, limits: WorkerLimits) -> AsyncIterator[ProcessWorker]:
        """A fresh locked worker, killed at the end of the context. Raises ProviderError."""
        crew = await self._ready_crew()
        if self._workers >= MAX_WORKERS:
            raise ProviderError(f"all {MAX_WORKERS} workers are taken")
        self._workers += 1
        try:
            memory, cpu = limits.memory_bytes, limits.cpu_seconds
            async with crew.child(WORKER, memory, cpu) as child:
                yield ProcessWorker(child, limits, crew.end)
        finally:
            self._workers -= 1

    def _plan_keys(self, graph: bytes, crew: Crew, account: bytes | None) -> list[bytes]:
        """Where its plan may be; where it is put is the last."""
        key = content_hash(graph_hash(graph) + self.class_id + crew.started.version.encode())
        if account is None or is_shared(graph, account):
            return [key]
        return [key, content_hash(key + account)]

    async def _ready_crew(self) -> Crew:
        """The crew, once it is warm. Raises ProviderError if there will be none."""
        while not self._broken and not self._over.is_set() and not self._scope.cancel_called:
            crew = self._crew
            if crew is None or crew.lost.is_set():
                await self._changed.wait()
                continue
            try:
                await crew.wait_ready()
            except ConfigError as error:
                raise ProviderError(error.message) from error
            return crew
        raise ProviderError(
            "the sandbox of this node has stopped", hint="`p2pflop doctor` says what is wrong."
        )

    async def _keep_crew(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    while await self._serve_crew():
                        pass
        finally:
            self._nursery = None
            self._over.set()
            self._first.set()
            self._note_change()

    async def _serve_crew(self) -> bool:
        """One crew from start to end; whether another one should follow."""
        failure = ConfigError("no sandbox for jobs: this machine starts no processes")
        with contextlib.suppress(OSError):
            crew = self._crew = Crew(self._environment(), self._engine)
            self._note_change()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._announce, crew, nursery.cancel_scope)
                    await crew.serve()
                    nursery.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    await crew.aclose()
            failure = crew.error()
        if not self._first.is_set():
            self._first_error = failure
            return False
        self._count_crash()
        return not self._broken

    def _count_crash(self) -> None:
        self._crash_count += 1
        self._crashes.append(trio.current_time())
        recent = self._crashes[-1] - self._crashes[0] <= CRASH_WINDOW_SECONDS
        if len(self._crashes) == MAX_CRASHES and recent:
            self._broken = True
            if self._on_broken is not None:
                self._on_broken()

    async def _announce(self, crew: Crew, scope: trio.CancelScope) -> None:
        try:
            await crew.wait_ready()
        except ConfigError:
            scope.cancel()
        else:
            self._first.set()

    def _note_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in _KEEP_VARIABLES if name in os.environ}
        # Hashes of strings decide orders inside tinygrad: equal graphs, equal plans.
        fixed = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "HOME": "/nonexistent"}
        # glibc maps and unmaps every megabyte anew otherwise: half the cost of moving tensors.
        malloc = {"MALLOC_MMAP_THRESHOLD_": str(32 * MIB), "MALLOC_TRIM_THRESHOLD_": str(32 * MIB)}
        return {
            **kept,
            **fixed,
            **malloc,
            **classes.environment(self._class_name),
            **self._variables,
        }

    async def _lower(self, lowering: Lowering, nursery: trio.Nursery) -> None:
        try:
            with lowering.scope:
                async with self._slots:
                    plan = await self._lowerers.lower(lowering, nursery)
                    self._lowered += 1
                    lowering.plan = plan
        except P2PFlopError as error:
            lowering.error = error
        finally:
            if self._lowerings.get(lowering.key) is lowering:
                del self._lowerings[lowering.key]
            lowering.done.set()
        if lowering.plan is not None:  # whoever wants it does not wait for the disk
            with trio.CancelScope(shield=True):
                await self._plans.put(lowering.key, lowering.plan)
