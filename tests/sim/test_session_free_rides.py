"""What a buyer of sessions cannot have for nothing, however it ends a lease."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from p2pflop.errors import JobError
from p2pflop.job.commands import Batch, Failed
from p2pflop.node import session_sale
from p2pflop.node.memory_market import MemoryNode
from p2pflop.node.memory_sessions import DigestWorkspace
from tests.session_scripts import FLOATS, Script, beginning, opening, steps
from tests.sim.test_session_memory import SIZE, begin, reference
from tests.sim.test_session_villains import once_after, only, tampered

if TYPE_CHECKING:
    from tests.sim.conftest import Market

LONG_S = session_sale.FINISH_S + 2


def counted_nusd(provider: MemoryNode, buyer: MemoryNode) -> int:
    """What counts against a buyer's credit and is in no ledger."""
    allocator = provider.seller.allocator
    return allocator._pending(provider.seller.now_ns())[buyer.account]


async def test_who_goes_with_the_answer_and_before_the_bill_loses_credit(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, script = await market.provider(), await market.buyer(), Script()
    await begin(buyer, script)
    provider.workers.step_s = LONG_S
    script.give([*beginning(), *steps(1)])
    assert await script.read(0, SIZE) == await reference(market, 1)
    script.give([*steps(2)])
    await trio.sleep(1)
    await buyer.kill()
    await trio.sleep(60)
    assert provider.seller.busy == 0
    assert market.debts(buyer, provider)[1] <= FLOATS
    assert counted_nusd(provider, buyer) + market.debts(buyer, provider)[1] == 3 * FLOATS


async def test_a_fault_at_the_end_of_a_batch_loses_credit_for_all_of_it(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, buyer, script = await market.provider(), await market.buyer(), Script()
    await begin(buyer, script)
    run = DigestWorkspace.run

    def fault_at_the_fifth(space: DigestWorkspace, *graph_and_places: Any) -> None:
        if space.kernels == 4:
            raise JobError("the job's code faulted")
        run(space, *graph_and_places)

    monkeypatch.setattr(DigestWorkspace, "run", fault_at_the_fifth)
    script.give([*beginning(), *steps(5)])
    assert await script.until(Failed)
    await trio.sleep(10)
    assert market.debts(buyer, provider) == (0, 0)
    assert counted_nusd(provider, buyer) == 5 * FLOATS


async def test_commands_over_the_quote_are_not_obeyed(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, script = await market.provider(), await market.buyer(), Script()
    script.say(opening(cap_nusd=100 * FLOATS, wait_s=600))
    buyer.buyer.nursery.start_soon(buyer.sessions.serve, script)
    script.give(beginning())
    await script.obeyed()
    begun = len(beginning()) + 1
    buyer.tamper_sent = once_after([Batch(begun, tuple(steps(100)))])
    script.give(steps(1))
    await script.until_note()
    assert await script.read(0, SIZE) == await reference(market, 1)
    assert len(script.leases) == 2
    assert counted_nusd(provider, buyer) <= 101 * FLOATS, "no more than the second lease may bill"
    await script.close()
    await market.settle_down()
    assert market.debts(buyer, provider) == (FLOATS, FLOATS)


async def test_a_lease_in_which_nothing_is_obeyed_costs_its_buyer_a_pause(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, script = await market.provider(), await market.buyer(), Script()
    buyer.tamper_sent = tampered(only(Batch, lambda _: []))
    await begin(buyer, script)
    await trio.sleep(session_sale.GIVEN_BACK_S)
    assert not provider.seller.allocator.lapses
    script.leave()
    await trio.sleep(30)
    assert provider.seller.busy == 0
    assert len(provider.seller.allocator.lapses) == 1
    buyer.tamper_sent = tampered(lambda message: [message])
    honest = Script()
    await begin(buyer, honest)
    honest.give([*beginning(), *steps(1)])
    await honest.close()
    await market.settle_down()
    assert market.debts(buyer, provider) == (FLOATS, FLOATS)
    assert not provider.seller.allocator.lapses, "what was paid makes up for it"


async def test_a_script_that_fails_at_once_costs_its_buyer_no_pause(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    for _ in range(3):
        script = Script()
        await begin(buyer, script)
        await script.close()
        await trio.sleep(1)
        assert provider.seller.busy == 0
    assert not provider.seller.allocator.lapses


async def test_a_provider_that_shuts_down_counts_nothing_that_it_broke_off(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, script = await market.provider(), await market.buyer(), Script()
    await begin(buyer, script)
    provider.workers.step_s = 2 * LONG_S
    script.give(beginning())
    await script.obeyed()
    script.give(steps(2))
    await trio.sleep(1)
    await provider.session_sales.stop()
    await trio.sleep(30)
    assert provider.session_sales.cards() == []
    assert counted_nusd(provider, buyer) == 0
    assert not provider.seller.allocator.lapses
    script.leave()
