"""Real ``p2pflop node`` processes on loopback, stopped by pid when a test ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

START_S = 60.0
STOP_S = 20.0
POLL_S = 0.05


@dataclass
class NodeProcess:
    """One running node and how to talk to it."""

    home: Path
    process: subprocess.Popen[bytes]
    log: Path
    note: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return str(self.note["url"])

    def get(self, path: str) -> Any:
        token = (self.home / "token").read_text()
        answer = httpx.get(
            self.url + path, headers={"Authorization": f"Bearer {token}"}, timeout=30
        )
        answer.raise_for_status()
        return answer.json()

    def addresses(self) -> list[str]:
        return list(self.get("/v1/status")["addresses"])

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the node ended: {self.log.read_text()}")
            with contextlib.suppress(OSError, ValueError):
                note = json.loads((self.home / "node.json").read_text())
                if note["pid"] == self.process.pid:
                    self.note = note
                    return
            time.sleep(POLL_S)
        raise AssertionError(f"the node did not start in {START_S} s: {self.log.read_text()}")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ctrl-C, then wait for the end; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"the node did not stop: {self.log.read_text()}") from None
        return self.process.returncode


class StartNode(Protocol):
    """``start_node("provider", "--ask", "0.05")``: a node with a home of that name."""

    def __call__(self, name: str, *flags: str, port: int = 0) -> NodeProcess: ...


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[StartNode]:
    started: list[NodeProcess] = []

    def start(name: str, *flags: str, port: int = 0) -> NodeProcess:
        home = tmp_path / name
        home.mkdir(exist_ok=True)
        log = tmp_path / f"{name}-{len(started)}.log"
        command = [sys.executable, "-m", "p2pflop.cli.main", "node", "--home", str(home)]
        command += ["--port", str(port), "--listen", "/ip4/127.0.0.1/tcp/0", *flags]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, stdout=sink, stderr=sink, env=os.environ | {"CC": "/bin/false"}
            )
        node = NodeProcess(home, process, log)
        started.append(node)
        node.wait_ready()
        return node

    yield start
    faults = []
    for node in started:
        try:
            node.stop()
        except AssertionError as fault:
            faults.append(str(fault))
    assert not faults, faults


def wait_until(condition: Any, timeout_s: float = 30.0) -> Any:
    """Poll ``condition`` until it gives something true, and return that."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(POLL_S)
    raise AssertionError(f"not within {timeout_s} s: {condition}")


@pytest.fixture(name="wait_until")
def _wait_until() -> Any:
    return wait_until
