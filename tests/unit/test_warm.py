"""Workers that linger for the next job of the same account."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from p2pflop.node.memory_workers import MemoryWorkerPool
from p2pflop.node.warm import LINGER_S, WarmWorkers
from p2pflop.node.worker_types import WorkerLimits

LIMITS = WorkerLimits(memory_bytes=2**20, cpu_seconds=10, step_seconds=1)


async def test_a_worker_lingers_and_then_ends(autojump_clock: MockClock) -> None:
    pool = MemoryWorkerPool()
    async with trio.open_nursery() as nursery:
        warm = WarmWorkers(pool, nursery)
        async with warm.lease(b"account", LIMITS) as first:
            pass
        async with warm.lease(b"account", LIMITS) as second:
            assert second is first
        assert pool.statistics().workers == 1
        await trio.sleep(LINGER_S + 1)
        assert pool.statistics().workers == 0


async def test_a_worker_that_lingers_ends_with_the_node() -> None:
    pool = MemoryWorkerPool()
    async with trio.open_nursery() as nursery:
        async with WarmWorkers(pool, nursery).lease(b"account", LIMITS):
            pass
        assert pool.statistics().workers == 1
        nursery.cancel_scope.cancel()
    assert pool.statistics().workers == 0
