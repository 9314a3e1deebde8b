"""Limits of asks between real buyers and sellers: respected by both, and enforced by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from p2pflop.cli.main import run
from p2pflop.errors import MarketError
from p2pflop.job.commands import Failed
from p2pflop.job.file import decode_file, open_job
from p2pflop.job.validate import Refusal
from p2pflop.job.variants import encode_variants
from p2pflop.market.evidence import Verdict, replay
from p2pflop.market.ranking import Miss, MissReason
from p2pflop.market.records import Reject
from p2pflop.node.evidence import REJECT_ROW
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, sample_file
from p2pflop.node.service import Json, SubmitOptions
from p2pflop.node.session_sale import RECEIPT_S
from p2pflop.units import NS_PER_S
from p2pflop.wire import open_sealed
from tests.session_scripts import FLOATS, Script, beginning, opening, steps
from tests.sim.test_evidence_memory import evidence_of
from tests.sim.test_packs_memory import PACK, ready, variants
from tests.sim.test_resubmission import STEPS, check_whole, submit, three
from tests.sim.test_session_memory import SIZE, begin, reference
from tests.sim.test_wishes_memory import budget, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.sim.conftest import Market

DAY_S = 24 * 3600


async def figures(buyer: MemoryNode, file: bytes | None = None) -> dict[str, int]:
    """What the sample job comes to, by the settings that limit it."""
    file = file or sample_file()
    told = await buyer.buyer.quote(file, SubmitOptions())
    checked = open_job(decode_file(file).body)
    assert not isinstance(checked, Refusal)
    return {
        "max_lease_s": DAY_S,
        "max_flop": int(told["flop"]),
        "max_moved_bytes": int(told["moved_bytes"]),
        "max_nodes": sum(len(each.graph.nodes) for each in checked.graphs.values()),
    }


def misses(ranked: Json) -> list[Json]:
    return [miss for miss in ranked["misses"] if miss["reason"] == MissReason.LIMIT]


@pytest.mark.parametrize("name", ["max_lease_s", "max_flop", "max_moved_bytes", "max_nodes"])
async def test_a_job_goes_to_who_takes_it(
    market: Market, autojump_clock: object, name: str, tmp_path: Path, capsys: Any
) -> None:
    apart = market.another()
    figure = (await figures(await apart.buyer()))[name]
    await apart.close()
    limit: dict[str, Any] = {name: figure}
    just = await market.provider("just", **limit)
    buyer = await market.buyer()
    first = await buyer.submit(sample_file())
    assert (await market.end_of(buyer, first))["provider"] == just.peer
    limit = {name: figure - 1, "price_nusd": PRICE_NUSD // 2}
    cheaper = await market.provider("cheaper", **limit)
    buyer.meet(cheaper)
    run_id = await buyer.submit(sample_file(), fresh=True)
    assert (await market.end_of(buyer, run_id))["provider"] == just.peer
    assert not buyer.events(run_id, "rejected"), "it was not asked in vain"
    [ranked] = buyer.events(run_id, "ranked")
    [miss] = misses(ranked)
    assert miss["over"] == {
        "limit": name.removeprefix("max_"),
        "job": figure,
        "ask": figure - 1,
    }
    [look] = replay(evidence_of(buyer, run_id))
    assert [bid.verdict for bid in look.bids] == [Verdict.BEST]
    entry = look.ranked[-1]
    assert isinstance(entry, Miss)
    assert (entry.peer, entry.told) == (cheaper.peer, miss["told"])
    file = tmp_path / "run.p2pe"
    file.write_bytes(buyer.buyer.evidence(run_id))
    assert run(["explain", str(file)]) == 0
    assert f"does not do: {miss['told']}" in " ".join(capsys.readouterr().out.split())
    await market.close()


@pytest.mark.parametrize("name", ["max_lease_s", "max_flop", "max_moved_bytes", "max_nodes"])
async def test_who_ignores_a_limit_is_refused_with_the_newest_sheet(
    market: Market, autojump_clock: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = market.another()
    figure = (await figures(await apart.buyer()))[name]
    await apart.close()
    limit: dict[str, Any] = {name: figure - 1}
    provider = await market.provider(**limit)
    buyer = await market.buyer()
    monkeypatch.setattr("p2pflop.market.ranking.exceeded", lambda *_: None)
    run_id = await buyer.submit(sample_file())
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["error"]) == ("failed", "MarketError")
    assert "is over the ask's" in end["message"]
    [row] = [row for row in buyer.runs.rows(run_id) if row.kind == REJECT_ROW]
    reject = open_sealed(Reject, row.body).record
    assert "is over the ask's" in reject.reason
    assert reject.sheet == provider.sheets.newest_wire
    assert not provider.seller.busy


async def test_alone_with_a_limit_the_run_says_what_to_do(
    market: Market, autojump_clock: object
) -> None:
    await market.provider(max_lease_s=3600)
    buyer = await market.buyer()
    end = await market.end_of(buyer, await buyer.submit(sample_file()))
    assert end["message"] == "no ask satisfies the job: 1 x over a limit of the ask"
    assert end["hint"] == (
        "A lease of 24 h 0 min is over the ask's 1 h 0 min: give the job an earlier deadline."
    )
    end = await market.end_of(buyer, await buyer.submit(sample_file(), deadline_s=3600))
    assert end["kind"] == "result"


async def test_the_default_deadline_fits_a_day_however_old_the_sheet_is(
    market: Market, autojump_clock: object
) -> None:
    await market.provider(max_lease_s=DAY_S)
    buyer = await market.buyer()
    await trio.sleep(600)
    assert (await market.end_of(buyer, await buyer.submit(sample_file())))["kind"] == "result"


async def test_what_is_left_of_a_job_goes_to_who_would_not_take_it_all(
    market: Market, autojump_clock: object
) -> None:
    cheap, dear, buyer = await three(market)
    whole = await figures(buyer, sample_file(STEPS))
    small = await market.provider(
        "small", price_nusd=PRICE_NUSD * 3 // 2, max_flop=whole["max_flop"] * 4 // 5
    )
    buyer.meet(small)
    run_id = await submit(buyer)
    await trio.sleep(5)
    await cheap.kill()
    end = await market.end_of(buyer, run_id)
    await check_whole(market, buyer, run_id, end)
    assert end["provider"] == small.peer
    first, second = buyer.events(run_id, "ranked")
    assert [len(misses(each)) for each in (first, second)] == [1, 0]
    assert dear.peer in {deal["provider"] for deal in second["deals"]}


async def test_nobody_quotes_to_a_wish_over_its_limits(
    market: Market, autojump_clock: object
) -> None:
    provider = await market.provider(wish_ask_nusd=PRICE_NUSD // 2, max_flop=1)
    other = await market.provider("other", wish_ask_nusd=PRICE_NUSD // 2)
    buyer = await market.buyer()
    run_id = await buyer.submit(sample_file(), max_nusd=await budget(buyer), rest=True)
    await until(lambda: buyer.sheets.newest and buyer.sheets.newest.sheet.wishes)
    for node in (provider, other):
        node.meet(buyer)
    assert (await market.end_of(buyer, run_id))["provider"] == other.peer
    assert not provider.seller.quoting._out


# Sessions


async def test_a_session_takes_one_short_lease_after_the_other(
    market: Market, autojump_clock: object
) -> None:
    expected = await reference(market, 100)
    provider = await market.provider(max_lease_s=60)
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give(beginning())
    for _ in range(100):
        script.give(steps(1))
        await trio.sleep(1)
    assert await script.read(0, SIZE) == expected
    assert {lease.provider for lease in script.leases} == {provider.account.hex()}
    assert len(script.leases) == 3
    assert not script.notes, script.notes[0]
    assert buyer.buyer.experience.avoided(0) == ()
    closed = await script.close()
    assert closed.flop == 100 * FLOATS, "nothing was done again"
    await market.settle_down()
    market.check()


async def test_a_session_goes_on_within_the_work_that_an_ask_takes(
    market: Market, autojump_clock: object
) -> None:
    expected = await reference(market, 100)
    await market.provider(max_flop=40 * FLOATS)
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give(beginning())
    for _ in range(10):
        script.give(steps(10))
        await script.obeyed()
    assert await script.read(0, SIZE) == expected
    assert len(script.leases) == 3
    assert not script.notes, script.notes[0]
    assert (await script.close()).flop == 100 * FLOATS
    await market.settle_down()
    market.check()


async def test_a_script_that_runs_ahead_of_what_an_ask_takes_gets_there_all_the_same(
    market: Market, autojump_clock: object
) -> None:
    expected = await reference(market, 1000)
    await market.provider(max_flop=300 * FLOATS, max_moved_bytes=16 * SIZE)
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(1000)])
    assert await script.read(0, SIZE) == expected
    assert len(script.leases) == 4
    assert not script.notes, script.notes[0]
    assert (await script.close()).flop == 1000 * FLOATS, "nothing was done again"
    looks = replay(evidence_of(buyer, buyer.sessions.base.runs.cards()[0]["id"]))
    assert [bid.verdict for look in looks for bid in look.bids] == [Verdict.BEST] * 4
    await market.settle_down()
    market.check()


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        ({"max_flop": FLOATS - 1}, "work of 64 FLOP is over the ask's 63 FLOP"),
        ({"max_moved_bytes": 2 * SIZE - 1}, "moving 512 B is over the ask's 511 B"),
    ],
)
async def test_one_command_that_is_over_a_limit_costs_one_lease(
    market: Market, autojump_clock: object, limit: dict[str, Any], told: str
) -> None:
    await market.provider(**limit)
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(1)])
    failed = await script.until(Failed)
    assert isinstance(failed, Failed)
    assert told in failed.hint
    assert len(script.leases) == 1


async def test_a_session_that_nobody_takes_says_why(market: Market, autojump_clock: object) -> None:
    await market.provider(max_nodes=1)
    buyer, script = await market.buyer(), Script()
    await begin(buyer, script)
    script.give([*beginning(), *steps(1)])
    failed = await script.until(Failed)
    assert isinstance(failed, Failed)
    assert "over a limit of the ask" in failed.text
    assert "lowering 4 nodes is over the ask's 1 node" in failed.hint


async def test_a_provider_ends_a_session_with_what_is_over_its_limits(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, buyer, script = await market.provider(max_flop=FLOATS), await market.buyer(), Script()
    monkeypatch.setattr("p2pflop.node.session_purchase.exceeded", lambda *_: None)
    await begin(buyer, script)
    script.give([*beginning(), *steps(1)])
    await script.obeyed()
    await trio.sleep(RECEIPT_S + 1)
    script.give(steps(1))
    failed = await script.until(Failed)
    assert isinstance(failed, Failed)
    await market.settle_down()
    assert market.debts(buyer, provider) == (FLOATS, FLOATS)


async def test_a_session_bid_for_longer_than_the_longest_lease_is_refused(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    await market.provider(max_lease_s=60)
    buyer, script = await market.buyer(), Script()
    service = buyer.sessions
    terms = service._terms
    monkeypatch.setattr(
        type(service), "_terms", lambda self, session, now_ns, limits=(): terms(session, now_ns)
    )
    script.say(opening())
    buyer.buyer.nursery.start_soon(service.serve, script)
    script.give(beginning())
    failed = await script.until(Failed)
    assert isinstance(failed, Failed)
    assert "a lease of 24 h 0 min is over the ask's 1 min 0 s" in failed.text


# Packs


async def test_a_pack_that_is_over_what_each_ask_takes_is_not_bought(
    market: Market, autojump_clock: object
) -> None:
    made = variants()
    buyer = await market.buyer()
    packs = await ready(buyer)
    order = await packs._order(made.file, SubmitOptions())
    flop = order.checked.cost.flop
    provider = await market.provider(max_flop=2 * flop)
    buyer.meet(provider)
    with pytest.raises(MarketError, match="1 x over a limit of the ask"):
        await packs.submit(encode_variants(made), SubmitOptions(run_id=PACK, rest=True))
    assert not buyer.runs.cards()
    other = await market.provider("other", price_nusd=2 * PRICE_NUSD)
    buyer.meet(other)
    await packs.submit(encode_variants(made), SubmitOptions(run_id=PACK))
    assert (await market.end_of(buyer, PACK))["provider"] == other.peer


async def test_a_pack_rests_no_more_where_its_jobs_alone_would_be_taken(
    market: Market, autojump_clock: object
) -> None:
    buyer = await market.buyer()
    packs = await ready(buyer)
    made = variants()
    await packs.submit(encode_variants(made), SubmitOptions(run_id=PACK, rest=True))
    await trio.sleep(60)
    assert not buyer.runs.get(PACK).over
    order = await packs._order(made.file, SubmitOptions())
    buyer.meet(await market.provider(max_flop=order.checked.cost.flop))
    end = await market.end_of(buyer, PACK)
    assert (end["error"], end["kind"]) == ("MarketError", "failed")
    assert "over a limit of the ask" in end["message"]
    assert end["at_ns"] < buyer.runs.get(PACK).card["deadline_ns"] - 3600 * NS_PER_S
