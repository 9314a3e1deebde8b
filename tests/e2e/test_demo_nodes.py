"""The demo in real processes: its registry and nodes end with it, and a whole one runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from p2pflop.errors import HomeLockedError
from p2pflop.node.home import held

END_S = 30.0
ROOT = Path(__file__).parents[2]
PARENT = """
import sys
from pathlib import Path
from p2pflop.cli import demo_nodes
demo_nodes.PROVIDERS = {}
with demo_nodes.open_market(Path(sys.argv[1])) as market:
    print(market.buyer.process.pid, market.registry.address, flush=True)
    sys.stdin.read()
"""


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/head").is_success
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_the_registry_and_the_nodes_end_with_the_demo(tmp_path: Path, number: int) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    node = 0
    try:
        assert parent.stdout is not None
        told, address = parent.stdout.readline().split()
        node = int(told)
        url = address.decode().partition("@")[2]
        assert httpx.get(f"{url}/v1/head").status_code == 200
        parent.send_signal(number)
        parent.wait(END_S)
        deadline = time.monotonic() + END_S
        while True:
            try:
                with held(tmp_path / "buyer"):
                    break
            except HomeLockedError:
                assert time.monotonic() < deadline, "the node still runs"
            time.sleep(0.05)
        while answers(url):
            assert time.monotonic() < deadline, "the registry still runs"
            time.sleep(0.05)
        node = 0
    finally:
        parent.kill()
        parent.communicate()
        if node:
            os.kill(node, signal.SIGKILL)


@pytest.mark.slow
def test_a_whole_demo(tmp_path: Path) -> None:
    """Who has not paid sells nothing; once it has it is there within seconds, and wins."""
    command = [sys.executable, "-m", "p2pflop.cli.main", "demo", "--home", str(tmp_path), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "is not attested by registry" in told["left_out"]
    assert (told["killed"], told["provider"]) == ("fair", "dear")
    assert told["appeared_s"] < 15
    assert set(told["sold_nusd"]) >= {"cheap"}
    assert told["hash"] == told["local_hash"]
    assert sum(told["owed"].values()) == told["owed_nusd"]
    assert "The registry is stopped now" in done.stderr
    plain = told["plain"]
    assert plain["killed"] == "cheap"
    assert plain["provider"] in ("fair", "dear")
    assert re.fullmatch(r"accuracy on held-out digits: 9\d\.\d%", plain["lines"][-1])
    assert "p2pflop: the provider is lost" in done.stderr
