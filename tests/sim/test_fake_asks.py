"""A book full of asks behind which nobody is, each cheaper than the only honest one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.dht.planes import Stream
from p2pflop.market.evidence import Evidence, Verdict, replay
from p2pflop.market.records import MAX_SHEET_ORDERS, Rejected
from p2pflop.market.samples import ask, party
from p2pflop.node import bidding, evidence
from p2pflop.node.dialing import NodeDialer
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, now_ns, sample_file
from p2pflop.node.messages import Offer
from p2pflop.node.sale import Sale
from p2pflop.node.sell import Seller
from p2pflop.units import NS_PER_S
from p2pflop.wire import decode

if TYPE_CHECKING:
    from tests.sim.conftest import Market


def fill_with_fakes(buyer: MemoryNode, class_id: bytes, count: int) -> None:
    """As many identities as wanted: they cost nothing, not even an address."""
    at_ns = now_ns()
    until_ns = at_ns + 1800 * NS_PER_S
    offer = ask(1, PRICE_NUSD // 2, class_id=class_id, valid_until_ns=until_ns)
    for number in range(count):
        buyer.sheets.book.apply(party(number).sheet(offer, now_ns=at_ns), at_ns)


def class_of(provider: MemoryNode) -> bytes:
    newest = provider.sheets.newest
    assert newest is not None
    return newest.sheet.asks[0].class_id


@pytest.mark.parametrize("count", [100, bidding.ASKED_A_LOOK, 300])
async def test_a_job_goes_past_asks_behind_which_nobody_is(
    market: Market, autojump_clock: object, count: int
) -> None:
    honest, buyer = await market.provider(), await market.buyer()
    fill_with_fakes(buyer, class_of(honest), count)
    run_id = await buyer.submit(sample_file(3))
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end.get("provider")) == ("result", honest.peer)
    assert len(buyer.events(run_id, "rejected")) == count
    looks = replay(decode(Evidence, buyer.buyer.evidence(run_id)))
    assert [len(look.bids) for look in looks] == [
        min(bidding.ASKED_A_LOOK, count + 1 - start)
        for start in range(0, count + 1, bidding.ASKED_A_LOOK)
    ]
    assert all(look.is_right for look in looks)


async def test_after_some_silence_those_who_delivered_before_are_asked(
    market: Market, autojump_clock: object
) -> None:
    """Each silent one costs up to ten seconds; a stranger that is honest has to wait for that."""
    known, buyer = await market.provider(price_nusd=2 * PRICE_NUSD), await market.buyer()
    first = await market.end_of(buyer, await buyer.submit(sample_file(3)))
    assert first["provider"] == known.peer
    fill_with_fakes(buyer, class_of(known), 100)
    buyer.meet(await market.provider("stranger"))
    run_id = await buyer.submit(sample_file(3, seed=1))
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", known.peer)
    assert len(buyer.events(run_id, "rejected")) == bidding.SILENT_BEFORE_KNOWN
    whole, among_known = replay(decode(Evidence, buyer.buyer.evidence(run_id)))
    assert whole.is_right
    assert [bid.verdict for bid in among_known.bids] == [Verdict.BEST]


async def test_when_those_have_no_room_the_rest_is_asked(
    market: Market, autojump_clock: object
) -> None:
    known, buyer = await market.provider(price_nusd=2 * PRICE_NUSD), await market.buyer()
    await market.end_of(buyer, await buyer.submit(sample_file(3)))
    known.seller.stopping = True
    stranger = await market.provider("stranger")
    fill_with_fakes(buyer, class_of(known), 20)
    buyer.meet(stranger)
    run_id = await buyer.submit(sample_file(3, seed=1))
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", stranger.peer)
    looks = replay(decode(Evidence, buyer.buyer.evidence(run_id)))
    assert [len(look.bids) for look in looks] == [bidding.SILENT_BEFORE_KNOWN, 1, 13]
    assert all(look.is_right for look in looks)


async def test_evidence_that_is_cut_begins_with_a_round(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that continues one which is not shown would seem to have passed better deals by."""
    monkeypatch.setattr(bidding, "ASKED_A_LOOK", 4)
    monkeypatch.setattr(evidence, "MAX_LOOKS", 5)
    honest, buyer = await market.provider(), await market.buyer()
    honest.seller.stopping = True
    fill_with_fakes(buyer, class_of(honest), 10)
    run_id = await buyer.submit(sample_file(3), rest=True, deadline_s=300)
    end = await market.end_of(buyer, run_id)
    assert end["kind"] == "failed"
    shown = decode(Evidence, buyer.buyer.evidence(run_id))
    assert not shown.looks[0].continues
    verdicts = {bid.verdict for look in replay(shown) for bid in look.bids}
    assert verdicts <= {Verdict.BEST, Verdict.NEXT}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """How many seconds a provider takes to decide on a bid, by its peer."""
    delays: dict[str, float] = {}
    decide = Seller._decide

    async def late(seller: Seller, offer: Offer) -> Sale | Rejected:
        await trio.sleep(delays.get(seller.identity.peer, 0))
        return await decide(seller, offer)

    monkeypatch.setattr(Seller, "_decide", late)
    return delays


async def test_five_that_answer_a_call_and_no_bid_cost_five_seconds(
    market: Market, autojump_clock: object, slow: dict[str, float]
) -> None:
    honest, buyer = await market.provider(price_nusd=2 * PRICE_NUSD), await market.buyer()
    for number in range(5):
        fake = await market.provider(f"fake-{number}", price_nusd=PRICE_NUSD)
        slow[fake.peer] = math.inf
        buyer.meet(fake)
    began_at = trio.current_time()
    run_id = await buyer.submit(sample_file(3))
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", honest.peer)
    assert trio.current_time() - began_at < 5
    told = [event["reason"] for event in buyer.events(run_id, "rejected")]
    assert [reason.partition("passed over: it said nothing for ")[2] for reason in told] == [
        "2.0 s",
        "1.0 s",
        *["0.5 s"] * 3,
    ]
    assert all(look.is_right for look in replay(decode(Evidence, buyer.buyer.evidence(run_id))))
    now_avoided = buyer.buyer.experience.avoided(now_ns())
    assert now_avoided == (), "once is no failure"
    await market.end_of(buyer, await buyer.submit(sample_file(3, seed=1)))
    assert len(buyer.buyer.experience.avoided(now_ns())) == 5


async def test_a_fill_that_comes_after_another_was_asked_costs_nothing(
    market: Market, autojump_clock: object, slow: dict[str, float]
) -> None:
    late, quick = await market.provider("late"), await market.provider(price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    slow[late.peer] = 3.0
    run_id = await buyer.submit(sample_file(3))
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", quick.peer)
    await trio.sleep(3.0)
    assert late.seller.busy == 1, "its fill came, and waits for a confirm"
    await market.settle_down()
    assert market.debts(buyer, late) == (0, 0)
    assert market.debts(buyer, quick) == (end["cost_nusd"],) * 2
    assert len(buyer.events(run_id, "filled")) == 1
    [look] = replay(decode(Evidence, buyer.buyer.evidence(run_id)))
    assert look.is_right


async def test_whoever_is_left_is_waited_for(
    market: Market, autojump_clock: object, slow: dict[str, float]
) -> None:
    late, buyer = await market.provider("late"), await market.buyer()
    slow[late.peer] = 8.0
    run_id = await buyer.submit(sample_file(3))
    assert (await market.end_of(buyer, run_id))["provider"] == late.peer
    assert buyer.events(run_id, "rejected") == []


async def test_who_was_passed_over_is_asked_again_if_nobody_else_takes_the_job(
    market: Market, autojump_clock: object, slow: dict[str, float]
) -> None:
    late, other = await market.provider("late"), await market.provider(price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    slow[late.peer] = 3.0
    other.seller.stopping = True
    run_id = await buyer.submit(sample_file(3))
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", late.peer)
    await market.settle_down()
    assert market.debts(buyer, late) == (end["cost_nusd"],) * 2
    assert len(buyer.events(run_id, "filled")) == 1


async def test_who_says_no_leaves_the_next_as_long(
    market: Market, autojump_clock: object, slow: dict[str, float]
) -> None:
    for number in range(3):
        provider = await market.provider(f"provider-{number}", price_nusd=PRICE_NUSD // 2)
        provider.seller.stopping = True
    late = await market.provider("late")
    await market.provider("dearer", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    slow[late.peer] = 1.5
    run_id = await buyer.submit(sample_file(3))
    assert (await market.end_of(buyer, run_id))["provider"] == late.peer
    assert len(buyer.events(run_id, "rejected")) == 3


async def test_a_far_stranger_has_as_long_as_it_took_to_reach_it(
    market: Market, autojump_clock: object, slow: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    far, near = await market.provider("far"), await market.provider(price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    slow[far.peer] = 2.5
    open_stream = NodeDialer.open

    async def slowly(dialer: NodeDialer, peer: str, protocol: str) -> Stream:
        await trio.sleep(3.0 if peer == far.peer else 0)
        return await open_stream(dialer, peer, protocol)

    monkeypatch.setattr(NodeDialer, "open", slowly)
    run_id = await buyer.submit(sample_file(3))
    assert (await market.end_of(buyer, run_id))["provider"] == far.peer
    assert buyer.events(run_id, "rejected") == []
    assert near.seller.busy == 0


async def test_who_has_delivered_before_is_waited_for(
    market: Market, autojump_clock: object, slow: dict[str, float]
) -> None:
    late, buyer = await market.provider("late"), await market.buyer()
    await market.end_of(buyer, await buyer.submit(sample_file(3)))
    buyer.meet(await market.provider(price_nusd=2 * PRICE_NUSD))
    slow[late.peer] = 3.0
    run_id = await buyer.submit(sample_file(3, seed=1))
    assert (await market.end_of(buyer, run_id))["provider"] == late.peer
    assert buyer.events(run_id, "rejected") == []


async def test_a_node_with_many_asks_is_asked_once_a_round(
    market: Market, autojump_clock: object
) -> None:
    """Silence and refusals are its own, and not of one of its asks: 32 of them, which an identity
    may have, would else cost a buyer as much as 32 identities."""
    honest, buyer = await market.provider(), await market.buyer()
    at_ns = now_ns()
    offers = [
        ask(number, PRICE_NUSD // 2 + 10 * number, class_id=class_of(honest))
        for number in range(MAX_SHEET_ORDERS)
    ]
    for number in range(3):
        buyer.sheets.book.apply(party(number).sheet(*offers, now_ns=at_ns), at_ns)
    run_id = await buyer.submit(sample_file(3))
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end.get("provider")) == ("result", honest.peer)
    asked = [event["provider"] for event in buyer.events(run_id, "rejected")]
    assert len(asked) == len(set(asked)) == 3
    assert trio.current_time() < 60
    [look] = replay(decode(Evidence, buyer.buyer.evidence(run_id)))
    assert look.is_right
