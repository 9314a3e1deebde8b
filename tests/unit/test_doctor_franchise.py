"""``p2pflop doctor --franchise``: each guideline kept, and each of them broken."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2pflop.cli.doctor import Finding
from p2pflop.cli.doctor_franchise import MAX_CLAIM_NS, MIN_DAYS, guidelines
from p2pflop.cli.main import run
from p2pflop.units import GIB
from tests.serving_registry import LiveRegistry

NAMES = {
    "attestation",
    "registry",
    "sale",
    "sandbox",
    "network",
    "clock",
    "keys",
    "room",
    "books",
    "payments",
}


def registry_entry(**more: Any) -> dict[str, Any]:
    return {
        "issuer": "ab" * 32,
        "url": "http://127.0.0.1:9",
        "trusted": True,
        "trouble": "",
        "waits_for": "",
        **more,
    }


class Stub:
    """A node that keeps every guideline, but for what a test changes."""

    def __init__(self, home: Path) -> None:
        home.chmod(0o700)
        self.home = home
        self.node: dict[str, Any] = {
            "selling": True,
            "sandbox_level": 3,
            "addresses": ["/ip4/192.0.2.7/tcp/7421/p2p/12D3KooW"],
            "memory_bytes": 4 * GIB,
            "franchise": {
                "attestation": {"days_left": 200, "max_slots": 4},
                "registries": [registry_entry()],
                "left_out_by": [],
            },
        }
        self.free_bytes = 100 * GIB
        self.connected: list[dict[str, Any]] = [{"peer": "a", "inbound": True}]
        self.money: list[dict[str, Any]] = []

    def status(self) -> dict[str, Any]:
        return self.node

    def doctor(self) -> dict[str, Any]:
        return {"problems": [], "free_bytes": self.free_bytes}

    def peers(self) -> list[dict[str, Any]]:
        return self.connected

    def payments(self) -> list[dict[str, Any]]:
        return self.money

    def findings(self) -> dict[str, Finding]:
        found = guidelines(self)  # type: ignore[arg-type]
        return {each.name.removeprefix("guideline "): each for each in found}

    def broken(self) -> dict[str, str]:
        bad = {name: each for name, each in self.findings().items() if not each.ok}
        assert all(each.hint for each in bad.values())
        return {name: each.value for name, each in bad.items()}


@pytest.fixture
def node(tmp_path: Path) -> Stub:
    return Stub(tmp_path)


def test_all_are_kept(node: Stub) -> None:
    assert set(node.findings()) == NAMES
    assert node.broken() == {}


def test_attestation(node: Stub) -> None:
    franchise = node.node["franchise"]
    franchise["attestation"]["days_left"] = MIN_DAYS - 1
    assert node.broken() == {"attestation": "only 13 days left, 4 slots"}
    franchise["attestation"] = None
    franchise["registries"] = [registry_entry(waits_for="the fee: pay $1")]
    assert "it waits for the fee: pay $1" in node.broken()["attestation"]
    franchise["registries"] = []
    assert node.broken()["attestation"] == "the node trusts no registry"


@pytest.mark.parametrize(
    ("change", "text"), [({"trusted": False}, "two histories"), ({"trouble": "is down"}, "is down")]
)
def test_registry(node: Stub, change: dict[str, Any], text: str) -> None:
    node.node["franchise"]["registries"] = [registry_entry(**change)]
    assert text in node.broken()["registry"]


@pytest.mark.parametrize(
    ("name", "value", "broken"),
    [
        ("selling", False, {"sale": "the node sells nothing"}),
        ("sandbox_level", 1, {"sandbox": "level 1: strangers' jobs are refused"}),
        ("memory_bytes", GIB // 2, {"room": "only 537 MB of memory are for jobs"}),
        (
            "addresses",
            ["/ip4/127.0.0.1/tcp/1/p2p/x", "/ip6/::1/tcp/1", "/dns/a/tcp/1", "/ip4/x/tcp/1"],
            {"network": "it listens on this machine alone"},
        ),
    ],
)
def test_what_the_node_tells(node: Stub, name: str, value: Any, broken: dict[str, str]) -> None:
    node.node[name] = value
    assert node.broken() == broken


def test_nobody_has_dialled_it(node: Stub) -> None:
    node.connected = [{"peer": "a", "inbound": False}]
    assert node.broken() == {"network": "no peer of 1 has dialled it"}


def test_a_full_disk(node: Stub) -> None:
    node.free_bytes = GIB
    assert "of disk are free" in node.broken()["room"]


@pytest.mark.parametrize("name", [".", "account.pem", "delegation.bin", "token"])
def test_keys_that_others_can_read(node: Stub, name: str) -> None:
    path = node.home / name
    if name != ".":
        path.write_text("secret")
    path.chmod(0o755)
    assert f"others can read {path}" in node.broken()["keys"]


def test_books(node: Stub) -> None:
    node.node["franchise"]["left_out_by"] = [{"peer": "12D3", "reason": "not attested"}] * 5
    assert node.broken()["books"].count("12D3 leaves its asks out: not attested") == 3


def test_claims_that_wait(node: Stub) -> None:
    now_ns = time.time_ns()
    claim = {"id": "ab" * 32, "side": "received", "state": "claimed", "at_ns": now_ns}
    node.money = [claim, claim | {"state": "acknowledged", "at_ns": 0}]
    assert node.broken() == {}
    node.money = [claim | {"at_ns": now_ns - MAX_CLAIM_NS - 1}]
    assert "abababababab" in node.broken()["payments"]


@pytest.mark.parametrize("ahead_s", [0, 60, -60])
def test_the_clock(
    node: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: int
) -> None:
    registry = LiveRegistry(tmp_path / "registry").start()
    try:
        node.node["franchise"]["registries"] = [registry_entry(url=registry.url)]
        shifted = SimpleNamespace(time=lambda: time.time() + ahead_s, time_ns=time.time_ns)
        monkeypatch.setattr("p2pflop.cli.doctor_franchise.time", shifted)
        broken = node.broken()
    finally:
        registry.stop()
    if ahead_s:
        side = "ahead of" if ahead_s > 0 else "behind"
        assert side in broken["clock"]
    else:
        assert broken == {}


def test_without_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--franchise", "--json", "--home", str(tmp_path)]) == 2
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert not found["guideline node"]["ok"]
    assert found["guideline node"]["hint"]


def test_a_node_that_tells_nothing_is_not_taken_for_a_good_one(node: Stub) -> None:
    node.node = {}
    assert {"attestation", "sale", "sandbox", "network", "room"} <= set(node.broken())
