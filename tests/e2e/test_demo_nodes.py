"""The demo's nodes end with the demo, whatever ends that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from p2pflop.errors import HomeLockedError
from p2pflop.node.home import held

END_S = 30.0
PARENT = """
import sys
from pathlib import Path
from p2pflop.cli import demo_nodes
home = Path(sys.argv[1])
nodes = []
with demo_nodes._signals_as_interrupt():
    demo_nodes.freshen(home)
    try:
        demo_nodes._wait_ready(demo_nodes._start(nodes, home, "buyer", ()))
        print(nodes[0].process.pid, flush=True)
        sys.stdin.read()
    finally:
        demo_nodes._stop(nodes)
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_the_nodes_end_with_the_demo(tmp_path: Path, number: int) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    node = 0
    try:
        assert parent.stdout is not None
        node = int(parent.stdout.readline())
        parent.send_signal(number)
        parent.wait(END_S)
        deadline = time.monotonic() + END_S
        while True:
            try:
                with held(tmp_path):
                    break
            except HomeLockedError:
                assert time.monotonic() < deadline, "the node still runs"
            time.sleep(0.05)
        node = 0
    finally:
        parent.kill()
        parent.communicate()
        if node:
            os.kill(node, signal.SIGKILL)
