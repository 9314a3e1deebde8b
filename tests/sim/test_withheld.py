"""A provider that bills and does not hand over is given up soon, and avoided afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.dht.planes import Stream
from p2pflop.dht.transfer import BLOB_PROTOCOL
from p2pflop.job.lifecycle import DELIVERY
from p2pflop.node.buy import Buyer
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, sample_file
from p2pflop.node.sell import Seller
from p2pflop.node.supply import INPUT_S, MIN_INPUT_BYTES_PER_S
from p2pflop.units import NS_PER_S
from tests.sim.test_bad_input import LARGE, Quick
from tests.sim.test_resubmission import told

if TYPE_CHECKING:
    from tests.sim.conftest import Market

BOUND_S = DELIVERY.after_ns / NS_PER_S
SOON_S = 5.0
STEPS, EVERY = 40, 10


class Withholder:
    """A dialer of one side whose blob streams from the other say nothing, or very little."""

    def __init__(self, side: Buyer | Seller, peer: str, pause_s: float) -> None:
        self._inner = side.dialer
        self._peer = peer
        self._pause_s = pause_s
        self.starts = True
        side.dialer = self

    async def open(self, peer: str, protocol: str) -> Stream:
        stream = await self._inner.open(peer, protocol)
        if (peer, protocol) == (self._peer, BLOB_PROTOCOL) and self.starts:
            return _Slow(stream, self._pause_s)
        return stream


class _Slow:
    def __init__(self, inner: Stream, pause_s: float) -> None:
        self.peer = inner.peer
        self.send = inner.send
        self.aclose = inner.aclose
        self._inner = inner
        self._pause_s = pause_s

    async def receive(self, max_bytes: int = 2**20) -> bytes:
        await trio.sleep(self._pause_s)
        return await self._inner.receive(max_bytes)


async def market_of(market: Market) -> tuple[MemoryNode, MemoryNode, MemoryNode]:
    """A cheap provider and one twice as dear, of jobs with large states, and a buyer."""
    cheap = await market.provider("cheap", session=Quick)
    dear = await market.provider("dear", price_nusd=2 * PRICE_NUSD, session=Quick)
    cheap.workers.step_s = 1.0
    return cheap, dear, await market.buyer(floats=LARGE)


@pytest.mark.parametrize("pause_s", [1e9, 29.0], ids=["nothing", "a trickle"])
@pytest.mark.parametrize("from_step", [0, 20])
async def test_blobs_that_do_not_come_lose_the_provider_in_a_minute(
    market: Market, autojump_clock: object, pause_s: float, from_step: int
) -> None:
    cheap, dear, buyer = await market_of(market)
    withholder = Withholder(buyer.buyer, cheap.peer, pause_s)
    withholder.starts = not from_step
    file = sample_file(STEPS, floats=LARGE)
    run_id = await buyer.submit(file, checkpoint_steps=EVERY)
    began = trio.current_time()
    async for events in buyer.runs.follow(run_id, 0):
        if not from_step or any(e.get("to_step") == from_step for e in events):
            break
    withholder.starts = True
    await told(buyer, run_id, "resubmitted")
    assert trio.current_time() - began <= from_step + EVERY + BOUND_S + SOON_S
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", dear.peer)
    assert trio.current_time() - began <= from_step + EVERY + BOUND_S + 2 * SOON_S
    [lost] = buyer.events(run_id, "resubmitted")
    assert lost["from_step"] == from_step
    assert "handed over nothing more of what it billed for 60 s" in lost["reason"]
    assert buyer.buyer.experience.avoided(buyer.buyer.now_ns()) == (cheap.account,)
    await market.settle_down()
    market.check()
    assert (market.debts(buyer, cheap)[0] > 0) == bool(from_step)


async def test_a_result_that_does_not_come_loses_the_provider_in_a_minute(
    market: Market, autojump_clock: object
) -> None:
    cheap, dear, buyer = await market_of(market)
    Withholder(buyer.buyer, cheap.peer, 1e9)
    run_id = await buyer.submit(sample_file(STEPS, floats=LARGE), checkpoint_steps=0)
    began = trio.current_time()
    await told(buyer, run_id, "resubmitted")
    assert trio.current_time() - began <= STEPS + BOUND_S + SOON_S
    assert (await market.end_of(buyer, run_id))["provider"] == dear.peer


async def test_one_that_is_slow_and_moves_is_waited_for(
    market: Market, autojump_clock: object
) -> None:
    floats = 2**21
    cheap = await market.provider("cheap", session=Quick)
    await market.provider("dear", price_nusd=2 * PRICE_NUSD, session=Quick)
    buyer = await market.buyer(floats=floats)
    Withholder(buyer.buyer, cheap.peer, 19.0)
    run_id = await buyer.submit(sample_file(4, floats=floats), checkpoint_steps=0)
    began = trio.current_time()
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", cheap.peer)
    assert trio.current_time() - began > 3 * BOUND_S


@pytest.mark.parametrize("pause_s", [1e9, 20.0], ids=["nothing", "a trickle"])
async def test_inputs_that_do_not_come_end_the_lease(
    market: Market, autojump_clock: object, pause_s: float
) -> None:
    cheap, dear, buyer = await market_of(market)
    Withholder(cheap.seller, buyer.peer, pause_s)
    run_id = await buyer.submit(sample_file(STEPS, floats=LARGE))
    began = trio.current_time()
    await told(buyer, run_id, "resubmitted")
    assert trio.current_time() - began <= INPUT_S + 4 * LARGE / MIN_INPUT_BYTES_PER_S + SOON_S
    assert not cheap.seller.busy
    [lost] = buyer.events(run_id, "resubmitted")
    assert "of the job did not come within" in lost["reason"]
    assert (await market.end_of(buyer, run_id))["provider"] == dear.peer
