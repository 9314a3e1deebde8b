"""A registry and three nodes, all real processes: who has not paid does not sell to who cares."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pflop.cli.main import run
from p2pflop.client import Client
from p2pflop.job.file import encode_file
from tests.e2e.test_first_light import counting_job, submit

StartNode = Callable[..., Any]
Output = pytest.CaptureFixture[str]
STOP_S = 20.0


class Registry:
    """``p2pflop registry serve`` and what its operator says."""

    def __init__(self, folder: Path, capsys: Output) -> None:
        self.home = folder / "registry-home"
        self._capsys = capsys
        root = folder / "root.pem"
        init = ("init", "--root-key", str(root), "--fee", "1", "--slots", "2")
        self.key = str(self.operator(*init)["issuer"])
        self._log = (folder / "registry.log").open("wb")
        command = [sys.executable, "-m", "p2pflop.cli.main", "registry", "serve"]
        command += ["--home", str(self.home), "--port", "0", "--json"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, env=os.environ
        )
        assert self.process.stdout is not None
        self.url = str(json.loads(self.process.stdout.readline())["url"])

    def operator(self, *arguments: str) -> Any:
        """A command of the operator's, as JSON."""
        self._capsys.readouterr()
        assert run(["registry", *arguments, "--home", str(self.home), "--json"]) == 0
        return json.loads(self._capsys.readouterr().out)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def registry(tmp_path: Path, capsys: Output) -> Iterator[Registry]:
    made = Registry(tmp_path, capsys)
    yield made
    made.stop()


def asks(node: Any) -> set[str]:
    """Who is in the ranked part of the node's book."""
    return {ask["provider"] for ask in node.get("/v1/book")["book"]}


def provider_of(node: Any, seed: int) -> str:
    """Buy something new: from whom."""
    bought = submit(counting_job(20, seed), node)
    bought.result(timeout=60)
    return [str(e["provider"]) for e in bought.events() if e["kind"] == "filled"][-1]


def account_of(node: Any) -> str:
    """As an operator names it, and as payments are to be marked."""
    return str(node.get("/v1/status")["account"])[:12]


def franchise(node: Any) -> Any:
    return node.get("/v1/status")["franchise"]


def waits_for(node: Any) -> str:
    return str(franchise(node)["registries"][0]["waits_for"])


def test_who_has_not_paid_is_left_out_and_told_and_wins_once_it_has(
    start_node: StartNode, wait_until: Any, registry: Registry, capsys: Output
) -> None:
    trusted = ("--registry", f"{registry.key}@{registry.url}")
    enrol = (*trusted, "--enroll", "--agree", "1", "--contact", "ada@example.org")
    dear = start_node("dear", "--ask", "90000", *enrol)
    cheap = start_node("cheap", "--ask", "10000", *enrol, "--connect", dear.addresses()[0])
    both = [address for node in (dear, cheap) for address in ("--connect", node.addresses()[0])]
    buyer = start_node("buyer", *trusted, *both)
    cheap_peer, dear_peer = cheap.note["peer"], dear.note["peer"]
    for node in (dear, cheap):
        wait_until(lambda node=node: waits_for(node) == "the operator's approval")
        registry.operator("approve", account_of(node), "--yes")
        wait_until(lambda node=node: "pay $1" in waits_for(node))
        assert account_of(node) in waits_for(node)
    registry.operator("paid", account_of(dear), "1", "--reference", "1", "--yes")
    wait_until(lambda: asks(buyer) == {dear_peer})
    wait_until(lambda: cheap_peer in misses(buyer))
    assert misses(buyer)[cheap_peer] == "account is not attested"
    assert provider_of(buyer, 1) == dear_peer
    left_out = wait_until(lambda: franchise(cheap)["left_out_by"])
    assert {each["peer"] for each in left_out} >= {buyer.note["peer"]}
    assert "not attested" in left_out[0]["reason"]
    capsys.readouterr()
    assert run(["doctor", "--home", str(cheap.home)]) == 2
    assert "pay $1" in capsys.readouterr().out

    registry.operator("paid", account_of(cheap), "1", "--reference", "2", "--yes")
    wait_until(lambda: cheap_peer in asks(buyer), 10)
    assert provider_of(buyer, 2) == cheap_peer
    assert franchise(cheap)["attestation"]["days_left"] == 364

    registry.stop()
    assert provider_of(buyer, 3) == cheap_peer
    # A restart without the registry, and without peers that could tell, remembers.
    buyer.stop()
    buyer = start_node("buyer", *trusted, *both)
    wait_until(lambda: cheap_peer in asks(buyer))
    assert provider_of(buyer, 4) == cheap_peer
    wait_until(lambda: franchise(buyer)["registries"][0]["trouble"])


def misses(node: Any) -> dict[str, str]:
    """Who is not ranked, and why."""
    with Client(node.home) as client:
        found = client.quote(encode_file(counting_job(20).file))["misses"]
    return {miss["provider"]: miss["reason"] for miss in found}
