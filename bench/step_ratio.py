"""A training step on a provider against the same step in a local TinyJit; a fresh worker's first.

Both run in this process, in turn, on the digits example, so that a busy machine slows both. The
second figure is a new process with tinygrad imported, as the zygote's fork has it: from the cached
plans to the end of step 0. Prints one JSON object.
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
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from p2pflop.kernels.classes import descriptor, environment

ROOT = Path(__file__).resolve().parent.parent
WARM_UP_STEPS = 5


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--fresh", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fresh is not None:
        print(json.dumps(first_step(arguments.fresh.read_bytes())))
        return
    os.environ.update(environment())
    print(json.dumps(measure(arguments.pairs), indent=1))


def measure(pairs: int) -> dict[str, Any]:
    """Lower the example, run ``pairs`` pairs of steps, start a fresh process once."""
    from tinygrad import Device

    from p2pflop.dht.manifest import address_of
    from p2pflop.job.file import CheckedJob, encode_body, open_job
    from p2pflop.kernels.lower import lower
    from p2pflop.kernels.run import Session
    from p2pflop.kernels.trace import trace

    digits = _example()
    _, train, test = digits.program()
    traced = trace(train, steps=pairs, every={100: test}, address_of=address_of)
    job = open_job(traced.body)
    assert isinstance(job, CheckedJob)
    started = time.perf_counter()
    plans = {graph: lower(checked) for graph, checked in job.graphs.items()}
    lowering_s = time.perf_counter() - started
    session = Session(job.work, plans)
    for slot, data in traced.inputs.items():
        session.write(slot, 0, data)
    session.initialise()
    native = _native_step(train)
    # Steps at which only the training phase is due, so that both sides do the same.
    numbers = [number for number in range(2 * pairs) if (number + 1) % 100][: pairs + WARM_UP_STEPS]
    native_s, ours_s = [], []
    for number in numbers:
        native_s.append(_time(native, Device["CPU"].synchronize))
        ours_s.append(_time(partial(session.step, number), Device["CPU"].synchronize))
    native_s, ours_s = native_s[WARM_UP_STEPS:], ours_s[WARM_UP_STEPS:]
    return {
        "bench": "step_ratio",
        "example": "digits",
        "class": descriptor().name,
        "value": round(
            statistics.median(ours / local for ours, local in zip(ours_s, native_s, strict=True)), 3
        ),
        "unit": "worker step / TinyJit step, median of interleaved pairs",
        "promise": "<= 1.00",
        "pairs": len(ours_s),
        "worker_step_ms": round(1e3 * statistics.median(ours_s), 3),
        "tinyjit_step_ms": round(1e3 * statistics.median(native_s), 3),
        "fresh_worker": _fresh(msgspec.msgpack.encode((traced.body.work, plans, traced.inputs))),
        "lowering_s": round(lowering_s, 1),
        "job_bytes": len(encode_body(traced.body)),
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
    for slot, value in inputs.items():
        session.write(slot, 0, value)
    session.initialise()
    session.step(0)
    return {"first_step_ms": round(1e3 * (time.perf_counter() - started), 1), "promise": "<= 100"}


def _fresh(data: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plans"
        path.write_bytes(data)
        command = [sys.executable, __file__, "--fresh", str(path)]
        output = subprocess.run(command, capture_output=True, check=True, timeout=120).stdout
    measured: dict[str, Any] = json.loads(output)
    return measured


def _native_step(train: Callable[[], Any]) -> Callable[[], Any]:
    from tinygrad import TinyJit
    from tinygrad.helpers import Context

    def step() -> Any:
        with Context(TRAINING=1):
            return train()["loss"]

    return TinyJit(step)  # type: ignore[no-any-return]


def _time(run: Callable[[], Any], wait: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def _example() -> Any:
    spec = importlib.util.spec_from_file_location("digits", ROOT / "examples" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
