"""Sessions whose script, buyer or provider is stopped: what was done is paid, and nobody blamed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.job.commands import Closed, Failed, Read
from p2pflop.node import session_script
from p2pflop.node.handing_over import HAND_OVER_S
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode
from p2pflop.units import MIB
from tests.session_scripts import FLOATS, Script, beginning, opening, steps
from tests.sim.test_session_memory import SIZE, begin, reference

if TYPE_CHECKING:
    from tests.sim.conftest import Market

FLOATS_MANY = 2**20
LONG_S = 120.0


@pytest.fixture
async def stopped(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> tuple[MemoryNode, MemoryNode, Script, bytes]:
    """A provider, a buyer, a script that is stopped while it reads, and what it is to read."""
    monkeypatch.setattr(session_script, "MAX_OUTBOX_BYTES", MIB)
    provider = await market.provider(price_nusd=10**9)
    await market.provider("other", price_nusd=2 * 10**9)
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give([*beginning(FLOATS_MANY), *steps(1)])
    data = await script.read(0, 4 * FLOATS_MANY)
    script.stop()
    script.give([Read(0, 0, 4 * FLOATS_MANY), *steps(3)])
    await trio.sleep(LONG_S)
    return provider, buyer, script, data


async def test_a_script_that_is_stopped_while_it_reads_costs_its_provider_no_repute(
    market: Market,
    autojump_clock: object,
    stopped: tuple[MemoryNode, MemoryNode, Script, bytes],
) -> None:
    provider, buyer, script, data = stopped
    assert provider.seller.busy == 0
    assert buyer.buyer.experience.avoided(buyer.buyer.now_ns()) == ()
    script.go_on()
    number = script.sent - 4
    with trio.fail_after(30):
        await script.obeyed()
    assert script.answers[number] == data
    assert await script.read(0, 4 * FLOATS_MANY) != data
    assert not script.notes, script.notes[0]
    assert [lease.provider for lease in script.leases] == [provider.account.hex()] * 2
    await script.close()
    await market.settle_down()
    market.check()


async def test_one_that_is_killed_then_leaves_nothing_behind(
    market: Market,
    autojump_clock: object,
    stopped: tuple[MemoryNode, MemoryNode, Script, bytes],
) -> None:
    _, buyer, script, _ = stopped
    script.leave()
    await trio.sleep(1)
    assert buyer.sessions.cards() == []
    await market.settle_down()
    market.check()


async def test_a_slow_reader_keeps_its_lease(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_script, "MAX_OUTBOX_BYTES", MIB)
    await market.provider(price_nusd=10**9)
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give([*beginning(FLOATS_MANY), *steps(1), Read(0, 0, 4 * FLOATS_MANY)])
    while script.ran_to < script.sent:
        script.stop()
        await trio.sleep(session_script.UNREAD_S - 1)
        script.go_on()
        await script.heard()
    assert len(script.leases) == 1


async def test_a_node_that_stops_signs_for_what_was_done(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(slots=2), await market.buyer()
    provider.workers.step_s = 0.1
    scripts = [Script(), Script()]
    for script in scripts:
        await begin(buyer, script)
        script.give([*beginning(), *steps(10)])
    await scripts[0].obeyed()
    scripts[1].give(steps(10))
    await trio.sleep(0.5)
    with trio.fail_after(HAND_OVER_S):
        await buyer.sessions.stop()
    assert provider.seller.busy == 0
    assert market.debts(buyer, provider) == (30 * FLOATS, 30 * FLOATS)
    for script in scripts:
        [failed] = script.of(Failed)
        assert isinstance(failed, Failed)
        assert "shutting down" in failed.text
        assert len(script.of(Closed)) == 1
    late = Script()
    late.say(opening())
    await buyer.sessions.serve(late)
    [failed] = late.of(Failed)
    assert isinstance(failed, Failed)
    assert "shutting down" in failed.text


async def test_a_node_that_stops_waits_for_nobody_for_long(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, script = await market.provider(), await market.buyer(), Script()
    provider.workers.step_s = 25.0
    await begin(buyer, script)
    script.give([*beginning(), *steps(1)])
    await trio.sleep(1)
    with trio.fail_after(HAND_OVER_S + 1):
        await buyer.sessions.stop()
    await trio.sleep(5)
    assert provider.seller.busy == 0


async def test_a_session_that_waits_for_a_provider_stops_too(
    market: Market, autojump_clock: object
) -> None:
    buyer, script = await market.buyer(), Script()
    script.say(opening(wait_s=600))
    buyer.buyer.nursery.start_soon(buyer.sessions.serve, script)
    await script.until_note()
    with trio.fail_after(3):
        await buyer.sessions.stop()
    [failed] = script.of(Failed)
    assert isinstance(failed, Failed)
    assert "shutting down" in failed.text


async def test_a_provider_that_stops_in_mid_session_is_paid_and_the_script_goes_on(
    market: Market, autojump_clock: object
) -> None:
    expected = await reference(market, 40)
    first = await market.provider("first")
    second = await market.provider("second", price_nusd=2 * PRICE_NUSD)
    first.workers.step_s = 0.1
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(10)])
    await script.obeyed()
    script.give(steps(20))
    script.give(steps(10))
    await trio.sleep(0.5)
    with trio.fail_after(HAND_OVER_S):
        first.seller.stopping = True
        await first.session_sales.stop()
    assert await script.read(0, SIZE) == expected
    assert "shutting down" in script.notes[0]
    assert script.leases[-1].provider == second.account.hex()
    assert buyer.buyer.experience.avoided(buyer.buyer.now_ns()) == ()
    await script.close()
    await market.settle_down()
    market.check()
    assert market.debts(buyer, first)[0] >= 10 * FLOATS
