"""Sessions between real buyers and sellers joined in memory: how they begin, run, move and end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.errors import ProviderError
from p2pflop.job.commands import NOBODY, Closed, Data, Failed, Free, Ran
from p2pflop.node import session_buying, session_service
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode
from tests.session_scripts import FLOATS, Script, beginning, decoded, opening, steps

if TYPE_CHECKING:
    from tests.sim.conftest import Market

SIZE = 4 * FLOATS


async def begin(buyer: MemoryNode, script: Script, **wish: object) -> None:
    script.say(opening(**wish))
    buyer.buyer.nursery.start_soon(buyer.sessions.serve, script)
    await script.begun()


async def reference(market: Market, runs: int, price_nusd: int = PRICE_NUSD) -> bytes:
    """What a session of so many runs gives, on a market of its own."""
    other = market.another()
    await other.provider(price_nusd=price_nusd)
    buyer = await other.buyer()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(runs)])
    data = await script.read(0, SIZE)
    await script.close()
    await other.close()
    return data


async def test_a_session_runs_reads_and_pays(market: Market, autojump_clock: object) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(3)])
    data = await script.read(0, SIZE)
    assert len(data) == SIZE
    assert data != bytes(SIZE)
    assert script.leases[0].provider == provider.account.hex()
    closed = await script.close()
    assert closed.cost_nusd > 0
    assert closed.flop == 3 * FLOATS
    await market.settle_down()
    assert market.debts(buyer, provider) == (closed.cost_nusd, closed.cost_nusd)
    market.check()


async def test_equal_commands_give_equal_bytes(market: Market, autojump_clock: object) -> None:
    assert await reference(market, 5) == await reference(market, 5)
    assert await reference(market, 5) != await reference(market, 6)


async def test_a_provider_that_dies_is_replaced_and_the_bytes_are_the_same(
    market: Market, autojump_clock: object
) -> None:
    expected = await reference(market, 20)
    first = await market.provider("first")
    second = await market.provider("second", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(10)])
    await script.obeyed()
    await first.kill()
    script.give(steps(10))
    with trio.fail_after(30):
        assert await script.read(0, SIZE) == expected
    assert [lease.provider for lease in script.leases] == [
        first.account.hex(),
        second.account.hex(),
    ]
    assert len(script.notes) == 1
    await script.close()
    await market.restart(first)
    await market.settle_down()
    market.check()


async def test_a_read_that_was_answered_in_part_goes_on_where_it_was(
    market: Market, autojump_clock: object
) -> None:
    floats = 2**20
    first = await market.provider("first")
    await market.provider("second", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(floats), *steps(2)])
    await script.obeyed()
    whole = await script.read(0, 4 * floats)
    pieces = 0

    def break_off(frame: bytes) -> list[bytes]:
        nonlocal pieces
        pieces += isinstance(decoded(frame), Data)
        if pieces == 3:
            raise ProviderError("the network is gone")
        return [frame]

    first.tamper_answered_sent = break_off
    with trio.fail_after(60):
        assert await script.read(0, 4 * floats) == whole
    assert len(script.leases) == 2


async def test_an_idle_lease_is_given_back_and_the_next_begins_with_a_snapshot(
    market: Market, autojump_clock: object
) -> None:
    expected = await reference(market, 6)
    provider, buyer = await market.provider(), await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(5)])
    await script.obeyed()
    await trio.sleep(session_buying.IDLE_S / 2)
    assert provider.seller.busy == 1
    await trio.sleep(session_buying.IDLE_S)
    assert provider.seller.busy == 0
    script.give(steps(1))
    assert await script.read(0, SIZE) == expected
    assert len(script.leases) == 2
    closed = await script.close()
    assert not script.notes, script.notes[0]
    assert closed.flop == 6 * FLOATS  # nothing was computed twice
    await market.settle_down()
    market.check()


async def test_large_buffers_travel_as_blobs_and_old_snapshots_are_deleted(
    market: Market, autojump_clock: object
) -> None:
    floats = 100_000
    data = bytes(range(250)) * 1600
    await market.provider()
    buyer = await market.buyer()
    loaded = await buyer.store.put(data)
    there = await buyer.store.list()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(floats, large=data), *steps(1)])
    before = await script.read(0, 4 * floats)
    for _ in range(3):
        await trio.sleep(session_buying.IDLE_S + 1)
        kept = [info.address for info in await buyer.store.list()]
        assert len([each for each in kept if each != loaded.address]) <= 4
        assert await script.read(0, 4 * floats) == before
        script.give(steps(1))
        before = await script.read(0, 4 * floats)
    await script.close()
    await trio.sleep(1)
    assert await buyer.store.list() == there


async def test_a_node_may_sell_to_itself_and_nothing_is_owed(
    market: Market, autojump_clock: object
) -> None:
    floats = 100_000
    node = await market.provider()
    there = await node.store.list()
    script = Script()
    await begin(node, script)
    script.give([*beginning(floats), *steps(1)])
    before = await script.read(0, 4 * floats)
    await trio.sleep(session_buying.IDLE_S + 1)
    assert await script.read(0, 4 * floats) == before
    assert len(script.leases) == 2
    await script.close()
    await market.settle_down()
    assert market.debts(node, node) == (0, 0)
    await trio.sleep(2 * 3600)  # as a seller it keeps for a while what a lease has loaded
    assert await node.store.list() == there


async def test_a_quote_that_is_used_up_leads_to_the_next_lease(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_service, "SLICE_NUSD", 3000)
    expected = await reference(market, 100)
    provider, buyer = await market.provider(), await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(100)])
    assert await script.read(0, SIZE) == expected
    assert len(script.leases) > 1
    assert not script.notes, script.notes[0]
    closed = await script.close()
    assert closed.cost_nusd == 100 * FLOATS  # a FLOP costs a nano-dollar here
    await market.settle_down()
    assert market.debts(buyer, provider) == (closed.cost_nusd, closed.cost_nusd)


async def test_the_cap_is_never_exceeded(market: Market, autojump_clock: object) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    script = Script()
    await begin(buyer, script, cap_nusd=50 * FLOATS, wait_s=600)
    script.give([*beginning(), *steps(100)])
    with trio.fail_after(5):  # to wait would not help
        failed = await script.until(Failed)
    assert isinstance(failed, Failed)
    assert "CLOUD_MAX_USD" in failed.hint
    assert not failed.job
    await script.until(Closed)
    await market.settle_down()
    owing, due = market.debts(buyer, provider)
    assert owing == due == 50 * FLOATS


async def test_a_command_that_is_refused_ends_the_session_by_its_number(
    market: Market, autojump_clock: object
) -> None:
    await market.provider()
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(), Free(7)])
    failed = await script.until(Failed)
    assert isinstance(failed, Failed)
    assert failed.job
    assert failed.number == len(beginning())
    assert "no buffer 7" in failed.text


async def test_without_a_provider_it_waits_and_then_says_why(
    market: Market, autojump_clock: object
) -> None:
    buyer = await market.buyer()
    script = Script()
    began_at = trio.current_time()
    await begin(buyer, script, wait_s=30)
    [failed] = script.of(Failed)
    assert isinstance(failed, Failed)
    assert failed.number == NOBODY
    assert "order book is empty" in failed.text
    assert trio.current_time() - began_at == pytest.approx(30, abs=1)
    assert len(script.notes) == 1


async def test_without_a_provider_it_may_run_in_the_nodes_own_sandbox(
    market: Market, autojump_clock: object
) -> None:
    expected = await reference(market, 4)
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script, local=True)
    script.give([*beginning(), *steps(4)])
    assert await script.read(0, SIZE) == expected
    assert (await script.close()).cost_nusd == 0


async def test_a_provider_that_stops_hands_over_within_seconds(
    market: Market, autojump_clock: object
) -> None:
    expected = await reference(market, 20)
    first = await market.provider("first")
    await market.provider("second", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(10)])
    await script.obeyed()
    with trio.fail_after(5):
        first.seller.stopping = True
        await first.session_sales.stop()
    script.give(steps(10))
    assert await script.read(0, SIZE) == expected
    await script.close()
    await market.settle_down()
    market.check()
    assert market.debts(buyer, first)[0] == 10 * FLOATS  # what it did is paid


async def test_a_script_that_is_gone_frees_the_slot_and_pays_what_was_obeyed(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(10)])
    await script.obeyed()
    script.leave()
    await trio.sleep(3)
    assert provider.seller.busy == 0
    assert buyer.sessions.cards() == []
    await market.settle_down()
    assert market.debts(buyer, provider) == (10 * FLOATS, 10 * FLOATS)


async def test_a_buyer_that_dies_frees_the_slot_within_seconds(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(10)])
    await script.obeyed()
    await buyer.kill()
    await trio.sleep(6)
    assert provider.seller.busy == 0
    await market.restart(buyer)
    await market.settle_down()
    market.check()


async def test_each_run_is_told_by_itself_if_the_script_says_so(
    market: Market, autojump_clock: object
) -> None:
    await market.provider()
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script, verbose=True)
    script.give([*beginning(), *steps(5)])
    await script.obeyed()
    ran = [frame for frame in script.frames if isinstance(frame, Ran)]
    assert [frame.kernels for frame in ran] == [1] * 5
    assert [frame.flop for frame in ran] == [FLOATS] * 5


async def test_receipts_come_while_it_runs(market: Market, autojump_clock: object) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give(beginning())
    for _ in range(20):
        script.give(steps(1))
        await trio.sleep(1)
    owing, due = market.debts(buyer, provider)
    assert 10 * FLOATS <= owing == due < 20 * FLOATS
    await script.close()
