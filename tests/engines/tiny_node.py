"""The smallest node: a pool, a busy worker, a busy compiler. Prints the process ids of the pool
and the worker, then waits to be ended."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

import trio

from p2pflop.job.graph import Dtype, graph_hash
from p2pflop.job.spec import MODE_TRACE, ROLE_STATE, NoSource, Phase, Work, WorkParam
from p2pflop.node.worker_types import Worker, WorkerLimits
from p2pflop.node.workers import WorkerPool
from p2pflop.wire import encode

GRAPH = b"a graph"
# Seconds of work for clang.
MUCH_SOURCE = b"C:" + b"".join(
    b"int f%d(int x) { return x * %d; }\n" % (i, i) for i in range(30_000)
)
scripted_engine = importlib.import_module("scripted_engine")


async def main(folder: Path) -> None:
    variables = {"PYTHONPATH": str(Path(__file__).parent)}
    pool = WorkerPool(folder, engine="scripted_engine", variables=variables)
    await pool.start()
    pids: tuple[int, ...] = ()
    try:
        async with pool.worker(WorkerLimits(2**25, 60, 60)) as worker:
            plan = await pool.lower(GRAPH)
            state = WorkParam(int(Dtype.UINT8), (4,), ROLE_STATE, NoSource())
            phase = Phase(graph_hash(GRAPH), 1, 0, (MODE_TRACE,))
            work = Work(1, (phase,), (state,), scripted_engine.SPIN)
            await worker.load(encode(work), {graph_hash(GRAPH): plan})
            pids = pool.statistics().process_ids
            with trio.open_signal_receiver(signal.SIGINT) as signals:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(compute, worker)
                    nursery.start_soon(pool.lower, MUCH_SOURCE)
                    while not clang_runs(pids[1]):  # noqa: ASYNC110
                        await trio.sleep(0.01)
                    print(*pids, flush=True)
                    async for _ in signals:
                        alive = sum(os.path.exists(f"/proc/{pid}") for pid in pids)  # noqa: PTH110, ASYNC240
                        print(f"interrupted, {alive} alive", flush=True)
                        nursery.cancel_scope.cancel()
    finally:
        await pool.aclose()


def clang_runs(session: int) -> bool:
    """Whether a process of that session is called clang."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().rsplit(")", 1)
        except OSError:
            continue
        if "clang" in name and int(rest.split()[3]) == session:
            return True
    return False


async def compute(worker: Worker) -> None:
    async for _ in worker.run(0, 10):
        pass


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
