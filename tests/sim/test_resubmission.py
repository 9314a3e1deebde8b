"""A run goes on from its newest checkpoint when its provider is lost, and gives the same result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.errors import ProviderError
from p2pflop.job.buying import MAX_STALLED
from p2pflop.job.spec import Result
from p2pflop.node import messages as m
from p2pflop.node import stretches
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, now_ns, sample_file, unchanged
from p2pflop.node.sell import Seller
from p2pflop.node.service import Json, SubmitOptions
from p2pflop.wire import decode

if TYPE_CHECKING:
    from p2pflop.dht.planes import Stream
    from tests.sim.conftest import Market

STEPS, EVERY = 120, 30


class At:
    """A tamper that does something once, at the first message of a kind."""

    def __init__(self, kind: type[m.Message]) -> None:
        self.reached = trio.Event()
        self._kind = kind

    def __call__(self, frame: bytes) -> list[bytes]:
        if isinstance(m.decode_message(frame, "peer"), self._kind):
            self.reached.set()
        return [frame]


async def three(market: Market) -> tuple[MemoryNode, MemoryNode, MemoryNode]:
    """A cheap provider and one twice as dear, of slow steps, and a buyer."""
    cheap = await market.provider("cheap")
    dear = await market.provider("dear", price_nusd=2 * PRICE_NUSD)
    for provider in (cheap, dear):
        provider.workers.step_s = 0.1
    return cheap, dear, await market.buyer()


async def told(buyer: MemoryNode, run_id: str, kind: str) -> None:
    """Return once a run has told an event of that kind."""
    async for events in buyer.runs.follow(run_id, 0):
        if any(event["kind"] == kind for event in events):
            return


async def whole_hash(market: Market) -> str:
    """The hash of the unbroken run."""
    apart = market.another()
    await apart.provider()
    buyer = await apart.buyer()
    end = await apart.end_of(buyer, await buyer.submit(sample_file(STEPS)))
    await apart.close()
    return str(end["hash"])


async def submit(buyer: MemoryNode, **options: int) -> str:
    return await buyer.submit(sample_file(STEPS), checkpoint_steps=EVERY, **options)


async def check_whole(market: Market, buyer: MemoryNode, run_id: str, end: Json) -> Result:
    """It has the hash of the unbroken run, all rows in its trace, and every blob it names."""
    assert end["kind"] == "result", end
    assert end["hash"] == await whole_hash(market)
    record = decode(Result, buyer.buyer.result_record(run_id))
    assert (record.first_step, record.steps_done) == (0, STEPS)
    for address in (record.trace, *record.state, *(o.address for o in record.outputs)):
        assert await buyer.store.stat(address) is not None
    return record


async def test_a_run_goes_on_elsewhere_from_its_checkpoint(
    market: Market, autojump_clock: object
) -> None:
    cheap, dear, buyer = await three(market)
    run_id = await submit(buyer)
    await trio.sleep(5)
    await cheap.kill()
    end = await market.end_of(buyer, run_id)
    await check_whole(market, buyer, run_id, end)

    [lost] = buyer.events(run_id, "resubmitted")
    assert (lost["provider"], lost["next"], lost["from_step"]) == (cheap.peer, dear.peer, 30)
    assert 30 < lost["step"] < 60
    filled = [(e["provider"], e["first_step"]) for e in buyer.events(run_id, "filled")]
    assert filled == [(cheap.peer, 0), (dear.peer, 30)]
    receipts = [(e["provider"], e["to_step"]) for e in buyer.events(run_id, "receipt")]
    assert receipts == [(cheap.peer, 30), *((dear.peer, step) for step in (60, 90, 120))]

    await market.restart(cheap)
    await market.settle_down()
    market.check()
    paid = [market.debts(buyer, provider)[1] for provider in (cheap, dear)]
    assert all(paid)
    assert end["cost_nusd"] == sum(paid)


@pytest.mark.parametrize("falls", ["silent", "broken"])
async def test_a_dead_provider_is_noticed_within_five_seconds(
    market: Market, autojump_clock: object, falls: str
) -> None:
    cheap, _, buyer = await three(market)
    dead_since: list[float] = []

    def dead(frame: bytes) -> list[bytes]:
        if not dead_since:
            return [frame]
        if falls == "broken":
            raise ProviderError("the network is gone")
        return []

    buyer.tamper_heard = dead
    run_id = await submit(buyer)
    await trio.sleep(5)
    dead_since.append(trio.current_time())
    await told(buyer, run_id, "resubmitted")
    assert trio.current_time() - dead_since[0] <= 5.1
    buyer.tamper_heard = unchanged
    await cheap.kill()
    await check_whole(market, buyer, run_id, await market.end_of(buyer, run_id))


async def test_without_another_ask_it_waits_for_one(market: Market, autojump_clock: object) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    provider.workers.step_s = 0.1
    run_id = await submit(buyer)
    await trio.sleep(5)
    await provider.kill()
    await trio.sleep(2 * 3600)
    assert buyer.runs.get(run_id).card["state"] == "waiting"
    assert buyer.events(run_id, "resubmitted")[-1]["next"] in ("", provider.peer)
    await market.restart(provider)
    end = await market.end_of(buyer, run_id)
    await check_whole(market, buyer, run_id, end)
    await market.settle_down()
    market.check()
    assert market.debts(buyer, provider)[1] == end["cost_nusd"]


async def test_what_is_left_of_the_budget_bounds_the_next_stretch(
    market: Market, autojump_clock: object
) -> None:
    cheap, dear, buyer = await three(market)
    [quote, _] = [
        deal["total_nusd"]
        for deal in (
            await buyer.buyer.quote(sample_file(STEPS), SubmitOptions(checkpoint_steps=EVERY))
        )["deals"]
    ]
    run_id = await submit(buyer, max_nusd=quote * 5 // 4, deadline_s=600)
    await trio.sleep(5)
    await cheap.kill()
    end = await market.end_of(buyer, run_id)
    assert end["message"] == "the deadline passed while waiting"
    [miss] = [m for m in buyer.events(run_id, "ranked")[-1]["misses"] if m["provider"] == dear.peer]
    assert "budget" in miss["reason"]
    assert "after step 30" in end["hint"]
    assert buyer.runs.cards()[0]["cost_nusd"] == end["cost_nusd"] > 0
    assert end["cost_nusd"] == market.debts(buyer, cheap)[0]


@pytest.mark.parametrize("times", [4, 6])
async def test_without_a_budget_a_run_costs_at_most_four_times_its_first_quote(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(stretches, "LEAST_UNSTATED_LIMIT_NUSD", 1)
    cheap = await market.provider("cheap")
    dear = await market.provider("dear", price_nusd=times * PRICE_NUSD)
    cheap.workers.step_s = dear.workers.step_s = 0.1
    buyer = await market.buyer()
    run_id = await submit(buyer, deadline_s=3600)
    await trio.sleep(5)
    [filled] = buyer.events(run_id, "filled")
    assert filled["limit_nusd"] == 4 * filled["quote_nusd"]
    await cheap.kill()
    await trio.sleep(60)
    if times == 6:
        assert buyer.runs.get(run_id).card["state"] == "waiting"
        await buyer.kill()
        await market.restart(buyer)
        await trio.sleep(1)
        owing_nusd = market.debts(buyer, cheap)[0]
        assert buyer.runs.get(run_id).card["cost_nusd"] == owing_nusd > 0
    end = await market.end_of(buyer, run_id)
    assert end["kind"] == ("result" if times == 4 else "failed")
    if times == 6:
        [miss] = [
            m for m in buyer.events(run_id, "ranked")[-1]["misses"] if m["provider"] == dear.peer
        ]
        assert "budget" in miss["reason"]


async def test_a_run_that_gets_nowhere_is_given_up(market: Market, autojump_clock: object) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    provider.workers.failure = ProviderError("the sandbox is lost")
    end = await market.end_of(buyer, await submit(buyer))
    assert end["error"] == "ProviderError"
    assert "the sandbox is lost" in end["message"]
    assert len(buyer.runs.cards()) == 1
    assert len(buyer.events(buyer.runs.cards()[0]["id"], "filled")) == 1 + MAX_STALLED


async def test_a_provider_that_failed_is_avoided_ever_longer(
    market: Market, autojump_clock: object
) -> None:
    cheap, dear, buyer = await three(market)
    cheap.workers.failure = ProviderError("the sandbox is lost")
    for round_number in range(3):
        run_id = await submit(buyer, fresh=True)
        assert (await market.end_of(buyer, run_id))["provider"] == dear.peer
        assert len(buyer.events(run_id, "resubmitted")) == 1
        again = await submit(buyer, fresh=True)
        end = await market.end_of(buyer, again)
        assert (end["provider"], buyer.events(again, "resubmitted")) == (dear.peer, [])
        await trio.sleep(60 << round_number)


@pytest.mark.parametrize("at_s", [3.5, 5.0, 9.0, 12.0])
async def test_the_buyers_node_dies_in_the_middle_of_it(
    market: Market, autojump_clock: object, at_s: float
) -> None:
    cheap, dear, buyer = await three(market)
    run_id = await submit(buyer)
    await trio.sleep(5)
    await cheap.kill()
    await trio.sleep(at_s)
    await buyer.kill()
    await trio.sleep(1)
    await market.restart(buyer)
    end = await market.end_of(buyer, run_id)
    await check_whole(market, buyer, run_id, end)
    await market.restart(cheap)
    await market.settle_down()
    market.check()
    paid = [market.debts(buyer, provider)[1] for provider in (cheap, dear)]
    assert end["cost_nusd"] == sum(paid)


async def test_the_power_goes_at_every_write_of_the_buyer(
    market: Market, autojump_clock: object
) -> None:
    """The provider is lost after its first checkpoint, and the buyer's node at any write."""

    async def run(cut_at: int | None, before: bool) -> int:
        apart = market.another()
        cheap, dear, buyer = await three(apart)
        buyer.cut_at, buyer.cut_before = cut_at, before
        buyer.tamper_heard = paid = At(m.Checkpoint)
        apart.nursery.start_soon(submit, buyer)
        with trio.move_on_after(60):
            await paid.reached.wait()
            await trio.sleep(0.5)
        await cheap.kill()
        if cut_at is not None:
            with trio.move_on_after(120):
                await buyer.down.wait()
            buyer.cut_at = None
            if buyer.down.is_set():
                await apart.restart(buyer)
        cards = buyer.runs.cards()
        if not cards:
            assert (cut_at, before) == (1, True)
            await submit(buyer)
            cards = buyer.runs.cards()
        end = await apart.end_of(buyer, cards[0]["id"])
        assert end["kind"] == "result", (cut_at, before, end)
        hashes.add(end["hash"])
        await apart.restart(cheap)
        await apart.settle_down()
        apart.check()
        assert end["cost_nusd"] == sum(apart.debts(buyer, p)[1] for p in (cheap, dear))
        await apart.close()
        return buyer.writes

    hashes = {await whole_hash(market)}
    for at in range(1, await run(None, False) + 1):
        for before in (True, False):
            await run(at, before)
    assert len(hashes) == 1


async def test_late_claims_of_one_that_was_given_up_are_fenced(
    market: Market, autojump_clock: object
) -> None:
    cheap, _, buyer = await three(market)
    cut: list[bool] = []
    cheap.tamper_answered_sent = lambda frame: [] if cut else [frame]
    run_id = await submit(buyer)
    await trio.sleep(5)
    cut.append(True)
    await told(buyer, run_id, "resubmitted")
    cut.clear()
    owing = market.debts(buyer, cheap)[0]
    await check_whole(market, buyer, run_id, await market.end_of(buyer, run_id))
    await market.settle_down()
    assert market.debts(buyer, cheap) == (owing, owing)
    market.check()


async def test_who_does_not_answer_a_bid_is_not_asked_for_a_while(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    mute, honest = (
        await market.provider("mute", price_nusd=PRICE_NUSD // 2),
        await market.provider(),
    )
    buyer = await market.buyer()
    answer = Seller.handle

    async def handle(self: Seller, stream: Stream) -> None:
        if self is mute.seller:
            await trio.sleep_forever()
        await answer(self, stream)

    monkeypatch.setattr(Seller, "handle", handle)
    took_s = []
    silent = "the provider was lost: passed over: it said nothing for 2.0 s"
    for _ in range(4):
        began_s = trio.current_time()
        run_id = await buyer.submit(sample_file(), fresh=True)
        assert (await market.end_of(buyer, run_id))["provider"] == honest.peer
        took_s.append(trio.current_time() - began_s)
        told = [(event["provider"], event["reason"]) for event in buyer.events(run_id, "rejected")]
        assert told == ([] if len(took_s) > 2 else [(mute.peer, silent)]), "excused once"
    assert took_s[:2] == pytest.approx([2, 2], abs=0.5)
    assert max(took_s[2:]) < 0.5
    [avoided] = buyer.buyer.experience.pauses(now_ns())
    assert (avoided.account, avoided.failures) == (mute.account, 1)
