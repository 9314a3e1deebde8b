"""Real nodes: a provider that takes less than the network, and what its buyers see of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import p2pflop as pf
from p2pflop.client import Client
from p2pflop.errors import MarketError
from tests.e2e.test_first_light import counting_job, wait_for_asks
from tests.e2e.test_sweep import square_job

StartNode = Callable[..., Any]
LIMITS = ("--max-lease", "1h", "--max-flop", "1P", "--max-moved", "20GB", "--max-nodes", "5000")


@pytest.mark.slow
def test_a_job_is_bought_within_the_limits_of_an_ask_and_not_beyond(
    start_node: StartNode, wait_until: Any
) -> None:
    provider = start_node("provider", "--ask", "0.05", *LIMITS)
    buyer = start_node("buyer", "--connect", provider.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    client, job = Client(buyer.home), counting_job(steps=40, seed=3)
    [ask] = client.book()
    assert ask["limits"] == {
        "lease_s": 3600,
        "flop": 10**15,
        "moved_bytes": 20 * 10**9,
        "nodes": 5000,
    }
    with pytest.raises(MarketError, match="1 x over a limit of the ask") as caught:
        pf.submit(job, client=client).result(timeout=60)
    assert "is over the ask's 1 h 0 min: give the job an earlier deadline" in caught.value.hint
    result = pf.submit(job, deadline="30m", client=client).result(timeout=120)
    assert result.hash == job.run_local().hash


@pytest.mark.slow
@pytest.mark.parametrize("rest", [False, True])
def test_small_jobs_that_are_too_large_together_are_bought_one_by_one(
    start_node: StartNode, wait_until: Any, rest: bool
) -> None:
    job = square_job()
    most = str(2 * job.checked.cost.flop)
    provider = start_node("provider", "--ask", "90000", "--max-flop", most)
    buyer = start_node("buyer", "--connect", provider.addresses()[0])
    wait_for_asks(buyer, 1, wait_until)
    args = [{"lr": number / 10} for number in range(4)]
    sweep = pf.map(job, args, rest=rest, client=Client(buyer.home))
    for outcome, given in zip(sweep, args, strict=True):
        assert outcome.pack == ""
        expected = (1 - 2 * given["lr"]) ** 10
        assert outcome.result()["loss"][-1] == pytest.approx(expected, abs=1e-4)
