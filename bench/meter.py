"""What the meter tells of each example against what its compiled kernels do.

For each phase of each example: FLOP of the lowered kernels over metered FLOP, and the seconds of
lowering. Promise: the ratio is within 0.5 and 2. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from train_steps import load

from p2pflop.kernels.classes import descriptor, environment

NAMES = ("mlp", "digits", "conv", "gpt", "lstm", "vae", "gan", "embeddings", "onnx_model")


def main() -> None:
    """Parse, lower, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("examples", nargs="*", default=list(NAMES))
    names = parser.parse_args().examples
    os.environ.update(environment())
    rows = {name: measure(name) for name in names}
    ratios = [ratio for row in rows.values() for ratio in row["lowered_over_metered"]]
    report = {
        "bench": "meter",
        "class": descriptor().name,
        "value": max(max(ratio, 1 / ratio) for ratio in ratios),
        "unit": "lowered FLOP / metered FLOP or its reciprocal, the largest of all phases",
        "promise": "<= 2",
        "examples": rows,
    }
    print(json.dumps(report, indent=1))


def measure(name: str) -> dict[str, Any]:
    """Lower every phase of an example."""
    from p2pflop.kernels.lower import lower
    from p2pflop.kernels.plan import decode_plan

    job = load(name).make_job().checked
    metered = {line.graph: line.flop for line in job.cost.lines}
    started = time.perf_counter()
    plans = {graph: decode_plan(lower(checked)) for graph, checked in job.graphs.items()}
    phases = [phase.graph for phase in job.work.phases]
    return {
        "lowered_over_metered": [round(plans[each].flop / metered[each], 2) for each in phases],
        "flop": [plans[each].flop for each in phases],
        "lowering_s": round(time.perf_counter() - started, 1),
    }


if __name__ == "__main__":
    main()
