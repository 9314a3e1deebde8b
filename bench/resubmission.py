"""What a provider's death costs: a run whose provider is killed with -9 beside an unbroken one.

Three real nodes on loopback: a buyer and two providers, both with the plans of the job cached. In
each pair the same training run is bought twice, once left alone and once with its provider killed
halfway between two checkpoints; the provider is started again afterwards. The promise is for the
extra time from submission to result: at most five seconds to notice, one checkpoint interval to do
again, and the start of a worker whose plans are cached. The hashes have to be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train_steps import load

from p2pflop.cli import demo_nodes
from p2pflop.cli.demo_nodes import DemoNode
from p2pflop.client import Client
from p2pflop.kernels.classes import environment
from p2pflop.node.service import SubmitOptions

STEPS = 2400
EVERY = 600
KILL_AT = 900
NOTICE_S = 5.0
ASKS = {"one": "0.04", "other": "0.05"}


@contextmanager
def three_nodes(folder: Path) -> Iterator[tuple[Client, list[DemoNode]]]:
    nodes: list[DemoNode] = []

    def start(name: str, *flags: str) -> DemoNode:
        (folder / name).mkdir()
        return demo_nodes._start(nodes, folder / name, name, flags)

    try:
        buyer = start("buyer")
        address = str(demo_nodes._wait_ready(buyer)["address"])
        providers = [start(name, "--ask", ask, "--connect", address) for name, ask in ASKS.items()]
        for node in providers:
            demo_nodes._wait_ready(node)
        with Client(buyer.home) as client:
            wait_for_asks(client)
            yield client, providers
    finally:
        demo_nodes._stop(nodes)


def wait_for_asks(client: Client) -> None:
    while len(client.book()) < len(ASKS):
        time.sleep(0.05)


def buy(client: Client, data: bytes, providers: list[DemoNode], *, kills: bool) -> dict[str, Any]:
    """One run, and the seconds from its submission to the events that matter."""
    peers = {str((node.note() or {})["peer"]): node for node in providers}
    began = time.perf_counter()
    run_id = client.submit(data, SubmitOptions(checkpoint_steps=EVERY, checkpoint_s=0, fresh=True))
    seen: dict[str, Any] = {"lost_at_step": 0}
    provider = ""
    for event in client.events(run_id):
        now_s = time.perf_counter() - began
        if event["kind"] == "filled":
            provider = event["provider"]
        elif event["kind"] == "checkpoint":
            seen.setdefault("first_checkpoint_s", now_s)
        elif event["kind"] == "progress" and event["step"] >= KILL_AT and kills:
            peers[provider].kill()
            seen["killed_s"], seen["victim"], kills = now_s, peers[provider], False
        elif event["kind"] == "resubmitted":
            seen["noticed_s"] = now_s - seen["killed_s"]
            seen["again_steps"] = event["step"] - event["from_step"]
        elif event["kind"] == "rows" and "noticed_s" in seen and "warm_s" not in seen:
            seen["warm_s"] = now_s - seen["killed_s"] - seen["noticed_s"]
        elif event["kind"] == "result":
            return seen | {"seconds": now_s, "hash": event["hash"]}
        elif event["kind"] in ("failed", "cancelled"):
            raise SystemExit(f"run failed: {event}")
    raise SystemExit("the run has no end")


def prepare(client: Client, data: bytes, providers: list[DemoNode]) -> None:
    """Have both providers lower the job: the second one by the death of the first one."""
    victim = buy(client, data, providers, kills=True)["victim"]
    victim.start_again()


def measure(pairs: int) -> dict[str, Any]:
    from p2pflop.job.file import encode_file

    job = load("digits").make_job(steps=STEPS)
    data = encode_file(job.file)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, three_nodes(Path(folder)) as (client, providers):
        for blob in job.inputs.values():
            client.put(blob)
        prepare(client, data, providers)
        for _ in range(pairs):
            wait_for_asks(client)
            whole = buy(client, data, providers, kills=False)
            broken = buy(client, data, providers, kills=True)
            broken["victim"].start_again()
            if whole["hash"] != broken["hash"]:
                raise SystemExit("the broken run gave another hash")
            interval_s = whole["seconds"] * EVERY / STEPS
            rows.append(
                {
                    "unbroken_s": whole["seconds"],
                    "broken_s": broken["seconds"],
                    "extra_s": broken["seconds"] - whole["seconds"],
                    "noticed_s": broken["noticed_s"],
                    "warm_start_s": broken["warm_s"],
                    "again_steps": broken["again_steps"],
                    "bound_s": NOTICE_S + interval_s + broken["warm_s"],
                }
            )
    return {name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.update(environment())
    promise = "extra <= 5 s + one checkpoint interval + warm start"
    report = {"bench": "resubmission", "steps": STEPS, "every": EVERY, "promise": promise}
    print(json.dumps(report | measure(arguments.pairs), indent=1))


if __name__ == "__main__":
    main()
