"""Small inputs go along with a job: they are on disk with its run, or neither is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.dht.manifest import address_of
from p2pflop.errors import BlobNotFoundError, JobError, StoreFullError
from p2pflop.node.memory_market import sample_data, sample_file
from tests.sim.test_power_cuts import check, check_goods

if TYPE_CHECKING:
    from p2pflop.node.memory_market import MemoryNode
    from tests.sim.conftest import Market

INPUTS = sample_data()


async def kept(node: MemoryNode) -> list[bytes]:
    """Those of the inputs that are in a node's store."""
    return [data for data in INPUTS if await node.store.stat(address_of(data)) is not None]


async def test_a_job_is_bought_with_the_inputs_that_go_along(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.node("buyer")
    with pytest.raises(BlobNotFoundError):
        await buyer.submit(sample_file())
    run_id = await buyer.submit(sample_file(), INPUTS)
    assert await kept(buyer) == list(INPUTS)
    end = await market.end_of(buyer, run_id)
    assert end["kind"] == "result"
    await check_goods(buyer, run_id)
    await market.settle_down()
    check(market, buyer, provider, end)


async def test_of_several_inputs_some_may_be_there_already(
    market: Market, autojump_clock: object
) -> None:
    await market.provider()
    buyer = await market.node("buyer")
    await buyer.store.put(INPUTS[0], owner=b"s" * 32)
    end = await market.end_of(buyer, await buyer.submit(sample_file(), INPUTS[1:]))
    assert end["kind"] == "result"
    info = await buyer.store.stat(address_of(INPUTS[0]))
    assert info is not None
    assert not info.owner, "what a run of this node needs is its own"


async def test_a_submission_may_be_repeated(market: Market, autojump_clock: object) -> None:
    await market.provider()
    buyer = await market.node("buyer")
    run_id = "0123456789ab"
    for _ in range(2):
        assert await buyer.submit(sample_file(), INPUTS, run_id=run_id) == run_id
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    assert len(buyer.runs.cards()) == 1


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
async def test_a_power_cut_at_the_first_write(
    market: Market, autojump_clock: object, *, before: bool
) -> None:
    await market.provider()
    buyer = await market.node("buyer")
    buyer.writes, buyer.cut_at, buyer.cut_before = 0, 1, before
    market.nursery.start_soon(buyer.submit, sample_file(), INPUTS)
    with trio.fail_after(60):
        await buyer.down.wait()
    await trio.sleep(1)
    await market.restart(buyer)
    assert len(buyer.runs.cards()) == (0 if before else 1)
    assert await kept(buyer) == ([] if before else list(INPUTS))
    for card in buyer.runs.cards():
        assert (await market.end_of(buyer, card["id"]))["kind"] == "result"


async def test_what_is_no_input_of_the_job_is_refused(
    market: Market, autojump_clock: object
) -> None:
    buyer = await market.node("buyer")
    for wrong in ((*INPUTS, b"another"), (INPUTS[0][:-1], INPUTS[1])):
        with pytest.raises(JobError, match="no input of it"):
            await buyer.submit(sample_file(), wrong)
    assert not buyer.runs.cards()
    assert await kept(buyer) == []


async def test_a_store_without_room_is_told_before_there_is_a_run(
    market: Market, autojump_clock: object
) -> None:
    buyer = await market.node("buyer")
    buyer.store.quota.quota_bytes = 1
    with pytest.raises(StoreFullError):
        await buyer.submit(sample_file(), INPUTS)
    assert not buyer.runs.cards()
    assert await kept(buyer) == []
