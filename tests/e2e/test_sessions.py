"""Sessions through real nodes and real workers, by a client of bare frames."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any

import pytest

from p2pflop.job.commands import Allocate, Closed, Data, Failed, Leased, Note, Read, Write
from p2pflop.market.sessions import FIRST_HELD_SECONDS
from p2pflop.node.execute import WORKER_BASE_BYTES
from p2pflop.node.session_sale import STOOD_S
from p2pflop.units import MIB
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


def seller_and_buyer(start_node: StartNode, wait_until: Any) -> tuple[Any, Any]:
    """Two nodes; the second has the ask of the first."""
    seller = start_node("seller", "--ask", "50")
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    return seller, buyer


def test_a_session_runs_at_a_provider_and_both_ledgers_say_what_it_cost(
    start_node: StartNode, wait_until: Any
) -> None:
    seller, buyer = seller_and_buyer(start_node, wait_until)
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
    seller, buyer = seller_and_buyer(start_node, wait_until)
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
    seller, buyer = seller_and_buyer(start_node, wait_until)
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


def heard(client: FrameClient) -> list[Failed]:
    """All that the node still says, to its last word; of it what has failed."""
    while not isinstance(client.hear(), Closed):
        pass
    return [frame for frame in client.frames if isinstance(frame, Failed)]


def test_a_buyers_node_that_is_stopped_signs_for_all_that_was_done(
    start_node: StartNode, wait_until: Any
) -> None:
    seller, buyer = seller_and_buyer(start_node, wait_until)
    client = open_client(buyer)
    client.leased()
    client.give([*beginning(), *steps(3)])
    client.obeyed()
    client.give(steps(2000))
    began = time.monotonic()
    assert buyer.stop() == 0
    assert time.monotonic() - began < 10
    [failed] = heard(client)
    assert "shutting down" in failed.text
    wait_until(lambda: seller.get("/v1/status")["leases"] == 0, 3)
    earned = balances(seller)
    assert earned > [0]
    assert not seller.get("/v1/sales")["sales"]
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    assert balances(buyer) == earned


def test_a_provider_that_is_stopped_is_paid_and_the_session_goes_on_within_seconds(
    start_node: StartNode, wait_until: Any
) -> None:
    buyer = start_node("buyer")
    address = buyer.addresses()[0]
    first = start_node("first", "--ask", "40", "--connect", address)
    second = start_node("second", "--ask", "50", "--connect", address)
    wait_for_asks(buyer, 2, wait_until)
    client = open_client(buyer, wait_s=30)
    assert client.leased().provider == first.get("/v1/status")["account"]
    client.give([*beginning(), *steps(500)])
    client.obeyed()
    client.give(steps(2000))
    first.process.terminate()
    began = time.monotonic()
    client.give(steps(500))
    assert client.read(0, SIZE) == expected(3000)
    assert time.monotonic() - began < 20
    assert first.process.wait(20) == 0
    leases = [frame.provider for frame in client.frames if isinstance(frame, Leased)]
    assert leases[1:] == [second.get("/v1/status")["account"]]
    notes = [frame.text for frame in client.frames if isinstance(frame, Note)]
    assert "shutting down" in notes[0]
    client.close()
    first = start_node("first", "--connect", address)
    wait_until(lambda: sorted(balances(first) + balances(second)) == balances(buyer))
    assert all(balances(first))


def test_a_script_that_reads_nothing_for_a_while_blames_nobody(
    start_node: StartNode, wait_until: Any
) -> None:
    seller, buyer = seller_and_buyer(start_node, wait_until)
    client = open_client(buyer, memory_bytes=48 * MIB)
    client.leased()
    size = 32 * MIB
    number = client.give([Allocate(0, size), Write(0, size - 4, b"last"), Read(0, 0, size)])
    wait_until(lambda: seller.get("/v1/status")["leases"] == 0, 40)
    data = bytearray()
    while len(data) < size:
        frame = client.hear()
        assert not isinstance(frame, Failed | Note), frame
        if isinstance(frame, Data):
            assert frame.number == number
            data += frame.data
    assert data == bytes(size - 4) + b"last"
    closed = client.close()
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
