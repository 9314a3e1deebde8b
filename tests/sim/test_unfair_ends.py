"""Ends that one side would like better than the other: what they earn is nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
import trio

from p2pflop.job.file import decode_file
from p2pflop.job.lifecycle import Edge
from p2pflop.job.spec import MODE_LAST, Work
from p2pflop.market.receipts import close
from p2pflop.market.records import Bid, Receipt
from p2pflop.node import memory_market
from p2pflop.node import messages as m
from p2pflop.node.allocator import Allocator
from p2pflop.node.driver import LIFE_ROW
from p2pflop.node.journal import PROVIDER
from p2pflop.node.memory_market import sample_file
from p2pflop.node.memory_workers import CountingSession
from p2pflop.wire import decode, reopen

if TYPE_CHECKING:
    from p2pflop.node.memory_market import MemoryNode
    from tests.sim.conftest import Market

STEPS = 120
STEP_NUSD = 6


class GoesOn(CountingSession):
    """Does not end where the work ends itself, and tells its flags all the same."""

    def should_stop(self, number: int) -> bool:
        del number
        return False

    def _flag(self, phase: int, output: int) -> bytes:
        flag = super()._flag(phase, output)
        return bytes([CountingSession.should_stop(self, self._last[phase])]) if flag else flag


@pytest.mark.parametrize("every", [15, 30, 0])
async def test_who_goes_on_after_the_end_of_the_work_is_refused(
    market: Market, autojump_clock: object, every: int
) -> None:
    evil = await market.provider("evil", session=GoesOn, price_nusd=5 * 10**14)
    honest = await market.provider("honest")
    honest.workers.step_s = evil.workers.step_s = 0.05
    buyer = await market.buyer()
    file = sample_file(STEPS, stop_every=30)
    run_id = await buyer.submit(file, checkpoint_steps=every)
    end = await market.end_of(buyer, run_id)
    [lost] = buyer.events(run_id, "resubmitted")
    assert "it went on after step 29, which ended it" in lost["reason"]
    assert buyer.runs.get(run_id).card["step"] == 30
    await market.settle_down()
    earned_nusd = market.debts(buyer, evil)[1]
    assert 0 < earned_nusd < 15 * STEP_NUSD if every == 15 else earned_nusd == 0
    await evil.kill()
    alone = await market.end_of(buyer, await buyer.submit(file, fresh=True))
    assert alone["hash"] == end["hash"]


async def test_a_closing_receipt_ends_the_sale_that_it_is_for(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(setup_nusd=5000), await market.buyer()
    provider.workers.step_s = 0.05
    owed_nusd: list[int] = []
    closed = trio.Event()

    def close_too_soon(frame: bytes) -> list[bytes]:
        told = m.decode_message(frame, provider.peer)
        if owed_nusd or not isinstance(told, m.Countersigned):
            return [frame]
        last = reopen(Receipt, told.receipt, buyer.identity.network).record
        [bid] = [row.body for row in buyer.runs.rows(run_id) if row.kind == LIFE_ROW + Edge.RANKED]
        [wire] = msgspec.msgpack.decode(bid, type=tuple[bytes])
        work = decode(Work, decode_file(file).body.work)
        bought = reopen(Bid, wire, buyer.identity.network).record
        closing = close(buyer.identity.node, last, bought, work, buyer.identity.network)
        assert closing is not None
        owed_nusd.append(closing.record.amount_nusd)
        closed.set()
        return [frame, m.encode_message(m.Countersigned(closing.wire))]

    buyer.tamper_sent = close_too_soon
    file = sample_file(STEPS)
    run_id = await buyer.submit(file, checkpoint_steps=60)
    await closed.wait()
    buyer.runs.get(run_id).cancel_requested.set()
    await market.end_of(buyer, run_id)
    await market.settle_down()
    [head] = provider.journal.heads(PROVIDER)
    assert (head.end_state, head.summary) == (
        "released",
        b"the buyer cancelled, and signed what it owes",
    )
    assert owed_nusd == [5000 + 60 * STEP_NUSD]
    assert market.debts(buyer, provider)[1] == owed_nusd[0]


async def spend_time(
    provider: MemoryNode,
    buyer: MemoryNode,
    market: Market,
    *,
    seconds: float = STEPS - 3,
    **options: int,
) -> int:
    """How often a buyer that never pays, and cancels after so long, gets a lease."""
    filled = 0
    for seed in range(6):
        file = sample_file(STEPS, seed=seed)
        run_id = await buyer.submit(file, checkpoint_steps=0, **options)
        if "deadline_s" not in options:
            await trio.sleep(seconds)
            buyer.runs.get(run_id).cancel_requested.set()
        await market.end_of(buyer, run_id)
        await trio.sleep(5)
        filled += len(buyer.events(run_id, "filled"))
    assert market.debts(buyer, provider) == (0, 0)
    return filled


async def test_rows_until_a_short_deadline_count_against_the_credit(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(credit_nusd=1000), await market.buyer()
    provider.workers.step_s = 1.0
    assert await spend_time(provider, buyer, market, deadline_s=100) == 1


async def test_work_of_which_nothing_is_traced_counts_too(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_market, "MODE_TRACE", MODE_LAST)
    provider, buyer = await market.provider(credit_nusd=1000), await market.buyer()
    provider.workers.step_s = 1.0
    assert await spend_time(provider, buyer, market) == 1


@pytest.mark.parametrize("seconds", [1.5, 60.0])
async def test_a_step_that_was_begun_counts_before_its_rows(
    market: Market, autojump_clock: object, seconds: float
) -> None:
    """Twice a step is within the credit, and nothing of it is ever seen."""
    provider = await market.provider(credit_nusd=STEPS * STEP_NUSD + STEP_NUSD)
    buyer = await market.buyer()
    provider.workers.step_s = 120.0
    assert await spend_time(provider, buyer, market, seconds=seconds) == 2


async def test_a_setup_counts_before_the_first_step(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lower(*_: object) -> bytes:
        await trio.sleep(120)
        return b""

    provider, buyer = await market.provider(credit_nusd=7000, setup_nusd=3000), await market.buyer()
    monkeypatch.setattr(provider.workers, "lower", lower)
    assert await spend_time(provider, buyer, market, seconds=5.0) == 2


async def begin_and_cancel(market: Market, buyer: MemoryNode, seed: int, after_s: float) -> bool:
    """Whether a stranger got a lease of one long step, which it broke off after so long."""
    run_id = await buyer.submit(sample_file(1, floats=1000, seed=seed))
    await trio.sleep(after_s)
    buyer.runs.get(run_id).cancel_requested.set()
    await market.end_of(buyer, run_id)
    await trio.sleep(5)
    return bool(buyer.events(run_id, "filled"))


@pytest.mark.parametrize(("after_s", "times"), [(1.0, 40), (100.0, 30)])
async def test_a_step_that_is_broken_off_counts_by_its_time(
    market: Market,
    autojump_clock: object,
    monkeypatch: pytest.MonkeyPatch,
    after_s: float,
    times: int,
) -> None:
    """So nobody takes the strangers' credit from the others by beginning again and again; each job
    costs 1,000 nano-dollars."""
    monkeypatch.setattr(Allocator, "note_speed", lambda *_: None)
    provider = await market.provider(credit_nusd=4000)
    provider.seller.allocator.flop_per_s = 1  # each is worth a nano-dollar
    provider.workers.step_s = 3600.0
    stranger, other = await market.buyer("stranger"), await market.buyer("other")
    for node in (stranger, other):
        for data in memory_market.sample_data(1000):
            await node.store.put(data)
    filled = [await begin_and_cancel(market, stranger, n, after_s) for n in range(40)]
    assert filled.count(True) == times
    provider.workers.step_s = 0.0
    run_id = await other.submit(sample_file(1, floats=1000, seed=99))
    end = await market.end_of(other, run_id)
    assert (end["kind"] == "result") is (times == 40)
