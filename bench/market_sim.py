"""The market in simulation: books that become the same, and what a market without a planner gains.

**Convergence**: ``--peers`` nodes with the production book, relay and exchange, 5 % of messages
lost, 1 % of nodes crashing a minute, villains of every kind, and a partition of a minute. How long
after the last sheet, and after the partition, until every honest book is the same.

**Quality**: ``--providers`` and ``--jobs`` of random costs, values and deadlines, traded by the
production ranking. The surplus beside that of a planner who knows everything (scipy's assignment),
how many attempts a fill takes, how prices spread, and whether a place in the network pays.

Prints one JSON object. The planner takes minutes at full size.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import time
from typing import Any

from planner import best_surplus_nusd, place_p_value

from p2pflop.node.memory_mesh import MeshSettings
from p2pflop.node.memory_trading import TradingFloor, make_jobs, make_providers
from p2pflop.node.memory_villains import KINDS, run_ordeal


def convergence(peers: int, seed: int) -> dict[str, Any]:
    """Run the ordeal. Every 100th peer checks all signatures itself."""
    began = time.process_time()
    settings = MeshSettings(peers=peers, villains=len(KINDS), verified_every=100)
    ordeal = run_ordeal(settings, seed, sheets_per_s=peers / 50)
    counts = ordeal.mesh.counts
    peer_s = peers * ordeal.mesh.now_s
    return {
        "peers": peers,
        "after_last_sheet_s": ordeal.after_last_sheet_s,
        "after_partition_s": ordeal.after_partition_s,
        "promise_s": 10,
        "virtual_s": ordeal.mesh.now_s,
        "sheets": counts["sheets"],
        "messages": counts["messages"],
        "crashes": counts["crashes"],
        "comparison_bytes_per_peer_s": round(counts["comparison bytes"] / peer_s),
        "all_bytes_per_peer_s": round(counts["bytes"] / peer_s),
        "cpu_s": round(time.process_time() - began, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def quality(provider_count: int, job_count: int, seed: int) -> dict[str, Any]:
    """Trade, and compare with the planner."""
    chance = random.Random(seed)  # noqa: S311 - a simulation
    providers, jobs = make_providers(provider_count, chance), make_jobs(job_count, chance)
    began = time.process_time()
    traded = TradingFloor(providers, jobs, chance).run()
    traded_s = time.process_time() - began
    attempts = sorted(traded.attempts)
    planned_nusd = best_surplus_nusd(jobs, providers)
    return {
        "providers": provider_count,
        "jobs": job_count,
        "surplus_of_optimum": round(traded.surplus_nusd / planned_nusd, 4),
        "promise": ">= 0.95",
        "filled": traded.filled,
        "attempts_mean": round(statistics.mean(attempts), 3),
        "attempts_p99": attempts[int(0.99 * len(attempts))],
        "filled_in_first_period": round(traded.waited_periods.count(0) / traded.filled, 3),
        "price_dispersion": round(
            statistics.stdev(traded.prices_nusd) / statistics.mean(traded.prices_nusd), 3
        ),
        "place_p_value": round(place_p_value(providers, seed), 4),
        "place_promise": "> 0.01",
        "cpu_s": round(traded_s, 1),
    }


def main() -> None:
    """Parse, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=1_000)
    parser.add_argument("--providers", type=int, default=1_000)
    parser.add_argument("--jobs", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=["convergence", "quality"])
    given = parser.parse_args()
    report: dict[str, Any] = {"bench": "market_sim", "seed": given.seed}
    if given.only != "quality":
        report["convergence"] = convergence(given.peers, given.seed)
    if given.only != "convergence":
        report["quality"] = quality(given.providers, given.jobs, given.seed)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
