"""Sessions on nodes whose power goes at a write to the journal: nothing is lost, or paid twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode
from p2pflop.node.session_state import SESSION_PROVIDER, lease_state
from tests.session_scripts import FLOATS, Script, beginning, steps
from tests.sim.test_embedded_home import credit_taken_nusd, embed
from tests.sim.test_session_memory import SIZE, begin, reference

if TYPE_CHECKING:
    from tests.sim.conftest import Market

RUNS = 12
WRITES = range(1, 8)


async def run_slowly(script: Script) -> bytes:
    """A step a second, so that receipts come in between."""
    script.give(beginning())
    for _ in range(RUNS):
        script.give(steps(1))
        await trio.sleep(1)
    return await script.read(0, SIZE)


def unsigned_nusd(provider: MemoryNode) -> int:
    """What it billed, and nobody has countersigned to the end."""
    states = [lease_state(head.summary) for head in provider.journal.heads(SESSION_PROVIDER)]
    pairs = [(state.open_receipt("main"), state.signed_receipt("main")) for state in states]
    return sum(
        billed.amount_nusd - (0 if signed is None else signed.amount_nusd)
        for billed, signed in pairs
        if billed is not None
    )


@pytest.mark.parametrize("embedded", [True, False], ids=["embedded", "selling"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("write", WRITES)
async def test_a_provider_is_paid_what_was_countersigned(
    market: Market, autojump_clock: object, write: int, before: bool, embedded: bool
) -> None:
    """Whether it sells again, or an embedded node runs on its home."""
    expected = await reference(market, RUNS)
    first = await market.provider("first")
    await market.provider("second", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    first.cut_at, first.cut_before = first.writes + write, before
    script = Script()
    await begin(buyer, script, wait_s=60)
    with trio.fail_after(120):
        assert await run_slowly(script) == expected
    await script.close()
    if first.down.is_set():
        await trio.sleep(20)
        await (embed(market, first) if embedded else market.restart(first))
    await market.settle_down()
    market.check()
    assert credit_taken_nusd(first, buyer) == unsigned_nusd(first)
    assert not any(node.journal.unfinished("session-provider") for node in market.nodes)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("write", WRITES)
async def test_a_buyer_owes_what_it_countersigned_and_no_more(
    market: Market, autojump_clock: object, write: int, before: bool
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    buyer.cut_at, buyer.cut_before = buyer.writes + write, before
    script = Script()
    with trio.move_on_after(60):
        await begin(buyer, script)
        await run_slowly(script)
        await script.close()
    script.leave()
    await trio.sleep(10)
    assert provider.seller.busy == 0
    if buyer.down.is_set():
        await market.restart(buyer)
    await market.settle_down()
    market.check()
    assert market.debts(buyer, provider)[0] <= RUNS * FLOATS
    assert not any(node.journal.unfinished("session-buyer") for node in market.nodes)
