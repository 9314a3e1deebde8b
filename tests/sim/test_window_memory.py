"""Work runs ahead of the buyer's countersignatures by a window, waits there, and goes on."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.job import patience
from p2pflop.job.events import State
from p2pflop.node import messages as m
from p2pflop.node.journal import PROVIDER
from p2pflop.node.memory_market import MemoryNode, sample_file
from p2pflop.node.memory_workers import ROWS_PER_EVENT
from p2pflop.node.window import COUNTERSIGN_WITHIN_S
from tests.sim.conftest import only_sale

if TYPE_CHECKING:
    from tests.sim.conftest import Market

STEPS = 320
WINDOW_STEPS = 40
MOST_AHEAD = WINDOW_STEPS + ROWS_PER_EVENT + 1
"""The node hears of so many steps at once, and one more is under way."""
STEP_S = 0.25
STEP_NUSD = 6
SIGNED_ONCE = {"checkpoint_steps": 0, "checkpoint_s": 0}


@pytest.fixture(autouse=True)
def _patient_buyers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What their countersignatures wait for is not the provider."""
    monkeypatch.setattr(patience, "MIN_STALL_NS", patience.MAX_STALL_NS)


class Withheld:
    """A tamper that keeps countersignatures back until it is told to let them go."""

    def __init__(self) -> None:
        self.free = False
        self._held: list[bytes] = []

    def __call__(self, frame: bytes) -> list[bytes]:
        if not self.free and isinstance(m.decode_message(frame, "peer"), m.Countersigned):
            self._held.append(frame)
            return []
        if not self.free:
            return [frame]
        held, self._held = self._held, []
        return [*held, frame]


async def opened(market: Market, window_steps: int = WINDOW_STEPS) -> tuple[MemoryNode, MemoryNode]:
    provider = await market.provider(window_nusd=window_steps * STEP_NUSD)
    provider.workers.step_s = STEP_S
    return provider, await market.buyer()


def ahead(provider: MemoryNode) -> int:
    """Steps shown and not countersigned."""
    [card] = provider.seller.cards()
    assert card["quote_nusd"] == STEPS * STEP_NUSD
    return int(card["step"] - card["signed_nusd"] // STEP_NUSD)


async def test_work_waits_at_the_window_and_goes_on_when_it_is_signed(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await opened(market)
    buyer.tamper_sent = withheld = Withheld()
    run_id = await buyer.submit(sample_file(STEPS), **SIGNED_ONCE)
    await trio.sleep(COUNTERSIGN_WITHIN_S / 2)

    [card] = provider.seller.cards()
    assert (card["state"], card["paused"], card["signed_nusd"]) == ("running", True, 0)
    assert WINDOW_STEPS < ahead(provider) <= MOST_AHEAD
    assert provider.workers.statistics().workers == 1, "the worker is kept"
    assert only_sale(provider).is_standing

    withheld.free = True
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    assert buyer.events(run_id, "resubmitted") == []
    rows = [row["step"] for event in buyer.events(run_id, "rows") for row in event["rows"]]
    assert rows == list(range(STEPS))
    await market.settle_down()
    assert provider.seller.cards() == []
    market.check()


async def test_a_buyer_that_signs_in_time_is_never_waited_for(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await opened(market, 4 * ROWS_PER_EVENT)
    run_id = await buyer.submit(sample_file(STEPS), **SIGNED_ONCE)
    end = await market.end_of(buyer, run_id)
    took = trio.current_time()
    receipts = [receipt["to_step"] for receipt in buyer.events(run_id, "receipt")]
    assert receipts[-1] == STEPS
    assert len(receipts) > STEPS // (4 * ROWS_PER_EVENT), "asked for with half of it unsigned"
    assert took < STEPS * STEP_S + 10
    await market.settle_down()
    assert market.debts(buyer, provider) == (end["cost_nusd"],) * 2
    market.check()


async def test_a_window_of_nothing_signs_every_step(market: Market, autojump_clock: object) -> None:
    provider, buyer = await opened(market, 0)
    run_id = await buyer.submit(sample_file(STEPS), **SIGNED_ONCE)
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    receipts = [receipt["to_step"] for receipt in buyer.events(run_id, "receipt")]
    assert max(b - a for a, b in itertools.pairwise(receipts)) <= ROWS_PER_EVENT + 1
    await market.settle_down()
    assert sum(market.debts(buyer, provider)) > 0
    market.check()


async def test_a_buyer_that_never_signs_loses_the_lease_and_owes_it_for_a_day(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await opened(market)
    buyer.tamper_sent = Withheld()
    run_id = await buyer.submit(sample_file(STEPS), **SIGNED_ONCE, deadline_s=1200)
    await trio.sleep(STEPS * STEP_S + COUNTERSIGN_WITHIN_S + 5)
    [head] = [head for head in provider.journal.heads(PROVIDER) if head.end_state]
    assert head.end_state == State.RELEASED
    assert b"countersigned for 600 s" in head.summary
    shown = list(provider.seller.allocator._unpaid)
    assert [unpaid.account for unpaid in shown] == [buyer.account]
    assert 0 < shown[0].amount_nusd <= MOST_AHEAD * STEP_NUSD
    await market.end_of(buyer, run_id)
    await market.settle_down()


async def test_its_own_jobs_a_node_does_not_wait_for(
    market: Market, autojump_clock: object
) -> None:
    node = await market.buyer("node", price_nusd=10**15, window_nusd=0)
    node.meet(node)
    run_id = await node.submit(sample_file(STEPS), **SIGNED_ONCE)
    assert (await market.end_of(node, run_id))["kind"] == "result"
    assert [receipt["to_step"] for receipt in node.events(run_id, "receipt")] == [STEPS]
