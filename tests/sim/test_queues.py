"""Many runs of one node over few slots: they queue for them, and are hardly ever refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from p2pflop.market.evidence import Evidence, replay
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, sample_file
from p2pflop.wire import decode

if TYPE_CHECKING:
    from tests.sim.conftest import Market

STEPS = 5


async def until(node: MemoryNode, run_id: str, state: str) -> None:
    async for events in node.runs.follow(run_id, 0):
        if any(event.get("state") == state for event in events):
            return


async def busy_market(
    market: Market, step_s: float = 0.1, **options: Any
) -> tuple[list[MemoryNode], MemoryNode, list[str]]:
    """Two providers of one slot each, a buyer, and its runs: two that run and one that waits."""
    providers = [await market.provider(name, slots=1) for name in ("one", "two")]
    for provider in providers:
        provider.workers.step_s = step_s
    buyer = await market.buyer()
    runs = []
    for state in ("running", "running", "waiting"):
        runs.append(await buyer.submit(sample_file(STEPS), fresh=True, **options))
        await until(buyer, runs[-1], state)
    return providers, buyer, runs


async def test_newcomers_queue_behind_who_waits_for_room(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pflop.node.waiting_room.QUEUE_S", 100.0)
    _, buyer, runs = await busy_market(market)
    newcomers = [await buyer.submit(sample_file(STEPS), fresh=True) for _ in range(8)]
    for run_id in [*runs, *newcomers]:
        assert (await market.end_of(buyer, run_id))["kind"] == "result"
    refusals = [len(buyer.events(run_id, "rejected")) for run_id in newcomers]
    # Of two deals of the same price, the one that has just got room need not be the first.
    assert max(refusals) <= 1
    for run_id in newcomers:
        replays = replay(decode(Evidence, buyer.buyer.evidence(run_id)))
        assert all(each.is_right for each in replays)
    await market.settle_down()
    market.check()


async def test_who_may_pay_more_does_not_queue(market: Market, autojump_clock: object) -> None:
    _, buyer, _ = await busy_market(market, step_s=60.0, max_nusd=10**6)
    buyer.meet(await market.provider("dear", price_nusd=3 * PRICE_NUSD, slots=1))
    run_id = await buyer.submit(sample_file(STEPS), fresh=True)
    await until(buyer, run_id, "running")
    assert len(buyer.events(run_id, "rejected")) == 2, "it has asked everybody"


async def test_a_newcomer_is_cancelled_at_once_and_survives_a_restart(
    market: Market, autojump_clock: object
) -> None:
    _, buyer, _ = await busy_market(market, step_s=5.0)
    cancelled, kept = [await buyer.submit(sample_file(STEPS), fresh=True) for _ in range(2)]
    began = trio.current_time()
    buyer.runs.get(cancelled).cancel_requested.set()
    assert (await market.end_of(buyer, cancelled))["kind"] == "cancelled"
    assert trio.current_time() - began < 0.1
    assert buyer.events(kept, "ranked") == []
    await buyer.kill()
    await market.restart(buyer)
    assert (await market.end_of(buyer, kept))["kind"] == "result"
    await market.settle_down()
    market.check()
