"""Limits of what one node buys, refuses and remembers, each at its number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from p2pflop.dht.database import Operation
from p2pflop.dht.planes import Stream
from p2pflop.errors import ConfigError
from p2pflop.ids import content_hash
from p2pflop.market.ranking import Miss, Policy, rank
from p2pflop.market.records import ZERO_HASH, Receipt
from p2pflop.market.samples import MANDATE, NOW_NS, ask, need, party
from p2pflop.market.views import BookView
from p2pflop.node import buy, ledger_book, letters, quoting, sell
from p2pflop.node import messages as m
from p2pflop.node.ledger_book import MAX_NODES
from p2pflop.node.memory_market import sample_file
from p2pflop.node.orders import MAX_RANKED_TOLD, Ranking, describe_ranking
from p2pflop.node.payment_book import Payment, Side, State
from p2pflop.node.payments import MAX_NODES_TRIED

if TYPE_CHECKING:
    from tests.sim.conftest import Market


async def test_so_many_runs_are_under_way_and_the_next_waits_for_the_user(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buy, "MAX_RUNS_UNDER_WAY", 2)
    provider, buyer = await market.provider(slots=4), await market.buyer()
    provider.workers.step_s = 1.0
    runs = [await buyer.submit(sample_file(seed=seed)) for seed in range(2)]
    with pytest.raises(ConfigError, match="2 jobs are under way") as told:
        await buyer.submit(sample_file(seed=2))
    assert "cancel" in told.value.hint
    for run_id in runs:
        assert (await market.end_of(buyer, run_id))["kind"] == "result"
    again = await buyer.submit(sample_file(seed=2))
    assert (await market.end_of(buyer, again))["kind"] == "result"


async def test_of_refusals_the_latest_are_remembered(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sell, "MAX_REFUSALS_REMEMBERED", 3)
    provider, buyer = await market.provider(level=1), await market.buyer()
    for seed in range(5):
        end = await market.end_of(buyer, await buyer.submit(sample_file(seed=seed)))
        assert end["error"] == "MarketError"
    assert len(provider.seller._refusals) == 3
    assert not provider.seller._sales


async def test_of_quotes_that_were_filled_the_latest_are_remembered(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quoting, "MAX_FILLED", 3)
    provider = await market.provider()
    ids = [content_hash(b"quote %d" % number) for number in range(5)]
    for quote_id in ids:
        provider.seller.quoting.fill(quote_id)
    filled = [provider.seller.quoting.is_filled(quote_id) for quote_id in ids]
    assert filled == [False, False, True, True, True]


async def test_of_sales_that_are_over_so_many_bytes_are_remembered(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, buyer = await market.provider(), await market.buyer()
    for seed in range(4):
        await market.end_of(buyer, await buyer.submit(sample_file(seed=seed)))
        await market.settle_down()
        if seed == 0:
            [sale] = provider.seller._sales.values()
            assert sale.body_bytes > 0
            monkeypatch.setattr(sell, "MAX_REMEMBERED_BYTES", 5 * sale.body_bytes // 2)
    assert len(provider.seller._sales) == len(provider.seller._by_fill) == 2
    assert provider.seller._over_bytes <= sell.MAX_REMEMBERED_BYTES


@pytest.mark.parametrize("others", [letters.MAX_WORDS_HEARD - 1, letters.MAX_WORDS_HEARD])
async def test_so_many_other_words_are_heard_before_the_answer(
    market: Market, autojump_clock: object, others: int
) -> None:
    """A peer that talks of other things has not answered."""
    speaker, hearer = await market.node("speaker"), await market.node("hearer")

    async def talk(stream: Stream) -> None:
        await stream.receive()
        for _ in range(others):
            await stream.send(m.encode_message(m.Heartbeat()))
        await stream.send(m.encode_message(m.Settled()))

    speaker.host.handle("/talks", talk)
    heard = await letters.leave_word(hearer.host, speaker.peer, m.Heartbeat(), "/talks")
    assert heard == (others < letters.MAX_WORDS_HEARD)


def test_of_a_ranking_the_best_are_told() -> None:
    sheets = tuple(
        party(number).sheet(
            *(ask(1 + n, 10**6 * (1 + n), memory_bytes=2**33 if n % 2 else 0) for n in range(20))
        )
        for number in range(4)
    )
    ranked = rank(sheets, need(), Policy(), NOW_NS)
    assert sum(isinstance(entry, Miss) for entry in ranked) > MAX_RANKED_TOLD
    told = describe_ranking(Ranking(bytes(16), BookView(sheets, NOW_NS), MANDATE, ranked, ()))
    assert len(told["deals"]) == len(told["misses"]) == MAX_RANKED_TOLD
    assert told["asks"] == len(ranked)
    totals = [deal["total_nusd"] for deal in told["deals"]]
    assert totals == [entry.total_nusd for entry in ranked[:MAX_RANKED_TOLD]]


async def test_of_an_accounts_nodes_and_of_entries_the_latest_are_told(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_book, "MAX_LISTED", 5)
    buyer = await market.buyer()
    account = content_hash(b"provider")
    nodes = [content_hash(b"node %d" % number) for number in range(MAX_NODES + 2)]

    async def write(insert: Operation | None) -> None:
        assert insert is not None
        await buyer.ledger_book._database.write(insert)

    for number, node in enumerate(nodes):
        fill = content_hash(b"fill %d" % number)
        receipt = Receipt(1, fill, 1, 0, ZERO_HASH, 1, ZERO_HASH, ZERO_HASH, 7)
        await buyer.ledger_book.delivered(receipt, account, NOW_NS + number, write, node=node)
    assert buyer.ledger_book.nodes_of(account) == nodes[:1:-1]
    assert len(buyer.ledger_book.report()["entries"]) == 5


async def test_of_an_accounts_nodes_so_many_are_tried_with_a_payment(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    buyer = await market.buyer()
    many = [content_hash(b"node %d" % number) for number in range(2 * MAX_NODES_TRIED)]
    monkeypatch.setattr(buyer.money, "_nodes_of", lambda _: many)
    payment = Payment(ZERO_HASH, Side.PAID, ZERO_HASH, 1, NOW_NS, "", State.CLAIMED)
    assert buyer.money._candidates(payment) == many[:MAX_NODES_TRIED]
