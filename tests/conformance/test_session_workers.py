"""What the session worker of every pool does: processes with a scripted engine, and memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import trio

from p2pflop.errors import JobError
from p2pflop.job.commands import (
    Allocate,
    AnyCommand,
    Bind,
    Copy,
    Data,
    Free,
    Ran,
    Read,
    Run,
    Write,
)
from p2pflop.job.graph import Dtype, Graph, GraphParam, Node, Op, Output, encode_graph, graph_hash
from p2pflop.node.memory_sessions import DigestWorkspace
from p2pflop.node.memory_workers import MemoryWorkerPool
from p2pflop.node.worker_types import SessionWorker, WorkerLimits, Workers
from p2pflop.node.workers import WorkerPool
from p2pflop.units import MIB

ENGINES = Path(__file__).parents[1] / "engines"
LIMITS = WorkerLimits(memory_bytes=64 * MIB, cpu_seconds=20, step_seconds=10)
PARAM = GraphParam(0, Dtype.UINT8, (4,))
NODES = (Node(Op.PARAM, (0,)), Node(Op.ADD, (), (0, 0)), Node(Op.ASSIGN, (), (0, 0, 1)))
GRAPH = encode_graph(Graph((PARAM,), NODES, (Output(2, 0),)))
NAME = graph_hash(GRAPH)


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


@asynccontextmanager
async def session(pool: Workers) -> AsyncIterator[SessionWorker]:
    """A session that has the graph."""
    plan = await pool.lower(GRAPH)
    async with pool.worker(LIMITS) as worker:
        opened = cast(SessionWorker, worker)
        await opened.open_session()
        await opened.define(NAME, plan)
        yield opened


async def answers(worker: SessionWorker, batches: int) -> list[Ran | Data]:
    """What is told up to the end of so many batches."""
    told: list[Ran | Data] = []
    async for report in worker.reports():
        told.append(report)
        batches -= isinstance(report, Ran)
        if not batches:
            break
    return told


def expected(commands: Sequence[AnyCommand]) -> list[bytes]:
    """What Reads give."""
    space = DigestWorkspace(LIMITS.memory_bytes)
    space.define(NAME, GRAPH)
    views = [space.obey(command) for command in commands]
    return [bytes(view) for view in views if view is not None]


COMMANDS: tuple[AnyCommand, ...] = (
    Allocate(7, 16),
    Allocate(2**32 - 1, 8),
    Write(7, 4, b"abcd"),
    Read(7, 0, 16),
    Bind(0, NAME, ((7, 4),)),
    Bind(1, NAME, ((2**32 - 1, 0),)),
    Run(0),
    Run(0),
    Run(1),
    Copy((7, 8), (7, 4), 4),
    Bind(0, NAME, ((7, 8),)),
    Run(0),
    Read(7, 0, 16),
    Read(2**32 - 1, 1, 0),
    Free(7),
    Allocate(7, 3),
    Read(7, 0, 3),
)


async def test_commands_are_obeyed_in_order_and_only_reads_are_answered(pool: Workers) -> None:
    async with session(pool) as worker:
        await worker.obey(COMMANDS)
        told = await answers(worker, 1)
    places = [place for place, command in enumerate(COMMANDS) if isinstance(command, Read)]
    data = [report for report in told if isinstance(report, Data)]
    assert [(each.number, each.last) for each in data] == [(place, True) for place in places]
    assert [each.data for each in data] == expected(COMMANDS)
    ran = told[-1]
    assert isinstance(ran, Ran)
    assert (ran.upto, ran.kernels, ran.flop) == (len(COMMANDS), 4, 16)


async def test_several_batches_are_under_way_before_one_is_heard(pool: Workers) -> None:
    async with session(pool) as worker:
        for start in range(0, len(COMMANDS), 3):
            await worker.obey(COMMANDS[start : start + 3])
        await worker.obey(())
        told = await answers(worker, 7)
    assert [report.data for report in told if isinstance(report, Data)] == expected(COMMANDS)
    ends = [report.upto for report in told if isinstance(report, Ran)]
    assert ends == [3, 6, 9, 12, 15, 17, 17]
    kernels = [report.kernels for report in told if isinstance(report, Ran)]
    assert kernels == [0, 0, 3, 1, 0, 0, 0]


async def test_large_answers_come_in_pieces_while_more_is_sent(pool: Workers) -> None:
    size = 5 * MIB + 3
    block = bytes(range(251)) * 4178
    told: list[Ran | Data] = []
    async with session(pool) as worker, trio.open_nursery() as nursery:

        async def listen() -> None:
            told.extend(await answers(worker, 3))

        nursery.start_soon(listen)
        await worker.obey([Allocate(0, size)])
        for start in range(0, size, MIB):
            await worker.put(0, start, block[: min(MIB, size - start)])
        await worker.obey([Read(0, 0, size), Read(0, MIB - 1, 2)])
        writes = [Write(0, 60_000 * place, bytes([place]) * 60_000) for place in range(80)]
        await worker.obey([*writes, Read(0, 0, size)])
    data = [report for report in told if isinstance(report, Data)]
    assert max(len(each.data) for each in data) <= MIB
    pieces = dict.fromkeys((1, 2, 83), b"")
    for each in data:
        pieces[each.number] += each.data
    loaded = b"".join(block[: min(MIB, size - start)] for start in range(0, size, MIB))
    assert pieces[1] == loaded
    assert pieces[2] == loaded[MIB - 1 : MIB + 1]
    written = b"".join(bytes([place]) * 60_000 for place in range(80))
    assert pieces[83] == written + loaded[len(written) :]


async def test_more_memory_than_it_may_have_is_the_programs_fault(pool: Workers) -> None:
    async with session(pool) as worker:
        await worker.obey([Allocate(0, 8)])
        await worker.obey([Allocate(1, 8), Allocate(2, 2**40), Read(0, 0, 8)])
        assert isinstance((await answers(worker, 1))[-1], Ran)
        with pytest.raises(JobError, match="memory"):
            await answers(worker, 1)
        assert worker.reached == 2


async def test_sessions_and_works_run_side_by_side(pool: Workers) -> None:
    told: list[list[bytes]] = []

    async def one(pool: Workers) -> None:
        async with session(pool) as worker:
            await worker.obey(COMMANDS)
            reports = await answers(worker, 1)
            told.append([report.data for report in reports if isinstance(report, Data)])

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(one, pool)
    assert told == [expected(COMMANDS)] * 3
    assert pool.statistics().workers == 0
