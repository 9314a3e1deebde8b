"""What a buyer risks with a provider that it does not know: one checkpoint interval, and no money.

Nothing is paid ahead. What is owed grows with the share of the quote, setup and all, of the steps
up to the last checkpoint that is here, verified and countersigned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from p2pflop.dht.manifest import address_of
from p2pflop.market.records import Receipt
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, sample_file
from tests.sim.test_bad_input import LARGE, Quick
from tests.sim.test_withheld import Withholder

if TYPE_CHECKING:
    from tests.sim.conftest import Market

STEPS, EVERY = 40, 10
SETUP_NUSD = 10**6


async def strangers(market: Market) -> tuple[MemoryNode, MemoryNode, MemoryNode]:
    """Two providers that want something for the setup, and a buyer that knows neither."""
    cheap = await market.provider("cheap", session=Quick, setup_nusd=SETUP_NUSD)
    dear = await market.provider(
        "dear", session=Quick, price_nusd=2 * PRICE_NUSD, setup_nusd=SETUP_NUSD
    )
    cheap.workers.step_s = dear.workers.step_s = 1.0
    return cheap, dear, await market.buyer(floats=LARGE)


async def test_nothing_is_owed_before_it_is_here(market: Market, autojump_clock: object) -> None:
    cheap, _, buyer = await strangers(market)
    booked: list[tuple[int, int]] = []
    delivered = buyer.ledger_book.delivered

    async def noting(receipt: Receipt, *arguments: Any, **more: Any) -> None:
        state = address_of(bytes([receipt.to_step]) + bytes(4 * LARGE - 1))
        assert await buyer.store.stat(state) is not None, "its state is in the buyer's store"
        booked.append((receipt.to_step, receipt.amount_nusd))
        await delivered(receipt, *arguments, **more)

    buyer.ledger_book.delivered = noting  # type: ignore[method-assign]
    run_id = await buyer.submit(sample_file(STEPS, floats=LARGE), checkpoint_steps=EVERY)
    await trio.sleep(EVERY - 1)
    assert market.debts(buyer, cheap) == (0, 0), "no setup, no minimum, no prepayment"
    await market.end_of(buyer, run_id)
    [filled] = buyer.events(run_id, "filled")
    quote_nusd = filled["quote_nusd"]
    assert quote_nusd > SETUP_NUSD
    assert booked == [(step, quote_nusd * step // STEPS) for step in range(EVERY, STEPS + 1, EVERY)]


@pytest.mark.parametrize("dies_at", [3, 13, 29])
async def test_a_provider_that_dies_costs_one_interval_of_time_and_no_money(
    market: Market, autojump_clock: object, dies_at: int
) -> None:
    cheap, dear, buyer = await strangers(market)
    run_id = await buyer.submit(sample_file(STEPS, floats=LARGE), checkpoint_steps=EVERY)
    await trio.sleep(dies_at + 0.5)
    await cheap.kill()
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", dear.peer)
    [lost] = buyer.events(run_id, "resubmitted")
    assert lost["from_step"] == dies_at // EVERY * EVERY
    assert lost["step"] - lost["from_step"] < EVERY
    first = buyer.events(run_id, "filled")[0]
    assert market.debts(buyer, cheap)[0] == first["quote_nusd"] * lost["from_step"] // STEPS


async def test_what_is_billed_and_withheld_is_never_owed(
    market: Market, autojump_clock: object
) -> None:
    cheap, _, buyer = await strangers(market)
    withholder = Withholder(buyer.buyer, cheap.peer, 1e9)
    withholder.starts = False
    run_id = await buyer.submit(sample_file(STEPS, floats=LARGE), checkpoint_steps=EVERY)
    await trio.sleep(EVERY + 1)
    owing_nusd = market.debts(buyer, cheap)[0]
    assert owing_nusd > 0
    withholder.starts = True
    while not buyer.events(run_id, "resubmitted"):
        assert market.debts(buyer, cheap)[0] == owing_nusd
        await trio.sleep(1)
    await market.end_of(buyer, run_id)
    await market.settle_down()
    market.check()
    assert market.debts(buyer, cheap) == (owing_nusd, owing_nusd)
