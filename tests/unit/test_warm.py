"""A worker lingers for its account only, for so long, for so many jobs, and gives way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing

from p2pflop.errors import ProviderError
from p2pflop.node.memory_workers import MemoryWorkerPool
from p2pflop.node.warm import (
    LINGER_S,
    MAX_JOBS,
    MAX_LINGERING,
    MAX_LINGERING_BYTES,
    WarmWorkers,
)
from p2pflop.node.worker_types import Worker, WorkerLimits
from p2pflop.units import MIB

ALICE, BOB = b"alice", b"bob"
LIMITS = WorkerLimits(memory_bytes=64 * MIB, cpu_seconds=3600, step_seconds=600.0)


class World:
    """A pool with warm workers on top."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.pool = MemoryWorkerPool()
        self.warm = WarmWorkers(self.pool, nursery)

    async def use(self, account: bytes, limits: WorkerLimits = LIMITS) -> Worker:
        async with self.warm.lease(account, limits) as worker:
            return worker

    @property
    def alive(self) -> int:
        return self.pool.statistics().workers


@pytest.fixture
def world(nursery: trio.Nursery) -> World:
    return World(nursery)


async def test_the_next_job_of_an_account_gets_the_same_worker(world: World) -> None:
    first = await world.use(ALICE)
    assert await world.use(ALICE) is first
    assert world.alive == 1


async def test_another_account_never_gets_it(world: World) -> None:
    first = await world.use(ALICE)
    second = await world.use(BOB)
    assert second is not first
    assert await world.use(ALICE) not in (first, second), "alice's has given way to bob's"


async def test_two_jobs_at_once_have_two_workers(world: World) -> None:
    async with world.warm.lease(ALICE, LIMITS) as one, world.warm.lease(ALICE, LIMITS) as other:
        assert one is not other
    assert world.alive == 1


async def test_it_is_gone_after_half_a_minute(world: World, autojump_clock: object) -> None:
    await world.use(ALICE)
    await trio.sleep(LINGER_S - 1)
    assert world.alive == 1
    await trio.sleep(2)
    assert world.alive == 0


async def test_each_job_lets_it_linger_anew(world: World, autojump_clock: object) -> None:
    first = await world.use(ALICE)
    for _ in range(3):
        await trio.sleep(LINGER_S - 1)
        assert await world.use(ALICE) is first
    await trio.sleep(LINGER_S + 1)
    assert world.alive == 0


async def test_one_task_waits_for_its_end_however_many_jobs_it_has(
    world: World, autojump_clock: object
) -> None:
    await world.use(ALICE)
    before = trio.lowlevel.current_statistics().tasks_living
    for _ in range(20):
        await world.use(ALICE)
    assert trio.lowlevel.current_statistics().tasks_living == before
    async with world.warm.lease(ALICE, LIMITS):
        await trio.sleep(2 * LINGER_S)
    await trio.sleep(LINGER_S - 1)
    assert world.alive == 1
    await trio.sleep(2)
    assert world.alive == 0


async def test_a_job_that_ends_badly_leaves_no_worker(world: World) -> None:
    with pytest.raises(ProviderError):
        async with world.warm.lease(ALICE, LIMITS):
            raise ProviderError("the worker misbehaved")
    assert world.alive == 0


async def test_a_cancelled_job_leaves_no_worker(world: World) -> None:
    with trio.CancelScope() as scope:
        async with world.warm.lease(ALICE, LIMITS):
            scope.cancel()
            await trio.sleep_forever()
    assert world.alive == 0


async def test_a_large_worker_does_not_linger(world: World) -> None:
    await world.use(ALICE, replace(LIMITS, memory_bytes=MAX_LINGERING_BYTES))
    assert world.alive == 1
    await world.use(BOB, replace(LIMITS, memory_bytes=MAX_LINGERING_BYTES + 1))
    assert world.alive == 0


@pytest.mark.parametrize(
    "more",
    [
        replace(LIMITS, memory_bytes=65 * MIB),
        replace(LIMITS, cpu_seconds=7200),
        replace(LIMITS, step_seconds=1.0),
    ],
)
async def test_one_that_is_too_small_is_not_taken(world: World, more: WorkerLimits) -> None:
    first = await world.use(ALICE)
    assert await world.use(ALICE, more) is not first
    assert world.alive == 1


async def test_a_dead_one_is_not_taken(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await world.use(ALICE)
    monkeypatch.setattr(type(first), "alive", property(lambda worker: worker is not first))
    assert await world.use(ALICE) is not first


async def test_so_many_linger_and_the_oldest_goes_first(world: World) -> None:
    accounts = [bytes([number]) for number in range(MAX_LINGERING + 1)]
    async with trio.open_nursery() as nursery:
        ready = [trio.Event() for _ in accounts]
        go = [trio.Event() for _ in accounts]

        async def job(number: int) -> None:
            async with world.warm.lease(accounts[number], LIMITS):
                ready[number].set()
                await go[number].wait()

        for number, event in enumerate(ready):
            nursery.start_soon(job, number)
            await event.wait()
        for event in go:
            event.set()
            await trio.testing.wait_all_tasks_blocked()
    assert world.alive == MAX_LINGERING
    assert set(world.warm._lingering) == set(accounts[1:])


async def test_after_so_many_jobs_it_is_not_kept(world: World) -> None:
    first = await world.use(ALICE)
    for _ in range(MAX_JOBS - 2):
        assert await world.use(ALICE) is first
    assert world.alive == 1
    assert await world.use(ALICE) is first
    assert world.alive == 0


async def test_one_that_lingers_ends_with_the_node() -> None:
    async with trio.open_nursery() as nursery:
        world = World(nursery)
        await world.use(ALICE)
        assert world.alive == 1
        nursery.cancel_scope.cancel()
    assert world.alive == 0
