"""A provider whose operator stops it hands its leases over: nothing is computed or paid twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.market.evidence import Avoided
from p2pflop.node import messages as m
from p2pflop.node.experience import FIRST_PAUSE_NS, Experience
from p2pflop.node.handing_over import HAND_OVER_S
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, sample_file, unchanged
from p2pflop.node.returning import RETURN_WITHIN_S
from tests.sim.test_bad_input import LARGE, Quick
from tests.sim.test_resubmission import STEPS, check_whole, submit, three, told, whole_hash

if TYPE_CHECKING:
    from tests.sim.conftest import Market

PARTING_S = 5.0
"""Beside handing over: the last words."""


async def stop(provider: MemoryNode) -> float:
    """Stop selling, as Ctrl-C does; how long that took."""
    began = trio.current_time()
    await provider.sheets.withdraw()
    await provider.seller.stop()
    return trio.current_time() - began


async def test_a_run_goes_on_from_the_step_at_which_its_provider_was_stopped(
    market: Market, autojump_clock: object
) -> None:
    cheap, dear, buyer = await three(market)
    run_id = await submit(buyer)
    await trio.sleep(5)
    assert await stop(cheap) <= 1
    await cheap.kill()
    end = await market.end_of(buyer, run_id)
    await check_whole(market, buyer, run_id, end)

    [lost] = buyer.events(run_id, "resubmitted")
    assert (lost["provider"], lost["next"]) == (cheap.peer, dear.peer)
    assert "pre-empted: the provider is shutting down" in lost["reason"]
    assert 40 < lost["from_step"] < 60, "between two checkpoints"
    assert lost["step"] == lost["from_step"], "all that it computed was handed over"
    receipts = [(e["provider"], e["to_step"]) for e in buyer.events(run_id, "receipt")]
    assert receipts[:2] == [(cheap.peer, 30), (cheap.peer, lost["from_step"])]
    assert receipts[-1] == (dear.peer, STEPS)
    assert buyer.buyer.experience.avoided(10**30) == ()

    await market.restart(cheap)
    await market.settle_down()
    market.check()
    paid = [market.debts(buyer, provider)[1] for provider in (cheap, dear)]
    assert end["cost_nusd"] == sum(paid)


async def test_a_job_without_checkpoints_has_one_when_its_provider_is_stopped(
    market: Market, autojump_clock: object
) -> None:
    cheap = await market.provider("cheap", session=Quick)
    dear = await market.provider("dear", price_nusd=2 * PRICE_NUSD, session=Quick)
    buyer, file = await market.buyer(floats=LARGE), sample_file(STEPS, floats=LARGE)
    cheap.workers.step_s = 0.1
    run_id = await buyer.submit(file, checkpoint_steps=0)
    await trio.sleep(5)
    await stop(cheap)
    end = await market.end_of(buyer, run_id)
    [lost] = buyer.events(run_id, "resubmitted")
    assert 40 < lost["from_step"] == lost["step"]
    assert end["provider"] == dear.peer
    unbroken = await market.end_of(buyer, await buyer.submit(file, fresh=True, checkpoint_steps=0))
    assert end["hash"] == unbroken["hash"]


async def test_what_is_due_anyway_is_not_brought_twice(
    market: Market, autojump_clock: object
) -> None:
    cheap, _, buyer = await three(market)
    run_id = await submit(buyer)
    await told(buyer, run_id, "receipt")
    await stop(cheap)
    await check_whole(market, buyer, run_id, await market.end_of(buyer, run_id))
    steps = [event["to_step"] for event in buyer.events(run_id, "receipt")]
    assert steps == sorted(set(steps))


async def test_a_provider_that_is_stopping_refuses_bids_with_a_reason(
    market: Market, autojump_clock: object
) -> None:
    cheap, _, buyer = await three(market)
    cheap.workers.step_s = 3.0
    await submit(buyer)
    await trio.sleep(4)
    market.nursery.start_soon(cheap.seller.stop)
    await trio.sleep(0.5)
    assert cheap.seller.busy, "it is at its step"
    run_id = await submit(buyer, fresh=True)
    await told(buyer, run_id, "filled")
    [refused] = buyer.events(run_id, "rejected")
    assert (refused["provider"], refused["reason"]) == (cheap.peer, "the provider is shutting down")


@pytest.mark.parametrize("holds", ["step", "countersignature"])
async def test_stopping_is_bounded(market: Market, autojump_clock: object, holds: str) -> None:
    cheap, dear, buyer = await three(market)
    run_id = await submit(buyer)
    await trio.sleep(5)
    if holds == "step":
        cheap.workers.step_s = 100.0
        await trio.sleep(1)
    else:

        def withheld(frame: bytes) -> list[bytes]:
            message = m.decode_message(frame, "peer")
            return [] if isinstance(message, m.Countersigned) else [frame]

        buyer.tamper_sent = withheld
    assert HAND_OVER_S <= await stop(cheap) <= HAND_OVER_S + PARTING_S
    buyer.tamper_sent = unchanged
    await cheap.kill()
    end = await market.end_of(buyer, run_id)
    await check_whole(market, buyer, run_id, end)
    await market.restart(cheap)
    await market.settle_down()
    market.check()
    assert end["cost_nusd"] == sum(market.debts(buyer, p)[1] for p in (cheap, dear))


async def test_a_buyer_that_is_gone_is_hardly_waited_for(
    market: Market, autojump_clock: object
) -> None:
    cheap, _, buyer = await three(market)
    run_id = await submit(buyer)
    await trio.sleep(5)
    await buyer.kill()
    await trio.sleep(5)
    assert cheap.seller.busy
    assert await stop(cheap) <= RETURN_WITHIN_S + 1
    await market.restart(buyer)
    await check_whole(market, buyer, run_id, await market.end_of(buyer, run_id))


async def test_a_result_on_its_way_is_waited_for(market: Market, autojump_clock: object) -> None:
    cheap, _, buyer = await three(market)
    delivered = trio.Event()

    def late(frame: bytes) -> list[bytes]:
        if isinstance(m.decode_message(frame, "peer"), m.Delivered):
            delivered.set()
        return [frame]

    buyer.tamper_heard = late
    run_id = await submit(buyer)
    await delivered.wait()
    assert await stop(cheap) <= 1
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", cheap.peer)
    assert buyer.events(run_id, "resubmitted") == []


async def test_a_job_that_has_not_begun_is_given_back_at_once(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap, dear, buyer = await three(market)
    monkeypatch.setattr(cheap.workers, "lower", never)
    run_id = await submit(buyer)
    await told(buyer, run_id, "filled")
    assert await stop(cheap) <= 1
    assert (await market.end_of(buyer, run_id))["provider"] == dear.peer


async def never(*_: object) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


@pytest.mark.parametrize("victim", ["provider", "buyer"])
async def test_the_power_goes_at_every_write_while_it_hands_over(
    market: Market, autojump_clock: object, victim: str
) -> None:
    async def run(cut_at: int, before: bool) -> int:
        """Its ``cut_at``-th write from the stop on is cut; 0: none. How many there were."""
        apart = market.another()
        cheap, dear, buyer = await three(apart)
        node = cheap if victim == "provider" else buyer
        run_id = await submit(buyer)
        await trio.sleep(5)
        until = node.writes
        if cut_at:
            node.cut_at, node.cut_before = until + cut_at, before
        cheap.seller.nursery.start_soon(cheap.seller.stop)
        if cut_at:
            with trio.fail_after(60):
                await node.down.wait()
            await trio.sleep(1)
            await apart.restart(node)
        else:
            await trio.sleep(1)
        after = node.writes - until
        end = await apart.end_of(buyer, run_id)
        assert end["kind"] == "result", (cut_at, before, end)
        hashes.add(end["hash"])
        await apart.settle_down()
        apart.check()
        assert end["cost_nusd"] == sum(apart.debts(buyer, p)[1] for p in (cheap, dear))
        await apart.close()
        return after

    hashes = {await whole_hash(market)}
    writes = await run(0, False)
    assert writes >= 2
    for at in range(1, writes + 1):
        for before in (True, False):
            await run(at, before)
    assert len(hashes) == 1


def test_handing_over_is_forgiven_once_until_a_job_is_done() -> None:
    experience, account = Experience(b"own"), b"provider"
    experience.note_excused(account, 0)
    assert experience.avoided(1) == ()
    experience.note_success(account)
    experience.note_excused(account, 0)
    assert experience.avoided(1) == ()
    experience.note_excused(account, 0)
    assert experience.avoided(FIRST_PAUSE_NS - 1) == (account,)
    assert experience.pauses(FIRST_PAUSE_NS - 1) == (Avoided(account, 1, FIRST_PAUSE_NS),)
    assert experience.avoided(FIRST_PAUSE_NS) == ()


async def test_one_that_waits_for_a_countersignature_leaves_with_all_that_it_has(
    market: Market, autojump_clock: object
) -> None:
    """Its window is full: it stands still between two steps, and must hear of the stop there."""
    cheap = await market.provider("cheap", window_nusd=1)
    dear = await market.provider("dear", price_nusd=2 * PRICE_NUSD)
    cheap.workers.step_s = 0.1
    buyer = await market.buyer()
    held: list[bytes] = []

    def late(frame: bytes) -> list[bytes]:
        if holds and isinstance(m.decode_message(frame, "peer"), m.Countersigned):
            held.append(frame)
            return []
        released, held[:] = list(held), []
        return [*released, frame]

    holds = [True]
    buyer.tamper_sent = late
    run_id = await submit(buyer)
    await trio.sleep(10)
    assert held, "it waits for that"
    market.nursery.start_soon(cheap.seller.stop)
    await trio.sleep(1)
    holds.clear()
    end = await market.end_of(buyer, run_id)
    await check_whole(market, buyer, run_id, end)
    [lost] = buyer.events(run_id, "resubmitted")
    assert (end["provider"], lost["step"]) == (dear.peer, lost["from_step"])
