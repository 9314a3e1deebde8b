"""Training steps on a provider against the same steps in a local TinyJit, and what they cost.

For each example: the ratio of step times, in interleaved pairs in this process, so that a busy
machine slows both; the first step of a new process that has tinygrad imported, as the zygote's fork
has it, from the cached plans to the end of step 0; the same cold, from the program on, beside the
first step of a native process, both with nothing compiled yet; the size of the job; the seconds to
trace, open and meter it; and the cost that the meter tells against what the compiled kernels do.
The GPT of eight layers is traced and metered only. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from p2pflop.kernels.classes import descriptor, environment

ROOT = Path(__file__).resolve().parent.parent
WARM_UP_STEPS = 5
HOUR_NS = 3600 * 10**9
EXAMPLES = {"mlp": 400, "digits": 150, "conv": 150, "gpt": 40}
REPEATS = 3


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, help="pairs of steps [default: by example]")
    parser.add_argument("--fresh", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cold", choices=["ours", "native"], help=argparse.SUPPRESS)
    parser.add_argument("examples", nargs="*", default=list(EXAMPLES))
    arguments = parser.parse_args()
    if arguments.fresh is not None:
        print(json.dumps(first_step(arguments.fresh.read_bytes())))
        return
    os.environ.update(environment())
    if arguments.cold:
        print(json.dumps(cold(arguments.examples[0], arguments.cold)))
        return
    rows = {name: measure(name, arguments.pairs or EXAMPLES[name]) for name in arguments.examples}
    ratios = [row["ratio"] for row in rows.values()]
    report = {
        "bench": "train_steps",
        "class": descriptor().name,
        "value": statistics.median(ratios),
        "unit": "worker step / TinyJit step, median over examples of medians of pairs",
        "promise": "<= 1.00, none above 1.03",
        "largest": max(ratios),
        "examples": rows,
        "gpt_of_8_layers": measure_trace("gpt", layers=8)
        | {"promise": "trace, open and meter <= 2 s, meter <= 100 ms"},
    }
    print(json.dumps(report, indent=1))


@dataclass(frozen=True)
class Lowered:
    """An example with its plans and, natively, its step."""

    job: Any
    plans: dict[bytes, bytes]
    inputs: dict[int, bytes]
    native: Callable[[], Any]
    lowering_s: float


def prepare(name: str, steps: int) -> Lowered:
    """Trace and lower an example."""
    from tinygrad import Tensor

    from p2pflop.dht.manifest import address_of
    from p2pflop.job.file import CheckedJob, open_job
    from p2pflop.kernels.lower import lower
    from p2pflop.kernels.trace import trace

    Tensor.manual_seed(0)
    train, every = _functions(load(name))
    traced = trace(train, steps=steps, every=every, address_of=address_of)
    job = open_job(traced.body)
    assert isinstance(job, CheckedJob)
    started = time.perf_counter()
    plans = {graph: lower(checked) for graph, checked in job.graphs.items()}
    lowering_s = time.perf_counter() - started
    return Lowered(job, plans, traced.inputs, _native_step(train), lowering_s)


def measure(name: str, pairs: int) -> dict[str, Any]:
    """Lower an example, run ``pairs`` pairs of steps, start a fresh process once."""
    from tinygrad import Device

    from p2pflop.kernels.run import Session
    from p2pflop.wire import encode

    lowered = prepare(name, 2 * pairs)
    session = Session(lowered.job.work, lowered.plans)
    session.initialise()
    for slot, data in lowered.inputs.items():
        session.write(slot, 0, data)
    # Steps at which only the training phase is due, so that both sides do the same.
    periods = [phase.every for phase in lowered.job.work.phases[1:]]
    numbers = [n for n in range(10 * pairs) if all((n + 1) % period for period in periods)]
    native_s, ours_s = [], []
    for number in numbers[: pairs + WARM_UP_STEPS]:
        native_s.append(_time(lowered.native, Device["CPU"].synchronize))
        ours_s.append(_time(partial(session.step, number), Device["CPU"].synchronize))
    native_s, ours_s = native_s[WARM_UP_STEPS:], ours_s[WARM_UP_STEPS:]
    ratios = [ours / local for ours, local in zip(ours_s, native_s, strict=True)]
    fresh = (encode(lowered.job.work), lowered.plans, lowered.inputs)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "pairs": len(ours_s),
        "worker_step_ms": round(1e3 * statistics.median(ours_s), 3),
        "tinyjit_step_ms": round(1e3 * statistics.median(native_s), 3),
        "fresh_worker": _fresh(msgspec.msgpack.encode(fresh)),
        "cold_first_step_s": _cold(name),
        "lowering_s": round(lowered.lowering_s, 1),
        "lowered_over_metered": _costs(lowered),
        **measure_trace(name),
    }


def _costs(lowered: Lowered) -> list[float]:
    """FLOP of the compiled kernels over the meter's, for each phase. Promise: within 2x."""
    from p2pflop.kernels.plan import decode_plan

    metered = {line.graph: line.flop for line in lowered.job.cost.lines}
    return [
        round(decode_plan(lowered.plans[phase.graph]).flop / metered[phase.graph], 2)
        for phase in lowered.job.work.phases
    ]


def measure_trace(name: str, **sizes: int) -> dict[str, Any]:
    """Size of a job, and the processor seconds to trace, open and meter it: the least of three."""
    from p2pflop.dht.manifest import address_of
    from p2pflop.job.file import CheckedJob, encode_body, open_job
    from p2pflop.job.meter import meter
    from p2pflop.kernels.trace import trace

    times: list[tuple[float, float]] = []
    size_bytes = 0
    for _ in range(REPEATS):
        train, every = _functions(load(name), **sizes)
        started = time.process_time()
        traced = trace(train, steps=1000, every=every, address_of=address_of)
        job = open_job(traced.body)
        assert isinstance(job, CheckedJob)
        ended = time.process_time()
        for checked in job.graphs.values():
            meter(checked)
        times.append((ended - started, time.process_time() - ended))
        size_bytes = len(encode_body(traced.body))
    return {
        "job_bytes": size_bytes,
        "trace_open_meter_s": round(min(whole for whole, _ in times), 2),
        "meter_ms": round(1e3 * min(part for _, part in times), 1),
    }


def first_step(data: bytes) -> dict[str, Any]:
    """Milliseconds from cached plans to the end of step 0, in a process that has done nothing."""
    from p2pflop.job.spec import Work
    from p2pflop.kernels.run import Session
    from p2pflop.wire import decode

    started = time.perf_counter()
    kind = tuple[bytes, dict[bytes, bytes], dict[int, bytes]]
    work, plans, inputs = msgspec.msgpack.decode(data, type=kind)
    session = Session(decode(Work, work), plans)
    session.initialise()
    for slot, value in inputs.items():
        session.write(slot, 0, value)
    session.step(0)
    return {
        "first_step_ms": round(1e3 * (time.perf_counter() - started), 1),
        "promise": "<= 100 (MLP), <= 500 (GPT of 8 layers)",
    }


def cold(name: str, side: str) -> float:
    """Seconds from a program that is imported to the end of its first training step.

    Ours is a node's: traced here, lowered by its lowerers, which share the cores, run in a worker.
    """
    from tinygrad import Device, Tensor

    Tensor.manual_seed(0)
    train, _ = _functions(load(name))
    if side == "ours":
        return trio.run(_cold_ours, train)
    started = time.perf_counter()
    _native_step(train)()
    Device["CPU"].synchronize()
    return time.perf_counter() - started


async def _cold_ours(train: Callable[[], Any]) -> float:
    from p2pflop.dht.manifest import address_of
    from p2pflop.job.file import CheckedJob, open_job
    from p2pflop.kernels.trace import trace
    from p2pflop.node.execute import lower_all, worker_limits
    from p2pflop.node.workers import WorkerPool
    from p2pflop.wire import encode

    async def nothing(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    with tempfile.TemporaryDirectory() as folder:
        async with trio.open_nursery() as nursery:
            pool = WorkerPool(Path(folder))
            await pool.start(nursery)
            started = time.perf_counter()
            traced = trace(train, steps=1, address_of=address_of)
            job = open_job(traced.body)
            assert isinstance(job, CheckedJob)
            plans = await lower_all(pool, traced.body.graphs, nothing)
            async with pool.worker(worker_limits(job, HOUR_NS, 1)) as worker:
                await worker.load(encode(job.work), plans)
                for slot, data in traced.inputs.items():
                    await worker.write(slot, 0, data)
                async for _ in worker.run(0, 1):
                    pass
                seconds = time.perf_counter() - started
            await pool.aclose()
            nursery.cancel_scope.cancel()
    return seconds


def _cold(name: str) -> dict[str, float]:
    """Both sides, each the better of two processes."""
    seconds = {}
    for side in ("ours", "native"):
        command = [sys.executable, __file__, "--cold", side, name]
        outputs = [
            subprocess.run(command, capture_output=True, check=True, timeout=600).stdout
            for _ in range(2)
        ]
        seconds[side] = round(min(float(output) for output in outputs), 2)
    return seconds | {"ratio": round(seconds["ours"] / seconds["native"], 2)}


def _fresh(data: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plans"
        path.write_bytes(data)
        command = [sys.executable, __file__, "--fresh", str(path)]
        output = subprocess.run(command, capture_output=True, check=True, timeout=120).stdout
    measured: dict[str, Any] = json.loads(output)
    return measured


def _functions(module: Any, **sizes: int) -> tuple[Callable[[], Any], dict[int, Any]]:
    """The training step of an example, and its other functions by period."""
    if module.__name__ == "digits":
        _, train, test = module.program()
        return train, {module.TEST_EVERY: test}
    _, train, every = module.program(**sizes)
    return train, every


def _native_step(train: Callable[[], Any]) -> Callable[[], Any]:
    from tinygrad import TinyJit
    from tinygrad.helpers import Context

    def step() -> Any:
        with Context(TRAINING=1):
            return next(iter(train().values()))

    return TinyJit(step)  # type: ignore[no-any-return]


def _time(run: Callable[[], Any], wait: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def load(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
