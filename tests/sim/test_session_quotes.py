"""What a lease may come to: raised in place while that serves, else the session moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from p2pflop.job.commands import Failed
from p2pflop.node import session_purchase, session_service
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode
from p2pflop.node.session_messages import Raise, Raised
from tests.session_scripts import FLOATS, Script, beginning, steps
from tests.sim.test_session_memory import SIZE, begin, reference
from tests.sim.test_session_villains import once_after, only, tampered

if TYPE_CHECKING:
    from tests.sim.conftest import Market

RUNS = 100
SLICE_NUSD = 3000
COST_NUSD = RUNS * FLOATS
"""A FLOP costs a nano-dollar here."""


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_service, "SLICE_NUSD", SLICE_NUSD)


async def begun(market: Market, **more: Any) -> tuple[MemoryNode, MemoryNode, MemoryNode, Script]:
    """A provider, another that is dearer, a buyer and its script."""
    provider = await market.provider(**more)
    other = await market.provider("other", price_nusd=2 * PRICE_NUSD)
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script, wait_s=60)
    assert script.leases[0].provider == provider.account.hex()
    return provider, other, buyer, script


async def test_a_quote_that_is_used_up_is_raised_in_place(
    market: Market, autojump_clock: object
) -> None:
    expected = await reference(market, RUNS)
    provider, _, buyer, script = await begun(market)
    script.give([*beginning(), *steps(RUNS)])
    assert await script.read(0, SIZE) == expected
    [card] = provider.session_sales.cards()
    assert card["quote_nusd"] == 4 * SLICE_NUSD
    assert provider.seller.allocator._pending(0)[buyer.account] <= card["quote_nusd"]
    closed = await script.close()
    assert len(script.leases) == 1
    assert not script.notes, script.notes[0]
    assert (closed.cost_nusd, closed.flop) == (COST_NUSD, COST_NUSD)
    assert closed.moved_bytes == 3 * SIZE, "no snapshot was taken"
    await market.settle_down()
    assert market.debts(buyer, provider) == (COST_NUSD, COST_NUSD)
    market.check()


async def test_beyond_the_credit_the_session_moves_with_a_snapshot(
    market: Market, autojump_clock: object
) -> None:
    expected = await reference(market, RUNS)
    first, second, buyer, script = await begun(market, credit_nusd=4000, window_nusd=4000)
    script.give([*beginning(), *steps(RUNS)])
    assert await script.read(0, SIZE) == expected
    assert [lease.provider for lease in script.leases] == [
        first.account.hex(),
        second.account.hex(),
    ]
    assert not script.notes, script.notes[0]
    closed = await script.close()
    assert closed.flop == COST_NUSD, "nothing was done again"
    await market.settle_down()
    market.check()
    assert market.debts(buyer, first)[0] <= SLICE_NUSD


async def test_a_provider_that_is_cheaper_by_now_has_the_next_lease(
    market: Market, autojump_clock: object
) -> None:
    expected = await reference(market, RUNS)
    cheaper = await market.provider("cheaper", price_nusd=PRICE_NUSD // 2)
    cheaper.seller.stopping = True
    first, _, _, script = await begun(market)
    cheaper.seller.stopping = False
    script.give([*beginning(), *steps(RUNS)])
    assert await script.read(0, SIZE) == expected
    assert [lease.provider for lease in script.leases] == [
        first.account.hex(),
        cheaper.account.hex(),
    ]
    assert (await script.close()).flop == COST_NUSD


async def test_the_limit_of_the_session_ends_it_without_a_penny_more(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, script = await market.provider(), await market.buyer(), Script()
    await begin(buyer, script, cap_nusd=50 * FLOATS)
    script.give([*beginning(), *steps(RUNS)])
    failed = await script.until(Failed)
    assert isinstance(failed, Failed)
    assert "CLOUD_MAX_USD" in failed.hint
    await market.settle_down()
    assert market.debts(buyer, provider) == (50 * FLOATS, 50 * FLOATS)


async def test_a_provider_that_stops_raises_nothing(market: Market, autojump_clock: object) -> None:
    provider, _, _, script = await begun(market)
    provider.seller.stopping = True
    script.give([*beginning(), *steps(RUNS)])
    assert await script.read(0, SIZE) == await reference(market, RUNS)
    assert len(script.leases) == 2


@pytest.mark.parametrize("factor", [0, 3, 2**40])
async def test_a_quote_that_nobody_asked_for_ends_the_lease(
    market: Market, autojump_clock: object, factor: int
) -> None:
    expected = await reference(market, RUNS)
    villain, honest, _, script = await begun(market)
    villain.tamper_answered_sent = tampered(
        only(Raised, lambda raised: [Raised(factor * raised.quote_nusd)])
    )
    script.give([*beginning(), *steps(RUNS)])
    assert await script.read(0, SIZE) == expected
    assert "nobody asked" in script.notes[0]
    assert script.leases[-1].provider == honest.account.hex()


async def test_a_provider_that_says_nothing_of_a_quote_is_left(
    market: Market, autojump_clock: object
) -> None:
    expected = await reference(market, RUNS)
    villain, _, _, script = await begun(market)
    villain.tamper_answered_sent = tampered(only(Raised, lambda _: []))
    script.give([*beginning(), *steps(RUNS)])
    with trio.fail_after(session_purchase.RAISE_S + 5):
        assert await script.read(0, SIZE) == expected
    assert "said nothing of a quote" in script.notes[0]


@pytest.mark.parametrize("quote_nusd", [0, SLICE_NUSD, 2**63 - 1])
async def test_a_buyer_that_asks_for_no_higher_quote_is_cut_off(
    market: Market, autojump_clock: object, quote_nusd: int
) -> None:
    _, _, buyer, script = await begun(market)
    buyer.tamper_sent = once_after([Raise(quote_nusd)])
    script.give([*beginning(), *steps(1)])
    await script.until_note()
    assert await script.read(0, SIZE) == await reference(market, 1)
    assert len(script.leases) == 2
    script.leave()
