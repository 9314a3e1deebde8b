"""A registry loses its online key, with real processes: the way on that docs/registry.md tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from p2pflop.cli.main import run
from tests.e2e.test_strict_market import (
    Registry,
    account_of,
    asks,
    founded,
    franchise,
    provider_of,
    waits_for,
)

StartNode = Callable[..., Any]
Output = pytest.CaptureFixture[str]


@pytest.mark.slow
def test_a_registry_without_its_online_key_goes_on_with_another(
    start_node: StartNode, wait_until: Any, tmp_path: Path, capsys: Output
) -> None:
    home = founded(tmp_path, capsys)
    registry = Registry(home, capsys)
    trusted = ("--registry", f"{registry.key}@{registry.url}")
    enrol = (*trusted, "--enroll", "--agree", "1", "--contact", "ada@example.org")
    seller = start_node("seller", "--ask", "90000", *enrol)
    buyer = start_node("buyer", *trusted, "--connect", seller.addresses()[0])
    try:
        wait_until(lambda: waits_for(seller) == "the operator's approval")
        registry.attest(account_of(seller), "1")
        wait_until(lambda: asks(buyer) == {seller.note["peer"]})

        (home / "registry" / "online.pem").unlink()
        revoke = ["revoke", account_of(seller), "--reason", "own_wish", "--yes"]
        assert run(["registry", *revoke, "--home", str(home)]) == 2
        assert "certify" in capsys.readouterr().err
        assert httpx.get(f"{registry.url}/v1/head").is_success, "the public part goes on"
        assert provider_of(buyer, 1) == seller.note["peer"]

        registry.stop()
        withdraw = ("certify", "--withdraw", "--root-key", str(tmp_path / "root.pem"), "--yes")
        registry.operator(*withdraw)
        registry = Registry(home, capsys, port=int(registry.url.rpartition(":")[2]))
        for node in (seller, buyer):
            wait_until(lambda node=node: "gave up its online keys" in node.log.read_text(), 60)
            wait_until(lambda node=node: franchise(node)["registries"][0]["accounts"] == 1, 60)
        assert asks(buyer) == {seller.note["peer"]}
        assert provider_of(buyer, 2) == seller.note["peer"]
        registry.operator(*revoke)
        wait_until(lambda: not asks(buyer), 60)
    finally:
        registry.stop()
