"""Jobs that collect have checkpoints too, and go on from them with all that was collected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.job.collection import Collection
from p2pflop.job.spec import Result
from p2pflop.node.memory_market import MemoryNode, sample_file
from p2pflop.node.service import Json
from p2pflop.wire import decode
from tests.sim.test_resubmission import STEPS, three

if TYPE_CHECKING:
    from tests.sim.conftest import Market

EVERY = 30
FILE = sample_file(STEPS, collects=True)


async def collected(buyer: MemoryNode, run_id: str) -> list[int]:
    """The values, which are the numbers of their steps."""
    [named] = decode(Result, buyer.buyer.result_record(run_id)).outputs
    found = decode(Collection, await buyer.store.get(named.address))
    return [
        int.from_bytes(await buyer.store.get(entry.address), "little") for entry in found.entries
    ]


async def unbroken(market: Market) -> Json:
    apart = market.another()
    await apart.provider()
    buyer = await apart.buyer()
    end = await apart.end_of(buyer, await buyer.submit(FILE, checkpoint_steps=0))
    await apart.close()
    return end


async def test_checkpoints_change_nothing(market: Market, autojump_clock: object) -> None:
    await market.provider()
    buyer = await market.buyer()
    run_id = await buyer.submit(FILE)
    end = await market.end_of(buyer, run_id)
    assert end["hash"] == (await unbroken(market))["hash"]
    assert [event["step"] for event in buyer.events(run_id, "checkpoint")] == [30, 60, 90]
    assert await collected(buyer, run_id) == list(range(STEPS))


@pytest.mark.parametrize("falls", ["killed", "stopped"])
async def test_a_run_that_collects_goes_on_elsewhere(
    market: Market, autojump_clock: object, falls: str
) -> None:
    cheap, dear, buyer = await three(market)
    run_id = await buyer.submit(FILE, checkpoint_steps=EVERY)
    await trio.sleep(7.5)
    if falls == "stopped":
        await cheap.sheets.withdraw()
        await cheap.seller.stop()
    await cheap.kill()
    end = await market.end_of(buyer, run_id)
    assert end["hash"] == (await unbroken(market))["hash"]
    assert await collected(buyer, run_id) == list(range(STEPS))
    [lost] = buyer.events(run_id, "resubmitted")
    assert lost["next"] == dear.peer
    if falls == "killed":
        assert lost["from_step"] == 60
    else:
        assert lost["from_step"] > 70
    await market.restart(cheap)
    await market.settle_down()
    market.check()
    assert end["cost_nusd"] == sum(market.debts(buyer, p)[1] for p in (cheap, dear))


async def test_a_run_that_collects_survives_its_buyers_restart(
    market: Market, autojump_clock: object
) -> None:
    cheap, _, buyer = await three(market)
    run_id = await buyer.submit(FILE, checkpoint_steps=EVERY)
    await trio.sleep(5)
    await cheap.kill()
    await trio.sleep(9)
    await buyer.kill()
    await market.restart(buyer)
    end = await market.end_of(buyer, run_id)
    assert end["hash"] == (await unbroken(market))["hash"]
    assert await collected(buyer, run_id) == list(range(STEPS))
