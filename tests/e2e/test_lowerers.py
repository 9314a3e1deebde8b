"""Lowerers that are kept for the small graphs of an account, in real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from p2pflop.errors import JobError
from p2pflop.node import lowerers
from p2pflop.node.lowerers import SMALL_GRAPH_BYTES
from p2pflop.node.workers import WorkerPool
from p2pflop.units import MIB
from tests.e2e.test_workers import pool, scripted_pool, wait_until_dead

__all__ = ["pool"]

ALICE, BOB = b"alice", b"bob"


async def who(pool: WorkerPool, number: int, account: bytes | None = ALICE) -> int:
    """The process that lowered a graph."""
    return int(await pool.lower(b"who %d" % number, account=account))


async def test_small_graphs_of_an_account_share_a_process(pool: WorkerPool) -> None:
    first = await who(pool, 1)
    assert await who(pool, 2) == first
    assert await who(pool, 3, BOB) != first, "no account sees another's"
    assert await who(pool, 4, None) != first, "nor does who has none"
    assert await who(pool, 5) == first


async def test_a_large_graph_has_a_process_of_its_own_and_its_plan_is_for_all(
    pool: WorkerPool,
) -> None:
    large = b"who".ljust(SMALL_GRAPH_BYTES + 1)
    first = await who(pool, 1)
    plan = await pool.lower(large, account=ALICE)
    assert int(plan) != first
    assert await pool.lower(large, account=BOB) == plan
    assert await pool.lower(large) == plan
    assert pool.statistics().plans_reused == 2


async def test_what_a_used_lowerer_says_is_kept_for_its_account_alone(
    tmp_path: Path,
) -> None:
    async with scripted_pool(tmp_path) as pool:
        await pool.lower(b"turn", account=ALICE)
        assert await pool.lower(b"graph", account=ALICE) == b"evil"
        assert await pool.lower(b"graph", account=BOB) == b"plan of graph"
        assert await pool.lower(b"graph") == b"plan of graph"
        assert pool.plan_at_hand(b"graph", BOB) == b"plan of graph"
    async with scripted_pool(tmp_path) as pool:  # and so on disk
        assert await pool.lower(b"graph", account=BOB) == b"plan of graph"
        assert pool.statistics().plans_reused == 1


async def test_a_plan_that_is_for_all_is_for_each(pool: WorkerPool) -> None:
    plan = await pool.lower(b"who")
    assert pool.plan_at_hand(b"who", ALICE) == plan
    assert await pool.lower(b"who", account=ALICE) == plan


async def test_the_fault_of_a_used_lowerer_is_tried_again_in_a_fresh_one(pool: WorkerPool) -> None:
    await pool.lower(b"sick", account=ALICE)
    assert await pool.lower(b"graph", account=ALICE) == b"plan of graph"
    for graph, why in ((b"fail", "told to fail"), (b"die", "SIGSEGV")):
        first = await who(pool, len(graph))
        with pytest.raises(JobError, match=why):
            await pool.lower(graph, account=ALICE)
        assert await who(pool, 10 + len(graph)) != first


async def test_a_fault_of_the_first_graph_is_not_tried_again(pool: WorkerPool) -> None:
    with pytest.raises(JobError, match="told to fail"):
        await pool.lower(b"fail", account=ALICE)
    await pool.lower(b"sick", account=ALICE)
    assert pool.statistics().plans_lowered == 1


async def test_kept_memory(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowerers, "KEPT_MEMORY_BYTES", 16 * MIB)
    with pytest.raises(JobError, match="memory"):
        await pool.lower(b"eat", account=ALICE)
    assert await who(pool, 1)


async def test_graphs_of_one_lowerer(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowerers, "MAX_KEPT_GRAPHS", 2)
    pids = [await who(pool, number) for number in range(4)]
    assert pids[0] == pids[1] != pids[2] == pids[3]
    await wait_until_dead(*pids)


async def test_idle_lowerers(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowerers, "MAX_IDLE_LOWERERS", 1)
    alice = await who(pool, 1)
    bob = await who(pool, 2, BOB)
    await wait_until_dead(alice)
    assert await who(pool, 3, BOB) == bob


async def test_idle_time(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowerers, "IDLE_S", 0.05)
    first = await who(pool, 1)
    await wait_until_dead(first)
    assert await who(pool, 2) != first


async def test_a_lowering_that_nobody_waits_for_ends_its_lowerer(pool: WorkerPool) -> None:
    first = await who(pool, 1)
    with trio.move_on_after(0.1):
        await pool.lower(b"spin", account=ALICE)
    await wait_until_dead(first)
    assert await who(pool, 2) != first
