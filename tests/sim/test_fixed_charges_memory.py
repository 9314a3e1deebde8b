"""Setup and minimum charge: whole where the buyer ends a stretch, else in proportion."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import trio

from p2pflop.market.take import Take
from p2pflop.node import messages as m
from p2pflop.node.market_view import countersigned
from p2pflop.node.memory_market import MemoryNode, sample_file
from p2pflop.node.service import Json

if TYPE_CHECKING:
    from tests.sim.conftest import Market

STEPS = 120
STEP_NUSD = 6
METERED_NUSD = STEPS * STEP_NUSD
STOPPED_NUSD = STEPS // 4 * (STEP_NUSD + 1)
"""The flag that it stops by costs something, too."""
SETUP_NUSD = 5000


async def opened(market: Market, **charges: Any) -> tuple[MemoryNode, MemoryNode]:
    provider = await market.provider(**charges)
    provider.workers.step_s = 0.01
    return provider, await market.buyer()


@pytest.mark.parametrize(
    ("charges", "due_nusd"),
    [
        ({}, STOPPED_NUSD),
        ({"setup_nusd": SETUP_NUSD}, SETUP_NUSD + STOPPED_NUSD),
        ({"min_charge_nusd": 400}, 400),
        ({"setup_nusd": 100, "min_charge_nusd": 250}, 100 + STOPPED_NUSD),
        ({"setup_nusd": 100, "min_charge_nusd": 10_000}, 10_000),
    ],
)
@pytest.mark.parametrize("checkpoint_steps", [0, 12])
async def test_a_work_that_stops_itself_pays_the_fixed_charges_whole(
    market: Market,
    autojump_clock: object,
    charges: dict[str, int],
    due_nusd: int,
    checkpoint_steps: int,
) -> None:
    provider, buyer = await opened(market, **charges)
    run_id = await buyer.submit(
        sample_file(STEPS, stop_every=STEPS // 4), checkpoint_steps=checkpoint_steps
    )
    end = await market.end_of(buyer, run_id)
    assert end["kind"] == "result"
    assert end["cost_nusd"] == due_nusd
    await market.settle_down()
    assert market.debts(buyer, provider) == (due_nusd, due_nusd)
    market.check()


async def told(buyer: MemoryNode, run_id: str, *kinds: str) -> None:
    """Return once a run has told so many events of each of these kinds."""
    wanted = Counter(kinds)
    async for events in buyer.runs.follow(run_id, 0):
        wanted -= Counter(event["kind"] for event in events)
        if not wanted:
            return


async def cancelled(
    market: Market, receipts: int, victim: str = "", at: int = 0, *, before: bool = False
) -> tuple[MemoryNode, MemoryNode, Json]:
    """A run with a checkpoint now and then, cancelled when so many receipts have come."""
    provider, buyer = await opened(market, setup_nusd=SETUP_NUSD)
    every = 12 if receipts else STEPS // 2
    run_id = await buyer.submit(sample_file(STEPS), checkpoint_steps=every)
    await told(buyer, run_id, *(["receipt"] * receipts or ["rows"]))
    node = {"buyer": buyer, "provider": provider}.get(victim)
    if node is not None:
        node.cut_at, node.cut_before = node.writes + at, before
    buyer.runs.get(run_id).cancel_requested.set()
    if node is not None:
        with trio.move_on_after(60):
            await node.down.wait()
            await trio.sleep(5)
            await market.restart(node)
        node.cut_at = None
        if not buyer.runs.get(run_id).over:
            buyer.runs.get(run_id).cancel_requested.set()
    end = await market.end_of(buyer, run_id)
    await market.settle_down()
    return provider, buyer, end


async def test_a_buyer_that_cancels_owes_the_setup_whole_once_it_has_countersigned(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, end = await cancelled(market, 2)
    assert end["kind"] == "cancelled"
    [*_, last] = buyer.events(buyer.runs.cards()[0]["id"], "receipt")
    due_nusd = SETUP_NUSD + METERED_NUSD * last["to_step"] // STEPS
    assert end["cost_nusd"] == buyer.runs.cards()[0]["cost_nusd"] == due_nusd
    assert last["to_step"] < STEPS
    assert f"--from-step {last['to_step']}," in end["hint"]
    assert market.debts(buyer, provider) == (due_nusd, due_nusd)
    assert buyer.journal.letters() == []
    taken = Take(1, due_nusd, due_nusd)
    assert await provider.ledger_book.take(lambda: countersigned(provider.journal)) == taken
    assert await buyer.ledger_book.take(lambda: countersigned(buyer.journal)) == taken
    market.check()


async def test_a_buyer_that_cancels_before_it_has_countersigned_owes_nothing(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, end = await cancelled(market, 0)
    assert end["kind"] == "cancelled"
    assert buyer.events(buyer.runs.cards()[0]["id"], "receipt") == []
    assert end["hint"] == ""
    assert buyer.runs.cards()[0]["cost_nusd"] == 0
    assert market.debts(buyer, provider) == (0, 0)
    market.check()


@pytest.mark.parametrize("victim", ["buyer", "provider"])
@pytest.mark.parametrize("before", [False, True])
async def test_a_power_cut_at_a_cancel_leaves_equal_ledgers(
    market: Market, autojump_clock: object, victim: str, before: bool
) -> None:
    for at in range(1, 6):
        other = market.another()
        provider, buyer, end = await cancelled(other, 2, victim, at, before=before)
        owing, due = other.debts(buyer, provider)
        assert owing == due == buyer.runs.cards()[0]["cost_nusd"] > 0, at
        if end["kind"] == "cancelled":
            assert owing > SETUP_NUSD, at
        other.check()
        await other.close()


async def test_a_closing_receipt_that_is_lost_with_its_stream_comes_as_a_letter(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await opened(market, setup_nusd=SETUP_NUSD)
    run_id = await buyer.submit(sample_file(STEPS), checkpoint_steps=12)
    await told(buyer, run_id, "receipt", "receipt")

    def deaf(frame: bytes) -> list[bytes]:
        message = m.decode_message(frame, "peer")
        return [] if isinstance(message, m.Countersigned | m.Abandoned) else [frame]

    buyer.tamper_sent = deaf
    buyer.runs.get(run_id).cancel_requested.set()
    assert (await market.end_of(buyer, run_id))["kind"] == "cancelled"
    owing, due = market.debts(buyer, provider)
    assert owing > SETUP_NUSD > due
    await trio.sleep(120)  # by now the provider has given the silent buyer up
    buyer.tamper_sent = lambda frame: [frame]
    await market.settle_down()
    assert market.debts(buyer, provider) == (owing, owing)
    market.check()


async def test_a_restarted_provider_shows_how_far_it_has_billed(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await opened(market)
    delivered = trio.Event()

    def deaf(frame: bytes) -> list[bytes]:
        if not isinstance(m.decode_message(frame, "peer"), m.Delivered):
            return [frame]
        delivered.set()
        return []

    buyer.tamper_heard = deaf
    await buyer.submit(sample_file(STEPS))
    await delivered.wait()
    await buyer.kill()
    before = provider.seller.cards()
    assert [(card["state"], card["step"]) for card in before] == [("receipted", STEPS)]
    await provider.kill()
    await market.restart(provider)
    await trio.sleep(1)
    assert provider.seller.cards() == before


async def test_a_lease_that_is_lost_earns_no_setup_and_the_next_one_its_own(
    market: Market, autojump_clock: object
) -> None:
    first = await market.provider("first", setup_nusd=SETUP_NUSD)
    second = await market.provider("second", setup_nusd=SETUP_NUSD + 100)
    buyer = await market.buyer()
    for node in (first, second):
        node.workers.step_s = 0.01
    run_id = await buyer.submit(sample_file(STEPS), checkpoint_steps=12, max_nusd=10**9)
    await told(buyer, run_id, "receipt", "receipt")
    await first.kill()
    end = await market.end_of(buyer, run_id)
    assert end["kind"] == "result"
    await market.restart(first)
    await market.settle_down()
    [lost, *_] = buyer.events(run_id, "resubmitted")
    owed_first, owed_second = (market.debts(buyer, node)[0] for node in (first, second))
    done = int(buyer.events(run_id, "filled")[-1]["first_step"])
    assert lost
    assert owed_first == METERED_NUSD * done // STEPS > 0
    rest = METERED_NUSD * (STEPS - done) // STEPS
    assert owed_second == SETUP_NUSD + 100 + rest
    assert end["cost_nusd"] == owed_first + owed_second
    market.check()
