"""Unmodified tinygrad scripts under CLOUD=1, through two real nodes, beside themselves on DEV=CPU.

The scripts (``bench/scripts``) know nothing of p2pflop; each reads its loss every ten steps. Native
and CLOUD runs take turns. The bytes of a step are counted on the link between the two nodes, all
of it: frames, noise, heartbeats. ``--quick`` runs the smallest scripts alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from delayed_link import Link, delayed_link

from p2pflop.client import Client
from p2pflop.kernels.classes import environment

SCRIPTS = Path(__file__).parent / "scripts"
STEPS = {"mlp": 60, "conv": 200, "gpt": 60}
WARM_BLOCKS = 2
DELAY_S = 0.025
WEIGHTS, WEIGHT_SIDE = 25, 1024
BEATS = 100
EAGER_SIZES = 10


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="convolutions and eager alone, one pair"
    )
    parser.add_argument("--pairs", type=int, default=2, help="native and CLOUD runs of each script")
    arguments = parser.parse_args()
    names = ["conv"] if arguments.quick else list(STEPS)
    pairs = 1 if arguments.quick else arguments.pairs
    report: dict[str, Any] = {"bench": "cloud"}
    with tempfile.TemporaryDirectory() as folder, nodes(Path(folder)) as market:
        report["steps"] = {name: compare(market, name, pairs) for name in names}
        report["steps"]["promise"] = "ratio <= 1.05, bytes a step <= 300"
        report["delayed"] = {
            name: delayed(market, name, report["steps"][name]["native_ms"]) for name in names
        }
        report["eager"] = eager(market, pairs)
        if not arguments.quick:
            report["weights"] = weights(market, Path(folder))
            report["moved"] = moved(market, Path(folder))
    print(json.dumps(report, indent=1))


@dataclass
class Market:
    """Two providers, a buyer, and the link between the buyer and the first of them."""

    folder: Path
    buyer: Path
    processes: dict[str, subprocess.Popen[bytes]]
    link: Link


@contextmanager
def nodes(folder: Path) -> Iterator[Market]:
    """The cheaper provider is reached by the link; the other is there for when it is killed."""
    processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str, *flags: str) -> str:
        home = folder / name
        command = [sys.executable, "-m", "p2pflop.cli.main", "node", "--home", str(home)]
        command += ["--port", "0", "--listen", "/ip4/127.0.0.1/tcp/0", *flags]
        processes[name] = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not (home / "node.json").exists():
            if processes[name].poll() is not None:
                raise SystemExit(f"the node {name} did not start")
            time.sleep(0.05)
        with Client(home) as client:
            return str(client.status()["addresses"][0])

    try:
        first = start("first", "--ask", "0.05")
        second = start("second", "--ask", "0.06")
        with delayed_link(int(first.split("/tcp/")[1].split("/")[0])) as link:
            port = first.split("/tcp/")[1].split("/")[0]
            through = first.replace(f"/tcp/{port}", f"/tcp/{link.port}")
            start("buyer", "--connect", through, "--connect", second)
            with Client(folder / "buyer") as client:
                while len(client.book()) < 2:
                    time.sleep(0.05)
            yield Market(folder, folder / "buyer", processes, link)
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()


def native(folder: Path, name: str, *arguments: str, steps: int = 0) -> dict[str, Any]:
    """The script as it is, in the providers' class, with a compiler cache of its own."""
    variables = {**os.environ, **environment(), "STEPS": str(steps)}
    return run(name, arguments, variables | {"XDG_CACHE_HOME": str(folder / "cache")})


def cloud(market: Market, name: str, *arguments: str, steps: int = 0) -> dict[str, Any]:
    """The same bytes of a script, with CLOUD=1."""
    variables = {**os.environ, "CLOUD": "1", "P2PFLOP_HOME": str(market.buyer)}
    return run(name, arguments, variables | {"STEPS": str(steps), "CLOUD_MAX_USD": "1"})


def run(name: str, arguments: tuple[str, ...], variables: dict[str, str]) -> dict[str, Any]:
    """What a script prints; what it says on stderr is kept for whoever looks for a reason."""
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told | {"stderr": done.stderr}


def compare(market: Market, name: str, pairs: int) -> dict[str, Any]:
    """Median seconds of a warm step, CLOUD over native, and bytes between the nodes."""
    ours: list[float] = []
    theirs: list[float] = []
    bytes_a_step = 0.0
    first = cloud(market, name, steps=STEPS[name])  # nothing is cached, and the data goes up
    told: dict[str, Any] = {}
    for number in range(pairs):
        told = native(market.folder, name, steps=STEPS[name])
        theirs += told["step_s"][WARM_BLOCKS:]
        few = counted(market, name, STEPS[name] // 2)
        many = counted(market, name, STEPS[name])
        ours += many["step_s"][WARM_BLOCKS:]
        if number == pairs - 1:
            extra = many["link_bytes"] - few["link_bytes"]
            bytes_a_step = extra / (STEPS[name] - STEPS[name] // 2)
            if many["loss"] != told["loss"]:
                raise SystemExit(f"{name}: loss {many['loss']} is not native's {told['loss']}")
    median = statistics.median(ours)
    return {
        "step_ms": round(median * 1e3, 2),
        "native_ms": round(statistics.median(theirs) * 1e3, 2),
        "ratio": round(median / statistics.median(theirs), 3),
        "bytes_a_step": round(bytes_a_step),
        "loss_equal": True,
        "first_steps_s": {
            "native": round(told["first_s"], 2),
            "cold": round(first["first_s"], 2),
            "cached": round(many["first_s"], 2),
        },
    }


def counted(market: Market, name: str, steps: int) -> dict[str, Any]:
    """A CLOUD run, and the bytes that crossed the link meanwhile."""
    before = market.link.there_bytes + market.link.back_bytes
    told = cloud(market, name, steps=steps)
    return told | {"link_bytes": market.link.there_bytes + market.link.back_bytes - before}


def delayed(market: Market, name: str, native_ms: float) -> dict[str, Any]:
    """A script once more, with every byte between the nodes late."""
    market.link.delay_s = DELAY_S
    try:
        told = cloud(market, name, steps=STEPS[name])
    finally:
        market.link.delay_s = 0.0
    step = statistics.median(told["step_s"][WARM_BLOCKS:])
    return {
        "round_trip_ms": 2 * DELAY_S * 1e3,
        "step_ms": round(step * 1e3, 2),
        "ratio": round(step * 1e3 / native_ms, 3),
        "promise": "<= 1.25",
    }


def eager(market: Market, pairs: int) -> dict[str, Any]:
    """A hundred small operations that neither side has seen, and then again."""
    told: dict[str, list[float]] = {"native": [], "cold": [], "cached": []}
    for number in range(pairs):
        skipped = number * EAGER_SIZES
        runs = {
            "native": native(market.folder, "eager", steps=skipped),
            "cold": cloud(market, "eager", steps=skipped),
            "cached": cloud(market, "eager", steps=skipped),
        }
        if len({run["loss"] for run in runs.values()}) > 1:
            raise SystemExit("eager: the sums are not native's")
        for name, run in runs.items():
            told[name].append(run["first_s"])
    ratios = [ours / theirs for ours, theirs in zip(told["cold"], told["native"], strict=True)]
    return {
        **{f"{name}_s": round(statistics.median(each), 2) for name, each in told.items()},
        "ratio": round(statistics.median(ratios), 3),
        "promise": "cold <= 1.2 of native",
    }


def weights_file(folder: Path) -> str:
    """100 MB of safetensors."""
    path = folder / "weights.safetensors"
    if not path.exists():
        rng = np.random.default_rng(0)
        header, data, at = {}, bytearray(), 0
        for number in range(WEIGHTS):
            tensor = rng.standard_normal((WEIGHT_SIDE, WEIGHT_SIDE)).astype(np.float32) / 32
            data += tensor.tobytes()
            place = [at, len(data)]
            header[f"w{number}"] = {
                "dtype": "F32",
                "shape": list(tensor.shape),
                "data_offsets": place,
            }
            at = len(data)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return str(path)


def weights(market: Market, folder: Path) -> dict[str, Any]:
    """The same 100 MB twice: what crosses the link the second time, and how soon it runs."""
    path = weights_file(folder)
    local = native(folder, "weights", path, "0")
    local_again = native(folder, "weights", path, "0")
    sent = []
    firsts = []
    for _ in range(2):
        before = uploaded(market)
        firsts.append(cloud(market, "weights", path, "0")["first_s"])
        sent.append(uploaded(market) - before)
    return {
        "uploaded_bytes": sent,
        "second_of_first": round(sent[1] / sent[0], 5),
        "promise": "second <= 1 % of the first",
        "first_step_s": [round(each, 2) for each in firsts],
        "native_first_step_s": [round(local["first_s"], 2), round(local_again["first_s"], 2)],
        "ratio": round(firsts[1] / local["first_s"], 3),
        "promise_of_ratio": "<= 0.5",
    }


def uploaded(market: Market) -> int:
    """What has reached the first provider: by the link, and into its store by the side port."""
    files = (path for path in (market.folder / "first").rglob("*") if path.is_file())
    stored = sum(path.stat().st_size for path in files if path.suffix != ".db-wal")
    return stored + market.link.there_bytes


def moved(market: Market, folder: Path) -> dict[str, Any]:
    """100 MB of state when its provider is killed: the longest that a read-back took."""

    def kill() -> None:
        time.sleep(6)
        market.processes["first"].send_signal(signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    told = cloud(market, "weights", weights_file(folder), str(BEATS))
    return {
        "longest_s": round(max(told["beats_s"]), 2),
        "usual_s": round(statistics.median(told["beats_s"]), 4),
        "promise": "<= 5 s and a warm start",
    }


if __name__ == "__main__":
    main()
