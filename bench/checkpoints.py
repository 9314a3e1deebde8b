"""What checkpoints cost: the steps of a job with one every 50 of them, beside those without.

The provider's side of a lease, as it is: a locked worker, the store, a journal that has each
checkpoint on disk before it would be told. Each pair is one run with checkpoints and one without,
in alternating order, so that a busy machine slows both; a run's time is from its first rows to its
last. Beside that the same between two real nodes, as the buyer sees it: there the buyer, who
verifies, keeps and countersigns each checkpoint, competes with the worker for this machine's cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from submit_latency import start_nodes
from train_steps import load

from p2pflop.client import Client
from p2pflop.dht.store import FileStore
from p2pflop.kernels.classes import environment
from p2pflop.node.books import open_books
from p2pflop.node.execute import Checkpoints, Execution, Outcome, lower_all, worker_limits
from p2pflop.node.feeding import Feeds
from p2pflop.node.journal import Head, JobRows, Journal
from p2pflop.node.service import SubmitOptions
from p2pflop.node.worker_types import Rows
from p2pflop.node.workers import WorkerPool
from p2pflop.wire import encode

EVERY = 50
STEPS = {"digits": 1500, "conv": 1500, "gpt": 150}
HOUR_NS = 3600 * 10**9

Run = Callable[[int], Awaitable[float]]
"""Seconds of the steps of a run, with a checkpoint every so many of them or, for 0, without."""


@asynccontextmanager
async def provider(folder: Path, job: Any) -> AsyncIterator[Run]:
    checked, books = job.checked, open_books(folder)
    journal = Journal(books)

    async def nothing(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    async with FileStore(folder / "store") as store, trio.open_nursery() as nursery:
        for blob in job.inputs.values():
            await store.put(blob)
        pool = WorkerPool(folder / "plans")
        await pool.start(nursery)
        plans = await lower_all(pool, job.file.body.graphs, nothing)

        async def run(every: int) -> float:
            rows = JobRows(journal, Head(os.urandom(6).hex(), "provider", 0, "", b""), time.time_ns)
            stamps: list[float] = []

            async def give(interval: Outcome) -> None:
                rows.add(f"checkpoint {interval.done_to}", encode(interval.result))
                await rows.flush()

            async def on_rows(_: Rows) -> None:
                stamps.append(time.perf_counter())
                await trio.lowlevel.checkpoint()

            async with pool.worker(worker_limits(checked, HOUR_NS, 1)) as worker:
                execution = Execution(
                    checked,
                    pool.class_id,
                    store,
                    worker,
                    feeds=Feeds(checked, store, nothing, nothing),
                    owner=bytes(32),
                    at_hand={},
                    hold=nothing,
                )
                await execution.load(plans)
                await execution.run(Checkpoints(every, 0, lambda _late: True, give), on_rows)
            return stamps[-1] - stamps[0]

        yield run
        await pool.aclose()
        await books.aclose()
        nursery.cancel_scope.cancel()


def bought(client: Client, job: Any) -> Run:
    from p2pflop.job.file import encode_file

    for blob in job.inputs.values():
        client.put(blob)
    data = encode_file(job.file)

    async def run(every: int) -> float:
        await trio.lowlevel.checkpoint()
        run_id = client.submit(
            data, SubmitOptions(checkpoint_steps=every, checkpoint_s=0, fresh=True)
        )
        stamps = []
        for event in client.events(run_id):
            if event["kind"] == "rows":
                stamps.append(event["at_ns"])
            elif event["kind"] in ("failed", "cancelled"):
                raise SystemExit(f"run failed: {event}")
        return float(stamps[-1] - stamps[0]) / 1e9

    return run


async def compare(run: Run, pairs: int) -> dict[str, float]:
    times: dict[int, list[float]] = {0: [], EVERY: []}
    await run(0)
    for number in range(pairs):
        for every in (0, EVERY) if number % 2 else (EVERY, 0):
            times[every].append(await run(every))
    ratios = [slow / fast for fast, slow in zip(times[0], times[EVERY], strict=True)]
    return {
        "without_s": round(statistics.median(times[0]), 3),
        "with_s": round(statistics.median(times[EVERY]), 3),
        "ratio": round(statistics.median(ratios), 3),
    }


async def measure(name: str, pairs: int) -> dict[str, Any]:
    job = load(name).make_job(steps=STEPS[name])
    with tempfile.TemporaryDirectory() as folder:
        async with provider(Path(folder), job) as run:
            alone = await compare(run, pairs)
    with tempfile.TemporaryDirectory() as folder, start_nodes(Path(folder)) as (client, _):
        beside = await compare(bought(client, job), pairs)
    return {"steps": STEPS[name], "provider": alone, "between_two_nodes": beside}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("examples", nargs="*", default=list(STEPS))
    arguments = parser.parse_args()
    os.environ.update(environment())
    rows = {name: trio.run(measure, name, arguments.pairs) for name in arguments.examples}
    report = {"bench": "checkpoints", "every": EVERY, "promise": "<= 1.03", "examples": rows}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
