"""Real nodes: a job is bought, and one that took no part sees the trade and not the buyer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from p2pflop.cli.main import run
from p2pflop.keys import public_key_of
from tests.e2e.test_first_light import counting_job, submit, wait_for_asks

StartNode = Callable[..., Any]
Output = pytest.CaptureFixture[str]

ASK_USD = 90_000
SAVED = "tape"


def trades(node: Any) -> list[dict[str, Any]]:
    return list(node.get("/v1/trades")["trades"])


def test_a_third_node_sees_the_trade_and_no_name_of_the_buyer(
    start_node: StartNode, wait_until: Any, capsys: Output
) -> None:
    seller = start_node("seller", "--ask", str(ASK_USD))
    at_seller = ("--connect", seller.addresses()[0])
    third = start_node("third", *at_seller)
    buyer = start_node("buyer", *at_seller)
    wait_for_asks(buyer, 1, wait_until)
    bought = submit(counting_job(10), buyer)
    result = bought.result(timeout=60)

    [told] = wait_until(lambda: trades(third))
    assert told["account"] == seller.get("/v1/status")["account"]
    assert told["price_nusd"] == ASK_USD * 10**9
    assert told["own"] is False
    assert trades(seller) == [{**told, "own": True}]
    late = start_node("late", *at_seller)
    assert wait_until(lambda: trades(late)) == [told]

    assert run(["trades", "--home", str(third.home), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [told]
    [of_class] = third.get("/v1/market")["classes"]
    assert of_class["last_nusd"] == told["price_nusd"]
    for node in (buyer, seller):
        taken = node.get("/v1/market")["take"]
        assert (taken["fills"], taken["take_nusd"]) == (1, 0)
        assert taken["paid_nusd"] == result.cost_nusd > 0

    who = buyer.get("/v1/status")
    assert third.stop() == 0
    saved = (third.home / SAVED).read_bytes()
    assert bytes.fromhex(told["account"]) in saved
    names = [bytes.fromhex(who["account"]), public_key_of(who["peer"]), who["peer"].encode()]
    for secret in (*names, result.record.work, bytes.fromhex(result.hash)):
        assert secret not in saved

    again = start_node("third")
    assert trades(again) == [told]
