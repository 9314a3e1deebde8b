"""What checkpoints cost a job: its steps with a checkpoint every 50 of them, beside its steps without.

Two real nodes over loopback; each pair of runs is one job with checkpoints and one without, in
alternating order, so that a busy machine slows both. A run's time is from its first row to its
last, at the buyer, who verifies, keeps and countersigns each checkpoint meanwhile. Node, buyer and
worker share this machine's cores, as they would not elsewhere: the ratio is an upper bound.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from submit_latency import two_nodes

from p2pflop.client import Client
from p2pflop.kernels.classes import environment
from p2pflop.node.service import SubmitOptions

ROOT = Path(__file__).resolve().parent.parent
EVERY = 50
STEPS = {"digits": 3000, "conv": 1500, "gpt": 300}


def load_job(name: str, steps: int) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.make_job(steps=steps)


def seconds(client: Client, data: bytes, checkpoint_steps: int) -> float:
    """From the first row to the last."""
    run_id = client.submit(data, SubmitOptions(checkpoint_steps=checkpoint_steps))
    stamps = []
    for event in client.events(run_id):
        if event["kind"] == "rows":
            stamps.append(event["at_ns"])
        elif event["kind"] in ("failed", "cancelled"):
            raise SystemExit(f"run failed: {event}")
    return (stamps[-1] - stamps[0]) / 1e9


def measure(client: Client, name: str, steps: int, pairs: int) -> dict[str, Any]:
    from p2pflop.job.file import encode_file

    job = load_job(name, steps)
    for blob in job.inputs.values():
        client.put(blob)
    data = encode_file(job.file)
    seconds(client, data, 0)
    times: dict[int, list[float]] = {0: [], EVERY: []}
    ratios = []
    for number in range(pairs):
        order = (0, EVERY) if number % 2 else (EVERY, 0)
        for every in order:
            times[every].append(seconds(client, data, every))
        ratios.append(times[EVERY][-1] / times[0][-1])
    return {
        "steps": steps,
        "state_bytes": sum(
            job.checked.slot_bytes(slot)
            for slot, param in enumerate(job.checked.work.params)
            if param.role == 1
        ),
        "without_s": round(statistics.median(times[0]), 3),
        "with_s": round(statistics.median(times[EVERY]), 3),
        "ratio": round(statistics.median(ratios), 3),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("examples", nargs="*", default=list(STEPS))
    arguments = parser.parse_args()
    os.environ.update(environment())
    with tempfile.TemporaryDirectory() as folder, two_nodes(Path(folder)) as (client, _):
        rows = {
            name: measure(client, name, STEPS[name], arguments.pairs)
            for name in arguments.examples
        }
    report = {"bench": "checkpoints", "every": EVERY, "promise": "<= 1.03", "examples": rows}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
