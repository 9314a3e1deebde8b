"""What every worker pool does: processes with a scripted engine, and memory, give the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from msgspec.structs import replace

from p2pflop.errors import JobError, ProviderError
from p2pflop.ids import content_hash
from p2pflop.job.graph import Dtype, graph_hash
from p2pflop.job.spec import (
    MODE_LAST,
    MODE_TRACE,
    ROLE_STATE,
    InitSource,
    NoSource,
    Phase,
    Stop,
    Work,
    WorkParam,
)
from p2pflop.node.memory_workers import MemoryWorkerPool
from p2pflop.node.worker_types import Paused, Rows, Worker, WorkerEvent, WorkerLimits, Workers
from p2pflop.node.workers import WorkerPool
from p2pflop.units import MIB
from p2pflop.wire import encode

ENGINES = Path(__file__).parents[1] / "engines"
LIMITS = WorkerLimits(memory_bytes=64 * MIB, cpu_seconds=20, step_seconds=10)
GRAPH = b"a graph"
STATE = WorkParam(int(Dtype.UINT8), (3,), ROLE_STATE, NoSource())
WORK = Work(
    1,
    (Phase(graph_hash(GRAPH), 1, 0, (MODE_TRACE, MODE_LAST)), Phase(graph_hash(GRAPH), 4, 0, (0,))),
    (STATE, WorkParam(int(Dtype.UINT8), (2,), ROLE_STATE, InitSource(graph_hash(GRAPH), 0))),
    seed=0,
)


@pytest.fixture(params=["processes", "memory"])
async def pool(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Workers]:
    made: Workers = MemoryWorkerPool()
    if request.param == "processes":
        variables = {"PYTHONPATH": str(ENGINES)}
        made = WorkerPool(tmp_path / "plans", engine="scripted_engine", variables=variables)
    await made.start()
    try:
        yield made
    finally:
        await made.aclose()


async def load(pool: Workers, worker: Worker, work: Work = WORK) -> None:
    plan = await pool.lower(GRAPH)
    await worker.load(encode(work), {graph_hash(GRAPH): plan})


async def collect(events: AsyncIterator[WorkerEvent]) -> list[WorkerEvent]:
    return [event async for event in events]


async def read(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


def steps_of(events: list[WorkerEvent]) -> list[int]:
    rows = [event for event in events if isinstance(event, Rows)]
    return [step for row in rows for step in range(row.first_step, row.last_step + 1)]


async def test_a_run_tells_every_step_and_value_once_and_in_order(pool: Workers) -> None:
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker)
        events = await collect(worker.run(5, 100))
    values = [value for event in events if isinstance(event, Rows) for value in event.values]
    assert values == [(step, 0, 0, step.to_bytes(4, "little")) for step in range(5, 105)]
    assert steps_of(events) == list(range(5, 105))
    assert events[-1] == Paused(105, ended=True)


async def test_it_stands_still_at_each_pause_and_can_be_read_there(pool: Workers) -> None:
    seen = []
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker)
        async for event in worker.run(0, 10, 4):
            if isinstance(event, Paused):
                state = await read(worker.read(0))
                seen.append((event.step, event.ended, state))
    assert seen == [(4, False, b"\4" * 3), (8, False, b"\10" * 3), (10, True, b"\12" * 3)]


async def test_pauses_are_multiples_of_the_step_not_of_the_start(pool: Workers) -> None:
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker)
        events = await collect(worker.run(3, 7, 5))
    pauses = [event for event in events if isinstance(event, Paused)]
    assert pauses == [Paused(5), Paused(10, ended=True)]


async def test_one_worker_can_run_again_from_where_it_stands(pool: Workers) -> None:
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker)
        await collect(worker.run(0, 3))
        events = await collect(worker.run(3, 2))
        assert steps_of(events) == [3, 4]
        assert await read(worker.read(0)) == b"\5" * 3


async def test_what_is_written_is_what_the_run_starts_from(pool: Workers) -> None:
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker)
        await worker.write(0, 1, b"\x10\x20")
        await collect(worker.run(0, 1))
        assert await read(worker.read(0)) == b"\x01\x11\x21"


async def test_writing_past_the_end_of_a_slot_is_refused(pool: Workers) -> None:
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker)
        with pytest.raises(ValueError, match="do not fit slot 0"):
            await worker.write(0, 2, b"12")
        await worker.write(0, 2, b"1")


async def test_large_slots_travel_in_chunks(pool: Workers) -> None:
    size = 3 * MIB + 5
    data = bytes(range(251)) * (size // 251) + bytes(size % 251)
    param = WorkParam(int(Dtype.UINT8), (size,), ROLE_STATE, NoSource())
    work = Work(1, WORK.phases, (param,), 0)
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker, work)
        await worker.write(0, 0, data)
        chunks = [chunk async for chunk in worker.read(0)]
    assert max(map(len, chunks)) <= MIB
    assert content_hash(b"".join(chunks)) == content_hash(data)


async def test_several_slots_are_read_in_one_exchange(pool: Workers) -> None:
    sizes = (0, 3, MIB, 0, MIB + 7, 1)
    params = tuple(WorkParam(int(Dtype.UINT8), (size,), ROLE_STATE, NoSource()) for size in sizes)
    work = Work(1, WORK.phases, params, 0)
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker, work)
        for slot, size in enumerate(sizes):
            await worker.write(slot, 0, bytes([slot + 1]) * size)
        slots = [4, 0, 2, 1, 3, 5]
        found = dict.fromkeys(slots, b"")
        order = []
        async for slot, chunk in worker.read_slots(slots):
            assert 0 < len(chunk) <= MIB
            found[slot] += chunk
            order.append(slot)
        assert list(dict.fromkeys(order)) == [4, 2, 1, 5]
        assert found == {slot: bytes([slot + 1]) * sizes[slot] for slot in slots}
        assert [item async for item in worker.read_slots([0, 3])] == []
        assert await read(worker.read(1)) == b"\2" * 3


async def test_it_stands_still_when_it_is_asked_to_and_goes_on(pool: Workers) -> None:
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker)
        await worker.pause()  # nothing runs: nothing comes of it
        events: list[WorkerEvent] = []
        pauses: list[int] = []
        async for event in worker.run(0, 2**40):
            events.append(event)
            if isinstance(event, Paused) and not event.ended:
                assert await read(worker.read(0)) == bytes([event.step % 256]) * 3
                pauses.append(event.step)
            if len(pauses) == 2:
                await worker.stop()
            elif len(events) % 2:
                await worker.pause()
        assert len(pauses) == 2
        assert pauses[0] < pauses[1]
        # A run that was stopped while it stood still ends without another word.
        assert steps_of(events) == list(range(pauses[1]))


async def test_init_slots_come_from_the_seed(pool: Workers) -> None:
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker, Work(1, WORK.phases, WORK.params, seed=256))
        assert await read(worker.read(1)) == b"\0\0"


async def test_an_output_is_empty_until_its_phase_has_run(pool: Workers) -> None:
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker)
        await collect(worker.run(0, 3))
        assert await read(worker.read_output(1, 0)) == b""
        assert await read(worker.read_output(0, 1)) == (2).to_bytes(8, "little")
        await collect(worker.run(3, 2))
        assert await read(worker.read_output(1, 0)) == (3).to_bytes(8, "little")


async def test_the_works_own_stop_ends_the_run(pool: Workers) -> None:
    work = Work(1, WORK.phases, WORK.params, 0, Stop(0, 1, 6))
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker, work)
        events = await collect(worker.run(0, 100, 4))
    assert steps_of(events) == list(range(6))
    assert events[-1] == Paused(6, ended=True, condition=True)


async def test_stop_while_it_runs_ends_it_soon(pool: Workers) -> None:
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker)
        events: list[WorkerEvent] = []
        async for event in worker.run(0, 2**40):
            events.append(event)
            if len(events) == 2:
                await worker.stop()
        last = events[-1]
        assert isinstance(last, Paused)
        assert last.ended
        assert not last.condition
        assert steps_of(events) == list(range(last.step))
        assert await read(worker.read(0)) == bytes([last.step % 256]) * 3


async def test_stop_while_it_stands_still_ends_it_there(pool: Workers) -> None:
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker)
        events: list[WorkerEvent] = []
        async for event in worker.run(0, 100, 10):
            events.append(event)
            if isinstance(event, Paused) and event.step == 20:
                await worker.stop()
        assert events[-1] == Paused(20)
        again = await collect(worker.run(20, 5))
        assert again[-1] == Paused(25, ended=True)


async def test_a_run_left_at_a_pause_can_be_followed_by_another(pool: Workers) -> None:
    async with pool.worker(LIMITS) as worker:
        await load(pool, worker)
        async for event in worker.run(0, 100, 10):
            if isinstance(event, Paused):
                break
        assert await read(worker.read(0)) == b"\12" * 3
        again = await collect(worker.run(10, 5))
        assert steps_of(again) == [10, 11, 12, 13, 14]


async def test_lowering_twice_reuses_the_plan(pool: Workers) -> None:
    first = await pool.lower(b"graph one")
    assert await pool.lower(b"graph one") == first
    assert await pool.lower(b"graph two") != first
    assert pool.plan_at_hand(b"graph one") == first
    assert pool.plan_at_hand(b"graph three") is None
    statistics = pool.statistics()
    assert (statistics.plans_lowered, statistics.plans_reused) == (2, 2)


async def test_a_missing_plan_is_not_the_jobs_fault(pool: Workers) -> None:
    async with pool.worker(LIMITS) as worker:
        with pytest.raises(ProviderError, match="no plan"):
            await worker.load(encode(WORK), {})


async def test_a_worker_begins_each_work_anew_whatever_it_ran_before(pool: Workers) -> None:
    other = b"another graph"
    born = WorkParam(int(Dtype.UINT8), (2,), ROLE_STATE, InitSource(graph_hash(other), 0))
    plans = {graph_hash(graph): await pool.lower(graph) for graph in (GRAPH, other)}
    works = [WORK, replace(WORK, seed=7), replace(WORK, params=(STATE, born), seed=3), WORK]
    async with pool.worker(LIMITS) as worker:
        for work in works:
            await worker.load(encode(work), plans)
            assert await collect(worker.run(0, 3))
            assert await read(worker.read(0)) == b"\3" * 3
            assert await read(worker.read(1)) == bytes([work.seed + 3]) * 2


async def test_a_work_too_large_for_its_memory_is_a_job_error(pool: Workers) -> None:
    param = WorkParam(int(Dtype.UINT8), (2**40,), ROLE_STATE, NoSource())
    async with pool.worker(LIMITS) as worker:
        with pytest.raises(JobError, match="memory"):
            await load(pool, worker, Work(1, WORK.phases, (param,), 0))


async def test_several_workers_run_side_by_side(pool: Workers) -> None:
    done: list[int] = []

    async def one(start: int) -> None:
        async with pool.worker(LIMITS) as worker:
            await load(pool, worker)
            events = await collect(worker.run(start, 20))
            done.append(steps_of(events)[0])

    async with trio.open_nursery() as nursery:
        for start in range(4):
            nursery.start_soon(one, start)
    assert sorted(done) == [0, 1, 2, 3]
    assert pool.statistics().workers == 0


async def test_the_class_has_a_hash_and_the_level_is_known(pool: Workers) -> None:
    assert len(pool.class_id) == 32
    assert pool.descriptor.name
    assert 1 <= pool.level <= 3
    assert not pool.broken
