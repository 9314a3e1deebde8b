"""Paying and being paid between nodes in memory: claims, acks, refusals, limits, credit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from p2pflop.errors import ConfigError, StoreError, VerificationError
from p2pflop.ids import content_hash
from p2pflop.node import payments as payments_module
from p2pflop.node.ledger_book import LedgerBook
from p2pflop.node.memory_market import MemoryNode, sample_file
from p2pflop.node.payment_book import Payment, Side, State
from p2pflop.node.payment_stream import PROTOCOL
from p2pflop.node.service import Json, SubmitOptions
from p2pflop.node.statements import make_statement

if TYPE_CHECKING:
    from tests.sim.conftest import Market

LONG_S = 2 * payments_module.MAX_AGAIN_S


def payment_id(number: int = 1) -> bytes:
    return content_hash(b"payment %d" % number)


def only(node: MemoryNode) -> Json:
    [payment] = node.money.listed()
    return payment


async def buy(market: Market, buyer: MemoryNode, seed: int = 0, **options: object) -> Json:
    end = await market.end_of(buyer, await buyer.submit(sample_file(seed=seed), **options))
    await trio.sleep(5)
    return end


async def indebted(market: Market) -> tuple[MemoryNode, MemoryNode, int]:
    """Provider, buyer and what is owed after one purchase."""
    provider, buyer = await market.provider(), await market.buyer()
    end = await buy(market, buyer)
    assert end["kind"] == "result"
    owing, due = market.debts(buyer, provider)
    assert owing == due > 0
    return provider, buyer, due


async def statements(buyer: MemoryNode, provider: MemoryNode) -> tuple[Json, Json]:
    """Of each about the other, once they agree in every amount."""
    ours = await make_statement(buyer.ledger_book, buyer.account, provider.account, 0)
    theirs = await make_statement(provider.ledger_book, provider.account, buyer.account, 0)
    amounts = [{e["reference"]: 0 for e in each["entries"]} for each in (ours, theirs)]
    for found, each in zip(amounts, (ours, theirs), strict=True):
        for entry in each["entries"]:
            found[entry["reference"]] += entry["amount_nusd"]
    assert {ref: -nusd for ref, nusd in amounts[0].items() if nusd} == {
        ref: nusd for ref, nusd in amounts[1].items() if nusd
    }
    assert ours["closing_nusd"] == -theirs["closing_nusd"]
    return ours, theirs


async def test_a_claim_is_acknowledged_and_both_books_agree(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, due = await indebted(market)
    await buyer.money.pay(payment_id(), provider.account, due, "invoice 7")
    assert market.debts(buyer, provider) == (0, due), "claimed is not received"
    await trio.sleep(5)
    assert (only(buyer)["state"], only(buyer)["told"]) == ("claimed", True)
    waiting = only(provider)
    assert (waiting["state"], waiting["reference"]) == ("claimed", "invoice 7")
    assert waiting["account"] == buyer.account.hex()
    await provider.money.acknowledge(payment_id())
    await trio.sleep(5)
    for node in (buyer, provider):
        assert (only(node)["state"], only(node)["told"]) == ("acknowledged", True)
        assert only(node)["said"]
        assert only(node)["heard"]
    assert market.debts(buyer, provider) == (0, 0)
    assert provider.ledger_book.received_nusd(buyer.account) == due
    ours, theirs = await statements(buyer, provider)
    assert [entry["memo"] for entry in ours["entries"]][-1] == "paid: invoice 7"
    assert [entry["memo"] for entry in theirs["entries"]][-1] == "received: invoice 7"
    assert theirs["head"] == provider.ledger_book.report()["head"]


async def test_what_one_has_paid_ahead_takes_nothing_from_what_another_owes(
    market: Market, autojump_clock: object
) -> None:
    provider, _, due = await indebted(market)
    await provider.money.receive(payment_id(), content_hash(b"who pays ahead"), 7, "cash")
    report = provider.ledger_book.report()
    assert (report["owed_nusd"], report["owing_nusd"]) == (due, 7)
    assert sum(balance["due_nusd"] for balance in report["balances"]) == due - 7
    assert report["entry_count"] == len(report["entries"])


async def test_the_same_payment_again_counts_once_and_another_amount_is_refused(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, due = await indebted(market)
    for _ in range(2):
        await buyer.money.pay(payment_id(), provider.account, due, "")
        await trio.sleep(5)
    with pytest.raises(ConfigError, match="is another one"):
        await buyer.money.pay(payment_id(), provider.account, due + 1, "")
    with pytest.raises(ConfigError, match="is another one"):
        await buyer.money.receive(payment_id(), provider.account, due, "")
    for _ in range(2):
        await provider.money.acknowledge(payment_id())
        await trio.sleep(5)
    with pytest.raises(ConfigError, match="was acknowledged, and stays so"):
        await provider.money.refuse(payment_id(), "no")
    market.check()


async def test_a_refused_claim_is_taken_back_by_an_entry_of_its_own(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, due = await indebted(market)
    await buyer.money.pay(payment_id(), provider.account, due, "by cheque")
    await trio.sleep(5)
    before = len(buyer.ledger_book.report()["entries"])
    await provider.money.refuse(payment_id(), "it bounced")
    await trio.sleep(5)
    assert (only(buyer)["state"], only(buyer)["reason"]) == ("refused", "it bounced")
    entries = buyer.ledger_book.report()["entries"]
    assert len(entries) == before + 1
    assert entries[0]["memo"] == "refused: it bounced"
    assert market.debts(buyer, provider) == (due, due)
    await statements(buyer, provider)
    with pytest.raises(ConfigError, match="was refused"):
        await provider.money.acknowledge(payment_id())
    assert await provider.money.refuse(payment_id(), "again") == only(provider)


async def test_money_that_nobody_claimed_is_booked_on_both_sides(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, due = await indebted(market)
    await provider.money.receive(payment_id(), buyer.account, due + 5, "cash")
    await trio.sleep(5)
    assert (only(buyer)["side"], only(buyer)["state"]) == ("paid", "acknowledged")
    assert only(buyer)["reference"] == "cash"
    assert market.debts(buyer, provider) == (-5, -5), "paid ahead"
    await statements(buyer, provider)


async def test_who_was_never_owed_anything_books_nothing_in_anothers_ledger(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    provider.sheets.book.apply(await buyer.sell(), 0)
    buyer.meet(provider)
    await provider.money.receive(payment_id(), buyer.account, 5, "a gift")
    await trio.sleep(5)
    assert "nothing was ever owed to your account here" in only(provider)["trouble"]
    assert buyer.ledger_book.report()["entries"] == []
    assert buyer.money.listed() == []


async def test_a_stranger_may_pay_ahead_and_is_found_by_its_sheet(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer = await market.provider(credit_nusd=0), await market.buyer()
    run_id = await buyer.submit(sample_file(), deadline_s=20)
    assert (await market.end_of(buyer, run_id))["kind"] == "failed"
    [refused, *_] = buyer.events(run_id, "rejected")
    assert "pay $" in refused["reason"]
    await buyer.money.pay(payment_id(), provider.account, 10**9, "ahead")
    await trio.sleep(5)
    assert (await market.end_of(buyer, await buyer.submit(sample_file(seed=1), deadline_s=20)))[
        "kind"
    ] == "failed", "claimed is not received"
    await provider.money.acknowledge(payment_id())
    end = await buy(market, buyer, seed=2, deadline_s=20)
    assert end["kind"] == "result"
    assert market.debts(buyer, provider) == (end["cost_nusd"] - 10**9,) * 2


async def test_what_is_paid_ahead_is_spent_to_the_last_and_outlives_restarts(
    market: Market, autojump_clock: object
) -> None:
    """Three jobs paid ahead, three more owed, and the seventh refused: all of it in both books."""
    provider, buyer = await market.provider(credit_nusd=0), await market.buyer()
    [deal] = (await buyer.buyer.quote(sample_file(), SubmitOptions()))["deals"]
    price_nusd = deal["total_nusd"]
    paid_nusd = 3 * price_nusd
    await buyer.money.pay(payment_id(), provider.account, paid_nusd, "ahead")
    await trio.sleep(5)
    assert market.debts(buyer, provider) == (-paid_nusd, 0), "the buyer's word alone"
    await provider.money.acknowledge(payment_id())
    await trio.sleep(5)
    assert market.debts(buyer, provider) == (-paid_nusd,) * 2
    for bought in range(1, 7):
        for node in (provider, buyer):
            await node.kill()
            await market.restart(node)
        end = await buy(market, buyer, seed=bought, deadline_s=30)
        assert end["kind"] == "result", bought
        assert market.debts(buyer, provider) == (bought * price_nusd - paid_nusd,) * 2
        assert provider.ledger_book.received_nusd(buyer.account) == paid_nusd
    run_id = await buyer.submit(sample_file(seed=7), deadline_s=30)
    assert (await market.end_of(buyer, run_id))["kind"] == "failed"
    assert "over your credit" in buyer.events(run_id, "rejected")[0]["reason"]
    ours, _ = await statements(buyer, provider)
    assert ours["closing_nusd"] == -paid_nusd
    market.check()


async def test_a_word_waits_for_a_node_that_is_away_over_restarts_of_both(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, due = await indebted(market)
    await provider.kill()
    await buyer.money.pay(payment_id(), provider.account, due, "")
    await trio.sleep(50 * 3600)
    assert only(buyer)["trouble"]
    assert not only(buyer)["told"]
    await buyer.kill()
    await market.restart(buyer)
    await trio.sleep(LONG_S)
    await market.restart(provider)
    await trio.sleep(LONG_S)
    assert only(buyer)["told"]
    await buyer.kill()
    await provider.money.acknowledge(payment_id())
    await provider.kill()
    await market.restart(provider)
    await market.restart(buyer)
    await trio.sleep(LONG_S)
    assert only(buyer)["state"] == "acknowledged"
    assert only(provider)["told"]
    market.check()


async def test_a_word_is_brought_at_once_when_its_node_connects(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, due = await indebted(market)
    await provider.kill()
    await buyer.money.pay(payment_id(), provider.account, due, "")
    await trio.sleep(10 * LONG_S)
    assert not only(buyer)["told"]
    await market.restart(provider)
    began = trio.current_time()
    stranger = await market.buyer("stranger")
    await (await stranger.host.open(buyer.peer, PROTOCOL)).aclose()
    await trio.sleep(2 * payments_module.AGAIN_S)
    told_by_strangers = only(buyer)["told"]
    await (await provider.host.open(buyer.peer, PROTOCOL)).aclose()
    await trio.sleep(2 * payments_module.AGAIN_S)
    assert (told_by_strangers, only(buyer)["told"]) == (False, True)
    assert trio.current_time() - began < payments_module.MAX_AGAIN_S / 2


async def test_a_word_for_an_unknown_node_is_tried_again_when_anybody_connects(
    market: Market, autojump_clock: object
) -> None:
    buyer, provider = await market.buyer(), await market.provider()
    await buyer.money.pay(payment_id(), provider.account, 10**9, "ahead")
    await trio.sleep(10 * LONG_S)
    assert only(buyer)["trouble"] == "no node of that account is known"
    began = trio.current_time()
    await provider.sell()
    await (await provider.host.open(buyer.peer, PROTOCOL)).aclose()
    buyer.meet(provider)
    await trio.sleep(3 * payments_module.AGAIN_S)
    assert only(buyer)["told"]
    assert trio.current_time() - began < payments_module.MAX_AGAIN_S / 2


async def test_who_has_claimed_can_be_told_of_other_money(
    market: Market, autojump_clock: object
) -> None:
    """A buyer that pays ahead is in no order book, and has bought nothing yet."""
    buyer, provider = await market.buyer(), await market.provider()
    await provider.sell()
    buyer.meet(provider)
    await buyer.money.pay(payment_id(1), provider.account, 10**9, "ahead")
    await trio.sleep(LONG_S)
    await provider.money.acknowledge(payment_id(1))
    await provider.money.receive(payment_id(2), buyer.account, 5, "and in cash")
    await trio.sleep(LONG_S)
    assert all(payment["told"] for payment in provider.money.listed())
    assert market.debts(buyer, provider) == (-(10**9) - 5, -(10**9) - 5)
    [claimed, cash] = sorted(buyer.money.listed(), key=lambda each: -each["amount_nusd"])
    assert (claimed["state"], cash["state"]) == ("acknowledged", "acknowledged")


async def test_who_connects_again_and_again_is_told_no_more_often_than_every_second(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, buyer, due = await indebted(market)
    await provider.kill()
    tries: list[float] = []

    async def fails(_self: object, _payment: bytes) -> str:
        tries.append(trio.current_time())
        buyer.money.met(provider.peer)
        return "it is gone again"

    monkeypatch.setattr(payments_module.Payments, "_try", fails)
    await buyer.money.pay(payment_id(), provider.account, due, "")
    await trio.sleep(10)
    assert 5 < len(tries) <= 11


async def test_nothing_is_claimed_that_is_not_on_disk(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, buyer, due = await indebted(market)

    async def full(*_: object) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(buyer.payment_book, "put", full)
        with pytest.raises(StoreError):
            await buyer.money.pay(payment_id(), provider.account, due, "")
    assert market.debts(buyer, provider) == (due, due)
    await trio.sleep(LONG_S)
    assert provider.money.listed() == []
    await buyer.money.pay(payment_id(), provider.account, due, "")
    await trio.sleep(LONG_S)
    assert only(provider)["state"] == "claimed"


@pytest.mark.parametrize(
    ("amount_nusd", "text", "words"),
    [
        (0, "", "more than"),
        (-1, "", "more than"),
        (10**15 + 1, "", "at most"),
        (1, "two\nlines", "one line"),
        (1, "\x1b[2J", "one line"),
        (1, "\N{RIGHT-TO-LEFT OVERRIDE}", "one line"),
        (1, "x" * 201, "one line"),
    ],
)
async def test_what_is_no_payment_is_not_booked(
    market: Market, autojump_clock: object, amount_nusd: int, text: str, words: str
) -> None:
    buyer = await market.buyer()
    other = content_hash(b"somebody")
    for pay in (buyer.money.pay, buyer.money.receive):
        with pytest.raises(ConfigError, match=words):
            await pay(payment_id(), other, amount_nusd, text)
    with pytest.raises(ConfigError, match="own account"):
        await buyer.money.pay(payment_id(), buyer.account, 1, "")
    for answer in (buyer.money.acknowledge(payment_id()), buyer.money.refuse(payment_id(), "")):
        with pytest.raises(ConfigError, match="nobody has claimed"):
            await answer
    assert buyer.ledger_book.report()["entries"] == []


async def test_claims_wait_up_to_limits_and_those_who_owe_come_first(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payments_module, "MAX_STRANGERS_CLAIMS", 2)
    monkeypatch.setattr(payments_module, "MAX_CLAIMS", 5)
    monkeypatch.setattr(payments_module, "MAX_CLAIMS_PER_ACCOUNT", 3)
    provider, buyer, _ = await indebted(market)
    strangers = [await market.node(f"stranger {number}") for number in range(3)]
    for number, stranger in enumerate(strangers):
        await stranger.money.pay(payment_id(100 + number), provider.account, 1, "spam")
        await trio.sleep(5)
    assert "owe nothing" in only(strangers[2])["trouble"]
    for number in range(4):
        await buyer.money.pay(payment_id(number), provider.account, 1, "")
        await trio.sleep(5)
    listed = provider.money.listed()
    assert [payment["account"] == buyer.account.hex() for payment in listed] == [
        *(True, True, True),
        *(False, False),
    ]
    assert "3 claims of your account wait" in buyer.money.listed()[0]["trouble"]
    await provider.money.refuse(payment_id(100), "spam")
    await provider.money.acknowledge(payment_id(1))
    await trio.sleep(LONG_S)
    assert all(payment["told"] for payment in buyer.money.listed()), "there is room again"
    assert only(strangers[2])["told"]


async def test_acks_that_nobody_asked_for_are_bounded(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payments_module, "MAX_UNASKED_A_DAY", 2)
    provider, buyer, _ = await indebted(market)
    for number in range(3):
        await provider.money.receive(payment_id(number), buyer.account, 1, "")
        await trio.sleep(5)
    assert len(buyer.money.listed()) == 2
    await trio.sleep(25 * 3600)
    assert len(buyer.money.listed()) == 3


async def test_of_an_ack_that_nobody_asked_for_little_beyond_the_debt_is_booked(
    market: Market, autojump_clock: object
) -> None:
    provider, buyer, due = await indebted(market)
    most_nusd = due + payments_module.MAX_UNASKED_AHEAD_NUSD
    await provider.money.receive(payment_id(1), buyer.account, most_nusd + 1, "so they say")
    await trio.sleep(LONG_S)
    assert buyer.money.listed() == []
    assert market.debts(buyer, provider)[0] == due
    assert "has to be claimed first" in only(provider)["trouble"]
    await provider.money.receive(payment_id(2), buyer.account, most_nusd, "cash")
    await trio.sleep(5)
    assert market.debts(buyer, provider)[0] == due - most_nusd
    await provider.money.receive(payment_id(3), buyer.account, 1, "more")
    await trio.sleep(LONG_S)
    assert market.debts(buyer, provider)[0] == due - most_nusd, "all of them together"


async def test_words_under_way_are_bounded(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payments_module, "MAX_UNTOLD", 1)
    buyer = await market.buyer()
    await buyer.money.pay(payment_id(1), content_hash(b"nobody"), 1, "")
    await buyer.money.pay(payment_id(1), content_hash(b"nobody"), 1, "")
    with pytest.raises(ConfigError, match="wait for their other side"):
        await buyer.money.pay(payment_id(2), content_hash(b"nobody"), 1, "")
    await trio.sleep(5)
    assert only(buyer)["trouble"] == "no node of that account is known"


async def test_a_statement_from_a_day_on_opens_with_what_was_before(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, buyer, due = await indebted(market)
    await trio.sleep(3600)
    await buyer.money.pay(payment_id(), provider.account, due - 1, "")
    whole = await make_statement(buyer.ledger_book, buyer.account, provider.account, 0)
    since_ns = whole["entries"][-1]["at_ns"]
    part = await make_statement(buyer.ledger_book, buyer.account, provider.account, since_ns)
    assert part["opening_nusd"] == -due
    assert [entry["amount_nusd"] for entry in part["entries"]] == [due - 1]
    assert part["closing_nusd"] == whole["closing_nusd"] == -1
    later = await make_statement(buyer.ledger_book, buyer.account, provider.account, since_ns + 1)
    assert (later["opening_nusd"], later["entries"], later["closing_nusd"]) == (-1, [], -1)
    monkeypatch.setattr("p2pflop.node.statements.MAX_STATEMENT_ENTRIES", 1)
    with pytest.raises(ConfigError, match="over 1 entries"):
        await make_statement(buyer.ledger_book, buyer.account, provider.account, 0)


async def test_a_long_statement_is_read_in_pages(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pflop.node.ledger_book.PAGE_ENTRIES", 2)
    provider, buyer, _ = await indebted(market)
    for number in range(5):
        await buyer.money.pay(payment_id(number), provider.account, 1, "")
    entries, head = await buyer.ledger_book.entries_of(provider.account)
    assert len(entries) >= 6
    assert head.hex() == buyer.ledger_book.report()["head"]


async def test_only_so_many_streams_are_heard_at_once(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payments_module, "MAX_STREAMS", 2)
    provider, buyer, due = await indebted(market)
    silent = [await buyer.host.open(provider.peer, PROTOCOL) for _ in range(2)]
    await trio.sleep(1)
    await buyer.money.pay(payment_id(), provider.account, due, "")
    await trio.sleep(1)
    assert not only(buyer)["told"]
    await trio.sleep(LONG_S)
    assert only(buyer)["told"], "who says nothing is sent away"
    for stream in silent:
        await stream.aclose()


async def test_one_peer_does_not_take_all_streams(market: Market, autojump_clock: object) -> None:
    provider, buyer, due = await indebted(market)
    other = await market.node("other")
    count = payments_module.MAX_STREAMS
    silent = [await other.host.open(provider.peer, PROTOCOL) for _ in range(count)]
    await trio.sleep(1)
    await buyer.money.pay(payment_id(), provider.account, due, "")
    await trio.sleep(1)
    assert only(buyer)["told"]
    for stream in silent:
        await stream.aclose()


def test_a_payment_is_the_same_only_if_all_that_matters_is() -> None:
    made = Payment(b"id", Side.PAID, b"account", 5, 0, "", State.CLAIMED)
    assert made.is_same(made.side, made.account, 5)
    for other in (
        replace(made, side=Side.RECEIVED),
        replace(made, account=b"another"),
        replace(made, amount_nusd=6),
    ):
        assert not made.is_same(other.side, other.account, other.amount_nusd)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("UPDATE entries SET account = zeroblob(32) WHERE seq = 1", "under another account"),
        ("UPDATE entries SET body = x'00' WHERE seq = 1", "no ledger entry"),
        ("DELETE FROM entries WHERE seq = 1", "not what was written"),
    ],
)
async def test_a_damaged_ledger_is_not_opened(
    market: Market, autojump_clock: object, damage: str, told: str
) -> None:
    """Not even where only statements would be wrong, which find entries by their account."""
    provider, buyer, due = await indebted(market)
    await buyer.money.pay(payment_id(), provider.account, due, "")
    database = buyer.ledger_book._database
    await database.write(lambda connection: connection.execute(damage))
    with pytest.raises(VerificationError, match=told) as raised:
        LedgerBook(database, buyer.account)
    assert "backup" in raised.value.hint
