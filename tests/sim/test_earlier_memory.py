"""The buyer's own earlier results answer at once: nothing is bought twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from p2pflop.errors import ConfigError
from p2pflop.node.memory_market import sample_file

if TYPE_CHECKING:
    from p2pflop.node.memory_market import MemoryNode
    from p2pflop.node.service import Json
    from tests.sim.conftest import Market


async def bought(market: Market, buyer: MemoryNode, file: bytes, **options: object) -> Json:
    """How a run of ``file`` ends, and its id."""
    run_id = await buyer.submit(file, **options)
    return {"run": run_id, **await market.end_of(buyer, run_id)}


async def test_what_was_bought_before_answers_at_once_and_costs_nothing(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    first = await bought(market, buyer, sample_file())
    await market.settle_down()
    debts = market.debts(buyer, provider)
    await provider.kill()
    again = await bought(market, buyer, sample_file())
    third = await bought(market, buyer, sample_file())
    assert first["cost_nusd"] > 0
    assert "earlier" not in first
    for end in (again, third):
        assert (end["earlier"], end["cost_nusd"]) == (first["run"], 0)
        for same in ("hash", "outputs", "state", "trace", "provider"):
            assert end[same] == first[same]
        assert buyer.buyer.result_record(end["run"]) == buyer.buyer.result_record(first["run"])
    assert market.debts(buyer, provider) == debts
    await buyer.kill()


async def test_it_is_found_after_a_restart(market: Market, autojump_clock: object) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    first = await bought(market, buyer, sample_file())
    await market.settle_down()
    await provider.kill()
    await buyer.kill()
    await market.restart(buyer)
    assert (await bought(market, buyer, sample_file()))["earlier"] == first["run"]


@pytest.mark.parametrize("gone", ["trace", "outputs", "state"])
async def test_without_one_of_its_blobs_it_is_bought_again(
    market: Market, autojump_clock: object, gone: str
) -> None:
    _, buyer = await market.provider(), await market.buyer()
    first = await bought(market, buyer, sample_file())
    address = {
        "trace": first["trace"],
        "outputs": first["outputs"]["last"],
        "state": first["state"]["weights"]["address"],
    }[gone]
    await buyer.store.delete(bytes.fromhex(address))
    again = await bought(market, buyer, sample_file())
    assert "earlier" not in again
    assert (again["hash"], again["cost_nusd"]) == (first["hash"], first["cost_nusd"])
    assert (await bought(market, buyer, sample_file()))["earlier"] == again["run"]


async def test_another_stretch_class_or_work_is_bought_and_fresh_too(
    market: Market, autojump_clock: object
) -> None:
    _, buyer = await market.provider(), await market.buyer()
    await bought(market, buyer, sample_file())
    for file in (sample_file(21), sample_file(seed=1), sample_file(10, first_step=20)):
        assert "earlier" not in await bought(market, buyer, file)
    [later] = [card["id"] for card in buyer.runs.cards() if card["first_step"] == 20]
    [*_, last] = buyer.events(later, "progress")
    assert (last["step"], last["steps"]) == (30, 30)  # of the work
    assert "earlier" in await bought(market, buyer, sample_file(10, first_step=20))
    assert "earlier" not in await bought(market, buyer, sample_file(), fresh=True)
    assert (await bought(market, buyer, sample_file(), classes=("any",)))["cost_nusd"] == 0
    elsewhere = await buyer.submit(sample_file(), classes=("ab" * 32,), deadline_s=60)
    assert (await market.end_of(buyer, elsewhere))["kind"] == "failed"


async def test_a_submission_with_an_id_may_be_repeated(
    market: Market, autojump_clock: object
) -> None:
    _, buyer = await market.provider(), await market.buyer()
    for _ in range(3):
        assert await buyer.submit(sample_file(), run_id="0123456789ab") == "0123456789ab"
    await market.end_of(buyer, "0123456789ab")
    assert await buyer.submit(sample_file(), run_id="0123456789ab") == "0123456789ab"
    assert len(buyer.runs.cards()) == 1
    with pytest.raises(ConfigError, match="is another job"):
        await buyer.submit(sample_file(21), run_id="0123456789ab")
    for wrong in ("", "0123456789AB", "../0123456789", "0" * 64):
        with pytest.raises(ConfigError, match="no id of a job"):
            await buyer.submit(sample_file(), run_id=wrong)
