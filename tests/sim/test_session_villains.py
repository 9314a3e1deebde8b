"""Sessions with who does not keep to the rules: nobody else loses bytes, money or a slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec
import pytest
import trio
from msgspec.structs import replace

from p2pflop.errors import ProviderError
from p2pflop.job import patience
from p2pflop.job.commands import Batch, Close, Data, Failed, Free, Ran, Read
from p2pflop.job.patience import LEAST_WORK_PER_S, MIN_SESSION_STALL_NS
from p2pflop.market.records import Receipt
from p2pflop.node import messages as m
from p2pflop.node import session_buying, session_sale
from p2pflop.node.execute import MIN_DEAR_FLOP
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode
from p2pflop.node.session_messages import WINDOW_COMMANDS, Leaving, SessionMessage
from p2pflop.units import MIB, NS_PER_S
from p2pflop.wire import Record, open_sealed, seal
from tests.session_scripts import FLOATS, Script, beginning, decoded, opening, steps
from tests.sim.test_session_memory import SIZE, begin, reference

if TYPE_CHECKING:
    from tests.sim.conftest import Market

K = TypeVar("K", bound=Record)
Change = Callable[[SessionMessage], list[SessionMessage]]


def tampered(change: Change) -> Callable[[bytes], list[bytes]]:
    """A tamper that changes messages."""

    def tamper(frame: bytes) -> list[bytes]:
        message = decoded(frame)
        assert message is not None
        return [msgspec.msgpack.encode(each) for each in change(message)]

    return tamper


def only(kind: type[K], change: Callable[[K], list[SessionMessage]]) -> Change:
    """Messages of other kinds pass."""
    return lambda message: change(message) if isinstance(message, kind) else [message]


GARBLINGS: dict[str, Change] = {
    "longer": only(Data, lambda d: [replace(d, data=d.data + b"x")]),
    "shorter": only(Data, lambda d: [replace(d, data=d.data[:-1])]),
    "twice": only(Data, lambda d: [d, d]),
    "another number": only(Data, lambda d: [replace(d, number=d.number + 1)]),
    "never the last": only(Data, lambda d: [replace(d, last=False)]),
    "no answer": only(Data, lambda _: []),
    "too far": only(Ran, lambda r: [replace(r, upto=r.upto + 1)]),
    "twice obeyed": only(Ran, lambda r: [r, r]),
    "a bid": only(Ran, lambda r: [m.Confirmed(b"", ())]),
    "leaves": only(Ran, lambda _: [Leaving("no")]),
    "a fault that is none": only(Ran, lambda r: [Failed(r.upto, True, "a lie", "")]),
    "falls silent": lambda _: [],
}


@pytest.mark.parametrize("garbling", GARBLINGS)
async def test_a_provider_that_garbles_is_left_and_not_paid(
    market: Market, autojump_clock: object, garbling: str
) -> None:
    expected, one_more = await reference(market, 10), await reference(market, 11)
    villain = await market.provider("villain")
    honest = await market.provider("honest", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)
    assert script.leases[0].provider == villain.account.hex()
    villain.tamper_answered_sent = tampered(GARBLINGS[garbling])
    script.give([*beginning(), *steps(10)])
    with trio.fail_after(30):
        assert await script.read(0, SIZE) == expected
        script.give(steps(1))
        assert await script.read(0, SIZE) == one_more
    assert script.leases[-1].provider == honest.account.hex()
    assert not script.of(Failed)
    await script.close()
    await market.settle_down()
    assert market.debts(buyer, villain)[0] == 0
    assert market.debts(buyer, honest) == (22 * FLOATS, 22 * FLOATS)


async def test_an_over_billing_provider_is_left_without_a_signature(
    market: Market, autojump_clock: object
) -> None:
    villain = await market.provider("villain")
    await market.provider("honest", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)

    def double(message: SessionMessage) -> list[SessionMessage]:
        assert isinstance(message, m.Receipted)
        receipt = open_sealed(Receipt, message.receipt).record
        dearer = replace(receipt, amount_nusd=2 * receipt.amount_nusd)
        return [m.Receipted(seal(dearer, villain.identity.node).wire)]

    villain.tamper_answered_sent = tampered(only(m.Receipted, double))
    script.give([*beginning(), *steps(10)])
    await script.obeyed()
    await trio.sleep(session_sale.RECEIPT_S + 1)
    script.give(steps(1))
    await script.obeyed()
    assert len(script.leases) == 2
    assert market.debts(buyer, villain)[0] == 0
    await script.close()


async def test_a_provider_that_boasts_of_its_work_has_no_snapshots_paid(
    market: Market, autojump_clock: object
) -> None:
    villain = await market.provider("villain")
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)
    began_s = trio.current_time()
    ages = only(Ran, lambda r: [replace(r, busy_ns=2**63 - 1)])
    villain.tamper_answered_sent = tampered(ages)
    script.give(beginning())
    for _ in range(5):
        script.give(steps(1))
        await script.obeyed()
    closed = await script.close()
    assert closed.busy_ns <= (trio.current_time() - began_s) * NS_PER_S
    assert closed.moved_bytes == 2 * SIZE, "no snapshot was read back"
    assert len(script.leases) == 1


async def test_what_a_provider_says_cannot_drive_a_terminal(
    market: Market, autojump_clock: object
) -> None:
    lie = tampered(only(Ran, lambda r: [Failed(r.upto - 1, True, "a\x1b[2Jb\nc", "\x07")]))
    for name in ("liar", "crony"):
        villain = await market.provider(name)
        villain.tamper_answered_sent = lie
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(1)])
    failed = await script.until(Failed)
    assert isinstance(failed, Failed)
    assert (failed.text + failed.hint).isprintable()


async def test_a_fault_that_two_accounts_find_is_the_scripts(
    market: Market, autojump_clock: object
) -> None:
    lie = tampered(only(Ran, lambda r: [Failed(r.upto - 1, True, "a fault", "")]))
    for times in (1, 2, 3):
        liar = await market.provider(f"liar-{times}", price_nusd=times * PRICE_NUSD)
        liar.tamper_answered_sent = lie
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(1)])
    failed = await script.until(Failed)
    assert isinstance(failed, Failed)
    assert failed.job
    assert failed.number == len(beginning())
    assert len(script.leases) == 2


async def test_a_provider_that_never_obeys_loses_the_lease(
    market: Market, autojump_clock: object
) -> None:
    villain = await market.provider("villain")
    await market.provider("honest", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)
    villain.tamper_answered_sent = tampered(
        lambda message: [] if isinstance(message, Ran | Data | m.Receipted) else [message]
    )
    script.give([*beginning(), *steps(1)])
    with trio.fail_after(35):
        await script.obeyed()
    assert len(script.leases) == 2
    assert "obeys nothing" in script.notes[0]


async def test_one_that_is_slow_with_much_is_waited_for(
    market: Market, autojump_clock: object
) -> None:
    provider = await market.provider(price_nusd=10**9)
    floats, runs = 2**20, 250
    provider.workers.step_s = 12 * floats / LEAST_WORK_PER_S  # touched bytes
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give([*beginning(floats), *steps(runs)])
    began_at = trio.current_time()
    await script.obeyed()
    assert NS_PER_S * (trio.current_time() - began_at) > MIN_SESSION_STALL_NS
    assert len(script.leases) == 1


async def hostile(market: Market) -> tuple[MemoryNode, MemoryNode, Script]:
    """A provider, a buyer with a lease of it, and the buyer's script."""
    provider, buyer = await market.provider(), await market.buyer()
    script = Script()
    await begin(buyer, script, wait_s=600)
    script.give(beginning())
    await script.obeyed()
    return provider, buyer, script


def once_after(extra: list[SessionMessage]) -> Callable[[bytes], list[bytes]]:
    """A tamper that lets a buyer say something more after its next Batch."""
    waiting = [extra]

    def change(message: SessionMessage) -> list[SessionMessage]:
        if isinstance(message, Batch) and waiting:
            return [message, *waiting.pop()]
        return [message]

    return tampered(change)


BEGUN = len(beginning()) + 1
FLOODS: dict[str, list[SessionMessage]] = {
    "out of turn": [Batch(BEGUN + 1, (Free(0),))],
    "nothing": [Batch(BEGUN, ())],
    "a fill": [m.Filled(b"")],
    "more after its end": [Close(), Batch(BEGUN + 1, (Free(0),))],
    "two ends": [Close(), Close()],
    "an unasked signature": [m.Countersigned(b"\x90")],
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_buyer_that_says_what_it_may_not_is_cut_off(
    market: Market, autojump_clock: object, flood: str
) -> None:
    provider, buyer, script = await hostile(market)
    buyer.tamper_sent = once_after(FLOODS[flood])
    script.give(steps(1))
    with trio.fail_after(10):
        await script.until_note()
        assert await script.read(0, SIZE) == await reference(market, 1)
    assert len(script.leases) == 2
    script.leave()
    await trio.sleep(5)
    assert provider.seller.busy == 0


async def test_an_unknown_buffer_ends_the_lease_by_its_number(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, script = await hostile(market)
    heard: list[SessionMessage] = []

    def note(message: SessionMessage) -> list[SessionMessage]:
        heard.append(message)
        return [message]

    buyer.tamper_heard = tampered(note)
    buyer.tamper_sent = once_after([Batch(BEGUN, (Read(99, 0, 4),))])
    script.give(steps(1))
    await script.until_note()
    [failed] = [message for message in heard if isinstance(message, Failed)]
    assert (failed.number, failed.job) == (BEGUN, True)
    assert "no buffer 99" in failed.text
    script.leave()
    await trio.sleep(5)
    assert provider.seller.busy == 0


async def test_more_than_the_window_lets_through_is_cut_off(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, script = await hostile(market)
    provider.workers.step_s = 100.0
    many = [
        Batch(BEGUN + first, tuple(steps(4096))) for first in range(0, WINDOW_COMMANDS + 4096, 4096)
    ]
    buyer.tamper_sent = once_after(many)  # type: ignore[arg-type]
    script.give(steps(1))
    await script.until_note()
    assert provider.session_sales.cards() == []
    script.leave()


async def test_a_buyer_that_never_countersigns_is_paused_and_loses_the_lease(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = await market.provider(window_nusd=20 * FLOATS, credit_nusd=10**9)
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)
    monkeypatch.setattr(patience, "MIN_SESSION_STALL_NS", 600 * NS_PER_S)  # it waits for nobody
    buyer.tamper_sent = tampered(only(m.Countersigned, lambda _: []))
    script.give(beginning())
    for _ in range(50):
        script.give(steps(1))
        await trio.sleep(0.1)
    assert provider.session_sales.cards()[0]["paused"]
    assert script.ran_to < script.sent
    await trio.sleep(session_sale.SIGN_WITHIN_S + 10)
    assert provider.seller.allocator._pending(2**62)  # what it was shown counts against it
    script.leave()


async def test_half_of_the_window_brings_a_receipt_and_an_honest_buyer_never_waits(
    market: Market, autojump_clock: object
) -> None:
    provider = await market.provider(window_nusd=20 * FLOATS, credit_nusd=10**9)
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give(beginning())
    began_at = trio.current_time()
    for _ in range(200):
        script.give(steps(1))
        await script.obeyed()
    assert trio.current_time() - began_at < 1
    await script.close()
    await market.settle_down()
    assert market.debts(buyer, provider) == (200 * FLOATS, 200 * FLOATS)


async def test_memory_that_nobody_has_is_refused_before_anything_runs(
    market: Market, autojump_clock: object
) -> None:
    provider = await market.provider(memory_bytes=300 * MIB)
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script, memory_bytes=128 * MIB)
    failed = await script.until(Failed)
    assert isinstance(failed, Failed)
    assert "too little memory" in failed.text
    assert provider.seller.busy == 0


async def test_a_provider_whose_workers_fail_is_not_tried_for_ever(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    script = Script()
    await begin(buyer, script, wait_s=600)
    provider.workers.failure = ProviderError("the sandbox is lost")
    script.give([*beginning(), *steps(1)])
    with trio.fail_after(120):
        failed = await script.until(Failed)
    assert isinstance(failed, Failed)
    assert failed.text == "9 leases in a row got no further; the last one: the sandbox is lost"
    assert "in parts" in failed.hint
    assert (failed.number, failed.job) == (0, False)
    assert len(script.leases) == session_buying.MAX_FRUITLESS + 1


async def test_a_fill_that_is_not_confirmed_costs_its_buyer_a_pause(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    buyer.tamper_sent = tampered(only(m.Confirmed, lambda _: []))
    script = Script()
    script.say(opening(wait_s=30))
    buyer.buyer.nursery.start_soon(buyer.sessions.serve, script)
    await trio.sleep(session_sale.CONFIRM_S + 5)
    assert provider.seller.busy == 0
    assert provider.seller.allocator.lapses
    script.leave()


async def test_a_graph_that_computes_far_more_than_it_is_metered_is_given_back(
    market: Market, autojump_clock: object
) -> None:
    provider = await market.provider("careful")
    provider.workers.lowered_flop = MIN_DEAR_FLOP + 1
    honest = await market.provider("honest", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(1)])
    await script.obeyed()
    assert "over four times" in script.notes[0]
    assert script.leases[-1].provider == honest.account.hex()
    assert market.debts(buyer, provider) == (0, 0)
