"""The smallest node: a pool and a busy worker. Prints their process ids, then waits to be ended."""

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
            print(*pids, flush=True)
            with trio.open_signal_receiver(signal.SIGINT) as signals:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(compute, worker)
                    async for _ in signals:
                        alive = sum(os.path.exists(f"/proc/{pid}") for pid in pids)  # noqa: PTH110, ASYNC240
                        print(f"interrupted, {alive} alive", flush=True)
                        nursery.cancel_scope.cancel()
    finally:
        await pool.aclose()


async def compute(worker: Worker) -> None:
    async for _ in worker.run(0, 10):
        pass


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
