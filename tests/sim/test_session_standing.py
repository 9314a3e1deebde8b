"""A lease of a session costs what it keeps from others, whatever its script does with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
import pytest
import trio
from msgspec.structs import replace

from p2pflop.job.commands import Batch, Failed, Hold, Ran
from p2pflop.market import sessions
from p2pflop.node import messages as m
from p2pflop.node import session_buying, session_sale
from p2pflop.node.execute import WORKER_BASE_BYTES
from p2pflop.node.session_messages import SessionMessage, Stood
from p2pflop.units import MIB
from tests.session_scripts import FLOATS, Script, beginning, decoded, opening, steps
from tests.sim.test_session_memory import SIZE, begin, reference
from tests.sim.test_session_villains import only, tampered

if TYPE_CHECKING:
    from tests.sim.conftest import Market

FLOP_PRICE_NUSD: Final = 10**9
MEMORY_BYTES: Final = 64 * MIB + WORKER_BASE_BYTES
NUSD_PER_S: Final = FLOP_PRICE_NUSD * MEMORY_BYTES / 10**15
"""For standing; what the sample graph computes is less than one of these."""
FIRST_S: Final = sessions.FIRST_HELD_SECONDS
UNPAID_S: Final = FIRST_S + session_sale.STOOD_S + session_sale.HOLD_WITHIN_S + 3
"""By then a lease that nobody pays for is over."""


@pytest.fixture(autouse=True)
def _standing_costs(_runs_alone_count: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "HELD_FLOP_PER_BYTE", 1)


async def trickle(script: Script, seconds: int) -> None:
    """Next to nothing, once a second."""
    for _ in range(seconds):
        script.give(steps(1))
        await trio.sleep(1)


async def test_who_runs_next_to_nothing_pays_for_the_memory_that_stands(
    market: Market, autojump_clock: object
) -> None:
    provider = await market.provider(price_nusd=FLOP_PRICE_NUSD)
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give(beginning())
    await trickle(script, 60)
    owing, due = market.debts(buyer, provider)
    assert owing == due
    assert 50 * NUSD_PER_S < owing < 62 * NUSD_PER_S
    assert len(script.leases) == 1
    assert not script.notes, script.notes[0]
    await script.close()
    await market.settle_down()
    market.check()


async def test_a_lease_that_computes_pays_for_nothing_else(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "LEAST_FLOP_PER_S", FLOATS)
    provider = await market.provider(price_nusd=FLOP_PRICE_NUSD)
    provider.workers.step_s = 0.4
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(60)])
    with trio.fail_after(30):
        await script.obeyed()
    await script.close()
    await market.settle_down()
    assert market.debts(buyer, provider)[0] < (FIRST_S + 2) * NUSD_PER_S


async def test_a_lease_whose_runs_count_next_to_nothing_stands(
    market: Market, autojump_clock: object
) -> None:
    provider = await market.provider(price_nusd=FLOP_PRICE_NUSD)
    provider.workers.step_s = 0.4
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give(beginning())
    for _ in range(10):
        script.give(steps(10))
    await script.obeyed()
    await script.close()
    assert len(script.leases) == 1
    assert not script.notes, script.notes[0]
    await market.settle_down()
    market.check()
    assert market.debts(buyer, provider)[0] > 34 * NUSD_PER_S


async def test_a_provider_that_hides_its_work_is_paid_for_no_more_than_the_time(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "LEAST_FLOP_PER_S", FLOATS)
    villain = await market.provider("villain", price_nusd=FLOP_PRICE_NUSD)
    villain.workers.step_s = 0.4
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    began_at = trio.current_time()
    villain.tamper_answered_sent = tampered(only(Ran, lambda ran: [replace(ran, busy_ns=0)]))
    script.give([*beginning(), *steps(50)])
    await script.obeyed()
    await script.close()
    await market.settle_down()
    seconds = trio.current_time() - began_at
    assert market.debts(buyer, villain)[0] <= (FIRST_S + seconds) * NUSD_PER_S


async def test_time_that_stood_at_a_provider_that_died_is_not_paid_again(
    market: Market, autojump_clock: object
) -> None:
    expected = await reference(market, 41, price_nusd=FLOP_PRICE_NUSD)
    first = await market.provider("first", price_nusd=FLOP_PRICE_NUSD)
    second = await market.provider("second", price_nusd=2 * FLOP_PRICE_NUSD)
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give(beginning())
    await trickle(script, 40)
    await first.kill()
    script.give(steps(1))
    assert await script.read(0, SIZE) == expected
    await script.close()
    await market.restart(first)
    await market.settle_down()
    market.check()
    assert market.debts(buyer, first)[0] > 30 * NUSD_PER_S
    assert market.debts(buyer, second)[0] <= 2 * (FIRST_S + 1) * NUSD_PER_S


async def test_who_does_not_pay_for_it_loses_the_lease_and_credit(
    market: Market, autojump_clock: object
) -> None:
    provider = await market.provider(price_nusd=FLOP_PRICE_NUSD)
    buyer, script = await market.buyer(), Script()
    buyer.tamper_heard = tampered(only(Stood, lambda _: []))
    await begin(buyer, script, wait_s=600)
    began_at = trio.current_time()
    script.give(beginning())
    while not script.notes:
        await trickle(script, 1)
    assert "stood are not paid" in script.notes[0]
    assert trio.current_time() - began_at <= UNPAID_S
    pending = provider.seller.allocator._pending(provider.seller.now_ns())
    assert pending[buyer.account] >= session_sale.STOOD_S * NUSD_PER_S
    script.leave()


async def test_who_says_nothing_at_all_loses_credit_too(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_buying, "IDLE_S", 10_000)
    provider = await market.provider(price_nusd=FLOP_PRICE_NUSD)
    buyer, script = await market.buyer(), Script()
    buyer.tamper_heard = tampered(only(Stood, lambda _: []))
    await begin(buyer, script)
    await trio.sleep(UNPAID_S)
    assert provider.seller.busy == 0
    pending = provider.seller.allocator._pending(provider.seller.now_ns())
    assert pending[buyer.account] >= session_sale.STOOD_S * NUSD_PER_S
    script.leave()


async def test_a_provider_that_makes_up_time_is_left_and_not_paid_for_it(
    market: Market, autojump_clock: object
) -> None:
    villain = await market.provider("villain", price_nusd=FLOP_PRICE_NUSD)
    honest = await market.provider("honest", price_nusd=2 * FLOP_PRICE_NUSD)
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    villain.tamper_answered_sent = tampered(only(Stood, lambda stood: [Stood(stood.seconds + 60)]))
    script.give(beginning())
    await trickle(script, FIRST_S + session_sale.STOOD_S + 2)
    assert "cannot have stood" in script.notes[0]
    assert script.leases[-1].provider == honest.account.hex()
    script.leave()
    await market.settle_down()
    assert market.debts(buyer, villain)[0] <= (FIRST_S + 1) * NUSD_PER_S


async def test_standing_ends_with_the_limit_and_not_beyond(
    market: Market, autojump_clock: object
) -> None:
    provider = await market.provider(price_nusd=FLOP_PRICE_NUSD)
    buyer, script = await market.buyer(), Script()
    cap_nusd = int(20 * NUSD_PER_S)
    await begin(buyer, script, cap_nusd=cap_nusd)
    script.give(beginning())
    while not script.of(Failed):
        await trickle(script, 1)
    [failed] = script.of(Failed)
    assert isinstance(failed, Failed)
    assert "CLOUD_MAX_USD" in failed.hint
    await market.settle_down()
    market.check()
    assert market.debts(buyer, provider)[0] <= cap_nusd


async def test_a_script_does_not_hold(market: Market, autojump_clock: object) -> None:
    await market.provider(price_nusd=FLOP_PRICE_NUSD)
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give([Hold(1)])
    failed = await script.until(Failed)
    assert isinstance(failed, Failed)
    assert "does not pay" in failed.text


async def test_setup_is_in_the_first_receipt(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "HELD_FLOP_PER_BYTE", 0)
    provider = await market.provider(setup_nusd=1000)
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give(beginning())
    await trio.sleep(session_sale.RECEIPT_S + 1)
    assert market.debts(buyer, provider) == (1000, 1000)
    await buyer.kill()
    await trio.sleep(10)
    assert market.debts(buyer, provider)[1] == 1000


async def test_graphs_that_never_run_are_paid_for(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "HELD_FLOP_PER_BYTE", 0)
    monkeypatch.setattr(sessions, "LOWERING_FLOP_PER_NODE", 1000)
    provider, buyer = await market.provider(), await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give(beginning())
    await trio.sleep(session_sale.RECEIPT_S + 1)
    nodes = 4
    assert market.debts(buyer, provider) == (nodes * 1000, nodes * 1000)
    await script.close()


async def test_graphs_over_the_limit_are_not_sent(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "HELD_FLOP_PER_BYTE", 0)
    monkeypatch.setattr(sessions, "LOWERING_FLOP_PER_NODE", 1000)
    provider, buyer = await market.provider(), await market.buyer()
    sent: list[SessionMessage] = []

    def note(frame: bytes) -> list[bytes]:
        message = decoded(frame)
        assert message is not None
        sent.append(message)
        return [msgspec.msgpack.encode(message)]

    buyer.tamper_sent = note
    script = Script()
    script.say(opening(cap_nusd=3999))
    buyer.buyer.nursery.start_soon(buyer.sessions.serve, script)
    script.give(beginning())
    failed = await script.until(Failed)
    assert isinstance(failed, Failed)
    assert "CLOUD_MAX_USD" in failed.hint
    batches = [message for message in sent if isinstance(message, Batch)]
    assert sum(len(batch.commands) for batch in batches) <= 4
    assert not [message for message in sent if isinstance(message, m.Receipted)]
    assert market.debts(buyer, provider) == (0, 0)


async def test_a_lease_is_not_to_be_had_for_less_than_its_first_seconds(
    market: Market, autojump_clock: object
) -> None:
    provider = await market.provider(price_nusd=FLOP_PRICE_NUSD)
    buyer = await market.buyer()
    for _ in range(4):
        script = Script()
        await begin(buyer, script)
        script.give(beginning())
        await trickle(script, FIRST_S)
        await script.close()
    await market.settle_down()
    market.check()
    assert market.debts(buyer, provider)[0] >= 4 * FIRST_S * NUSD_PER_S


async def test_fresh_accounts_that_pay_for_nothing_hold_a_slot_for_the_pool_at_most(
    market: Market, autojump_clock: object
) -> None:
    limit_nusd, pool_nusd = int(20 * NUSD_PER_S), int(60 * NUSD_PER_S)
    provider = await market.provider(price_nusd=FLOP_PRICE_NUSD, credit_nusd=pool_nusd)
    held = 0
    while True:
        buyer, script = await market.buyer(f"fresh-{held}"), Script()
        buyer.tamper_heard = tampered(only(Stood, lambda _: []))
        buyer.tamper_sent = tampered(only(m.Countersigned, lambda _: []))
        await begin(buyer, script, cap_nusd=limit_nusd)
        if script.of(Failed):
            break
        held += 1
        script.give(beginning())
        await trickle(script, int(UNPAID_S))
        script.leave()
        await trio.sleep(5)
        assert provider.seller.busy == 0
    [failed] = script.of(Failed)
    assert isinstance(failed, Failed)
    assert "credit" in failed.text
    shown_nusd = sum(provider.seller.allocator._pending(provider.seller.now_ns()).values())
    assert held > 2
    assert held * FIRST_S * NUSD_PER_S <= shown_nusd <= pool_nusd
