"""Real nodes: a job that no ask suits rests as a wish, and is done when somebody goes lower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import p2pflop as pf
from p2pflop.client import Client
from p2pflop.job.file import encode_file
from tests.e2e.test_first_light import counting_job, wait_for_asks

StartNode = Callable[..., Any]
ASK, LOW = "90000", "30000"


def events(run: pf.Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["kind"] == kind]


@pytest.mark.parametrize("publicly", [True, False], ids=["ask", "wish-ask"])
def test_a_run_rests_until_a_provider_goes_lower(
    start_node: StartNode, wait_until: Any, publicly: bool
) -> None:
    dear = start_node("dear", "--ask", ASK)
    address = dear.addresses()[0]
    buyer = start_node("buyer", "--connect", address)
    wait_for_asks(buyer, 1, wait_until)
    client, job = Client(buyer.home), counting_job(steps=40, seed=3)
    at_ask = client.quote(encode_file(job.file))["deals"][0]["total_nusd"]
    limit_usd = f"{at_ask // 2 / 10**9:.9f}"
    run = pf.submit(job, max_usd=limit_usd, deadline="5m", rest=True, client=client)
    [level] = wait_until(lambda: dear.get("/v1/wishes")["wishes"])
    assert (level["wishes"], level["own"]) == (1, 0)
    assert level["limit_nusd"] <= at_ask // 2
    [own] = buyer.get("/v1/wishes")["wishes"]
    assert own == level | {"own": 1}

    flags = ("--ask", LOW) if publicly else ("--ask", ASK, "--wish-ask", LOW)
    start_node("cheap", *flags, "--connect", address)
    result = run.result(timeout=120)
    assert result.hash == job.run_local().hash
    assert result.cost_usd <= float(limit_usd)
    [filled] = events(run, "filled")
    assert filled["quote_nusd"] <= at_ask // 2
    [resting] = events(run, "resting")
    assert resting["limit_nusd"] == at_ask // 2
