"""Workers in real processes: what jobs do to them, what hostile ones say, what is left behind."""

from __future__ import annotations

import importlib
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from p2pflop.errors import ConfigError, JobError, ProviderError
from p2pflop.job.graph import (
    Dtype,
    Graph,
    GraphParam,
    Node,
    Op,
    Output,
    encode_graph,
    graph_hash,
)
from p2pflop.job.spec import MODE_TRACE, ROLE_STATE, NoSource, Phase, Work, WorkParam
from p2pflop.kernels import classes
from p2pflop.kernels.frames import MAX_GRAPH_BYTES
from p2pflop.node import lowerers, workers
from p2pflop.node.plans import PlanCache
from p2pflop.node.worker_process import ProcessWorker
from p2pflop.node.worker_types import Paused, Rows, WorkerEvent, WorkerLimits
from p2pflop.node.workers import MAX_CRASHES, WorkerPool
from p2pflop.units import MIB
from p2pflop.wire import encode

ENGINES = Path(__file__).parents[1] / "engines"
sys.path.insert(0, str(ENGINES))
script = importlib.import_module("scripted_engine")
LIMITS = WorkerLimits(memory_bytes=32 * MIB, cpu_seconds=20, step_seconds=20)
GRAPH = b"a graph"
WAIT_SECONDS = 20.0
BUSY_TICKS = 20  # after so much CPU time a worker that spins is spinning


def scripted(deed: int, size: int = 4) -> Work:
    state = WorkParam(int(Dtype.UINT8), (size,), ROLE_STATE, NoSource())
    return Work(1, (Phase(graph_hash(GRAPH), 1, 0, (MODE_TRACE,)),), (state,), deed)


@asynccontextmanager
async def scripted_pool(
    folder: Path, on_broken: Callable[[], None] | None = None, **variables: str
) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(
        folder / "plans",
        on_broken=on_broken,
        engine="scripted_engine",
        variables={"PYTHONPATH": str(ENGINES), **variables},
    )
    try:
        await pool.start()
        yield pool
    finally:
        await pool.aclose()


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[WorkerPool]:
    async with scripted_pool(tmp_path) as made:
        yield made


async def load(pool: WorkerPool, worker: ProcessWorker, work: Work) -> None:
    plan = await pool.lower(GRAPH)
    await worker.load(encode(work), {graph_hash(GRAPH): plan})


async def run(pool: WorkerPool, deed: int, limits: WorkerLimits = LIMITS) -> list[WorkerEvent]:
    async with pool.worker(limits) as worker:
        await load(pool, worker, scripted(deed))
        return [event async for event in worker.run(0, 10)]


async def assert_works(pool: WorkerPool) -> None:
    assert (await run(pool, script.HONEST))[-1] == Paused(10, ended=True)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def wait_until(true: Callable[[], bool]) -> None:
    with trio.fail_after(WAIT_SECONDS):
        while not true():  # noqa: ASYNC110 (nothing tells of the end of a process that is not ours)
            await trio.sleep(0.01)


async def wait_until_dead(*pids: int) -> None:
    await wait_until(lambda: not any(is_alive(pid) for pid in pids))


async def wait_until_crashed(pool: WorkerPool, times: int) -> None:
    await wait_until(lambda: pool.statistics().crashes == times)


def alive_in_sessions(sessions: set[int]) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().rsplit(")", 1)
        except OSError:
            continue
        state, _, _, session = rest.split()[:4]
        if int(session) in sessions and state != "Z":
            found.append(name)
    return found


def oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def cpu_ticks(pid: int) -> int:
    """CPU time used in user mode, in hundredths of a second."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11])


def resident_bytes(pids: tuple[int, ...]) -> int:
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in pids)


async def kill_at_first_row(worker: ProcessWorker, pid: int) -> None:
    async for event in worker.run(0, 10_000):
        if isinstance(event, Rows):
            os.kill(pid, signal.SIGKILL)


class TestFaultsOfAJob:
    @pytest.mark.parametrize(
        ("deed", "why"),
        [
            (script.SEGFAULT, "SIGSEGV"),
            (script.DIVIDE_BY_ZERO, "SIGFPE"),
            (script.EAT_ALL_MEMORY, "memory"),
            (script.EAT_RESIDENT_MEMORY, "more memory than it was metered for"),
            (script.EXIT_WITHOUT_MEMORY, "ran out of memory"),
        ],
    )
    async def test_is_the_jobs_and_the_pool_lives_on(
        self, pool: WorkerPool, deed: int, why: str
    ) -> None:
        with pytest.raises(JobError, match=why):
            await run(pool, deed)
        await assert_works(pool)
        assert pool.statistics().crashes == 0

    async def test_endless_computing_ends_at_the_cpu_limit(self, pool: WorkerPool) -> None:
        with pytest.raises(JobError, match="CPU time"):
            await run(pool, script.SPIN, WorkerLimits(32 * MIB, cpu_seconds=1, step_seconds=20))
        await assert_works(pool)

    @pytest.mark.parametrize("deed", [script.SLEEP, script.SPIN])
    async def test_a_step_that_takes_too_long_is_ended(self, pool: WorkerPool, deed: int) -> None:
        with pytest.raises(JobError, match="step took longer"):
            await run(pool, deed, WorkerLimits(32 * MIB, cpu_seconds=60, step_seconds=0.2))
        await assert_works(pool)

    async def test_memory_cannot_be_hidden_in_shared_pages(self, pool: WorkerPool) -> None:
        with pytest.raises(ProviderError, match="Operation not permitted"):
            await run(pool, script.HIDE_MEMORY)

    async def test_a_dead_worker_stays_dead(self, pool: WorkerPool) -> None:
        async with pool.worker(LIMITS) as worker:
            await load(pool, worker, scripted(script.SEGFAULT))
            for _ in range(2):
                with pytest.raises(JobError, match="SIGSEGV"):
                    [event async for event in worker.run(0, 10)]
            with pytest.raises(JobError, match="SIGSEGV"):
                [chunk async for chunk in worker.read(0)]

    async def test_it_dies_first_when_the_machine_runs_out_of_memory(
        self, pool: WorkerPool
    ) -> None:
        async with pool.worker(LIMITS) as worker:
            assert oom_score(worker.pid) > oom_score(os.getpid())


class TestHostileWorker:
    @pytest.mark.parametrize(
        ("deed", "why"),
        [
            (script.GARBAGE, "not a valid message"),
            (script.HUGE_FRAME, "over the limit"),
            (script.WRONG_STEP, "steps 100 to 101 where 0 was next"),
            (script.SKIP_ROWS, "rows are missing"),
            (script.UNTRACED_ROW, "not traced"),
            (script.EARLY_PAUSE, "a pause at step 2"),
            (script.WRONG_REPORT, "Done during a run"),
            (script.EXIT, "code 3"),
            (script.RAISE, "KeyError"),
        ],
    )
    async def test_whatever_it_says_is_a_provider_error_and_its_end(
        self, pool: WorkerPool, deed: int, why: str
    ) -> None:
        async with pool.worker(LIMITS) as worker:
            await load(pool, worker, scripted(deed))
            with pytest.raises(ProviderError, match=why):
                [event async for event in worker.run(0, 10)]
            await wait_until_dead(worker.pid)
        await assert_works(pool)

    async def test_a_slot_of_another_size_is_refused(self, pool: WorkerPool) -> None:
        async with pool.worker(LIMITS) as worker:
            await load(pool, worker, scripted(script.WRONG_SIZE))
            with pytest.raises(ProviderError, match="3 bytes where 4 are due"):
                [chunk async for chunk in worker.read(0)]

    async def test_no_way_out_is_open_inside_a_lease(self, pool: WorkerPool) -> None:
        async with pool.worker(LIMITS) as worker:
            await load(pool, worker, scripted(script.ESCAPE))
            assert [event async for event in worker.run(0, 10)]
            told = b"".join([chunk async for chunk in worker.read_output(0, 0)])
        outcomes = json.loads(told)
        assert len(outcomes) > 25
        assert [name for name, why in outcomes.items() if why in ("ALLOWED", "ENOENT")] == []


class TestLosses:
    async def test_a_killed_worker_is_a_provider_error(self, pool: WorkerPool) -> None:
        async with pool.worker(LIMITS) as worker:
            await load(pool, worker, scripted(script.SLOW))
            with pytest.raises(ProviderError, match=r"the worker was killed \(SIGKILL\)"):
                await kill_at_first_row(worker, worker.pid)
        await assert_works(pool)
        assert pool.statistics().crashes == 0

    @pytest.mark.parametrize("victim", [0, 1])
    async def test_a_killed_helper_process_loses_its_leases_and_is_replaced(
        self, pool: WorkerPool, victim: int
    ) -> None:
        before = pool.statistics().process_ids
        async with pool.worker(LIMITS) as worker:
            await load(pool, worker, scripted(script.SLOW))
            with pytest.raises(ProviderError):
                await kill_at_first_row(worker, before[victim])
            await wait_until_dead(worker.pid, *before)
        await assert_works(pool)
        assert not set(before) & set(pool.statistics().process_ids)
        assert pool.statistics().crashes == 1

    async def test_a_worker_that_listens_to_nobody_dies_with_its_zygote(
        self, pool: WorkerPool
    ) -> None:
        async with pool.worker(LIMITS) as worker, trio.open_nursery() as nursery:
            await load(pool, worker, scripted(script.SPIN))

            async def spin() -> None:
                with pytest.raises(ProviderError):
                    [event async for event in worker.run(0, 10)]

            nursery.start_soon(spin)
            await wait_until(lambda: cpu_ticks(worker.pid) >= BUSY_TICKS)
            os.kill(pool.statistics().process_ids[0], signal.SIGKILL)
            await wait_until_dead(worker.pid)

    async def test_too_many_crashes_break_the_pool(self, tmp_path: Path) -> None:
        told = trio.Event()
        async with scripted_pool(tmp_path, on_broken=told.set) as pool:
            for number in range(MAX_CRASHES):
                assert not pool.broken
                await pool.lower(b"")
                os.kill(pool.statistics().process_ids[0], signal.SIGKILL)
                await wait_until_crashed(pool, number + 1)
            with trio.fail_after(WAIT_SECONDS):
                await told.wait()
            assert pool.broken
            with pytest.raises(ProviderError, match="has stopped"):
                await pool.lower(GRAPH)
            with pytest.raises(ProviderError, match="has stopped"):
                await run(pool, script.HONEST)

    async def test_what_does_not_start_says_why(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="told not to start"):
            async with scripted_pool(tmp_path, SCRIPT_FAILS_TO_START="1"):
                pass

    async def test_without_clang_there_is_a_hint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def absent() -> str:
            raise ConfigError("no clang", hint="install clang")

        classes.descriptor.cache_clear()
        monkeypatch.setattr(classes, "clang", absent)
        pool = WorkerPool(tmp_path)
        with pytest.raises(ConfigError, match="no clang"):
            await pool.start()
        await pool.aclose()


class TestLimits:
    async def test_workers(self, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(workers, "MAX_WORKERS", 2)
        async with pool.worker(LIMITS), pool.worker(LIMITS):
            with pytest.raises(ProviderError, match="all 2 workers are taken"):
                await run(pool, script.HONEST)
        await assert_works(pool)

    async def test_lowerings(self, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(workers, "MAX_LOWERINGS", 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.lower, b"slow graph")
            await wait_until(lambda: pool.statistics().lowering == 1)
            with pytest.raises(ProviderError, match="1 graphs are waiting"):
                await pool.lower(GRAPH)
        assert await pool.lower(GRAPH)

    async def test_graph(self, pool: WorkerPool) -> None:
        assert await pool.lower(b"x" * MAX_GRAPH_BYTES)
        with pytest.raises(JobError, match="over the limit"):
            await pool.lower(b"x" * (MAX_GRAPH_BYTES + 1))

    async def test_plan(self, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lowerers, "MAX_PLAN_BYTES", len(b"plan of 12"))
        assert await pool.lower(b"12") == b"plan of 12"
        with pytest.raises(JobError, match="over the limit"):
            await pool.lower(b"123")

    async def test_lowering_time(self, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lowerers, "LOWER_SECONDS", 0.2)
        with pytest.raises(JobError, match="took longer"):
            await pool.lower(b"spin")
        assert await pool.lower(GRAPH)

    async def test_lowering_memory(self, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lowerers, "LOWER_MEMORY_BYTES", 16 * MIB)
        with pytest.raises(JobError, match="memory"):
            await pool.lower(b"eat")
        assert await pool.lower(GRAPH)

    async def test_progress(self, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lowerers, "MAX_PROGRESS_FRAMES", 2)
        with pytest.raises(ProviderError, match="more than 2 frames"):
            await pool.lower(b"chatter")


class TestNothingIsLeft:
    async def test_closing_ends_every_process(self, tmp_path: Path) -> None:
        async with scripted_pool(tmp_path) as pool, pool.worker(LIMITS) as worker:
            await load(pool, worker, scripted(script.HONEST))
            pids = pool.statistics().process_ids
            assert len(pids) == 3
            assert all(is_alive(pid) for pid in pids)
        assert not any(is_alive(pid) for pid in pids)

    async def test_a_lease_ends_its_worker_even_in_mid_run(self, pool: WorkerPool) -> None:
        async with pool.worker(LIMITS) as worker:
            await load(pool, worker, scripted(script.SLOW))
            async for _ in worker.run(0, 10_000):
                break
        assert not is_alive(worker.pid)

    async def test_cancelling_a_lease_ends_its_worker(self, pool: WorkerPool) -> None:
        pids: list[int] = []

        async def lease() -> None:
            async with pool.worker(LIMITS) as worker:
                await load(pool, worker, scripted(script.SPIN))
                pids.append(worker.pid)
                [event async for event in worker.run(0, 10)]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lease)
            await wait_until(lambda: bool(pids) and cpu_ticks(pids[0]) >= BUSY_TICKS)
            nursery.cancel_scope.cancel()
        assert not is_alive(pids[0])
        await assert_works(pool)

    @pytest.mark.parametrize("killer", [signal.SIGKILL, signal.SIGINT])
    async def test_no_process_outlives_the_node(self, tmp_path: Path, killer: int) -> None:
        """SIGINT goes to the whole group, as Ctrl-C does: the node decides, the rest follow it."""
        with start_tiny_node(tmp_path) as node:
            assert node.stdout is not None
            pids = [int(pid) for pid in node.stdout.readline().split()]
            assert len(pids) == 3
            assert all(is_alive(pid) for pid in pids)
            os.killpg(node.pid, killer)
            if killer == signal.SIGINT:
                assert node.stdout.readline() == b"interrupted, 3 alive\n"
            node.wait(WAIT_SECONDS)
        await wait_until_dead(*pids)
        # Zygote and compile helper lead a session each: whatever they started is in it.
        await wait_until(lambda: not alive_in_sessions(set(pids)))


def start_tiny_node(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", ENGINES / "tiny_node.py", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ENGINES)},
    )


class TestLowering:
    async def test_a_graph_that_does_not_lower_is_the_jobs_fault(self, pool: WorkerPool) -> None:
        with pytest.raises(JobError, match="told to fail"):
            await pool.lower(b"fail")
        with pytest.raises(JobError, match="SIGSEGV"):
            await pool.lower(b"die")
        with pytest.raises(ProviderError, match="Ready instead of a plan"):
            await pool.lower(b"babble")

    async def test_callers_for_one_graph_share_a_lowerer(self, pool: WorkerPool) -> None:
        plans: list[bytes] = []
        told: list[tuple[int, int]] = []

        async def one() -> None:
            plans.append(await pool.lower(b"slow graph", lambda *seen: told.append(seen)))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
        assert set(plans) == {b"plan of slow graph"}
        assert pool.statistics().plans_lowered == 1
        assert told.count((2, 2)) == 5

    async def test_a_caller_may_leave_without_harm_to_the_others(self, pool: WorkerPool) -> None:
        plans: list[bytes] = []

        async def stay() -> None:
            plans.append(await pool.lower(b"slow graph"))

        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.1):
                nursery.start_soon(stay)
                await pool.lower(b"slow graph")
        assert plans == [b"plan of slow graph"]

    async def test_a_lowering_that_nobody_waits_for_is_ended(self, pool: WorkerPool) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.lower, b"slow graph")
            await wait_until(lambda: len(pool.statistics().process_ids) == 3)
            nursery.cancel_scope.cancel()
        assert pool.statistics().lowering == 0
        assert await pool.lower(b"slow graph") == b"plan of slow graph"
        await wait_until(lambda: len(pool.statistics().process_ids) == 2)
        assert pool.statistics().plans_lowered == 1

    async def test_who_compiled_for_a_lowerer_is_reaped(self, pool: WorkerPool) -> None:
        def waiting() -> list[str]:
            """Processes that have ended and that nobody has asked for."""
            stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
            parents = {str(pid) for pid in pool.statistics().process_ids}
            fields = [stat.rpartition(")")[2].split() for stat in stats]
            return [state for state, parent, *_ in fields if parent in parents and state == "Z"]

        await pool.lower(b"C:int f() { return 1; }")
        await wait_until(lambda: not waiting())
        assert await pool.lower(b"C:int f() { return 2; }")
        await wait_until(lambda: not waiting())

    async def test_several_lowerers_compile_at_once(self, pool: WorkerPool) -> None:
        objects: list[bytes] = []

        async def one(number: int) -> None:
            objects.append(await pool.lower(f"C:int f() {{ return {number}; }}".encode()))

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(one, number)
        assert len(set(objects)) == 6
        assert all(each.startswith(b"\x7fELF") for each in objects)
        with pytest.raises(JobError, match="does not compile"):
            await pool.lower(b"C:int f() { return nothing; }")

    async def test_plans_outlive_the_pool(self, tmp_path: Path) -> None:
        async with scripted_pool(tmp_path) as pool:
            plan = await pool.lower(GRAPH)
        async with scripted_pool(tmp_path) as pool:
            assert await pool.lower(GRAPH) == plan
            assert pool.statistics().plans_lowered == 0
            assert pool.statistics().plans_reused == 1


def damage_only_file(folder: Path) -> None:
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"X")


class TestPlanCache:
    async def test_a_damaged_file_is_not_used_but_replaced(self, tmp_path: Path) -> None:
        key = b"k" * 32
        await PlanCache(tmp_path).put(key, b"machine code")
        damage_only_file(tmp_path)
        assert await PlanCache(tmp_path).get(key) is None
        assert os.listdir(tmp_path) == []  # noqa: PTH208

    async def test_the_least_recently_used_goes_first(self, tmp_path: Path) -> None:
        keys = [bytes([i]) * 32 for i in range(4)]
        cache = PlanCache(tmp_path, disk_bytes=3 * (32 + 100), memory_bytes=0)
        for number, key in enumerate(keys[:3]):
            await cache.put(key, bytes(100))
            os.utime(tmp_path / f"{key.hex()}.plan", (number, number))
        assert await cache.get(keys[0]) is not None
        await cache.put(keys[3], bytes(100))
        left = [await cache.get(key) is not None for key in keys]
        assert left == [True, False, True, True]

    async def test_memory_is_bounded_too(self, tmp_path: Path) -> None:
        cache = PlanCache(tmp_path / "none", disk_bytes=0, memory_bytes=100)
        await cache.put(b"a" * 32, bytes(60))
        await cache.put(b"b" * 32, bytes(40))
        assert await cache.get(b"a" * 32) == bytes(60)
        await cache.put(b"c" * 32, bytes(40))
        assert await cache.get(b"b" * 32) is None
        assert await cache.get(b"a" * 32) == bytes(60)


def test_the_node_side_imports_no_tensor_library() -> None:
    code = (
        "import sys, p2pflop.node.workers, p2pflop.node.memory_workers\n"
        "print([name for name in ('tinygrad', 'numpy', 'libp2p') if name in sys.modules])\n"
    )
    told = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, timeout=60, check=True
    )
    assert told.stdout == b"[]\n"


class TestWithTinygrad:
    """The real engine: a graph lowered, compiled and run, all of it behind the lock."""

    @pytest.mark.parametrize("name", ["cpu-clang-nofma", "cpu-llvm", "cpu-x86", "PYTHON::sm_80"])
    async def test_a_graph_is_lowered_and_run(self, tmp_path: Path, name: str) -> None:
        vector = (64,)
        nodes = (
            Node(Op.PARAM, (0,)),
            Node(Op.PARAM, (1,)),
            Node(Op.ADD, (), (0, 1)),
            Node(Op.REDUCE, (0, 1), (2,)),
        )
        params = tuple(GraphParam(slot, Dtype.FLOAT32, vector) for slot in (0, 1))
        graph = encode_graph(Graph(params, nodes, (Output(3), Output(2, 0))))
        state = WorkParam(int(Dtype.FLOAT32), vector, ROLE_STATE, NoSource())
        phase = Phase(graph_hash(graph), 1, 0, (MODE_TRACE,))
        work = encode(Work(1, (phase,), (state, state), 0))
        pool = WorkerPool(tmp_path, class_name=name)
        await pool.start()
        try:
            # A device's driver cannot be locked: such a node serves its own account alone.
            assert (pool.level == 1) == (name == "PYTHON::sm_80")
            told: list[tuple[int, int]] = []
            plan = await pool.lower(graph, lambda *seen: told.append(seen))
            assert told[-1][0] == told[-1][1] > 0
            async with pool.worker(LIMITS) as worker:
                await worker.load(work, {graph_hash(graph): plan})
                await worker.write(1, 0, struct.pack("<64f", *range(64)))
                events = [event async for event in worker.run(0, 3)]
                data = b"".join([chunk async for chunk in worker.read(0)])
            resident = resident_bytes(pool.statistics().process_ids)
        finally:
            await pool.aclose()
        assert struct.unpack("<64f", data) == tuple(3.0 * i for i in range(64))
        values = [value for event in events if isinstance(event, Rows) for value in event.values]
        assert [(step, struct.unpack("<f", value)[0]) for step, _, _, value in values] == [
            (step, (step + 1) * 2016.0) for step in range(3)
        ]
        assert resident < (150 if name == "cpu-llvm" else 120) * MIB

    async def test_an_invalid_graph_is_the_jobs_fault(self, tmp_path: Path) -> None:
        graph = Graph((), (Node(Op.CONST, (Dtype.FLOAT32, 0.1)),), (Output(0),))
        pool = WorkerPool(tmp_path)
        await pool.start()
        try:
            with pytest.raises(JobError, match="invalid graph"):
                await pool.lower(encode_graph(graph))
            with pytest.raises(JobError):
                await pool.lower(b"\xc1")
        finally:
            await pool.aclose()
