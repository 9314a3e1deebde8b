"""Sessions through real nodes and real workers, by a client of bare frames."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any

import pytest

from p2pflop.job.commands import Failed
from p2pflop.market.sessions import FIRST_HELD_SECONDS
from p2pflop.node.execute import WORKER_BASE_BYTES
from p2pflop.node.session_sale import STOOD_S
from tests.e2e.test_first_light import wait_for_asks
from tests.session_client import FrameClient
from tests.session_scripts import FLOATS, beginning, opening, steps

StartNode = Callable[..., Any]
SIZE = 4 * FLOATS
FIRST = bytes(range(256))
ADDED = b"\1\2\3\4" * FLOATS


def expected(runs: int) -> bytes:
    """Slot 0 after so many additions of slot 1, float by float, each rounded to 32 bits."""
    start = struct.unpack(f"<{FLOATS}f", FIRST)
    add = struct.unpack(f"<{FLOATS}f", ADDED)
    for _ in range(runs):
        sums = [a + b for a, b in zip(start, add, strict=True)]
        start = struct.unpack(f"<{FLOATS}f", struct.pack(f"<{FLOATS}f", *sums))
    return struct.pack(f"<{FLOATS}f", *start)


def open_client(node: Any, **wish: object) -> FrameClient:
    return FrameClient(node.url, node.home, opening(**wish))


def balances(node: Any) -> list[int]:
    return sorted(abs(each["due_nusd"]) for each in node.get("/v1/ledger")["balances"])


def test_a_session_runs_at_a_provider_and_both_ledgers_say_what_it_cost(
    start_node: StartNode, wait_until: Any
) -> None:
    seller = start_node("seller", "--ask", "50")
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    client = open_client(buyer)
    assert client.leased().provider == seller.get("/v1/status")["account"]
    client.give([*beginning(), *steps(3)])
    assert client.read(0, SIZE) == expected(3)
    [card] = seller.get("/v1/sales")["sales"]
    assert card["state"] == "session"
    assert len(buyer.get("/v1/status")["sessions"]) == 1
    closed = client.close()
    assert closed.flop == 3 * FLOATS
    assert closed.cost_nusd > 0
    wait_until(lambda: balances(seller) == balances(buyer) == [closed.cost_nusd])
    assert seller.get("/v1/ledger")["take"]["take_nusd"] == 0
    wait_until(lambda: seller.get("/v1/status")["leases"] == 0)


@pytest.mark.parametrize("kills", [1, 2])
def test_a_provider_killed_in_the_middle_changes_no_byte(
    start_node: StartNode, wait_until: Any, kills: int
) -> None:
    buyer = start_node("buyer")
    address = buyer.addresses()[0]
    sellers = {}
    for number in range(kills + 1):
        ask = str(40 * (number + 1))
        node = start_node(f"seller-{number}", "--ask", ask, "--connect", address)
        sellers[node.get("/v1/status")["account"]] = node
    wait_for_asks(buyer, kills + 1, wait_until)
    client = open_client(buyer, wait_s=30)
    client.give(beginning())
    runs = 0
    for _ in range(kills):
        provider = client.leased().provider
        client.give(steps(500))
        runs += 500
        client.obeyed()
        client.give(steps(2000))
        runs += 2000
        sellers[provider].kill()
        client.give(steps(1))  # if it had obeyed all, only this makes another lease
        runs += 1
    assert client.leased().provider in sellers
    assert client.read(0, SIZE) == expected(runs)
    client.close()


def test_a_script_that_is_killed_frees_the_lease(start_node: StartNode, wait_until: Any) -> None:
    seller = start_node("seller", "--ask", "50")
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    client = open_client(buyer)
    client.leased()
    client.give([*beginning(), *steps(3)])
    client.obeyed()
    client.drop()
    wait_until(lambda: seller.get("/v1/status")["leases"] == 0, 10)
    wait_until(lambda: balances(seller) == balances(buyer) != [], 10)


def test_a_buyers_node_killed_in_the_middle_loses_and_doubles_nothing(
    start_node: StartNode, wait_until: Any
) -> None:
    seller = start_node("seller", "--ask", "50")
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    client = open_client(buyer)
    client.leased()
    client.give([*beginning(), *steps(3)])
    client.obeyed()
    wait_until(lambda: balances(seller) != [], 15)
    client.give(steps(100))
    buyer.kill()
    client.drop()
    wait_until(lambda: seller.get("/v1/status")["leases"] == 0, 10)
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_until(lambda: balances(seller) == balances(buyer) != [], 15)


def test_a_lease_that_next_to_nothing_runs_on_is_paid_for_by_the_second(
    start_node: StartNode, wait_until: Any
) -> None:
    usd_per_pflop = 50
    seller = start_node("seller", "--ask", str(usd_per_pflop))
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    client = open_client(buyer)
    client.leased()
    client.give(beginning())
    began = time.monotonic()
    while time.monotonic() - began < FIRST_HELD_SECONDS + STOOD_S + 2:
        client.give(steps(1))
        client.obeyed()
        time.sleep(0.5)
    closed = client.close()
    memory_bytes = opening().memory_bytes + WORKER_BASE_BYTES
    nusd_per_s = usd_per_pflop * memory_bytes * 1e9 / 1e15
    assert closed.cost_nusd >= (FIRST_HELD_SECONDS + STOOD_S) * nusd_per_s
    wait_until(lambda: balances(seller) == balances(buyer) == [closed.cost_nusd])


def test_an_embedded_node_runs_a_session_by_itself(start_node: StartNode) -> None:
    node = start_node("alone")
    client = open_client(node, local=True)
    client.leased()
    client.give([*beginning(), *steps(3)])
    assert client.read(0, SIZE) == expected(3)
    assert client.close().cost_nusd == 0


def test_without_a_provider_the_script_hears_why(start_node: StartNode) -> None:
    client = open_client(start_node("alone"))
    failed = client.hear()
    assert isinstance(failed, Failed)
    assert "order book is empty" in failed.text
    began = time.monotonic()
    client.hear()
    assert time.monotonic() - began < 1
