"""A provider that is alive and does nothing has a lease for no longer than an honest one might."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.job.patience import MIN_STALL_NS
from p2pflop.node.memory_market import PRICE_NUSD, sample_file
from p2pflop.units import NS_PER_S
from tests.sim.test_resubmission import told

if TYPE_CHECKING:
    from tests.sim.conftest import Market

BOUND_S = MIN_STALL_NS / NS_PER_S
SOON_S = 5.0


@pytest.mark.parametrize("idle_from", [0, 3])
async def test_signs_of_life_alone_hold_a_small_job_for_two_minutes(
    market: Market, autojump_clock: object, idle_from: int
) -> None:
    idle = await market.provider("idle")
    busy = await market.provider("busy", price_nusd=2 * PRICE_NUSD)
    idle.workers.step_s = 1.0 if idle_from else 1e6
    buyer = await market.buyer()
    run_id = await buyer.submit(sample_file(20), checkpoint_steps=1)
    began = trio.current_time()
    if idle_from:
        await trio.sleep(idle_from + 0.5)
        idle.workers.step_s = 1e6
    await told(buyer, run_id, "resubmitted")
    assert BOUND_S <= trio.current_time() - began <= idle_from + BOUND_S + SOON_S
    [lost] = buyer.events(run_id, "resubmitted")
    assert "the provider made no progress for 120 s" in lost["reason"]
    assert (await market.end_of(buyer, run_id))["provider"] == busy.peer
    await trio.sleep(SOON_S)
    assert not idle.seller.busy, "it was told, though a letter went to it as well"


async def test_an_honest_provider_of_long_steps_is_waited_for(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    provider.workers.step_s = BOUND_S - SOON_S
    run_id = await buyer.submit(sample_file(5), checkpoint_steps=1)
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    assert not buyer.events(run_id, "resubmitted")
