"""How many trivial jobs a second ``pf.map`` buys over two real providers on loopback.

Each job is a whole purchase with its own bid, receipt and ledger entries (see submit_latency.py);
then the same jobs packed, as ``pf.map`` buys them unless told otherwise.
Beside it, in the same run, as many Ray and Dask tasks over two workers, where the ``bench`` extra
is installed; they do none of that. ``--jobs N`` sets how many, ``--under-way N`` how many at once.
The last number is of the same jobs once more, which this node's journal answers.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from submit_latency import start_nodes

from p2pflop.kernels.classes import environment


def job_with_argument() -> Any:
    os.environ.update(environment())
    from tinygrad import Tensor

    import p2pflop as pf

    weight = Tensor.zeros(4).contiguous()

    def step(number: Tensor) -> dict[str, Tensor]:
        weight.assign(weight + number)
        return {"total": weight.sum()}

    return pf.trace(step, steps=1, args={"number": 0.0}, title="trivial")


def per_second(jobs: int, work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return round(jobs / (time.perf_counter() - began), 1)


def p2pflop(jobs: int, under_way: int) -> dict[str, Any]:
    import p2pflop as pf

    job = job_with_argument()
    args = [{"number": float(number)} for number in range(jobs)]
    with tempfile.TemporaryDirectory() as folder, start_nodes(Path(folder), 2) as (buyer, _):

        def sweep(variants: list[dict[str, float]], *, fresh: bool, pack: bool = False) -> None:
            found = pf.map(job, variants, under_way=under_way, fresh=fresh, pack=pack, client=buyer)
            for outcome in found:
                if outcome.error is not None:
                    raise outcome.error

        sweep(args[: 2 * under_way], fresh=True)
        sweep(args[: 2 * under_way], fresh=True, pack=True)
        return {
            "jobs_per_s": per_second(jobs, lambda: sweep(args, fresh=True)),
            "target_jobs_per_s": 80,
            "packed_jobs_per_s": per_second(jobs, lambda: sweep(args, fresh=True, pack=True)),
            "target_packed_jobs_per_s": 200,
            "bought_before_per_s": per_second(jobs, lambda: sweep(args, fresh=False)),
        }


def ray_tasks(jobs: int) -> float | None:
    try:
        import ray
    except ImportError:
        return None
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    task = ray.remote(lambda number: number)
    try:
        ray.get([task.remote(number) for number in range(8)])
        return per_second(jobs, lambda: ray.get([task.remote(number) for number in range(jobs)]))
    finally:
        ray.shutdown()


def dask_tasks(jobs: int) -> float | None:
    try:
        from distributed import Client as DaskClient
    except ImportError:
        return None
    with DaskClient(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        client.gather(client.map(int, range(8), pure=False))
        return per_second(jobs, lambda: client.gather(client.map(int, range(jobs), pure=False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=400)
    parser.add_argument("--under-way", type=int, default=8)
    given = parser.parse_args()
    report = {"bench": "map_throughput", "jobs": given.jobs, "under_way": given.under_way}
    report["p2pflop"] = p2pflop(given.jobs, given.under_way)
    report |= {"ray_per_s": ray_tasks(given.jobs), "dask_per_s": dask_tasks(given.jobs)}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
