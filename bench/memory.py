"""Peak memory of a worker beside that of a native process that runs the same steps in a TinyJit.

Both are the kernel's own account of resident memory (``VmHWM``), the interpreter and its libraries
included. The worker is a fork of the zygote, locked, with its plans from the cache; the native
process compiles what it runs, as it must. For the larger ones tensors are most of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import trio
from train_steps import _functions, _native_step, load

from p2pflop.kernels.classes import environment
from p2pflop.node.execute import lower_all, worker_limits
from p2pflop.node.workers import WorkerPool
from p2pflop.units import MIB
from p2pflop.wire import encode

STEPS = 12
HOUR_NS = 3600 * 10**9
CASES: dict[str, tuple[str, dict[str, int]]] = {
    "mlp": ("mlp", {}),
    "mlp, wide": ("mlp", {"hidden": 65_536, "batch": 512}),
    "conv": ("conv", {}),
    "conv, wide": ("conv", {"channels": 64, "batch": 512}),
    "gpt": ("gpt", {}),
    "gpt, wide": ("gpt", {"width": 256, "batch": 32}),
}


def peak_mib(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return round(int(found[1]) * 1024 / MIB, 1)


def native(case: str) -> None:
    name, sizes = CASES[case]
    train, _ = _functions(load(name), **sizes)
    step = _native_step(train)
    for _ in range(STEPS):
        step()
    print(peak_mib(os.getpid()))


async def worker(case: str, folder: Path) -> float:
    from p2pflop.dht.manifest import address_of
    from p2pflop.job.file import CheckedJob, open_job
    from p2pflop.kernels.trace import trace

    name, sizes = CASES[case]
    train, _ = _functions(load(name), **sizes)
    traced = trace(train, steps=STEPS, address_of=address_of)
    job = open_job(traced.body)
    assert isinstance(job, CheckedJob)

    async def nothing(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        pool = WorkerPool(folder)
        await pool.start(nursery)
        plans = await lower_all(pool, traced.body.graphs, nothing)
        async with pool.worker(worker_limits(job, HOUR_NS, 1)) as locked:
            await locked.load(encode(job.work), plans)
            for slot, data in traced.inputs.items():
                await locked.write(slot, 0, data)
            async for _ in locked.run(0, STEPS):
                pass
            peak = peak_mib(locked.pid)
        await pool.aclose()
        nursery.cancel_scope.cancel()
    return peak


def compare(case: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--native", case]
    theirs = float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    with tempfile.TemporaryDirectory() as folder:
        ours = trio.run(worker, case, Path(folder))
    return {"worker_mib": ours, "native_mib": theirs, "ratio": round(ours / theirs, 3)}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--native", help=argparse.SUPPRESS)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    arguments = parser.parse_args()
    os.environ.update(environment())
    if arguments.native:
        native(arguments.native)
        return
    rows = {case: compare(case) for case in arguments.cases}
    print(json.dumps({"bench": "memory", "promise": "<= 1.10", "cases": rows}, indent=1))


if __name__ == "__main__":
    main()
