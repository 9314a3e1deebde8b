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
    # That one of two equal deals has no room is known once it has refused.
    assert max(refusals) <= 1
    for run_id in newcomers:
        replays = replay(decode(Evidence, buyer.buyer.evidence(run_id)))
        assert all(each.is_right for each in replays)
    await market.settle_down()
    market.check()


async def test_of_equal_deals_one_that_had_no_room_just_now_is_asked_last(
    market: Market, autojump_clock: object
) -> None:
    one, two = [await market.provider(name, slots=1) for name in ("one", "two")]
    buyer = await market.buyer()
    for full, free in ((one, two), (two, one)):
        buyer.buyer.waiting.note_full(full.account)
        run_id = await buyer.submit(sample_file(STEPS), fresh=True)
        end = await market.end_of(buyer, run_id)
        assert (end["kind"], end["provider"]) == ("result", free.peer)
        buyer.buyer.waiting.room_freed(full.account)
    buyer.buyer.waiting.note_full(one.account)
    two.seller.stopping = True
    run_id = await buyer.submit(sample_file(STEPS), fresh=True)
    assert (await market.end_of(buyer, run_id))["provider"] == one.peer
    assert [event["provider"] for event in buyer.events(run_id, "rejected")] == [two.peer]
    evidence = decode(Evidence, buyer.buyer.evidence(run_id))
    assert [look.mandate.policy.excluded for look in evidence.looks] == [(one.account,), ()]
    assert all(each.is_right for each in replay(evidence))


async def test_a_dearer_deal_is_not_taken_because_the_best_had_no_room(
    market: Market, autojump_clock: object
) -> None:
    best = await market.provider("best", slots=1)
    await market.provider("dearer", price_nusd=2 * PRICE_NUSD, slots=1)
    buyer = await market.buyer()
    buyer.buyer.waiting.note_full(best.account)
    run_id = await buyer.submit(sample_file(STEPS))
    assert (await market.end_of(buyer, run_id))["provider"] == best.peer


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
