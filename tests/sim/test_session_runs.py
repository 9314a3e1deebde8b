"""Sessions among the runs of their node: what is listed and told, cancelled, and why who won."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from msgspec.structs import replace

from p2pflop.errors import ConfigError
from p2pflop.job.commands import Failed
from p2pflop.market.evidence import MAX_LOOKS, Evidence, Verdict, replay
from p2pflop.market.ranking import Miss, MissReason
from p2pflop.node import session_service, session_story
from p2pflop.node.evidence import LOOK_ROW
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode
from p2pflop.node.service import Json
from p2pflop.wire import decode
from tests.session_scripts import FLOATS, Script, beginning, opening, steps
from tests.sim.test_session_memory import SIZE, begin

if TYPE_CHECKING:
    from tests.sim.conftest import Market


def listed(buyer: MemoryNode) -> Json:
    """The one session of a node, up to date."""
    buyer.sessions.cards()
    [card] = buyer.runs.cards()
    return card


def evidence_of(buyer: MemoryNode) -> Evidence:
    return decode(Evidence, buyer.buyer.evidence(listed(buyer)["id"]))


async def ended(buyer: MemoryNode) -> Json:
    """The last event of its one session."""
    run = buyer.runs.get(listed(buyer)["id"])
    with trio.fail_after(60):
        await run.ended.wait()
    return run.events[-1]


async def at_work(market: Market, **wish: object) -> tuple[MemoryNode, MemoryNode, Script]:
    """A provider, a buyer, and a script of its that has run three steps."""
    provider, buyer = await market.provider(), await market.buyer()
    script = Script()
    script.say(opening(**{"script": "train.py", **wish}))
    buyer.buyer.nursery.start_soon(buyer.sessions.serve, script)
    await script.begun()
    script.give([*beginning(), *steps(3)])
    await script.read(0, SIZE)
    return provider, buyer, script


async def test_a_session_is_listed_with_what_it_is_and_costs(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, script = await at_work(market)
    await trio.sleep(7)
    card = listed(buyer)
    assert (card["kind"], card["title"], card["state"]) == ("session", "train.py", "leased")
    assert (card["provider"], card["account"]) == (provider.peer, provider.account.hex())
    assert card["flop"] == 3 * FLOATS
    assert (card["step"], card["commands"]) == (10, 10)
    assert 0 < card["cost_nusd"] <= card["max_nusd"]
    assert not card["end_state"]
    closed = await script.close()
    last = await ended(buyer)
    assert (last["kind"], last["cost_nusd"]) == ("closed", closed.cost_nusd)
    card = listed(buyer)
    assert (card["state"], card["cost_nusd"]) == ("closed", closed.cost_nusd)
    assert card["ended_ns"] >= card["submitted_ns"]
    kinds = [event["kind"] for event in buyer.runs.get(card["id"]).events]
    assert kinds[:2] == ["filled", "state"]
    assert "receipt" in kinds


async def test_it_is_idle_when_its_lease_is_given_back(
    market: Market, autojump_clock: object
) -> None:
    _, buyer, script = await at_work(market)
    await trio.sleep(15)
    assert listed(buyer)["state"] == "idle"
    script.give(steps(1))
    await script.read(0, SIZE)
    assert listed(buyer)["state"] == "leased"
    assert len(replay(evidence_of(buyer))) == 2


async def test_a_script_with_a_name_that_is_no_line_is_listed_in_one(
    market: Market, autojump_clock: object
) -> None:
    _, buyer, _ = await at_work(market, script="a\nb\x1b[2J" + 150 * "c")
    title = listed(buyer)["title"]
    assert title.isprintable()
    assert len(title) == session_story.MAX_TITLE_CHARS


async def test_it_is_cancelled_paid_and_over(market: Market, autojump_clock: object) -> None:
    provider, buyer, script = await at_work(market)
    buyer.runs.get(listed(buyer)["id"]).cancel_requested.set()
    last = await ended(buyer)
    assert last["kind"] == "cancelled"
    assert 0 < last["cost_nusd"] == listed(buyer)["cost_nusd"]
    [failed] = script.of(Failed)
    assert isinstance(failed, Failed)
    assert "cancelled" in failed.text
    await market.settle_down()
    assert market.debts(buyer, provider) == (last["cost_nusd"], last["cost_nusd"])
    assert provider.seller.busy == 0
    market.check()


async def test_one_that_is_cancelled_while_it_waits_is_over(
    market: Market, autojump_clock: object
) -> None:
    buyer = await market.buyer()
    script = Script()
    buyer.buyer.nursery.start_soon(buyer.sessions.serve, script)
    script.say(opening(wait_s=60))
    await trio.sleep(3)
    assert listed(buyer)["state"] == "waiting"
    buyer.runs.get(listed(buyer)["id"]).cancel_requested.set()
    assert (await ended(buyer))["kind"] == "cancelled"


async def test_its_end_outlives_the_node_and_it_does_not(
    market: Market, autojump_clock: object
) -> None:
    _, buyer, script = await at_work(market)
    await script.close()
    await ended(buyer)
    before = listed(buyer)
    await buyer.kill()
    await market.restart(buyer)
    assert listed(buyer) == before
    assert [look.is_right for look in replay(evidence_of(buyer))] == [True]
    with pytest.raises(ConfigError, match="has no job file"):
        buyer.buyer.job_file(before["id"])
    with pytest.raises(ConfigError, match="has no result"):
        buyer.buyer.result_record(before["id"])


async def test_what_a_killed_node_leaves_is_told_as_failed_with_its_cost(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, _ = await at_work(market)
    await trio.sleep(7)
    await buyer.kill()
    await trio.sleep(20)
    await market.restart(buyer)
    last = await ended(buyer)
    assert (last["kind"], last["message"]) == ("failed", "the node of the session has ended")
    await market.settle_down()
    assert listed(buyer)["cost_nusd"] == market.debts(buyer, provider)[0] > 0


# Why who won


async def test_the_evidence_of_each_lease_is_kept_and_right(
    market: Market, autojump_clock: object
) -> None:
    full = await market.provider("full", price_nusd=PRICE_NUSD // 2)
    first = await market.provider("first")
    second = await market.provider("second", price_nusd=2 * PRICE_NUSD)
    small = await market.provider("small", price_nusd=1, memory_bytes=1000)
    full.seller.stopping = True
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(3)])
    await script.read(0, SIZE)
    await first.kill()
    script.give(steps(1))
    await script.read(0, SIZE)
    [one, two] = replay(evidence_of(buyer))
    assert one.is_right
    assert two.is_right
    assert [entry.peer for entry in one.ranked[:3]] == [full.peer, first.peer, second.peer]
    assert isinstance(one.ranked[3], Miss)
    assert (one.ranked[3].peer, one.ranked[3].reason) == (small.peer, MissReason.MEMORY)
    assert [(each.verdict, each.filled) for each in one.bids] == [
        (Verdict.BEST, False),
        (Verdict.NEXT, True),
    ]
    assert "shutting down" in one.bids[0].reason
    assert one.bids[1].reason  # why the lease ended
    assert two.bids[-1].filled
    assert two.bids[-1].bid is not None
    assert two.bids[-1].bid.provider == second.identity.node.public_key


async def test_evidence_that_was_tampered_with_is_seen(
    market: Market, autojump_clock: object
) -> None:
    await market.provider("dear", price_nusd=3 * PRICE_NUSD)
    _, buyer, _ = await at_work(market)
    evidence = evidence_of(buyer)
    [look] = evidence.looks

    def verdict(**changes: object) -> Verdict:
        [told] = replay(replace(evidence, looks=(replace(look, **changes),)))
        return told.bids[0].verdict

    assert verdict() is Verdict.BEST
    assert verdict(sheets=look.sheets[:1]) is Verdict.OTHER_BOOK
    assert verdict(session=()) is Verdict.OTHER_QUOTE
    for changed in ({"max_nusd": 0}, {"policy": replace(look.mandate.policy, max_price_nusd=1)}):
        mandate = replace(look.mandate, **changed)
        assert verdict(mandate=mandate) is Verdict.OTHER_MANDATE
    assert verdict(attempts=(replace(look.attempts[0], fill=look.attempts[0].bid),)) is (
        Verdict.FORGED
    )


async def test_an_ask_that_the_limit_does_not_reach_is_no_better_deal(
    market: Market, autojump_clock: object
) -> None:
    cheap = await market.provider("cheap", price_nusd=1, setup_nusd=10**6)
    dear = await market.provider("dear", price_nusd=PRICE_NUSD)
    buyer = await market.buyer()
    script = Script()
    await begin(buyer, script, cap_nusd=10**5)
    script.give([*beginning(), *steps(1)])
    await script.read(0, SIZE)
    assert script.leases[0].provider == dear.account.hex()
    [look] = replay(evidence_of(buyer))
    assert look.is_right
    [over] = [entry for entry in look.ranked if isinstance(entry, Miss)]
    assert (over.peer, over.reason) == (cheap.peer, MissReason.BUDGET)


async def test_looks_in_vain_are_kept_once_and_of_the_others_the_newest(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    buyer = await market.buyer()
    await begin(buyer, Script(), wait_s=30)
    last = await ended(buyer)
    assert (last["kind"], last["error"]) == ("failed", "MarketError")
    assert len(evidence_of(buyer).looks) == 1

    monkeypatch.setattr(session_story, "MAX_LOOKS", 3)
    monkeypatch.setattr(session_service, "RETRY_S", 0.1)
    assert MAX_LOOKS > 3
    provider = await market.provider()
    provider.seller.stopping = True
    waiting = Script()
    await begin(buyer, waiting, wait_s=1)
    newest = buyer.runs.cards()[0]["id"]
    kept = [row for row in buyer.runs.rows(newest) if row.kind == LOOK_ROW]
    assert 0 < len(kept) <= 3
