"""A registry and three nodes, all real processes: who has not paid does not sell to who cares."""

from __future__ import annotations

import json
import os
import shutil
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

    def __init__(self, home: Path, capsys: Output, port: int = 0) -> None:
        self.home = home
        self._capsys = capsys
        self._log = home.with_suffix(".log").open("wb")
        command = [sys.executable, "-m", "p2pflop.cli.main", "registry", "serve"]
        command += ["--home", str(self.home), "--port", str(port), "--json"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, env=os.environ
        )
        assert self.process.stdout is not None
        told = json.loads(self.process.stdout.readline())
        self.key, self.url = str(told["issuer"]), str(told["url"])

    def operator(self, *arguments: str) -> Any:
        """A command of the operator's, as JSON."""
        return operate(self.home, self._capsys, *arguments)

    def attest(self, account: str, reference: str) -> None:
        """Enrol an account that has applied, and book its fee."""
        self.operator("approve", account, "--yes")
        self.operator("paid", account, "1", "--reference", reference, "--yes")

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
    made = Registry(founded(tmp_path, capsys), capsys)
    yield made
    made.stop()


def operate(home: Path, capsys: Output, *arguments: str) -> Any:
    """What ``p2pflop registry`` answers, as JSON."""
    capsys.readouterr()
    assert run(["registry", *arguments, "--home", str(home), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def founded(folder: Path, capsys: Output) -> Path:
    """The home of a new registry."""
    home = folder / "registry"
    root = folder / "root.pem"
    operate(home, capsys, "init", "--root-key", str(root), "--fee", "1", "--slots", "2")
    return home


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


def left_out_by(node: Any) -> dict[str, str]:
    return {each["peer"]: each["reason"] for each in franchise(node)["left_out_by"]}


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
    wait_until(lambda: buyer.note["peer"] in left_out_by(cheap))
    assert "not attested" in left_out_by(cheap)[buyer.note["peer"]]
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


@pytest.mark.slow
def test_who_is_revoked_is_gone_within_a_minute(
    start_node: StartNode, wait_until: Any, registry: Registry
) -> None:
    trusted = ("--registry", f"{registry.key}@{registry.url}")
    enrol = (*trusted, "--enroll", "--agree", "1", "--contact", "ada@example.org")
    seller = start_node("seller", "--ask", "90000", *enrol)
    buyer = start_node("buyer", *trusted, "--connect", seller.addresses()[0])
    wait_until(lambda: waits_for(seller) == "the operator's approval")
    registry.attest(account_of(seller), "1")
    wait_until(lambda: asks(buyer) == {seller.note["peer"]})
    registry.operator("revoke", account_of(seller), "--reason", "own_wish", "--yes")
    wait_until(lambda: not asks(buyer), 60)
    wait_until(lambda: "was revoked" in left_out_by(seller).get(buyer.note["peer"], ""), 60)


def test_a_registry_that_shows_two_histories_is_caught(
    start_node: StartNode, wait_until: Any, tmp_path: Path, capsys: Output
) -> None:
    home = founded(tmp_path, capsys)
    shutil.copytree(home, tmp_path / "other")
    registries = [Registry(home, capsys), Registry(tmp_path / "other", capsys)]
    try:
        nodes = [
            start_node(
                f"node {number}",
                *("--registry", f"{each.key}@{each.url}", "--enroll", "--agree", "1"),
                *("--contact", "ada@example.org", "--ask", "90000"),
            )
            for number, each in enumerate(registries)
        ]
        for node, each in zip(nodes, registries, strict=True):
            wait_until(lambda node=node: waits_for(node) == "the operator's approval")
            each.attest(account_of(node), "1")
            wait_until(lambda node=node: franchise(node)["attestation"])
        with Client(nodes[0].home) as client:
            client.connect(nodes[1].addresses()[0])
        for node in nodes:
            wait_until(lambda node=node: not franchise(node)["registries"][0]["trusted"], 90)
            assert franchise(node)["attestation"] is None
            assert "told two histories" in node.log.read_text()
            assert franchise(node)["registries"][0]["fork"] in node.log.read_text()
        nodes[0].stop()
        key, url = registries[0].key, registries[0].url
        again = start_node("node 0", "--registry", f"{key}@{url}", "--forgive", key)
        wait_until(lambda: franchise(again)["attestation"])
    finally:
        for each in registries:
            each.stop()
