"""Real providers stopped by their operators in the middle of a job: it is handed over."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from p2pflop.node.handing_over import HAND_OVER_S
from tests.e2e.test_first_light import counting_job
from tests.e2e.test_killed_nodes import STEPS, Market

StartNode = Callable[..., Any]
STOPS_WITHIN_S = HAND_OVER_S + 10
"""With the last words, and a busy machine."""


@pytest.fixture(scope="module")
def whole_hash() -> str:
    """The hash of the unbroken run."""
    return counting_job(STEPS).run_local().hash


@pytest.fixture
def market(start_node: StartNode, wait_until: Any) -> Market:
    """The job has no checkpoint of its own."""
    return Market(start_node, wait_until, every=0)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_job_goes_on_from_the_step_at_which_its_provider_was_stopped(
    market: Market, whole_hash: str, by: signal.Signals
) -> None:
    next(iter(market.run))
    cheap = market.providers["cheap"]
    time.sleep(1)
    began = time.monotonic()
    cheap.process.send_signal(by)
    assert cheap.process.wait(STOPS_WITHIN_S) == 0
    assert time.monotonic() - began <= STOPS_WITHIN_S
    log = cheap.log.read_text()
    assert "stopping; leases under way: 1" in log
    assert "waiting for the running step and its checkpoint" in log
    assert "given back without" not in log

    [lost] = [e for e in market.check(whole_hash) if e["kind"] == "resubmitted"]
    assert "pre-empted: the provider is shutting down" in lost["reason"]
    assert 0 < lost["from_step"] == lost["step"] < STEPS
    events = list(market.run.events())
    filled = [(e["provider"], e["first_step"]) for e in events if e["kind"] == "filled"]
    dear = market.providers["dear"].note["peer"]
    assert filled == [(lost["provider"], 0), (dear, lost["from_step"])]


def test_a_second_ctrl_c_ends_it_at_once(market: Market, whole_hash: str) -> None:
    next(iter(market.run))
    market.buyer.process.send_signal(signal.SIGSTOP)
    try:
        cheap = market.providers["cheap"]
        cheap.process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert cheap.process.poll() is None, "it waits for the buyer"
        began = time.monotonic()
        cheap.process.send_signal(signal.SIGINT)
        assert cheap.process.wait(STOPS_WITHIN_S) == 0
        assert time.monotonic() - began <= HAND_OVER_S / 2
    finally:
        market.buyer.process.send_signal(signal.SIGCONT)
    market.check(whole_hash)
