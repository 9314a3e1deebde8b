"""Real nodes killed with -9 in the middle of a job: it goes on, and its result is the same."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

import p2pflop as pf
from p2pflop.cli.embedded import end_embedded
from p2pflop.client import Client
from tests.e2e.test_first_light import counting_job, wait_for_asks

StartNode = Callable[..., Any]
STEPS, EVERY = 240_000, 6_000  # five seconds and more: a kill must find it at work


@pytest.fixture(scope="module")
def whole_hash() -> str:
    """The hash of the unbroken run."""
    return counting_job(STEPS).run_local().hash


class Market:
    """A buyer and two providers, the first one cheaper."""

    def __init__(
        self,
        start_node: StartNode,
        wait_until: Any,
        every: int = EVERY,
        steps: int = STEPS,
        **job: Any,
    ) -> None:
        self.start_node = start_node
        self.wait_until = wait_until
        self.steps = steps
        self.buyer = start_node("buyer")
        self.address = self.buyer.addresses()[0]
        self.providers = {name: self.start(name) for name in ("cheap", "dear")}
        wait_for_asks(self.buyer, 2, wait_until)
        self.run = pf.submit(
            counting_job(steps, **job), client=Client(self.buyer.home), checkpoint_steps=every
        )

    def start(self, name: str) -> Any:
        ask = {"cheap": "40000", "dear": "90000"}[name]
        return self.start_node(name, "--ask", ask, "--connect", self.address)

    def wait_for(self, kind: str, times: int = 1) -> dict[str, Any]:
        """The event of that kind, the ``times``-th of the run."""
        for event in self.run.events():
            times -= event["kind"] == kind
            if not times:
                return event
        raise AssertionError(f"it never told of {kind}")

    def check(self, whole_hash: str) -> list[dict[str, Any]]:
        """The result is that of the unbroken run, and all ledgers say what it cost."""
        run = pf.Run(self.run.id, Client(self.buyer.home))
        result = run.result(timeout=120)
        assert result.hash == whole_hash
        result.verify()
        assert len(result["total"]) == self.steps
        for name, node in self.providers.items():
            if node.process.poll() is not None:
                self.providers[name] = self.start(name)

        def owed_nusd() -> int:
            return sum(n.get("/v1/ledger")["owed_nusd"] for n in self.providers.values())

        self.wait_until(lambda: owed_nusd() == result.cost_nusd)
        assert self.buyer.get("/v1/ledger")["owing_nusd"] == result.cost_nusd
        return list(run.events())


@pytest.fixture
def market(start_node: StartNode, wait_until: Any) -> Market:
    return Market(start_node, wait_until)


def test_a_provider_killed_after_a_checkpoint(market: Market, whole_hash: str) -> None:
    assert market.wait_for("receipt")["to_step"] == EVERY
    market.providers["cheap"].kill()
    began = time.monotonic()
    lost = market.wait_for("resubmitted")
    assert time.monotonic() - began <= 12, "five seconds, and a busy machine"
    assert lost["provider"] == market.providers["cheap"].note["peer"]
    assert lost["next"] == market.providers["dear"].note["peer"]
    events = market.check(whole_hash)
    paid = {event["provider"] for event in events if event["kind"] == "receipt"}
    assert paid == {lost["provider"], lost["next"]}


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4, 5))]
)
def test_a_provider_killed_at_a_random_moment(market: Market, whole_hash: str, seed: int) -> None:
    market.wait_for("filled")
    time.sleep(random.Random(seed).uniform(0, 4))  # noqa: S311
    market.providers["cheap"].kill()
    market.check(whole_hash)


@pytest.mark.slow
def test_both_providers_killed_one_after_the_other(market: Market, whole_hash: str) -> None:
    market.wait_for("receipt")
    market.providers["cheap"].kill()
    market.wait_for("filled", 2)
    market.wait_for("receipt", 2)
    market.providers["dear"].kill()
    market.wait_for("resubmitted", 2)
    market.providers["cheap"] = market.start("cheap")
    market.check(whole_hash)


def test_the_buyers_node_killed_while_it_looks_for_another(market: Market, whole_hash: str) -> None:
    market.wait_for("receipt")
    market.providers["cheap"].kill()
    time.sleep(2)
    market.buyer.kill()
    market.buyer = market.start_node("buyer", "--connect", market.providers["dear"].addresses()[0])
    market.address = market.buyer.addresses()[0]
    market.check(whole_hash)


def test_a_provider_that_stands_still_is_noticed(market: Market, whole_hash: str) -> None:
    market.wait_for("receipt")
    cheap = market.providers["cheap"]
    cheap.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        market.wait_for("resubmitted")
        assert time.monotonic() - began <= 12, "five seconds, and a busy machine"
    finally:
        cheap.process.send_signal(signal.SIGCONT)
    market.check(whole_hash)


@pytest.mark.slow
def test_any_command_on_the_home_of_a_killed_seller_sells_nothing(
    market: Market, whole_hash: str
) -> None:
    """It starts an embedded node, which finds the lease, the buyer, and its own asks at others."""
    cheap = market.providers["cheap"]
    (cheap.home / "config.toml").write_text(f'ask = "40000"\nconnect = {[market.address]}\n')
    market.wait_for("receipt")
    cheap.kill()
    command = [sys.executable, "-m", "p2pflop.cli.main", "jobs", "--json", "--home", cheap.home]
    assert json.loads(subprocess.run(command, check=True, capture_output=True).stdout) == []
    try:
        with Client(cheap.home) as client:
            assert client.status()["embedded"]
            market.wait_until(lambda: not client.status()["leases"])
            market.wait_until(lambda: client.sales() == [])
            assert {ask["price_nusd"] for ask in client.book() if ask["own"]} == {0}
        account = cheap.note["account"]

        def asks() -> list[int]:
            book = market.buyer.get("/v1/book")["book"]
            return [ask["price_nusd"] for ask in book if ask["account"] == account]

        market.wait_until(lambda: asks() == [])
        lost = market.wait_for("resubmitted")
        assert (lost["provider"], lost["next"]) == (
            cheap.note["peer"],
            market.providers["dear"].note["peer"],
        )
        market.check(whole_hash)
    finally:
        end_embedded(cheap.home)


def test_a_job_that_collects_goes_on_with_what_it_has(
    start_node: StartNode, wait_until: Any
) -> None:
    collecting: dict[str, Any] = {"look_every": 3000, "collect": ["top"]}
    market = Market(start_node, wait_until, **collecting)
    assert market.wait_for("receipt")["to_step"] == EVERY
    market.providers["cheap"].kill()
    local = counting_job(STEPS, **collecting).run_local()
    market.check(local.hash)
    result = pf.Run(market.run.id, Client(market.buyer.home)).result(timeout=60)
    assert result.steps_of("top") == list(range(2999, STEPS, 3000))
    assert list(result["top"]) == list(local["top"])
