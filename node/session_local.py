"""A session in a sandbox of this node's own, where nobody sells: nothing is bid, nothing owed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, cast

import trio

from p2pflop.dht.blobs import Store
from p2pflop.errors import JobError, P2PFlopError, first_error
from p2pflop.job.commands import AnyCommand, Load
from p2pflop.job.session import OpenGraph
from p2pflop.node.execute import MAX_STEP_SECONDS, WORKER_SLACK_BYTES
from p2pflop.node.session_lease import Answer, CommandFault, Outstanding
from p2pflop.node.session_work import OWN_ACCOUNT, SessionWork
from p2pflop.node.worker_types import SessionWorker, WorkerLimits, Workers

CPU_SECONDS: Final = 7 * 24 * 3600


@dataclass(slots=True)
class LocalLease:
    """``session_lease.Lease`` in a worker of this node's."""

    workers: Workers
    store: Store
    opened: Callable[[bytes], Awaitable[OpenGraph]]
    memory_bytes: int
    outstanding: Outstanding
    owed_nusd: int = 0
    _work: SessionWork = field(init=False)
    _failure: P2PFlopError | None = None
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def __post_init__(self) -> None:
        self._work = SessionWork(
            self.workers,
            self.store,
            self.opened,
            self,
            self.outstanding.take,
            self.memory_bytes,
            OWN_ACCOUNT,
        )

    async def bring(self, load: Load) -> None:
        """See ``session_work.Blobs``: it is here, or nowhere."""
        info = await self.store.stat(load.address)
        if info is None or info.size_bytes != load.size_bytes:
            raise JobError(f"there is no blob {load.address.hex()[:12]} of {load.size_bytes} bytes")

    async def used(self, load: Load) -> None:
        """See ``session_work.Blobs``."""

    @property
    def is_due(self) -> bool:
        """See Lease: its own user's sandbox is never."""
        return False

    async def obey(
        self, command: AnyCommand, graph: OpenGraph | None = None, answer: Answer | None = None
    ) -> None:
        """See Lease."""
        await trio.lowlevel.checkpoint()
        self.outstanding.add(command, graph, answer)

    async def hold(self) -> None:
        """See Lease: its own user's sandbox stands for nothing."""

    async def flush(self, upto: int) -> None:
        """See Lease."""
        batch = await self.outstanding.next_batch(upto)
        if batch is not None:
            await self._work.take(batch)

    async def close(self) -> None:
        """See Lease."""
        await self.outstanding.wait_obeyed()

    @asynccontextmanager
    async def live(self) -> AsyncIterator[None]:
        """The lease, while it is used. Raises what ended it."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run)
                yield
                nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _run(self) -> None:
        limits = WorkerLimits(self.memory_bytes + WORKER_SLACK_BYTES, CPU_SECONDS, MAX_STEP_SECONDS)
        try:
            async with self.workers.worker(limits) as worker:
                await self._work.run(cast(SessionWorker, worker), trio.lowlevel.checkpoint)
        except* P2PFlopError as group:
            error = first_error(group)
            if isinstance(error, JobError):
                self._failure = CommandFault(self._work.suspect, error.message, error.hint)
            else:
                self._failure = error
            self._scope.cancel()
