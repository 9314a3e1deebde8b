"""Runs that rest as wishes, and the quotes that fill them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import trio
from msgspec.structs import replace

from p2pflop.job.buying import MAX_REST_NS
from p2pflop.job.file import decode_file
from p2pflop.market.evidence import Evidence, replay
from p2pflop.market.records import Quote, Wish, ticket_of
from p2pflop.market.sheets import make_sheet
from p2pflop.market.wishes import MAX_QUOTE_LIFETIME_NS
from p2pflop.node import quoting, wishes
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, now_ns, sample_file
from p2pflop.node.quote_stream import Declined, Quoted
from p2pflop.node.service import SubmitOptions
from p2pflop.units import NS_PER_S
from p2pflop.wire import decode, open_sealed
from tests.sim.test_power_cuts import SHORT_S, Cut

if TYPE_CHECKING:
    from tests.sim.conftest import Market

HALF = PRICE_NUSD // 2


async def budget(buyer: MemoryNode, file: bytes | None = None) -> int:
    """Three quarters of what the sample job costs at the full price."""
    told = await buyer.buyer.quote(file or sample_file(), SubmitOptions())
    return int(max(d["total_nusd"] for d in told["deals"]) * 3 // 4)


async def resting(market: Market, **settings: Any) -> tuple[MemoryNode, MemoryNode, str]:
    """A provider, a buyer whose limit is below its ask, and the run that rests."""
    provider = await market.provider(**settings)
    buyer = await market.buyer()
    run_id = await buyer.submit(sample_file(), max_nusd=await budget(buyer), rest=True)
    await until_resting(buyer)
    return provider, buyer, run_id


async def until(holds: Callable[[], Any]) -> None:
    """Return as soon as it holds, within a minute."""
    for _ in range(600):
        if holds():
            return
        await trio.sleep(0.1)
    raise AssertionError("it never held")


async def until_resting(buyer: MemoryNode, count: int = 1) -> None:
    await until(lambda: len(wishes_of(buyer)) >= count)


def wishes_of(node: MemoryNode) -> Sequence[Wish]:
    newest = node.sheets.newest
    return () if newest is None else newest.sheet.wishes


def state_of(node: MemoryNode, run_id: str) -> str:
    return str(node.runs.get(run_id).card["state"])


async def test_without_rest_a_run_over_its_budget_fails(
    market: Market, autojump_clock: object
) -> None:
    await market.provider()
    buyer = await market.buyer()
    run_id = await buyer.submit(sample_file(), max_nusd=await budget(buyer))
    end = await market.end_of(buyer, run_id)
    assert (end["kind"], end["error"]) == ("failed", "MarketError")
    assert not wishes_of(buyer)


async def test_a_wish_tells_nothing_of_the_job(market: Market, autojump_clock: object) -> None:
    _, buyer, _ = await resting(market)
    assert buyer.sheets.newest is not None
    wire = buyer.sheets.newest.sealed.wire
    body = decode_file(sample_file()).body
    assert body.job.work not in wire
    again = await market.buyer("again")
    again.meet(*market.nodes)
    await again.submit(sample_file(), max_nusd=await budget(again), rest=True)
    await until_resting(again)
    assert wishes_of(again)[0].commitment != wishes_of(buyer)[0].commitment
    await market.close()


async def test_a_resting_run_fails_at_its_deadline_and_its_wish_goes(
    market: Market, autojump_clock: object
) -> None:
    await market.provider()
    buyer = await market.buyer()
    limit = await budget(buyer)
    began_ns = now_ns()
    run_id = await buyer.submit(sample_file(), max_nusd=limit, rest=True, deadline_s=900)
    await until_resting(buyer)
    [wish] = wishes_of(buyer)
    assert wish.valid_until_ns <= began_ns + 901 * NS_PER_S
    await trio.sleep(600)
    assert wishes_of(buyer) == (wish,), "looking again changes nothing"
    end = await market.end_of(buyer, run_id)
    assert (end["error"], "deadline" in end["message"]) == ("MarketError", True)
    assert now_ns() >= began_ns + 900 * NS_PER_S
    await trio.sleep(1)
    assert not wishes_of(buyer)
    looks = len(buyer.events(run_id, "ranked"))
    assert looks < 16, "it looks ever more rarely"
    assert MAX_REST_NS == 300 * NS_PER_S


async def test_a_cheaper_provider_fills_a_resting_run(
    market: Market, autojump_clock: object
) -> None:
    dear, buyer, run_id = await resting(market)
    assert state_of(buyer, run_id) == "waiting"
    cheap = await market.node("cheap", price_nusd=HALF)
    cheap.meet(buyer)
    end = await market.end_of(buyer, run_id)
    assert end["kind"] == "result", end
    [filled] = buyer.events(run_id, "filled")
    assert filled["provider"] == cheap.peer
    assert end["cost_nusd"] <= filled["quote_nusd"]
    await trio.sleep(wishes.WITHDRAW_WITHIN_S + 1)
    assert not wishes_of(buyer)
    assert not dear.seller.busy
    await market.settle_down()
    market.check()


async def test_a_quote_below_the_public_ask_fills_and_its_evidence_is_right(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, run_id = await resting(market, wish_ask_nusd=HALF)
    provider.meet(buyer)
    end = await market.end_of(buyer, run_id)
    assert end["kind"] == "result", end
    [filled] = buyer.events(run_id, "filled")
    full_nusd = (await buyer.buyer.quote(sample_file(seed=1), SubmitOptions()))["deals"][0][
        "total_nusd"
    ]
    assert filled["quote_nusd"] < full_nusd * 51 // 100
    replays = replay(decode(Evidence, buyer.buyer.evidence(run_id)))
    [bid] = [bid for look in replays for bid in look.bids]
    assert bid.verdict.is_right
    assert bid.bid is not None
    assert ticket_of(bid.bid)
    await market.settle_down()
    market.check()


async def test_a_provider_remembers_over_a_restart_which_quotes_are_filled(
    market: Market, autojump_clock: object
) -> None:
    dear, buyer, run_id = await resting(market, wish_ask_nusd=HALF)
    dear.meet(buyer)
    await market.end_of(buyer, run_id)
    before = set(dear.seller.quoting._filled)
    assert len(before) == 1
    await dear.kill()
    await market.restart(dear)
    assert set(dear.seller.quoting._filled) == before


async def test_a_wish_goes_some_time_after_it_was_filled(
    market: Market, autojump_clock: object
) -> None:
    """Not as its trade appears on the tape, which would tell whose it is."""
    went = [await _goes_after(market.another(), share) for share in (0.0, 0.4, 0.9)]
    assert went == [0, 4, 9]


async def _goes_after(market: Market, share: float) -> int:
    """In tenths of ``WITHDRAW_WITHIN_S``."""
    provider, buyer, run_id = await resting(market, wish_ask_nusd=HALF)
    buyer.buyer.wishes._random = lambda: share
    [wish] = wishes_of(buyer)
    provider.meet(buyer)
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    began = trio.current_time()
    await trio.sleep(0.1)
    assert len(provider.tape.listed()) == 1
    assert wishes_of(buyer) == (wish,)
    await until(lambda: not wishes_of(buyer))
    await market.close()
    return int((trio.current_time() - began) / wishes.WITHDRAW_WITHIN_S * 10)


async def test_a_run_that_all_were_too_busy_for_is_quoted_to_when_a_slot_frees(
    market: Market, autojump_clock: object
) -> None:
    provider = await market.provider()
    provider.workers.step_s = 1.0
    first, second = await market.buyer("first"), await market.buyer("second")
    long_run = await first.submit(sample_file(40))
    await until(lambda: provider.seller.busy)
    waiting = await second.submit(sample_file(), rest=True)
    await until_resting(second)
    provider.meet(second)
    assert (await market.end_of(first, long_run))["kind"] == "result"
    free_at = trio.current_time()
    await until(lambda: second.events(waiting, "filled"))
    assert trio.current_time() - free_at < 5
    assert (await market.end_of(second, waiting))["kind"] == "result"


async def test_a_restart_brings_the_wish_back(market: Market, autojump_clock: object) -> None:
    _, buyer, run_id = await resting(market)
    [before] = wishes_of(buyer)
    await buyer.kill()
    await market.restart(buyer)
    await until_resting(buyer)
    [after] = wishes_of(buyer)
    assert after.commitment != before.commitment
    assert replace(after, commitment=b"", number=0, valid_until_ns=0) == replace(
        before, commitment=b"", number=0, valid_until_ns=0
    )
    cheap = await market.node("cheap", price_nusd=HALF)
    cheap.meet(buyer)
    assert (await market.end_of(buyer, run_id))["kind"] == "result"


async def buy_resting(market: Market, cut: Cut | None = None) -> tuple[int, int]:
    """A run that rests and is quoted to, with a power cut; the writes of buyer and provider."""
    provider = await market.provider(wish_ask_nusd=HALF)
    buyer = await market.buyer()
    limit = await budget(buyer)

    async def submit() -> None:
        await buyer.submit(sample_file(12), max_nusd=limit, rest=True, checkpoint_steps=4)

    async def gossip() -> None:
        while True:
            await trio.sleep(0.5)
            for one, other in ((buyer, provider), (provider, buyer)):
                if not (one.down.is_set() or other.down.is_set()):
                    one.meet(other)

    if cut is not None:
        victim = {"buyer": buyer, "provider": provider}[cut.victim]
        victim.cut_at, victim.cut_before = cut.at, cut.before
    market.nursery.start_soon(submit)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gossip)
        if cut is not None:
            with trio.fail_after(60):
                await victim.down.wait()
            await trio.sleep(cut.down_s)
            await market.restart(victim)
        else:
            await trio.sleep(1)
        if not buyer.runs.cards():  # nothing of it was on disk
            assert cut is not None
            assert (cut.victim, cut.at, cut.before) == ("buyer", 1, True)
            market.nursery.start_soon(submit)
            await trio.sleep(1)
        [card] = buyer.runs.cards()
        end = await market.end_of(buyer, card["id"])
        nursery.cancel_scope.cancel()
    assert end["kind"] == "result", end
    await trio.sleep(wishes.WITHDRAW_WITHIN_S + 1)
    assert not wishes_of(buyer)
    await market.settle_down()
    market.check()
    owing, due = market.debts(buyer, provider)
    assert owing == due == end["cost_nusd"] <= limit
    await market.close()
    return buyer.writes, provider.writes


@pytest.mark.parametrize("victim", ["buyer", "provider"])
async def test_a_power_cut_at_any_write_loses_no_run_that_rests(
    market: Market, autojump_clock: object, victim: str
) -> None:
    writes = dict(zip(("buyer", "provider"), await buy_resting(market.another()), strict=True))
    assert writes[victim] >= 4
    for at in range(1, writes[victim] + 1):
        for before in (True, False):
            cut = Cut(victim, at, before, SHORT_S)
            try:
                await buy_resting(market.another(), cut)
            except Exception as error:
                raise AssertionError(f"{cut}: {error!r}") from error


async def test_a_cancelled_run_wishes_no_more(market: Market, autojump_clock: object) -> None:
    _, buyer, run_id = await resting(market)
    buyer.runs.get(run_id).cancel_requested.set()
    assert (await market.end_of(buyer, run_id))["kind"] == "cancelled"
    await trio.sleep(1)
    assert not wishes_of(buyer)
    assert buyer.sheets.newest is not None


async def test_wishes_on_a_sheet_are_bounded_and_the_next_moves_up(
    market: Market, autojump_clock: object
) -> None:
    await market.provider()
    buyer = await market.buyer()
    limit = await budget(buyer)
    runs = [
        await buyer.submit(sample_file(seed=seed), max_nusd=limit, rest=True)
        for seed in range(wishes.MAX_WISHES + 1)
    ]
    await until_resting(buyer, wishes.MAX_WISHES)
    await trio.sleep(10)
    assert len(wishes_of(buyer)) == wishes.MAX_WISHES
    assert len({wish.number for wish in wishes_of(buyer)}) == wishes.MAX_WISHES
    before = {wish.number for wish in wishes_of(buyer)}
    buyer.runs.get(runs[0]).cancel_requested.set()
    await market.end_of(buyer, runs[0])
    await trio.sleep(1)
    assert len({wish.number for wish in wishes_of(buyer)} - before) == 1
    await market.close()


async def test_a_provider_answers_a_bounded_number_of_wishes_each_once(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quoting, "MAX_QUOTES_OUT", 3)
    monkeypatch.setattr(quoting, "MAX_QUOTES_OUT_PER_ACCOUNT", 2)
    told: list[tuple[str, str]] = []
    provider = await market.provider(wish_ask_nusd=HALF)
    buyers = [await market.buyer(f"buyer-{number}") for number in range(3)]
    for buyer in buyers:
        _refuse_all(buyer, told, monkeypatch)
        limit = await budget(buyer)
        for seed in range(3):
            await buyer.submit(sample_file(seed=seed), max_nusd=limit, rest=True)
        await until_resting(buyer, 3)
    provider.meet(*buyers)
    await trio.sleep(20)
    assert len(told) == 3
    assert max(sum(peer == buyer.peer for peer, _ in told) for buyer in buyers) <= 2
    assert len({commitment for _, commitment in told}) == 3
    await trio.sleep(5 * MAX_QUOTE_LIFETIME_NS / NS_PER_S)
    assert len({peer for peer, _ in told}) == 3, "everybody's turn comes"
    await market.close()


async def test_a_look_at_wishes_is_bounded_and_goes_on(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quoting, "MAX_WISHES_A_LOOK", 1)
    provider = await market.provider()
    looked: list[bytes] = []
    monkeypatch.setattr(
        provider.seller.quoting, "_consider", lambda _w, sheet, *_: looked.append(sheet.node)
    )
    buyers = [await market.buyer(f"buyer-{number}") for number in range(3)]
    for buyer in buyers:
        await buyer.submit(sample_file(), max_nusd=await budget(buyer), rest=True)
        await until_resting(buyer)
    provider.meet(*buyers)
    await trio.sleep(2.5 * quoting.LOOK_EVERY_S)
    nodes = {buyer.identity.node.public_key for buyer in buyers}
    assert set(looked) == nodes
    assert len(looked) <= 4
    await market.close()


async def test_a_copied_commitment_keeps_no_quote_from_its_buyer(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, run_id = await resting(market, wish_ask_nusd=HALF)
    thief = await market.node("thief")
    identity, [wish] = thief.identity, wishes_of(buyer)
    stolen = make_sheet(
        identity.node,
        number=now_ns(),
        now_ns=now_ns(),
        delegation=identity.delegation(now_ns()),
        wishes=(wish,),
    )
    provider.sheets.take(stolen.sealed.wire, "")
    await trio.sleep(5)
    assert provider.seller.quoting._out, "the thief has its quote"
    provider.meet(buyer)
    await trio.sleep(5)
    assert buyer.events(run_id, "filled")
    assert (await market.end_of(buyer, run_id))["kind"] == "result"


async def test_strangers_do_not_get_all_quotes(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quoting, "MAX_QUOTES_OUT_TO_STRANGERS", 1)
    provider = await market.provider(wish_ask_nusd=HALF)
    buyers = [await market.buyer(f"buyer-{number}") for number in range(3)]
    paid = provider.ledger_book
    monkeypatch.setattr(
        type(paid), "received_nusd", lambda _, account: 10**9 * (account == buyers[2].account)
    )
    told: list[tuple[str, str]] = []
    for buyer in buyers:
        _refuse_all(buyer, told, monkeypatch)
        await buyer.submit(sample_file(), max_nusd=await budget(buyer), rest=True)
        await until_resting(buyer)
    provider.meet(*buyers)
    await trio.sleep(30)
    peers = [peer for peer, _ in told]
    assert len(peers) == 2
    assert buyers[2].peer in peers
    await market.close()


@pytest.mark.parametrize("held_back", [{"level": 1}, {"credit_nusd": 0}])
async def test_a_provider_quotes_nothing_that_it_would_refuse(
    market: Market, autojump_clock: object, held_back: dict[str, int]
) -> None:
    provider, buyer, run_id = await resting(market, wish_ask_nusd=HALF, **held_back)
    provider.meet(buyer)
    await trio.sleep(60)
    assert not provider.seller.quoting._out
    assert not buyer.events(run_id, "rejected")
    assert state_of(buyer, run_id) == "waiting"
    await market.close()


async def test_a_wish_is_answered_again_when_the_quote_has_expired(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, buyer, _ = await resting(market, wish_ask_nusd=HALF)
    told: list[tuple[str, str]] = []
    _refuse_all(buyer, told, monkeypatch)
    provider.meet(buyer)
    await trio.sleep(0.9 * MAX_QUOTE_LIFETIME_NS / NS_PER_S)
    assert len(told) == 1
    await trio.sleep(0.4 * MAX_QUOTE_LIFETIME_NS / NS_PER_S)
    assert len(told) == 2
    await market.close()


async def test_what_is_left_of_a_run_rests_when_its_provider_is_lost(
    market: Market, autojump_clock: object
) -> None:
    await market.provider("dear")
    buyer = await market.buyer()
    file = sample_file(120)
    limit = await budget(buyer, file)
    run_id = await buyer.submit(file, max_nusd=limit, rest=True, checkpoint_steps=30)
    await until_resting(buyer)
    [whole] = wishes_of(buyer)
    buyer.buyer.wishes._random = lambda: 0.0
    cheap = await market.node("cheap", price_nusd=HALF)
    cheap.workers.step_s = 0.5
    cheap.meet(buyer)
    await until(lambda: buyer.events(run_id, "receipt"))
    assert not wishes_of(buyer)
    await cheap.kill()
    await until_resting(buyer)
    [rest] = wishes_of(buyer)
    assert rest.flop < whole.flop
    assert rest.limit_nusd < whole.limit_nusd
    other = await market.node("other", price_nusd=HALF)
    other.meet(buyer)
    end = await market.end_of(buyer, run_id)
    assert end["kind"] == "result", end
    assert end["cost_nusd"] <= limit
    assert [filled["provider"] for filled in buyer.events(run_id, "filled")] == [
        cheap.peer,
        other.peer,
    ]


async def test_a_node_that_stops_takes_its_wishes_back(
    market: Market, autojump_clock: object
) -> None:
    _, buyer, _ = await resting(market)
    await buyer.sheets.withdraw()
    assert not wishes_of(buyer)
    assert buyer.sheets.newest is not None
    await market.close()


def _refuse_all(
    buyer: MemoryNode, told: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hear(word: Quoted, _peer: str) -> Declined:
        quote = decode_quote(word)
        told.append((buyer.peer, quote.commitment.hex()))
        return Declined("not today")

    monkeypatch.setattr(buyer.buyer.wishes, "_hear", hear)


def decode_quote(word: Quoted) -> Quote:
    return open_sealed(Quote, word.quote).record


async def test_so_many_wishes_are_remembered_as_answered(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quoting, "MAX_ANSWERED", 1)
    provider, first, _ = await resting(market, wish_ask_nusd=HALF)
    second = await market.buyer("second")
    await second.submit(sample_file(), max_nusd=await budget(second), rest=True)
    await until_resting(second)
    for buyer in (first, second):
        monkeypatch.setattr(buyer.buyer.wishes, "_wake", lambda _: None)
    provider.meet(first, second)
    await until(lambda: len(provider.seller.quoting._out) == 2)
    [(node, _)] = provider.seller.quoting._answered
    assert node in {first.identity.node.public_key, second.identity.node.public_key}
    await market.close()
