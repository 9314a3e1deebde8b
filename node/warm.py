"""Workers that linger with the account whose job they have run.

A fresh worker costs a fork and a lock-down; the next small job of the same buyer, within
``LINGER_S``, takes the one that is still there. Never across accounts: what a job leaves in its
process is seen by nobody else. A lingering worker gives way as soon as anybody needs its place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Set
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from p2pflop.node.worker_types import Worker, WorkerLimits, Workers
from p2pflop.units import MIB

LINGER_S: Final = 30.0
MAX_LINGERING: Final = 4
MAX_LINGERING_BYTES: Final = 256 * MIB
MAX_JOBS: Final = 256
"""After so many jobs a worker is not kept: its limit on CPU time counts from its start."""


@dataclass(slots=True)
class _Lease:
    stack: AsyncExitStack
    worker: Worker
    limits: WorkerLimits
    jobs: int = 0
    lingering: trio.CancelScope | None = None


class WarmWorkers:
    """Leases workers of a pool. ``nursery`` outlives every lease."""

    def __init__(self, workers: Workers, nursery: trio.Nursery) -> None:
        self._workers = workers
        self._nursery = nursery
        self._lingering: OrderedDict[bytes, _Lease] = OrderedDict()

    @asynccontextmanager
    async def lease(self, account: bytes, limits: WorkerLimits) -> AsyncIterator[Worker]:
        """A worker for a job of ``account``: one that lingers, or a fresh one."""
        lease = await self._take(account, limits)
        lease.jobs += 1
        try:
            yield lease.worker
        except BaseException:
            await _end(lease)
            raise
        if lease.limits.memory_bytes <= MAX_LINGERING_BYTES and lease.jobs < MAX_JOBS:
            await self._keep(account, lease)
        else:
            await _end(lease)

    def lingers(self, account: bytes, graphs: Set[bytes]) -> bool:
        """Whether a worker of that account lingers that has the plans of ``graphs`` ready."""
        lease = self._lingering.get(account)
        return lease is not None and lease.worker.alive and graphs <= lease.worker.held

    async def _take(self, account: bytes, limits: WorkerLimits) -> _Lease:
        lease = self._lingering.pop(account, None)
        if lease is not None:
            if lease.worker.alive and _is_enough(lease.limits, limits):
                return lease
            await _end(lease)
        while self._lingering:
            _, oldest = self._lingering.popitem(last=False)
            await _end(oldest)
        stack = AsyncExitStack()
        worker = await stack.enter_async_context(self._workers.worker(limits))
        return _Lease(stack, worker, limits)

    async def _keep(self, account: bytes, lease: _Lease) -> None:
        other = self._lingering.pop(account, None)
        if other is None and len(self._lingering) >= MAX_LINGERING:
            _, other = self._lingering.popitem(last=False)
        self._lingering[account] = lease
        until = trio.current_time() + LINGER_S
        if lease.lingering is None:
            lease.lingering = trio.CancelScope(deadline=until)
            self._nursery.start_soon(self._end_later, account, lease, lease.lingering)
        else:
            lease.lingering.deadline = until
        if other is not None:
            await _end(other)

    async def _end_later(self, account: bytes, lease: _Lease, lingering: trio.CancelScope) -> None:
        try:
            with lingering:
                await trio.sleep_forever()
        finally:  # also when the node stops: nobody else ends a worker that lingers
            lease.lingering = None
            if self._lingering.get(account) is lease:
                del self._lingering[account]
                await _end(lease)


def _is_enough(held: WorkerLimits, wanted: WorkerLimits) -> bool:
    return (
        held.memory_bytes >= wanted.memory_bytes
        and held.cpu_seconds >= wanted.cpu_seconds
        and held.step_seconds == wanted.step_seconds
    )


async def _end(lease: _Lease) -> None:
    with trio.CancelScope(shield=True):
        await lease.stack.aclose()
