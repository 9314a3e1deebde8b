"""From submit to result: a trivial warm job between two real nodes over loopback.

Each submission is a whole purchase: journal, ranking, signed bid, fill and confirm, a sandboxed
worker, commit, receipt, verified and durable result, countersignature, both ledgers. Beside it, in
the same run, a Ray task and a Dask task where the ``bench`` extra is installed; they do none of
that. ``--runs N`` sets how many are measured.

Five of the steps wait for the disk, one after the other; what one such commit costs is measured in
the same run, between the submissions, because it differs tenfold from machine to machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from p2pflop.client import Client
from p2pflop.kernels.classes import environment
from p2pflop.node.service import SubmitOptions

WARM_UP = 5


def percentiles(samples_ms: list[float]) -> dict[str, float]:
    ordered = sorted(samples_ms)
    return {
        "p50_ms": round(statistics.median(ordered), 2),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
        "min_ms": round(ordered[0], 2),
    }


def trivial_job() -> Any:
    os.environ.update(environment())
    from tinygrad import Tensor

    import p2pflop as pf

    weight = Tensor.zeros(4).contiguous()

    def step() -> dict[str, Tensor]:
        weight.assign(weight + 1)
        return {"total": weight.sum()}

    return pf.trace(step, steps=1, title="trivial")


@contextmanager
def start_nodes(folder: Path, sellers: int = 1) -> Iterator[tuple[Client, list[Client]]]:
    """A buyer and those who sell, real nodes over loopback."""
    processes: list[subprocess.Popen[bytes]] = []
    clients: list[Client] = []

    def start(name: str, *flags: str) -> Client:
        home = folder / name
        command = [sys.executable, "-m", "p2pflop.cli.main", "node", "--home", str(home)]
        command += ["--port", "0", "--listen", "/ip4/127.0.0.1/tcp/0", *flags]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        processes.append(process)
        while not (home / "node.json").exists():
            if process.poll() is not None:
                raise SystemExit(f"the node {name} did not start")
            time.sleep(0.05)
        clients.append(Client(home))
        return clients[-1]

    try:
        selling = [start(f"seller{number}", "--ask", "0.05") for number in range(sellers)]
        flags = [("--connect", seller.status()["addresses"][0]) for seller in selling]
        buyer = start("buyer", *(text for flag in flags for text in flag))
        while len(buyer.book()) < sellers:
            time.sleep(0.05)
        yield buyer, selling
    finally:
        for client in clients:
            client.close()
        for process in processes:
            process.terminate()
            process.wait()


def measure(
    once: Callable[[], Any], runs: int, between: Callable[[], None] = lambda: None
) -> list[float]:
    samples = []
    for number in range(WARM_UP + runs):
        between()
        began = time.perf_counter()
        once()
        if number >= WARM_UP:
            samples.append((time.perf_counter() - began) * 1e3)
    return samples


class Commits:
    """How long SQLite takes to commit durably on this disk, now."""

    def __init__(self, folder: Path) -> None:
        self._database = sqlite3.connect(folder / "commits.db", isolation_level=None)
        self._database.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE t (body BLOB);"
        )
        self.samples_ms: list[float] = []

    def once(self) -> None:
        """Measure one commit of 500 bytes."""
        began = time.perf_counter()
        self._database.execute("INSERT INTO t VALUES (?)", (bytes(500),))
        self.samples_ms.append((time.perf_counter() - began) * 1e3)


def where_time_goes(client: Client, run_ids: list[str]) -> dict[str, float]:
    """Median milliseconds from the run's beginning to each of its events, at the buyer."""
    offsets: dict[str, list[float]] = {}
    for run_id in run_ids:
        submitted_ns = int(client.job(run_id)["submitted_ns"])
        for event in client.events(run_id):
            offsets.setdefault(event["kind"], []).append((event["at_ns"] - submitted_ns) / 1e6)
    return {kind: round(statistics.median(values), 2) for kind, values in offsets.items()}


def p2pflop(runs: int) -> dict[str, Any]:
    from p2pflop.job.file import encode_file

    job = trivial_job()
    data = encode_file(job.file)
    ids: list[str] = []
    with tempfile.TemporaryDirectory() as folder, start_nodes(Path(folder)) as (buyer, _):
        for blob in job.inputs.values():
            buyer.put(blob)

        def once() -> None:
            run_id, events = buyer.submit_and_follow(data, SubmitOptions(fresh=True))
            ids.append(run_id)
            for event in events:
                if event["kind"] in ("failed", "cancelled"):
                    raise SystemExit(f"run failed: {event}")

        commits = Commits(Path(folder))
        samples = measure(once, runs, between=commits.once)
        return {
            **percentiles(samples),
            "target_p50_ms": 10,
            "one_commit_ms": percentiles(commits.samples_ms),
            "to_event_ms": where_time_goes(buyer, ids[-50:]),
        }


def ray_task(runs: int) -> dict[str, Any] | None:
    try:
        import ray
    except ImportError:
        return None
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    task = ray.remote(lambda: 1)
    try:
        return percentiles(measure(lambda: ray.get(task.remote()), runs))
    finally:
        ray.shutdown()


def dask_task(runs: int) -> dict[str, Any] | None:
    try:
        from distributed import Client as DaskClient
    except ImportError:
        return None
    with DaskClient(n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        return percentiles(measure(lambda: client.submit(int, 1, pure=False).result(), runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    report = {"bench": "submit_latency", "runs": runs, "p2pflop": p2pflop(runs)}
    report |= {"ray": ray_task(runs), "dask": dask_task(runs)}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
