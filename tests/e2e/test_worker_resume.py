"""kill -9 of workers in the middle of a job: from the last checkpoint on, the same bytes come."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio
from tinygrad import Tensor, dtypes

import p2pflop as pf
from p2pflop.errors import ProviderError
from p2pflop.job.graph import graph_hash
from p2pflop.job.spec import state_slots
from p2pflop.node.worker_process import ProcessWorker
from p2pflop.node.worker_types import Paused, Rows, WorkerLimits
from p2pflop.node.workers import WorkerPool
from p2pflop.units import MIB
from p2pflop.wire import encode

STEPS = 6000
CHECKPOINT_STEPS = 150
KILLS = 20
LIMITS = WorkerLimits(memory_bytes=64 * MIB, cpu_seconds=60, step_seconds=20)


def training_job() -> pf.Job:
    """State that depends on every step before, random numbers included."""
    data = Tensor([1.0, -2.0, 3.0, -4.0]).realize()
    weight = Tensor.zeros(4, dtype=dtypes.float32).contiguous()
    momentum = Tensor.zeros(4, dtype=dtypes.float32).contiguous()

    def step() -> dict[str, Tensor]:
        momentum.assign(momentum * 0.9 + data * Tensor.rand(4))
        weight.assign((weight + momentum * 0.01).tanh())
        return {"total": weight.sum()}

    return pf.trace(step, steps=STEPS, seed=11)


@dataclass
class Progress:
    """What is left of a job when its worker dies: the newest checkpoint, and rows up to there."""

    step: int = 0
    state: dict[int, bytes] = field(default_factory=dict)
    rows: list[tuple[int, int, int, bytes]] = field(default_factory=list)


class Runner:
    def __init__(self, pool: WorkerPool, job: pf.Job) -> None:
        self.pool = pool
        self.job = job
        self.checked = job.checked
        self.slots = state_slots(self.checked.work)
        self.plans: Mapping[bytes, bytes] = {}

    async def prepare(self) -> None:
        graphs = self.job.file.body.graphs
        self.plans = {graph_hash(graph): await self.pool.lower(graph) for graph in graphs}

    async def go_on(self, progress: Progress, kill_after_s: float | None = None) -> Progress:
        """Run from ``progress`` on; to the end, or until the worker is killed."""
        async with self.pool.worker(LIMITS) as worker, trio.open_nursery() as nursery:
            assert isinstance(worker, ProcessWorker)
            if kill_after_s is not None:
                nursery.start_soon(kill, worker.pid, kill_after_s)
            try:
                progress = await self._run(worker, progress)
            except ProviderError:
                progress = self.newest
            nursery.cancel_scope.cancel()
        return progress

    async def _run(self, worker: ProcessWorker, start: Progress) -> Progress:
        self.newest = start
        await worker.load(encode(self.checked.work), self.plans)
        for slot, source in self.checked.inputs:
            await worker.write(slot, 0, self.job.inputs[source.address])
        for slot, data in start.state.items():
            await worker.write(slot, 0, data)
        rows = list(start.rows)
        async for event in worker.run(start.step, STEPS - start.step, CHECKPOINT_STEPS):
            if isinstance(event, Rows):
                rows += event.values
            elif isinstance(event, Paused):
                state = {s: b"".join([p async for p in worker.read(s)]) for s in self.slots}
                self.newest = Progress(event.step, state, list(rows))
        return self.newest


async def kill(pid: int, after_s: float) -> None:
    await trio.sleep(after_s)
    os.kill(pid, signal.SIGKILL)


async def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    seed = random.randrange(2**32)  # noqa: S311 - moments, not secrets
    print(f"seed {seed}")
    moments = random.Random(seed)  # noqa: S311
    pool = WorkerPool(tmp_path / "plans")
    await pool.start()
    try:
        runner = Runner(pool, training_job())
        await runner.prepare()
        began = trio.current_time()
        unbroken = await runner.go_on(Progress())
        took_s = trio.current_time() - began
        kills = 0
        while kills < KILLS:
            progress = Progress()
            while progress.step < STEPS:
                progress = await runner.go_on(progress, moments.uniform(0, took_s / 4))
                kills += progress.step < STEPS
            assert progress.state == unbroken.state
            assert progress.rows == unbroken.rows
        assert pool.statistics().crashes == 0, "the zygote lives on"
    finally:
        await pool.aclose()
