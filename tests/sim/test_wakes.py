"""A run that rests is not kept busy by who offers it ever new deals and keeps none of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.job.buying import BUSY_PREFIX, MAX_REST_NS
from p2pflop.node import bidding, wishes
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, sample_file
from p2pflop.units import NS_PER_S
from tests.sim.test_hostile_quotes import Stranger
from tests.sim.test_wishes_memory import resting, until, until_resting

if TYPE_CHECKING:
    from tests.sim.conftest import Market

TRIED_S = 600
LIMIT_NUSD = 10_000


@pytest.fixture(autouse=True)
def _all_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks are counted by what was told of them."""
    monkeypatch.setattr(bidding, "MAX_LOOKS", TRIED_S)


def refuse(node: MemoryNode) -> None:
    """Have it say that it is busy, whatever it is asked."""
    node.seller.allocator.allowance = lambda: 0


async def looks(buyer: MemoryNode, run_id: str, act: Callable[[int], Awaitable[object]]) -> int:
    """How often the run ranks the book while somebody acts once a second."""
    before = len(buyer.events(run_id, "ranked"))
    for step in range(TRIED_S):
        await act(step)
        await trio.sleep(1)
    rejected = buyer.events(run_id, "rejected")
    assert all(event["reason"].startswith(BUSY_PREFIX) for event in rejected)
    assert len(rejected) >= wishes.WAKES_BURST, "each was worth a bid"
    return len(buyer.events(run_id, "ranked")) - before


def most_looks() -> int:
    """By what it is told; a few more by its own clock, which has it look ever more rarely."""
    own = 12 + TRIED_S * NS_PER_S // MAX_REST_NS
    return int(wishes.WAKES_BURST + wishes.WAKES_PER_S * TRIED_S) + own


async def test_ever_new_sheets_wake_a_run_so_often_and_no_more(
    market: Market, autojump_clock: object
) -> None:
    """A sheet costs its signer nothing, and each has a price that no one has seen."""
    crook = await market.provider(setup_nusd=2 * LIMIT_NUSD)
    buyer, honest = await market.buyer(), await market.node("honest", price_nusd=PRICE_NUSD)
    run_id = await buyer.submit(sample_file(), max_nusd=LIMIT_NUSD, rest=True, deadline_s=3600)
    await until_resting(buyer)
    refuse(crook)

    async def publish(step: int) -> None:
        crook.settings = replace(crook.settings, setup_nusd=LIMIT_NUSD // 2 - 5 * step)
        await crook.sheets.issue()
        buyer.meet(crook)

    assert await looks(buyer, run_id, publish) <= most_looks() < TRIED_S // 5
    [mine] = buyer.buyer.wishes._resting.values()
    assert len(mine.seen) <= wishes.MAX_SEEN
    honest.meet(buyer)
    buyer.meet(honest)
    began = trio.current_time()
    await until(lambda: buyer.events(run_id, "filled"))
    assert trio.current_time() - began <= 1 / wishes.WAKES_PER_S + 2, "an honest deal is not lost"
    assert (await market.end_of(buyer, run_id))["provider"] == honest.peer


async def test_ever_new_quotes_wake_a_run_so_often_and_no_more(
    market: Market, autojump_clock: object
) -> None:
    crook, buyer, run_id = await resting(market)
    refuse(crook)
    liar = Stranger(crook, buyer)
    looked = await looks(buyer, run_id, lambda _: liar.say(liar.quote().wire))
    assert looked <= most_looks()
    await market.close()


async def test_all_runs_together_are_woken_so_often(market: Market, autojump_clock: object) -> None:
    crook = await market.provider(setup_nusd=2 * LIMIT_NUSD)
    buyer = await market.buyer()
    runs = [
        await buyer.submit(sample_file(seed=seed), max_nusd=LIMIT_NUSD, rest=True)
        for seed in range(1, 41)
    ]
    await trio.sleep(MAX_REST_NS / NS_PER_S)
    refuse(crook)
    before = sum(len(buyer.events(run_id, "ranked")) for run_id in runs)
    for step in range(30):
        crook.settings = replace(crook.settings, setup_nusd=LIMIT_NUSD // 2 - 5 * step)
        await crook.sheets.issue()
        buyer.meet(crook)
        await trio.sleep(1)
    told = sum(len(buyer.events(run_id, "ranked")) for run_id in runs) - before
    own = len(runs)
    assert told <= wishes.ALL_WAKES_BURST + 30 * wishes.ALL_WAKES_PER_S + own
    await market.close()
