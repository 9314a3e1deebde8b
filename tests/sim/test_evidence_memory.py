"""Why a run went where it went: the kept evidence, ranked again, and what tampering does to it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from msgspec.structs import replace

from p2pflop.cli.main import run
from p2pflop.cli.progress import ranked_lines
from p2pflop.errors import ConfigError, ProtocolError
from p2pflop.market.evidence import MAX_SHEETS, Evidence, Look, Verdict, replay
from p2pflop.market.ranking import Miss, MissReason, Policy
from p2pflop.market.samples import MANDATE
from p2pflop.node import bidding
from p2pflop.node import evidence as kept
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, sample_file
from p2pflop.node.memory_workers import MemoryWorker
from p2pflop.node.runs import ROUND_ROW
from p2pflop.node.service import SubmitOptions
from p2pflop.wire import decode, encode

if TYPE_CHECKING:
    from tests.sim.conftest import Market


def evidence_of(buyer: MemoryNode, run_id: str) -> Evidence:
    return decode(Evidence, buyer.buyer.evidence(run_id))


async def bought(market: Market, providers: int = 3) -> tuple[MemoryNode, list[MemoryNode], str]:
    """A run between the cheapest of some providers and a buyer."""
    sellers = [
        await market.provider(f"seller {number}", price_nusd=PRICE_NUSD * (number + 1))
        for number in range(providers)
    ]
    buyer = await market.buyer()
    run_id = await buyer.submit(sample_file())
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    return buyer, sellers, run_id


def with_look(evidence: Evidence, **changes: object) -> Evidence:
    return replace(evidence, looks=(replace(evidence.looks[0], **changes),))


def verdict(evidence: Evidence) -> Verdict:
    [look] = replay(evidence)
    [replayed] = look.bids
    return replayed.verdict


async def test_the_best_deal_is_seen_to_be_the_best(market: Market, autojump_clock: object) -> None:
    buyer, sellers, run_id = await bought(market)
    [look] = replay(evidence_of(buyer, run_id))
    assert [entry.peer for entry in look.ranked] == [seller.peer for seller in sellers]
    [replayed] = look.bids
    assert (replayed.verdict, replayed.place, replayed.filled) == (Verdict.BEST, 0, True)
    assert look.is_right


async def test_it_is_kept_over_restarts_and_each_sheet_once(
    market: Market, autojump_clock: object
) -> None:
    buyer, _, run_id = await bought(market)
    again = await buyer.submit(sample_file(seed=1))
    await market.end_of(buyer, again)
    before = evidence_of(buyer, run_id)
    await buyer.kill()
    await market.restart(buyer)
    assert evidence_of(buyer, run_id) == before
    assert replay(evidence_of(buyer, again))[0].is_right
    assert buyer.journal._database.read("SELECT COUNT(*) FROM sheets") == [(3,)]


async def test_who_refused_was_asked_first(market: Market, autojump_clock: object) -> None:
    cheap = await market.provider("cheap", price_nusd=PRICE_NUSD)
    dear = await market.provider("dear", price_nusd=2 * PRICE_NUSD)
    small = await market.provider("small", price_nusd=PRICE_NUSD, memory_bytes=1000)
    buyer = await market.buyer()
    cheap.seller.stopping = True
    run_id = await buyer.submit(sample_file())
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    evidence = evidence_of(buyer, run_id)
    [look] = replay(evidence)
    assert [(each.place, each.verdict) for each in look.bids] == [
        (0, Verdict.BEST),
        (1, Verdict.NEXT),
    ]
    assert "shutting down" in look.bids[0].reason
    assert [entry.peer for entry in look.ranked[:2]] == [cheap.peer, dear.peer]
    assert isinstance(look.ranked[2], Miss)
    assert (look.ranked[2].peer, look.ranked[2].reason) == (small.peer, MissReason.MEMORY)
    assert evidence.looks[0].attempts[0].reject

    # Without the first bid the second one is not for the best.
    [_, second] = evidence.looks[0].attempts
    assert verdict(with_look(evidence, attempts=(second,))) is Verdict.WORSE


async def test_what_was_tampered_with_is_seen(market: Market, autojump_clock: object) -> None:
    buyer, _, run_id = await bought(market)
    evidence = evidence_of(buyer, run_id)
    look = evidence.looks[0]
    assert verdict(with_look(evidence, sheets=look.sheets[:-1])) is Verdict.OTHER_BOOK
    others: dict[str, object] = {
        "policy": Policy(max_price_nusd=1),
        "class_ids": (),
        "max_nusd": look.mandate.max_nusd - 1,
        "salt": bytes(16),
    }
    for name, other in others.items():
        changed_mandate = replace(look.mandate, **{name: other})
        assert verdict(with_look(evidence, mandate=changed_mandate)) is Verdict.OTHER_MANDATE
    attempt = look.attempts[0]
    for changed in (
        replace(attempt, bid=attempt.bid[:-1] + bytes([attempt.bid[-1] ^ 1])),
        replace(attempt, fill=attempt.fill[:-1] + bytes([attempt.fill[-1] ^ 1])),
        replace(attempt, fill=attempt.bid),
    ):
        assert verdict(with_look(evidence, attempts=(changed,))) is Verdict.FORGED
    assert verdict(replace(evidence, network="another")) is Verdict.FORGED


async def test_an_answer_to_another_bid_is_no_answer(
    market: Market, autojump_clock: object
) -> None:
    buyer, _, run_id = await bought(market)
    other = await buyer.submit(sample_file(seed=1))
    await market.end_of(buyer, other)
    evidence = evidence_of(buyer, run_id)
    [attempt], [others] = evidence.looks[0].attempts, evidence_of(buyer, other).looks[0].attempts
    swapped = replace(attempt, fill=others.fill)
    assert verdict(with_look(evidence, attempts=(swapped,))) is Verdict.FORGED


async def test_of_a_large_book_the_best_are_kept(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MAX_SHEETS", 2)
    buyer, sellers, run_id = await bought(market)
    evidence = evidence_of(buyer, run_id)
    assert len(evidence.looks[0].sheets) == 2
    [look] = replay(evidence)
    assert [entry.peer for entry in look.ranked] == [seller.peer for seller in sellers[:2]]
    assert look.bids[0].verdict is Verdict.UNPROVEN


async def test_a_round_after_a_wait_is_a_look_of_its_own(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer_slowly(_worker: MemoryWorker) -> None:
        await trio.sleep(1)

    monkeypatch.setattr(MemoryWorker, "_answer", answer_slowly)
    provider, buyer = await market.provider(slots=1), await market.buyer()
    first = await buyer.submit(sample_file(2000))
    await trio.sleep(0.1)
    second = await buyer.submit(sample_file(20, seed=1))
    assert (await market.end_of(buyer, second))["kind"] == "result"
    assert (await market.end_of(buyer, first))["kind"] == "result"
    looks = evidence_of(buyer, second).looks
    assert len(looks) >= 2
    assert not any(look.continues for look in looks)
    assert all(each.is_right for each in replay(evidence_of(buyer, second)))
    assert provider.seller.busy == 0


async def test_the_commands_show_it_and_find_what_is_wrong(
    market: Market,
    autojump_clock: object,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    buyer, sellers, run_id = await bought(market)
    right, wrong = tmp_path / "right.p2pe", tmp_path / "wrong.p2pe"
    evidence = evidence_of(buyer, run_id)
    right.write_bytes(encode(evidence))
    wrong.write_bytes(encode(with_look(evidence, mandate=MANDATE)))

    assert run(["explain", str(right)]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert ["took the job" in line for line in lines[1:4]] == [True, False, False]
    assert sum("not asked: another was better" in line for line in lines) == 2
    assert "right: the best deal" in shown.err

    assert run(["explain", str(right), "--json", "--provider", sellers[2].peer]) == 0
    [look] = json.loads(capsys.readouterr().out)
    [entry] = look["ranked"]
    assert entry["total_nusd"] == 3 * look["bids"][0]["quote_nusd"]
    assert look["bids"][0]["right"] is True

    assert run(["audit-tape", str(right)]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "1 bid in 1 file, 0 against the rule"
    wrong.write_bytes(encode(with_look(evidence, whole=False)))
    assert run(["audit-tape", str(right), str(wrong)]) == 0
    assert "0 against the rule, 1 unproven: not all of the" in capsys.readouterr().err
    wrong.write_bytes(encode(with_look(evidence, mandate=MANDATE)))
    assert run(["audit-tape", str(right), str(wrong)]) == ProtocolError.exit_code
    assert f"{wrong}: the bid to" in capsys.readouterr().err
    none = tmp_path / "none.p2pe"
    assert run(["audit-tape", str(none), str(wrong)]) == ProtocolError.exit_code
    told = capsys.readouterr().err
    assert f"not audited: cannot read {none}" in told
    assert "1 bid in 1 file, 1 against the rule" in told
    wrong.write_bytes(b"nothing of the kind")
    assert run(["audit-tape", str(wrong)]) == ConfigError.exit_code
    assert "is no evidence" in capsys.readouterr().err
    files = [str(path) for path in (none, right, wrong)]
    assert run(["audit-tape", *files]) == ConfigError.exit_code
    told = capsys.readouterr().err
    assert f"not audited: {wrong} is no evidence" in told
    assert "1 bid in 1 file, 0 against the rule" in told
    assert "2 of 3 files not audited" in told
    assert run(["audit-tape", "--json", *files]) == ConfigError.exit_code
    audited, *unread = json.loads(capsys.readouterr().out)
    assert (audited["file"], audited["right"]) == (str(right), True)
    assert [(each["file"], each["error"][:11]) for each in unread] == [
        (str(none), "cannot read"),
        (str(wrong), str(wrong)[:11]),
    ]


def test_limits_bound_what_is_decoded() -> None:
    look = Look(0, False, MANDATE, True, (b"",) * (MAX_SHEETS + 1), (), ())
    with pytest.raises(Exception, match="length"):
        decode(Evidence, encode(Evidence(2, "main", (look,))))
    assert replay(Evidence(2, "main", ())) == []


async def test_a_look_that_found_nothing_tells_why_of_each_ask(
    market: Market,
    autojump_clock: object,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = await market.provider("small", price_nusd=PRICE_NUSD, memory_bytes=1000)
    dear = await market.provider("dear", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    run_id = await buyer.submit(sample_file(), max_nusd=1, rest=True)
    await trio.sleep(30)
    evidence = evidence_of(buyer, run_id)
    looks = replay(evidence)
    assert len(looks) > 1
    for look in looks:
        assert look.bids == []
        assert {(entry.peer, entry.reason) for entry in look.ranked if isinstance(entry, Miss)} == {
            (small.peer, MissReason.MEMORY),
            (dear.peer, MissReason.BUDGET),
        }
    path = tmp_path / "decision"
    path.write_bytes(encode(evidence))
    assert run(["explain", str(path)]) == 0
    told = capsys.readouterr()
    assert told.out.count("does not do: over the budget") == 1  # and not once for each look
    assert f"looks 1 to {len(looks)}" in told.err
    assert "nothing was bid for: no ask did" in told.err
    buyer.buyer.runs.get(run_id).cancel_requested.set()


async def test_an_account_that_failed_is_said_to_be_avoided(
    market: Market,
    autojump_clock: object,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cheap = await market.provider("cheap", price_nusd=PRICE_NUSD)
    await market.provider("dear", price_nusd=2 * PRICE_NUSD)
    buyer = await market.buyer()
    now_ns = buyer.buyer.now_ns()
    for _ in range(2):
        buyer.buyer.experience.note_failure(cheap.account, now_ns)
    run_id = await buyer.submit(sample_file())
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    [ranked] = [e for e in buyer.buyer.runs.get(run_id).events if e["kind"] == "ranked"]
    [miss] = ranked["misses"]
    assert (miss["reason"], miss["failures"]) == (str(MissReason.POLICY), 2)
    assert miss["avoided_until_ns"] > now_ns
    assert "it failed 2 times in a row" in ranked_lines(ranked)[-1]
    path = tmp_path / "decision"
    path.write_bytes(buyer.buyer.evidence(run_id))
    assert run(["explain", str(path)]) == 0
    told = capsys.readouterr().out
    assert re.search(r"avoided until \d\d:\d\d: it failed 2 times in a row", told)
    assert str(MissReason.POLICY) not in told


async def test_of_a_damaged_file_there_is_one_line(
    market: Market,
    autojump_clock: object,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    buyer, _, run_id = await bought(market)
    whole = buyer.buyer.evidence(run_id)
    path = tmp_path / "decision"
    places = range(0, len(whole), 7)
    damaged = [whole[:place] for place in places]
    damaged += [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in places]
    for data in damaged:
        path.write_bytes(data)
        for command in ("audit-tape", "explain"):
            code = run([command, str(path)])
            told = capsys.readouterr()
            assert "fault of p2pflop" not in told.err
            assert code in (0, 2, 11)
            if code == 2:
                assert f"{path} is no evidence" in told.err
                assert told.err.count("error:") == 1
                assert len(told.err.splitlines()) == 2


async def test_of_a_run_that_waits_long_the_newest_looks_are_kept(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A price that moves wakes who rests, and costs nothing: what is kept of it is bounded, in the
    journal and in memory, over a restart too."""
    monkeypatch.setattr(bidding, "MAX_LOOKS", 4)
    seller, buyer = await market.provider(), await market.buyer()
    quote = await buyer.buyer.quote(sample_file(), SubmitOptions())
    max_nusd = quote["deals"][0]["total_nusd"] // 2
    run_id = await buyer.submit(sample_file(), max_nusd=max_nusd, rest=True, deadline_s=86400)
    told: list[int] = []

    async def watch() -> None:
        async for events in buyer.runs.follow(run_id, 0):
            told.extend(event["seq"] for event in events)

    market.nursery.start_soon(watch)
    for number in range(8):
        await trio.sleep(3600)
        await seller.sell()
        buyer.meet(seller)
        rows = [row.kind for row in buyer.runs.rows(run_id)]
        assert 1 <= rows.count(kept.LOOK_ROW) <= 4
        assert rows.count(kept.LOOK_ROW) == rows.count(kept.WANTED_ROW) == rows.count(ROUND_ROW)
        ranked = [event for event in buyer.events(run_id) if event["kind"] == "ranked"]
        assert 1 <= len(ranked) <= 4
        if number == 4:
            await buyer.kill()
            await market.restart(buyer)
            market.nursery.start_soon(watch)
    seller.settings = dataclasses.replace(seller.settings, ask_nusd=PRICE_NUSD // 4)
    await seller.sell()
    buyer.meet(seller)
    assert (await market.end_of(buyer, run_id))["kind"] == "result"
    await trio.sleep(1)
    assert len(told) > 100
    replays = replay(evidence_of(buyer, run_id))
    assert 1 <= len(replays) <= 4
    assert [each.verdict for each in replays[-1].bids] == [Verdict.BEST]
