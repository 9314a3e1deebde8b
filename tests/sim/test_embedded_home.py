"""A home whose selling node was killed, and on which an embedded one runs next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.job.events import State
from p2pflop.job.lifecycle import PROVIDER_LIMITS
from p2pflop.node import messages as m
from p2pflop.node.allocator import SELLS_NOTHING
from p2pflop.node.journal import PROVIDER
from p2pflop.node.memory_market import (
    PRICE_NUSD,
    MemoryNode,
    sample_data,
    sample_file,
    unchanged,
)
from p2pflop.node.service import SubmitOptions
from p2pflop.units import NS_PER_S
from tests.sim.test_classes_memory import OTHER, OTHER_ID
from tests.sim.test_power_cuts import SHORT_S
from tests.sim.test_resubmission import (
    EVERY,
    STEPS,
    check_whole,
    submit,
    three,
    told,
    whole_hash,
)
from tests.sim.test_wishes_memory import until_resting

if TYPE_CHECKING:
    from tests.sim.conftest import Market

HOUR_S = PROVIDER_LIMITS[State.RECEIPTED].after_ns / NS_PER_S


async def embed(market: Market, node: MemoryNode) -> None:
    """Run an embedded node on the home of one that was killed."""
    node.cut_at = None
    await node.start(market.nursery, embedded=True)
    node.meet(*(other for other in market.nodes if other is not node))


def owed_to(market: Market, buyer: MemoryNode, *providers: MemoryNode) -> int:
    return sum(market.debts(buyer, provider)[1] for provider in providers)


def credit_taken_nusd(provider: MemoryNode, buyer: MemoryNode) -> int:
    """What counts against a buyer's credit beside the ledger."""
    seller = provider.seller
    return seller.allocator._pending(seller.now_ns())[buyer.account]


@pytest.mark.parametrize("after_s", [0.0, 0.05, 5.0])
async def test_what_was_under_way_is_given_back_and_goes_on_elsewhere(
    market: Market, autojump_clock: object, after_s: float
) -> None:
    cheap, dear, buyer = await three(market)
    run_id = await submit(buyer)
    await told(buyer, run_id, "filled")
    await trio.sleep(after_s)
    await cheap.kill()
    await embed(market, cheap)
    await trio.sleep(5)
    assert not cheap.journal.unfinished(PROVIDER)
    assert cheap.seller.busy == 0
    [lost] = buyer.events(run_id, "resubmitted")
    assert (lost["provider"], lost["next"]) == (cheap.peer, dear.peer)
    end = await market.end_of(buyer, run_id)
    await check_whole(market, buyer, run_id, end)
    market.check()

    await cheap.kill()
    await market.restart(cheap)
    await market.settle_down()
    market.check()
    assert end["cost_nusd"] == owed_to(market, buyer, cheap, dear)
    assert credit_taken_nusd(cheap, buyer) == 0


@pytest.mark.parametrize("embedded", [True, False])
async def test_a_fill_that_the_crash_cut_off_is_no_lapse_of_its_buyer(
    market: Market, autojump_clock: object, embedded: bool
) -> None:
    cheap, _, buyer = await three(market)
    cheap.cut_at = cheap.writes + 1
    await submit(buyer)
    await cheap.down.wait()
    await buyer.kill()
    await trio.sleep(5)
    await (embed(market, cheap) if embedded else market.restart(cheap))
    await trio.sleep(5)
    [head] = cheap.journal.heads(PROVIDER)
    assert head.end_state == "released"
    assert len(cheap.seller.allocator.lapses) == 0
    assert cheap.seller.busy == 0


async def test_nobody_else_is_served_and_the_run_goes_on_when_the_home_sells_again(
    market: Market, autojump_clock: object
) -> None:
    cheap, buyer = await market.provider("cheap"), await market.buyer()
    cheap.workers.step_s = 0.1
    run_id = await submit(buyer)
    await trio.sleep(5)
    await cheap.kill()
    await embed(market, cheap)
    buyer.meet(cheap)
    await trio.sleep(600)
    assert buyer.runs.get(run_id).card["state"] in ("waiting", "bidding")
    assert len(buyer.events(run_id, "filled")) == 1, "there is nothing to be had for nothing"

    [private] = cheap.sheets.honoured()
    leaked = cheap.sheets._private[private]
    buyer.sheets.take(leaked.sealed.wire, "")
    await trio.sleep(60)
    assert buyer.events(run_id, "rejected")[-1]["reason"] == SELLS_NOTHING
    assert len(buyer.events(run_id, "filled")) == 1

    await cheap.kill()
    await market.restart(cheap)
    end = await market.end_of(buyer, run_id)
    await check_whole(market, buyer, run_id, end)
    await market.settle_down()
    market.check()
    assert end["cost_nusd"] == owed_to(market, buyer, cheap)
    unbroken = await market.end_of(buyer, await submit(buyer, fresh=True))
    assert end["cost_nusd"] == unbroken["cost_nusd"]


async def test_its_own_user_buys_at_no_price_whatever_the_home_charges(
    market: Market, autojump_clock: object
) -> None:
    node = await market.provider("home", setup_nusd=1000, min_charge_nusd=5000)
    await node.kill()
    await embed(market, node)
    for data in sample_data():
        await node.store.put(data)
    end = await market.end_of(node, await node.submit(sample_file()))
    assert (end["kind"], end["provider"], end["cost_nusd"]) == ("result", node.peer, 0)


def withheld(frame: bytes) -> list[bytes]:
    """A tamper that lets no countersignature pass."""
    return [] if isinstance(m.decode_message(frame, "peer"), m.Countersigned) else [frame]


async def test_a_delivered_result_waits_for_its_countersignature_for_as_long_as_it_takes(
    market: Market, autojump_clock: object
) -> None:
    """The buyer has it and signed for it; the hour that it has for that is one in which it can."""
    cheap, _, buyer = await three(market)

    buyer.tamper_sent = withheld
    run_id = await submit(buyer)
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", cheap.peer)
    await cheap.kill()
    await buyer.kill()
    await embed(market, cheap)
    await trio.sleep(3 * HOUR_S)
    [sale] = cheap.seller.cards()
    assert (sale["state"], cheap.seller.busy) == ("receipted", 0)
    assert credit_taken_nusd(cheap, buyer) == end["cost_nusd"]

    buyer.tamper_sent = unchanged
    await market.restart(buyer)
    await trio.sleep(60)
    assert cheap.seller.cards() == []
    assert market.debts(buyer, cheap) == (end["cost_nusd"], end["cost_nusd"])
    assert credit_taken_nusd(cheap, buyer) == 0
    market.check()


@pytest.mark.parametrize("embedded", [True, False])
async def test_a_countersignature_that_comes_late_gives_the_credit_back(
    market: Market, autojump_clock: object, embedded: bool
) -> None:
    """What was billed and not signed when the node died counts against the buyer, until it is."""
    cheap, _, buyer = await three(market)

    buyer.tamper_sent = withheld
    run_id = await submit(buyer)
    await trio.sleep(5)
    await cheap.kill()
    await trio.sleep(7)
    await (embed(market, cheap) if embedded else market.restart(cheap))
    await trio.sleep(1)
    [receipt, *_] = buyer.events(run_id, "receipt")
    assert credit_taken_nusd(cheap, buyer) == receipt["amount_nusd"] > 0
    assert market.debts(buyer, cheap)[1] == 0

    buyer.tamper_sent = unchanged
    await market.end_of(buyer, run_id)
    await market.settle_down()
    assert market.debts(buyer, cheap)[1] == receipt["amount_nusd"]
    assert credit_taken_nusd(cheap, buyer) == 0
    await cheap.kill()
    await market.restart(cheap)
    assert credit_taken_nusd(cheap, buyer) == 0, "nor after a restart"
    market.check()


@pytest.mark.parametrize("then", [["embedded", "selling"], ["embedded", "embedded", "selling"]])
async def test_the_power_goes_at_every_write_of_the_seller(
    market: Market, autojump_clock: object, then: list[str]
) -> None:
    async def run(cut_at: int, before: bool) -> int:
        """The seller's ``cut_at``-th write is cut; 0: none. How many there were."""
        apart = market.another()
        cheap, dear, buyer = await three(apart)
        until = cheap.writes
        if cut_at:
            cheap.cut_at, cheap.cut_before = until + cut_at, before
        run_id = await submit(buyer)
        if not cut_at:
            assert (await apart.end_of(buyer, run_id))["kind"] == "result"
            await trio.sleep(5)
        else:
            with trio.fail_after(60):
                await cheap.down.wait()
            for how in then:
                await (embed(apart, cheap) if how == "embedded" else apart.restart(cheap))
                await trio.sleep(SHORT_S)
                if how == "embedded":
                    assert cheap.seller.busy == 0
                    await cheap.kill()
            end = await apart.end_of(buyer, run_id)
            assert end["kind"] == "result", (cut_at, before, end)
            hashes.add(end["hash"])
            await apart.settle_down()
            apart.check()
            assert end["cost_nusd"] == owed_to(apart, buyer, cheap, dear)
        after = cheap.writes - until
        await apart.close()
        return after

    hashes = {await whole_hash(market)}
    writes = await run(0, False)
    assert writes >= 2 * STEPS // EVERY
    for at in range(1, writes + 1):
        for before in (True, False):
            await run(at, before)
    assert len(hashes) == 1


@pytest.mark.parametrize("victim", ["seller", "buyer"])
async def test_the_power_goes_at_every_write_of_the_embedded_node(
    market: Market, autojump_clock: object, victim: str
) -> None:
    async def run(cut_at: int, before: bool) -> int:
        """Its ``cut_at``-th write is cut; 0: none. How many there were."""
        apart = market.another()
        cheap, dear, buyer = await three(apart)
        node = cheap if victim == "seller" else buyer
        run_id = await submit(buyer)
        await trio.sleep(5)
        await node.kill()
        until = node.writes
        await node.start(apart.nursery, embedded=True)
        if cut_at:
            node.cut_at, node.cut_before = until + cut_at, before
            with trio.move_on_after(60):
                await node.down.wait()
        await trio.sleep(30)
        after = node.writes - until
        if not node.down.is_set():
            await node.kill()
        await apart.restart(node)
        end = await apart.end_of(buyer, run_id)
        assert end["kind"] == "result", (cut_at, before, end)
        hashes.add(end["hash"])
        await apart.settle_down()
        apart.check()
        assert end["cost_nusd"] == owed_to(apart, buyer, cheap, dear)
        await apart.close()
        return after

    hashes = {await whole_hash(market)}
    writes = await run(0, False)
    assert writes
    for at in range(1, writes + 1):
        for before in (True, False):
            await run(at, before)
    assert len(hashes) == 1


async def test_a_run_of_its_user_goes_on_at_the_price_of_before(
    market: Market, autojump_clock: object
) -> None:
    cheap, _, buyer = await three(market)
    run_id = await submit(buyer)
    await told(buyer, run_id, "receipt")
    await buyer.kill()
    await embed(market, buyer)
    end = await market.end_of(buyer, run_id)
    await check_whole(market, buyer, run_id, end)
    assert end["provider"] == cheap.peer
    unbroken = await market.end_of(buyer, await submit(buyer, fresh=True, max_nusd=0))
    assert (unbroken["provider"], unbroken["cost_nusd"]) == (buyer.peer, 0), "its own, and free"
    await market.settle_down()
    market.check()
    assert end["cost_nusd"] == owed_to(market, buyer, cheap)


async def test_a_run_of_its_user_rests_on_and_is_filled_within_its_limit(
    market: Market, autojump_clock: object
) -> None:
    dear, buyer = await market.provider("dear", descriptor=OTHER), await market.buyer()
    file, classes = sample_file(), (OTHER_ID.hex(),)
    told = await buyer.buyer.quote(file, SubmitOptions(classes=classes))
    limit_nusd = told["deals"][0]["total_nusd"] * 3 // 4
    run_id = await buyer.submit(file, max_nusd=limit_nusd, classes=classes, rest=True)
    await until_resting(buyer)
    await buyer.kill()
    await embed(market, buyer)
    await until_resting(buyer)
    newest = buyer.sheets.newest
    assert newest is not None
    assert newest.sheet.asks == (), "its wishes are for others, its asks are not"
    cheap = await market.provider("cheap", descriptor=OTHER, price_nusd=PRICE_NUSD // 2)
    cheap.meet(buyer)
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", cheap.peer)
    assert 0 < end["cost_nusd"] <= limit_nusd
    await market.settle_down()
    market.check()
    assert market.debts(buyer, dear) == (0, 0)
