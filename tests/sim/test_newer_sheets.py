"""A refusal brings the provider's newest sheet, which is ranked at once, and asked on once more."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.market.evidence import Evidence, replay
from p2pflop.market.fills import SUPERSEDED
from p2pflop.market.records import Sheet
from p2pflop.market.relay import MAX_FAULTS
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, now_ns, sample_file
from p2pflop.node.sheets import SheetService
from p2pflop.wire import decode
from tests.session_scripts import Script, opening

if TYPE_CHECKING:
    from tests.sim.conftest import Market


async def two_asks(
    market: Market, new_price_nusd: int = PRICE_NUSD
) -> tuple[MemoryNode, MemoryNode, MemoryNode]:
    """A cheap provider that the buyer knows by an old sheet alone, a dear one, and the buyer."""
    cheap = await market.provider("cheap")
    dear = await market.provider("dear", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    await cheap.kill()
    await trio.sleep(1)
    cheap.settings = replace(cheap.settings, ask_nusd=new_price_nusd)
    await cheap.start(market.nursery)
    return cheap, dear, buyer


def rejections(buyer: MemoryNode, run_id: str) -> list[tuple[str, str]]:
    return [(e["provider"], e["reason"]) for e in buyer.events(run_id, "rejected")]


def looks_right(buyer: MemoryNode, run_id: str) -> list[list[str]]:
    """Who was bid to after each look at the book; every bid was for the best that was left."""
    evidence = decode(Evidence, buyer.buyer.evidence(run_id))
    replays = replay(evidence)
    assert all(each.is_right for each in replays)
    peers = {n.node: n.peer for look in replays for n in look.ranked}
    return [[peers[bid.bid.provider] for bid in look.bids if bid.bid] for look in replays]


async def test_a_restarted_provider_is_asked_again_with_its_new_sheet(
    market: Market, autojump_clock: object
) -> None:
    cheap, _, buyer = await two_asks(market)
    run_id = await buyer.submit(sample_file())
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["provider"]) == ("result", cheap.peer)
    assert rejections(buyer, run_id) == [(cheap.peer, SUPERSEDED)]
    assert looks_right(buyer, run_id) == [[cheap.peer], [cheap.peer]]
    evidence = decode(Evidence, buyer.buyer.evidence(run_id))
    [refused] = evidence.looks[0].attempts
    assert refused.reject
    assert refused.reason == f"refused: {SUPERSEDED}"
    await market.settle_down()
    market.check()


async def test_a_new_price_is_ranked_as_any(market: Market, autojump_clock: object) -> None:
    cheap, dear, buyer = await two_asks(market, 3 * PRICE_NUSD)
    run_id = await buyer.submit(sample_file())
    assert (await market.end_of(buyer, run_id))["provider"] == dear.peer
    assert looks_right(buyer, run_id) == [[cheap.peer], [dear.peer]]
    number = cheap.sheets.newest.sheet.number if cheap.sheets.newest else 0
    assert buyer.sheets.book.last_number(cheap.identity.node.public_key) == number


async def test_who_renumbers_at_each_refusal_is_asked_twice(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap, dear, buyer = await two_asks(market)

    def none_honoured() -> dict[int, Sheet]:
        market.nursery.start_soon(cheap.sheets.issue)
        return {}

    monkeypatch.setattr(cheap.sheets, "honoured", none_honoured)
    run_id = await buyer.submit(sample_file())
    assert (await market.end_of(buyer, run_id))["provider"] == dear.peer
    assert rejections(buyer, run_id) == [(cheap.peer, SUPERSEDED)] * 2
    assert looks_right(buyer, run_id) == [[cheap.peer], [cheap.peer, dear.peer]]


async def test_a_bad_sheet_is_its_senders_fault_and_changes_nothing(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap, dear, buyer = await two_asks(market)
    newest = cheap.sheets.newest
    assert newest is not None
    forged = newest.sealed.wire[:-1] + bytes([newest.sealed.wire[-1] ^ 1])
    monkeypatch.setattr(SheetService, "newest_wire", forged)
    run_id = await buyer.submit(sample_file())
    assert (await market.end_of(buyer, run_id))["provider"] == dear.peer
    assert rejections(buyer, run_id) == [(cheap.peer, SUPERSEDED)]
    assert buyer.sheets.relay.score(cheap.peer, now_ns()) < MAX_FAULTS


async def test_a_session_asks_again_too(market: Market, autojump_clock: object) -> None:
    cheap, _, buyer = await two_asks(market)
    script = Script()
    script.say(opening())
    buyer.buyer.nursery.start_soon(buyer.sessions.serve, script)
    await script.begun()
    assert [lease.provider for lease in script.leases] == [cheap.account.hex()]
    assert not script.notes
    await script.close()


async def test_a_session_asks_who_renumbers_twice(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap, dear, buyer = await two_asks(market)
    asked = []

    def none_honoured() -> dict[int, Sheet]:
        asked.append(now_ns())
        market.nursery.start_soon(cheap.sheets.issue)
        return {}

    monkeypatch.setattr(cheap.sheets, "honoured", none_honoured)
    script = Script()
    script.say(opening())
    buyer.buyer.nursery.start_soon(buyer.sessions.serve, script)
    await script.begun()
    assert [lease.provider for lease in script.leases] == [dear.account.hex()]
    assert len(asked) == 2
    await script.close()
