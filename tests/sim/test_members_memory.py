"""Purchases whose inputs are entries of a collection."""

from __future__ import annotations

import pytest

from p2pflop.dht.manifest import address_of
from p2pflop.errors import BlobNotFoundError
from p2pflop.job.spec import Result
from p2pflop.node.memory_market import sample_collection, sample_data, sample_file
from p2pflop.wire import decode
from tests.sim.conftest import Market
from tests.sim.test_purchase_memory import LARGE


@pytest.mark.parametrize("floats", [4, LARGE])
async def test_they_give_what_the_same_blobs_give(
    market: Market, autojump_clock: object, floats: int
) -> None:
    provider, buyer = await market.provider(), await market.buyer(floats=floats)
    await buyer.store.put(sample_collection(floats))
    states = []
    for members in (False, True):
        run_id = await buyer.submit(sample_file(5, floats=floats, members=members))
        end = await market.end_of(buyer, run_id)
        assert end["kind"] == "result", end
        states.append(decode(Result, buyer.buyer.result_record(run_id)).state)
    assert states[0] == states[1]
    await market.settle_down()
    assert provider.seller.busy == 0
    market.check()


async def test_a_second_stretch_starts_from_the_state_not_from_the_members(
    market: Market, autojump_clock: object
) -> None:
    _, buyer = await market.provider(), await market.buyer()
    await buyer.store.put(sample_collection())
    ends = []
    for file in (sample_file(7, members=True), sample_file(3, first_step=7, members=True)):
        run_id = await buyer.submit(file)
        ends.append(await market.end_of(buyer, run_id))
    assert [end["kind"] for end in ends] == ["result", "result"]
    whole = await buyer.submit(sample_file(10, members=True))
    end = await market.end_of(buyer, whole)
    assert end["state"] == ends[1]["state"]


@pytest.mark.parametrize("missing", ["collection", "member"])
async def test_what_is_not_here_is_told_before_anything_is_bought(
    market: Market, autojump_clock: object, missing: str
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    lost = sample_collection()
    if missing == "member":
        await buyer.store.put(lost)
        lost = sample_data(4)[1]
        await buyer.store.delete(address_of(lost))
    with pytest.raises(BlobNotFoundError, match=address_of(lost).hex()):
        await buyer.submit(sample_file(5, members=True))
    assert not provider.seller._sales


async def test_a_collection_that_goes_before_it_is_fetched_fails_the_run_clearly(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    await buyer.store.put(sample_collection())
    run_id = await buyer.submit(sample_file(5, members=True))
    address = address_of(sample_collection())
    await buyer.store.delete(address)
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["error"]) == ("failed", "ProviderError")
    assert f"input {address.hex()[:12]} of the job is not to be had" in end["message"]
    assert provider.seller.busy == 0
