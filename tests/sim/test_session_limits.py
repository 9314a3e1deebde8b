"""What bounds a session on either side: each limit, and what is said over it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
import trio

from p2pflop.dht.manifest import address_of
from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.job.commands import (
    Allocate,
    AnyCommand,
    Batch,
    Bind,
    Closed,
    Define,
    Failed,
    Free,
    Load,
    Read,
    Run,
    Write,
)
from p2pflop.job.graph import Dtype, Graph, GraphParam, Node, Op, Output, encode_graph, graph_hash
from p2pflop.node import messages as m
from p2pflop.node import (
    session_buying,
    session_graphs,
    session_lease,
    session_log,
    session_purchase,
    session_sale,
    session_sell,
    session_service,
    session_work,
)
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode
from p2pflop.node.session_graphs import Graphs
from p2pflop.node.session_messages import SESSION_PROTOCOL, Wanted
from p2pflop.units import KIB, MIB
from tests.session_scripts import (
    FLOATS,
    Script,
    beginning,
    decoded,
    opening,
    sample_graph,
    steps,
)
from tests.sim.test_session_memory import SIZE, begin, reference

if TYPE_CHECKING:
    from tests.sim.conftest import Market


async def leased(market: Market) -> tuple[MemoryNode, MemoryNode, Script]:
    """A provider, a buyer and a script that has begun."""
    seller, buyer = await market.provider(), await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give(beginning())
    await script.obeyed()
    return seller, buyer, script


async def failure(script: Script) -> Failed:
    with trio.fail_after(60):
        failed = await script.until(Failed)
        await script.until(Closed)
    assert isinstance(failed, Failed)
    return failed


async def test_more_sessions_than_a_node_has_are_refused(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_service, "MAX_SESSIONS", 1)
    _, buyer, _ = await leased(market)
    other = Script()
    other.say(opening())
    buyer.buyer.nursery.start_soon(buyer.sessions.serve, other)
    assert "1 sessions are under way" in (await failure(other)).text
    assert len(buyer.sessions.cards()) == 1


async def test_a_provider_with_its_slots_taken_is_waited_for(
    market: Market, autojump_clock: object
) -> None:
    _, buyer, script = await leased(market)
    other = Script()
    other.say(opening(wait_s=60))
    buyer.buyer.nursery.start_soon(buyer.sessions.serve, other)
    await other.until_note()
    assert "every slot is taken" in other.notes[0]
    await script.close()
    with trio.fail_after(5):
        await other.begun()
    assert other.leases


async def test_a_script_that_ignores_the_window_is_cut_off(
    market: Market, autojump_clock: object
) -> None:
    seller, _, script = await leased(market)
    seller.workers.step_s = 100.0
    script.give(steps(1))
    for _ in range(12):
        script.give(steps(4096))
    assert "more than the window" in (await failure(script)).text


@pytest.mark.parametrize(
    "batch", [Batch(99, (Free(0),)), Batch(0, (Free(0),))], ids=["ahead", "behind"]
)
async def test_a_script_that_counts_wrong_is_told(
    market: Market, autojump_clock: object, batch: Batch
) -> None:
    _, _, script = await leased(market)
    script.say(batch)
    assert "is due" in (await failure(script)).text


async def test_a_script_that_says_nothing_gets_no_session(
    market: Market, autojump_clock: object
) -> None:
    buyer = await market.buyer()
    began_at = trio.current_time()
    with pytest.raises(ProtocolError, match="begins with an Open"):
        await buyer.sessions.serve(Script())
    assert trio.current_time() - began_at == pytest.approx(session_service.OPEN_S)


async def test_buffers_over_the_memory_are_refused(market: Market, autojump_clock: object) -> None:
    _, _, script = await leased(market)
    script.give([Allocate(9, 65 * MIB)])
    failed = await failure(script)
    assert failed.job
    assert "over the session's" in failed.text


async def test_a_mute_provider_is_passed_over(market: Market, autojump_clock: object) -> None:
    mute = await market.provider("mute")
    mute.tamper_answered_sent = lambda _frame: []
    await market.provider("honest", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    script = Script()
    began_at = trio.current_time()
    await begin(buyer, script)
    assert script.leases
    assert trio.current_time() - began_at <= session_purchase.FILL_S + 1


async def test_a_lease_that_nobody_uses_is_ended_by_its_provider(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_buying, "IDLE_S", 10_000)
    seller, _, script = await leased(market)
    await trio.sleep(session_sale.IDLE_S + 2)
    assert seller.seller.busy == 0
    script.leave()


async def test_a_session_stream_on_which_nothing_is_said_ends(
    market: Market, autojump_clock: object
) -> None:
    seller, buyer = await market.provider(), await market.buyer()
    stream = await buyer.dialer.open(seller.peer, SESSION_PROTOCOL)
    with trio.fail_after(session_sell.OFFER_S + 1), pytest.raises(ProviderError):
        await stream.receive()


async def test_a_bid_that_another_node_signed_or_that_was_filled_gets_nothing(
    market: Market, autojump_clock: object
) -> None:
    seller, buyer = await market.provider(), await market.buyer()
    other = await market.buyer("other")
    bids: list[bytes] = []

    def note(frame: bytes) -> list[bytes]:
        message = decoded(frame)
        if isinstance(message, Wanted):
            bids.append(message.bid)
        return [frame]

    buyer.tamper_sent = note
    script = Script()
    await begin(buyer, script)
    await script.close()
    for node, answer in ((other, None), (buyer, m.Refused)):
        stream = await node.dialer.open(seller.peer, SESSION_PROTOCOL)
        await stream.send(msgspec.msgpack.encode(Wanted(bids[0])))
        if answer is None:
            with pytest.raises(ProviderError):
                await stream.receive()
        else:
            assert isinstance(decoded(await stream.receive()), answer)
        await stream.aclose()
    assert seller.seller.busy == 0


async def test_a_flood_of_receipts_ends_the_lease(market: Market, autojump_clock: object) -> None:
    seller, buyer, script = await leased(market)

    def flood(frame: bytes) -> list[bytes]:
        is_receipt = isinstance(decoded(frame), m.Receipted)
        return [frame] * (session_purchase.MAX_WAITING_RECEIPTS + 3 if is_receipt else 1)

    seller.tamper_answered_sent = flood
    script.give(steps(1))
    await trio.sleep(session_sale.RECEIPT_S + 3)
    assert seller.seller.busy == 0
    assert market.debts(buyer, seller)[0] <= FLOATS


async def test_of_obeyed_batches_so_many_can_still_be_billed(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_lease, "MAX_MARKS", 3)
    _, buyer, script = await leased(market)
    for _ in range(10):
        script.give(steps(1))
        await script.obeyed()
    [session] = buyer.sessions._sessions.values()
    assert session.lease is not None
    assert len(session.lease.outstanding.marks) == 3


@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_LOG_COMMANDS", 40), ("MAX_LOG_BYTES", 3000), ("MAX_REPLAY_NS", 20)]
)
async def test_a_long_log_is_cut_by_a_snapshot_while_the_script_goes_on(
    market: Market,
    autojump_clock: object,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    value: int,
) -> None:
    expected = await reference(market, 200)
    monkeypatch.setattr(session_log, limit, value)
    first = await market.provider("first")
    first.workers.step_s = 0.001  # it is believed no more than that
    await market.provider("second", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give(beginning())
    for _ in range(20):
        script.give(steps(10))
        await trio.sleep(0.1)
    [session] = buyer.sessions._sessions.values()
    assert session.log.first > 100
    await first.kill()
    assert await script.read(0, SIZE) == expected
    closed = await script.close()
    assert closed.flop < 300 * FLOATS  # little was done again


async def test_blobs_beyond_the_leases_disk_make_room_for_each_other(
    market: Market, autojump_clock: object
) -> None:
    seller, buyer = await market.provider(), await market.buyer()
    blobs = [bytes([number]) * (400 * KIB) for number in range(5)]
    for data in blobs:
        await buyer.store.put(data)
    script = Script()
    await begin(buyer, script, memory_bytes=MIB)
    script.give([Allocate(0, 400 * KIB)])
    for data in blobs:
        script.give([Load(0, 0, address_of(data), len(data))])
        assert await script.read(0, 400 * KIB) == data
    held = [info for info in await seller.store.list() if info.size_bytes == 400 * KIB]
    assert len(held) == 2


async def test_a_blob_that_is_not_as_long_as_it_is_said_is_the_scripts_fault(
    market: Market, autojump_clock: object
) -> None:
    await market.provider()
    buyer = await market.buyer()
    info = await buyer.store.put(b"x" * 100)
    script = Script()
    await begin(buyer, script)
    script.give([Allocate(0, 200), Write(0, 0, b"1"), Load(0, 0, info.address, 150)])
    failed = await failure(script)
    assert failed.job
    assert "has not 150 bytes" in failed.text


async def test_a_snapshot_goes_on_with_reads_of_the_script_in_between(
    market: Market, autojump_clock: object
) -> None:
    _, _, script = await leased(market)
    numbers = []
    for _ in range(3):
        script.give(steps(1))
        numbers.append(script.give([Read(0, 0, SIZE)]))
        await trio.sleep(session_buying.IDLE_S + 2)
    assert [number in script.answers for number in numbers] == [True] * 3
    assert len(set(script.answers.values())) == 3
    await script.close()


async def test_opened_graphs_are_kept_within_a_limit(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = Graphs()
    first, second = sample_graph(times=1), sample_graph(times=300)
    opened = await graphs.open(first, graphs.user)
    assert await graphs.open(first, graphs.strangers) is opened
    monkeypatch.setattr(session_graphs, "MAX_KEPT_BYTES", len(second))
    kept = await graphs.open(second, graphs.user)
    assert await graphs.open(second, graphs.user) is kept
    assert await graphs.open(first, graphs.user) is not opened


def masking() -> list[AnyCommand]:
    """Buffers 0 and 1 with one of bools in the second, and a graph bound to them."""
    nodes = (Node(Op.PARAM, (0,)), Node(Op.PARAM, (1,)), Node(Op.ASSIGN, (), (0, 0, 1)))
    params = (GraphParam(0, Dtype.BOOL, (4,)), GraphParam(1, Dtype.BOOL, (4,)))
    graph = encode_graph(Graph(params, nodes, (Output(2, 0),)))
    bind = Bind(0, graph_hash(graph), ((0, 0), (1, 0)))
    return [Allocate(0, 4), Allocate(1, 4), Define(graph), bind]


async def test_a_bool_that_is_none_is_the_scripts_fault(
    market: Market, autojump_clock: object
) -> None:
    await market.provider()
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give([*masking(), Write(1, 0, b"\0\1\1\0"), Run(0)])
    await script.obeyed()
    script.give([Write(1, 0, b"\2"), Run(0)])
    failed = await failure(script)
    assert failed.job
    assert failed.number == script.sent - 1
    assert "other than 0 and 1" in failed.text


async def test_more_new_views_of_bools_than_one_batch_may_have_are_refused(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_work, "MAX_CHECKS", 10)
    monkeypatch.setattr(session_work, "PLACES_AT_ONCE", 3)
    await market.provider()
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    again: list[AnyCommand] = [Write(1, 0, b"\1"), Run(0)]
    script.give([*masking(), *9 * again])
    await script.obeyed()
    script.give(11 * again)
    assert "over 10 views of bools" in (await failure(script)).text
