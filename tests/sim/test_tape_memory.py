"""The tape between nodes: who hears of a trade, what it gives away, what a hostile peer cannot."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import trio
from msgspec.structs import replace

from p2pflop.dht.planes import Stream
from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.keys import PrivateKey
from p2pflop.market.gate import Outcome
from p2pflop.market.relay import MAX_FAULTS
from p2pflop.market.samples import CLASS_ID, Party
from p2pflop.market.sheets import make_delegation
from p2pflop.market.take import Take
from p2pflop.market.tape import (
    HOUR_NS,
    KEPT_HOURS,
    MAX_TRADES_AN_ACCOUNT,
    OpenTrade,
    Tape,
    fill_digest,
    hour_of,
    make_trade,
    round_gflop,
)
from p2pflop.market.tape_relay import (
    ANSWERED_BURST,
    COMPARE_TAPES_S,
    GOSSIPED_HOURS,
    TapeListing,
    TapeParcel,
)
from p2pflop.node import retelling
from p2pflop.node import tape as tape_module
from p2pflop.node.comparing import SILENCE_S
from p2pflop.node.identity import Identity
from p2pflop.node.market_view import countersigned
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, now_ns, sample_file
from p2pflop.node.tape import MAX_EXCHANGES, TELL_S
from p2pflop.units import NS_PER_S
from p2pflop.wire import encode

from .conftest import only_sale

if TYPE_CHECKING:
    from tests.sim.conftest import Market


async def connected(*nodes: MemoryNode) -> None:
    """Everybody with the one before."""
    for left, right in pairwise(nodes):
        await left.host.connect(right.host.addresses[0])
        for here, there in ((left, right), (right, left)):
            here.sheets.met(there.peer, ())


def tape_of(node: MemoryNode) -> list[OpenTrade]:
    return node.kept_tape.trades(now_ns())


def own_trade(node: MemoryNode, number: int = 1, hours_ago: int = 0) -> OpenTrade:
    """A trade that a node says it made."""
    account = node.identity.account
    assert isinstance(account, PrivateKey)
    at_ns = now_ns() - hours_ago * HOUR_NS
    delegation = make_delegation(
        account, node.identity.node.public_key, at_ns - 2 * HOUR_NS, at_ns + 2 * HOUR_NS
    )
    seller = Party(account, node.identity.node, delegation)
    return make_trade(
        seller.node,
        fill_id=b"fill %d" % number,
        class_id=CLASS_ID,
        price_nusd=10**6,
        flop=10**12,
        now_ns=at_ns,
        delegation=delegation,
    )


async def buy(market: Market, buyer: MemoryNode, seed: int = 0) -> None:
    """A run up to its end, and the time that its trade takes."""
    run_id = await buyer.submit(sample_file(seed=seed))
    await ended(market, buyer, run_id)


async def ended(market: Market, buyer: MemoryNode, run_id: str) -> None:
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    await trio.sleep(2 * TELL_S)


async def test_a_third_node_sees_the_trade_and_no_sign_of_the_buyer(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, third = (
        await market.provider(),
        await market.buyer(),
        await market.node("third"),
    )
    await connected(buyer, provider, third)
    await buy(market, buyer)
    [trade] = tape_of(third)
    assert tape_of(provider) == tape_of(buyer) == [trade]
    sale = only_sale(provider)
    bid = sale.bid.record
    assert trade.account == provider.account
    assert trade.trade.class_id == bid.class_id
    assert trade.trade.price_nusd == PRICE_NUSD
    assert trade.trade.gflop_rounded == round_gflop(sum(c.flop * c.times for c in bid.costs)) == 1
    assert trade.trade.hour == hour_of(now_ns())
    assert trade.trade.fill_digest == fill_digest(sale.fill_id)
    secrets = (
        buyer.account,
        buyer.identity.node.public_key,
        buyer.peer.encode(),
        sale.bid.id,
        sale.fill_id,
        bid.job.work,
        bid.nonce,
    )
    for secret in secrets:
        assert secret not in trade.sealed.wire


async def test_own_accounts_do_not_trade(market: Market, autojump_clock: object) -> None:
    provider = await market.provider(account="house")
    buyer = await market.buyer(account="house")
    await connected(buyer, provider)
    await buy(market, buyer)
    assert only_sale(provider).state == "settled"
    assert tape_of(provider) == tape_of(buyer) == []


async def test_who_comes_late_pulls_what_was_told_before(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    await connected(buyer, provider)
    for seed in range(3):
        await buy(market, buyer, seed)
    late = await market.node("late")
    await connected(buyer, late)
    assert tape_of(late) == []
    await late.tape.comparisons.compare_quietly(buyer.peer)
    assert tape_of(late) == tape_of(provider)
    assert len(tape_of(late)) == 3
    assert await late.tape.comparisons.compare(buyer.peer) == 0


async def test_what_gossip_lost_is_pulled_in_turn(market: Market, autojump_clock: object) -> None:
    provider, other = await market.provider(), await market.node("other")
    await connected(provider, other)
    provider.kept_tape.add(own_trade(provider, hours_ago=3), now_ns())
    await trio.sleep(COMPARE_TAPES_S + 1)
    assert tape_of(other) == tape_of(provider)


async def test_a_sale_that_a_restart_took_up_is_told_with_its_price(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    provider.cut_at = provider.writes + 3
    run_id = await buyer.submit(sample_file())
    await provider.down.wait()
    await market.restart(provider)
    await ended(market, buyer, run_id)
    told = [trade.trade.price_nusd for trade in tape_of(provider)]
    assert told == [PRICE_NUSD]


async def test_a_trade_that_a_crash_lost_is_told_after_it_and_once(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, buyer, third = (
        await market.provider(),
        await market.buyer(),
        await market.node("third"),
    )
    await connected(buyer, provider, third)
    with monkeypatch.context() as patched:
        patched.setattr(provider.tape, "settled", lambda **_: None)
        await buy(market, buyer)
    assert tape_of(provider) == tape_of(third) == []
    for _ in range(2):
        await provider.kill()
        await market.restart(provider)
        await connected(buyer, provider, third)
        await trio.sleep(COMPARE_TAPES_S + 1)
        [trade] = tape_of(third)
        assert tape_of(provider) == tape_of(buyer) == [trade]
        assert trade.trade.price_nusd == PRICE_NUSD
        provider.kept_tape = Tape(bytes(32))  # the crash takes the file as well


async def test_a_restart_in_the_next_hour_tells_what_was_lost_before_it(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new process delegates anew, and from then on: that does not cover the hour before."""
    provider, buyer = await market.provider(), await market.buyer()
    with monkeypatch.context() as patched:
        patched.setattr(provider.tape, "settled", lambda **_: None)
        await buy(market, buyer)
    await provider.kill()
    hour = hour_of(now_ns())
    await trio.sleep(3600 + 120)
    old = provider.identity
    provider.identity = Identity(old.account, old.node, old.network)
    provider.identity.delegation(now_ns())
    await market.restart(provider)
    [trade] = tape_of(provider)
    assert trade.trade.hour == hour


async def test_a_trade_that_no_delegation_covers_is_not_told_and_harms_nothing(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    late_ns = now_ns() + 2 * 3600 * NS_PER_S
    late = make_delegation(
        PrivateKey(bytes(32)), provider.identity.node.public_key, late_ns, 2 * late_ns, "main"
    )
    monkeypatch.setattr(Identity, "delegation", lambda *_: late)
    provider.tape.settled(
        fill_id=b"fill", class_id=CLASS_ID, price_nusd=10**6, flop=10**9, buyer=buyer.account
    )
    assert tape_of(provider) == []


async def test_what_settled_before_the_hours_of_gossip_is_not_told_again(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    await buy(market, buyer)
    await provider.kill()
    provider.kept_tape = Tape(bytes(32))
    await trio.sleep(GOSSIPED_HOURS * 3600)
    await market.restart(provider)
    await trio.sleep(1)
    assert tape_of(provider) == []


async def test_a_burst_of_sales_is_told_at_a_pace_and_within_an_accounts_limit(
    market: Market, autojump_clock: object
) -> None:
    provider, other = await market.provider(), await market.node("other")
    await connected(provider, other)
    burst = MAX_TRADES_AN_ACCOUNT + 20
    for number in range(burst):
        provider.tape.settled(
            fill_id=b"%d" % number,
            class_id=CLASS_ID,
            price_nusd=10**6,
            flop=10**9,
            buyer=other.account,
        )
    await trio.sleep(TELL_S / 2)
    assert len(tape_of(other)) == 1
    await trio.sleep(burst * TELL_S + COMPARE_TAPES_S)
    assert tape_of(other) == tape_of(provider)
    assert len(tape_of(other)) == MAX_TRADES_AN_ACCOUNT


async def test_followers_hear_what_is_new_and_what_they_missed(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    await connected(buyer, provider)
    await buy(market, buyer)
    follower = buyer.tape.follow(0)
    [first] = await anext(follower)
    assert first["kind"] == "trade"
    assert {**first} == {"seq": first["seq"], "kind": "trade", **buyer.tape.listed()[0]}
    assert first["own"] is False
    assert provider.tape.listed()[0]["own"] is True
    with trio.move_on_after(5) as waited:
        await anext(follower)
    assert waited.cancelled_caught
    await buy(market, buyer, seed=1)
    again = buyer.tape.follow(first["seq"])
    [second] = await anext(again)
    assert second["seq"] > first["seq"]
    assert second["id"] != first["id"]


# Hostile peers


async def test_a_forger_is_shunned_and_a_flood_is_bounded(
    market: Market, autojump_clock: object
) -> None:
    liar, honest = await market.node("liar"), await market.node("honest")
    await connected(liar, honest)
    for number in range(3 * MAX_TRADES_AN_ACCOUNT):
        await liar.host.publish(tape_module.TOPIC, own_trade(liar, number).sealed.wire)
    assert len(tape_of(honest)) == MAX_TRADES_AN_ACCOUNT
    assert honest.tape.relay.counts[Outcome.ACCOUNT] > 0
    for number in range(MAX_FAULTS + 1):
        await liar.host.publish(tape_module.TOPIC, b"junk %d" % number)
    assert honest.sheets.relay.is_shunned(liar.peer, now_ns())
    assert honest.tape.relay.counts[Outcome.SHUNNED] == 1
    with pytest.raises(ProviderError):
        await liar.tape.comparisons.compare(honest.peer)


async def test_replays_of_old_hours_do_not_come_by_gossip(
    market: Market, autojump_clock: object
) -> None:
    liar, honest = await market.node("liar"), await market.node("honest")
    await connected(liar, honest)
    for hours in (-1, 2, KEPT_HOURS):
        await liar.host.publish(tape_module.TOPIC, own_trade(liar, hours_ago=hours).sealed.wire)
    assert tape_of(honest) == []
    assert honest.tape.relay.counts == {Outcome.CLOCK: 3}


def answer_with(node: MemoryNode, *frames: bytes) -> None:
    """What ``node`` answers whoever pulls from it, whatever is asked."""

    async def handler(stream: Stream) -> None:
        for frame in frames:
            await stream.receive()
            await stream.send(frame)
        await trio.sleep_forever()

    node.host.handle(tape_module.PROTOCOL, handler)


async def test_lies_while_comparing_are_the_liars_fault(
    market: Market, autojump_clock: object
) -> None:
    liar, honest = await market.node("liar"), await market.node("honest")
    await connected(liar, honest)
    unasked = encode(TapeParcel((own_trade(liar).sealed.wire,), last=True))
    for number, frames in enumerate(
        ((b"junk",), (encode(TapeListing(bytes(16))), unasked), (encode(TapeListing(b"odd")),))
    ):
        answer_with(liar, *frames)
        with pytest.raises(ProtocolError):
            await honest.tape.comparisons.compare(liar.peer)
        left = honest.sheets.relay.score(liar.peer, now_ns())
        assert left == MAX_FAULTS - number - 1
    assert tape_of(honest) == []


async def test_a_peer_that_stalls_is_given_up(market: Market, autojump_clock: object) -> None:
    silent, honest = await market.node("silent"), await market.node("honest")
    await connected(silent, honest)
    answer_with(silent)
    started_s = trio.current_time()
    with pytest.raises(ProviderError, match="said nothing"):
        await honest.tape.comparisons.compare(silent.peer)
    assert trio.current_time() - started_s <= SILENCE_S + 1


async def test_comparisons_are_counted_by_peer_and_in_all(
    market: Market, autojump_clock: object
) -> None:
    greedy, honest = await market.node("greedy"), await market.node("honest")
    await connected(greedy, honest)
    for _ in range(ANSWERED_BURST):
        await greedy.tape.comparisons.compare(honest.peer)
    with pytest.raises(ProviderError, match="too many comparisons"):
        await greedy.tape.comparisons.compare(honest.peer)
    honest.tape.comparisons._answering |= {f"peer {number}" for number in range(MAX_EXCHANGES)}
    other = await market.node("another")
    with pytest.raises(ProviderError, match="too many comparisons"):
        await other.tape.comparisons.compare(honest.peer)


async def test_an_honest_clock_that_is_ahead_is_no_fault(
    market: Market, autojump_clock: object
) -> None:
    ahead, honest = await market.node("ahead"), await market.node("honest")
    await connected(ahead, honest)
    ahead.kept_tape.add(own_trade(ahead, hours_ago=-1), now_ns() + HOUR_NS)
    assert await honest.tape.comparisons.compare(ahead.peer) == 0
    assert honest.sheets.relay.score(ahead.peer, now_ns()) == MAX_FAULTS
    await trio.sleep(HOUR_NS / NS_PER_S)
    assert tape_of(honest) == tape_of(ahead)


# The take rate


async def test_buyer_and_seller_both_see_that_nothing_is_taken(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    for seed in range(2):
        run_id = await buyer.submit(sample_file(seed=seed), checkpoint_steps=5)
        await ended(market, buyer, run_id)
    takes = [await take_of(node) for node in (provider, buyer)]
    spent_nusd = buyer.ledger_book.report()["spent_nusd"]
    assert spent_nusd > 0
    assert takes == [Take(2, spent_nusd, spent_nusd)] * 2
    receipts = countersigned(buyer.journal)
    assert len(receipts) > 2
    buyer.ledger_book._take = None
    cheaper = [replace(each, amount_nusd=each.amount_nusd - 1) for each in receipts]
    assert (await buyer.ledger_book.take(lambda: cheaper)).take_nusd == 2


async def test_nothing_seems_taken_while_a_receipt_is_on_its_way_to_disk(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    seen: list[int] = []

    def look_at(node: MemoryNode) -> None:
        write = node.journal._database.write

        async def slow(operation: Callable[[Any], Any]) -> Any:
            await trio.sleep(0.1)
            return await write(operation)

        node.journal._database.write = slow  # type: ignore[method-assign]

    async def look(node: MemoryNode) -> None:
        while True:
            taken = await take_of(node)
            seen.append(taken.paid_nusd)
            assert taken.take_nusd == 0
            await trio.sleep(0.01)

    for node in (provider, buyer):
        look_at(node)
        market.nursery.start_soon(look, node)
    run_id = await buyer.submit(sample_file(), checkpoint_steps=5)
    await ended(market, buyer, run_id)
    assert len(set(seen)) > 2, "nobody looked while it was bought"


async def take_of(node: MemoryNode) -> Take:
    return await node.ledger_book.take(lambda: countersigned(node.journal))


async def test_who_follows_the_tape_hears_the_newest_trades(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tape_module, "MAX_LIVE_TRADES", 2)
    provider, buyer = await market.provider(), await market.buyer()
    for number in range(3):
        provider.tape.settled(
            fill_id=b"fill %d" % number,
            class_id=CLASS_ID,
            price_nusd=number + 1,
            flop=10**9,
            buyer=buyer.account,
        )
        await trio.sleep(1)
    async for heard in provider.tape.follow(0):
        assert [trade["price_nusd"] for trade in heard] == [2, 3]
        break
    await market.settle_down()


async def test_so_many_trades_are_told_again_after_a_restart(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retelling, "MAX_RETOLD", 2)
    provider, buyer = await market.provider(), await market.buyer()
    for _ in range(3):
        await ended(market, buyer, await buyer.submit(sample_file(1), fresh=True))
    await market.settle_down()
    assert len(tape_of(provider)) == 3
    await provider.kill()
    provider.kept_tape = Tape(bytes(32))
    await market.restart(provider)
    await trio.sleep(1)
    assert len(tape_of(provider)) == 2
