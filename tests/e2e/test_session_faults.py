"""Sessions in real worker processes: what runs do to them, and what hostile ones say."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from p2pflop.errors import JobError, P2PFlopError, ProviderError
from p2pflop.job.commands import Allocate, AnyCommand, Bind, Define, Load, Ran, Read, Run, Write
from p2pflop.job.graph import Dtype, Graph, GraphParam, Node, Op, Output, encode_graph, graph_hash
from p2pflop.node import worker_session
from p2pflop.node.worker_process import ProcessWorker
from p2pflop.node.worker_types import WorkerLimits
from p2pflop.node.workers import WorkerPool
from p2pflop.units import MIB

ENGINES = Path(__file__).parents[1] / "engines"
sys.path.insert(0, str(ENGINES))
script = importlib.import_module("scripted_engine")
LIMITS = WorkerLimits(memory_bytes=32 * MIB, cpu_seconds=20, step_seconds=20)
NODES = (Node(Op.PARAM, (0,)), Node(Op.ADD, (), (0, 0)), Node(Op.ASSIGN, (), (0, 0, 1)))
GRAPH = encode_graph(Graph((GraphParam(0, Dtype.UINT8, (4,)),), NODES, (Output(2, 0),)))
NAME = graph_hash(GRAPH)
HONEST, DEED = 0, 1
"""Bindings: of one run as it should be, and of one that does what its buffer says."""


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[WorkerPool]:
    made = WorkerPool(
        tmp_path / "plans", engine="scripted_engine", variables={"PYTHONPATH": str(ENGINES)}
    )
    try:
        await made.start()
        yield made
    finally:
        await made.aclose()


@asynccontextmanager
async def session(
    pool: WorkerPool, deed: int = 0, limits: WorkerLimits = LIMITS
) -> AsyncIterator[ProcessWorker]:
    """A session with both bindings; the first batch, of six commands, was obeyed."""
    plan = await pool.lower(GRAPH)
    async with pool.worker(limits) as worker:
        await worker.open_session()
        await worker.define(NAME, plan)
        some: list[AnyCommand] = [Allocate(0, 4), Allocate(1, 4), Write(1, 0, bytes([deed]))]
        await worker.obey([*some, Bind(HONEST, NAME, ((0, 0),)), Bind(DEED, NAME, ((1, 0),))])
        await worker.obey([Write(0, 0, b"\0")])
        assert [report async for report in first(worker, 2)]
        yield worker


async def first(worker: ProcessWorker, batches: int) -> AsyncIterator[Ran]:
    """The ends of so many batches."""
    async for report in worker.reports():
        if isinstance(report, Ran):
            yield report
            batches -= 1
            if not batches:
                return


async def failure(worker: ProcessWorker, *batches: Sequence[AnyCommand]) -> P2PFlopError:
    """What comes of commands that end the session."""
    for commands in batches:
        await worker.obey(commands)
    with pytest.raises(P2PFlopError) as caught:
        [report async for report in worker.reports()]
    return caught.value


async def assert_works(pool: WorkerPool) -> None:
    async with session(pool) as worker:
        await worker.obey([Run(HONEST), Run(DEED)])
        assert [report.kernels async for report in first(worker, 1)] == [2]


class TestFaultsOfAProgram:
    @pytest.mark.parametrize(
        ("deed", "why"),
        [
            (script.SEGFAULT, "SIGSEGV"),
            (script.DIVIDE_BY_ZERO, "SIGFPE"),
            (script.EAT_ALL_MEMORY, "memory"),
            (script.EAT_RESIDENT_MEMORY, "more memory than it was metered for"),
        ],
    )
    async def test_the_command_to_blame_is_known(
        self, pool: WorkerPool, deed: int, why: str
    ) -> None:
        async with session(pool, deed) as worker:
            honest = [Run(HONEST)] * 50
            error = await failure(worker, honest, [*honest, Run(DEED), *honest], honest)
            assert isinstance(error, JobError)
            assert why in error.message
            assert worker.reached == 6 + 100
            assert not worker.alive
            with pytest.raises(JobError, match=why):
                await worker.obey(honest)
        await assert_works(pool)
        assert pool.statistics().crashes == 0

    @pytest.mark.parametrize("deed", [script.SLEEP, script.SPIN])
    async def test_runs_that_take_too_long_are_ended(
        self, pool: WorkerPool, deed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(worker_session, "BATCH_SECONDS", 0.3)
        async with session(pool, deed, WorkerLimits(32 * MIB, 60, step_seconds=0.1)) as worker:
            error = await failure(worker, [Run(HONEST), Run(DEED)], [Run(HONEST)])
            assert isinstance(error, JobError)
            assert "2 runs took longer than" in error.message
            assert worker.reached == 7
        await assert_works(pool)

    async def test_a_worker_that_takes_nothing_more_is_ended(
        self, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(worker_session, "BATCH_SECONDS", 0.3)
        async with session(pool, script.SLEEP, WorkerLimits(32 * MIB, 60, 0.1)) as worker:
            await worker.obey([Run(DEED)])

            async def fill_the_pipe() -> None:
                while True:
                    await worker.put(0, 0, bytes(4) * 50_000)

            with pytest.raises(ProviderError, match="took nothing for"):
                await fill_the_pipe()
            assert not worker.alive

    async def test_a_killed_worker_is_the_providers_fault(self, pool: WorkerPool) -> None:
        async with session(pool, script.SLEEP) as worker:
            await worker.obey([Run(DEED)])
            os.kill(worker.pid, signal.SIGKILL)
            assert isinstance(await failure(worker), ProviderError)

    async def test_a_worker_that_dies_idle_is_noticed(self, pool: WorkerPool) -> None:
        async with session(pool) as worker, trio.open_nursery() as nursery:

            async def listen() -> None:
                assert isinstance(await failure(worker), ProviderError)

            nursery.start_soon(listen)
            await wait_all_tasks_blocked()
            os.kill(worker.pid, signal.SIGKILL)


class TestHostileWorker:
    @pytest.mark.parametrize(
        ("deed", "why"),
        [
            (script.GARBAGE, "not a valid message"),
            (script.HUGE_FRAME, "over the limit"),
            (script.WRONG_STEP, "Progressed out of turn"),
            (script.WRONG_REPORT, "Done out of turn"),
            (script.UNASKED_DATA, "Part out of turn"),
            (script.EXIT, "code 3"),
            (script.RAISE, "KeyError"),
        ],
    )
    async def test_whatever_it_says_is_a_provider_error_and_its_end(
        self, pool: WorkerPool, deed: int, why: str
    ) -> None:
        async with session(pool, deed) as worker:
            error = await failure(worker, [Run(DEED), Run(HONEST)])
            assert isinstance(error, ProviderError)
            assert why in error.message
            assert not worker.alive
        await assert_works(pool)

    @pytest.mark.parametrize(
        ("deed", "why"),
        [
            (script.WRONG_SIZE, "3 bytes where 4 are due"),
            (script.UNASKED_OBEYED, "Obeyed out of turn"),
            (script.UNASKED_DATA, "1 bytes where 4 are due"),
        ],
    )
    async def test_an_answer_of_another_size_or_order_is_refused(
        self, pool: WorkerPool, deed: int, why: str
    ) -> None:
        async with session(pool, deed) as worker:
            error = await failure(worker, [Run(DEED), Read(0, 0, 4)])
            assert isinstance(error, ProviderError)
            assert why in error.message

    async def test_an_answer_too_many_is_refused(self, pool: WorkerPool) -> None:
        async with session(pool, script.UNASKED_OBEYED) as worker:
            await worker.obey([Run(DEED)])
            assert [report async for report in first(worker, 1)]
            error = await failure(worker)
            assert "Obeyed where nothing is due" in error.message

    async def test_it_cannot_name_a_command_that_was_not_under_way(self, pool: WorkerPool) -> None:
        async with session(pool) as worker:
            assert worker.reached == 6
            await worker.obey([Run(HONEST)])
            assert 6 <= worker.reached <= 7


async def test_plans_and_data_do_not_come_as_commands(pool: WorkerPool) -> None:
    async with session(pool) as worker:
        for wrong in (Define(GRAPH), Load(0, 0, bytes(32), 4)):
            with pytest.raises(ValueError, match="by ``define`` and ``put``"):
                await worker.obey([wrong])
