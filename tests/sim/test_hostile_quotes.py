"""Quotes that are false, late, stolen, not kept, or too many: declined, with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from msgspec.structs import replace

from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.job.buying import BUSY_PREFIX
from p2pflop.keys import PrivateKey
from p2pflop.market.records import Ask, Quote
from p2pflop.market.sheets import make_sheet
from p2pflop.market.wishes import MAX_QUOTE_LIFETIME_NS, make_quote
from p2pflop.node import messages as m
from p2pflop.node import quote_stream, wishes
from p2pflop.node.memory_market import PRICE_NUSD, MemoryNode, now_ns
from p2pflop.node.quote_stream import Declined, Noted, Quoted
from p2pflop.node.sell import Seller
from p2pflop.units import NS_PER_S
from p2pflop.wire import Sealed, encode
from tests.sim.test_wishes_memory import HALF, resting, state_of, until, wishes_of

if TYPE_CHECKING:
    from tests.sim.conftest import Market


class Stranger:
    """A node that speaks the quote protocol and means no good."""

    def __init__(self, node: MemoryNode, buyer: MemoryNode) -> None:
        self.node = node
        self.buyer = buyer
        self._quotes = 0

    @property
    def public(self) -> Ask:
        """Its ask."""
        assert self.node.sheets.newest is not None
        return self.node.sheets.newest.sheet.asks[0]

    def quote(self, price_nusd: int = HALF, **changes: Any) -> Sealed[Quote]:
        wish = changes.pop("wish", None) or wishes_of(self.buyer)[0]
        key: PrivateKey = changes.pop("key", self.node.identity.node)
        self._quotes += 1
        return make_quote(
            key,
            changes.pop("buyer", self.buyer.identity.node.public_key),
            wish,
            replace(self.public, price_nusd=price_nusd, **changes),
            nonce=self._quotes.to_bytes(16, "big"),
            now_ns=now_ns(),
        )

    async def say(self, quote: bytes, sheet: bytes | None = None) -> Noted | Declined:
        if sheet is None:
            assert self.node.sheets.newest is not None
            sheet = self.node.sheets.newest.sealed.wire
        stream = await self.node.host.open(self.buyer.peer, quote_stream.PROTOCOL)
        try:
            return await quote_stream.tell(stream, Quoted(quote, sheet))
        finally:
            await stream.aclose()

    async def reason(self, quote: bytes, sheet: bytes | None = None) -> str:
        answer = await self.say(quote, sheet)
        assert isinstance(answer, Declined)
        return answer.reason


async def stranger(market: Market) -> Stranger:
    """One that never quotes by itself, and a buyer with one run that rests."""
    provider, buyer, _ = await resting(market)
    return Stranger(provider, buyer)


async def test_false_quotes_are_declined_with_the_reason(
    market: Market, autojump_clock: object
) -> None:
    liar = await stranger(market)
    [wish] = wishes_of(liar.buyer)
    unknown = replace(wish, commitment=bytes(32))
    assert "no such wish" in await liar.reason(liar.quote(wish=unknown).wire)
    assert "another buyer" in await liar.reason(liar.quote(buyer=bytes(32)).wire)
    assert "does not cross" in await liar.reason(liar.quote(PRICE_NUSD).wire)
    assert "does not have" in await liar.reason(liar.quote(number=7).wire)
    assert "not a valid" in await liar.reason(b"junk")
    old = liar.quote().wire
    await trio.sleep(MAX_QUOTE_LIFETIME_NS / NS_PER_S)
    assert "expired" in await liar.reason(old)
    [run_id] = [card["id"] for card in liar.buyer.runs.cards()]
    assert state_of(liar.buyer, run_id) == "waiting"
    assert not liar.buyer.events(run_id, "filled")
    await market.close()


async def test_a_quote_dearer_than_its_sheet_is_a_lie(
    market: Market, autojump_clock: object
) -> None:
    liar = await stranger(market)
    identity, record = liar.node.identity, liar.node.sheets.newest
    assert record is not None
    cheaper = make_sheet(
        identity.node,
        number=record.sheet.number + 1,
        now_ns=now_ns(),
        delegation=identity.delegation(now_ns()),
        asks=(replace(liar.public, price_nusd=HALF // 2),),
    )
    assert "dearer than its node's own sheet" in await liar.reason(
        liar.quote().wire, cheaper.sealed.wire
    )
    await market.close()


async def test_an_equivocating_node_quotes_nothing(market: Market, autojump_clock: object) -> None:
    liar = await stranger(market)
    identity, newest = liar.node.identity, liar.node.sheets.newest
    assert newest is not None
    other = make_sheet(
        identity.node,
        number=newest.sheet.number,
        now_ns=now_ns(),
        delegation=identity.delegation(now_ns()),
        asks=(replace(liar.public, price_nusd=HALF),),
    )
    assert "no sheet" in await liar.reason(liar.quote().wire, other.sealed.wire)
    assert liar.buyer.sheets.book.proof(identity.node.public_key) is not None
    await market.close()


async def test_a_quote_of_another_node_costs_its_bearer_the_stream(
    market: Market, autojump_clock: object
) -> None:
    liar = await stranger(market)
    honest = await market.provider("honest")
    liar.buyer.meet(honest)
    with pytest.raises((ProviderError, ProtocolError)):
        await liar.say(liar.quote(key=honest.identity.node).wire)
    [run_id] = [card["id"] for card in liar.buyer.runs.cards()]
    assert not liar.buyer.events(run_id, "filled")
    await market.close()


async def test_a_quote_that_is_not_kept_is_the_last_for_a_while(
    market: Market, autojump_clock: object
) -> None:
    liar = await stranger(market)
    buyer, node = liar.buyer, liar.node
    [run_id] = [card["id"] for card in buyer.runs.cards()]
    made = liar.quote()
    node.seller.quoting.fill(made.id)  # so that it is refused when the bid comes
    assert isinstance(await liar.say(made.wire), Noted)
    await until(lambda: buyer.events(run_id, "rejected"))
    [rejected] = buyer.events(run_id, "rejected")
    assert "filled already" in rejected["reason"]
    await trio.sleep(1)
    assert state_of(buyer, run_id) == "waiting"
    assert "known already" in await liar.reason(made.wire)
    assert "was not kept" in await liar.reason(liar.quote().wire)
    await trio.sleep(wishes.DISTRUST_NS / NS_PER_S)
    assert isinstance(await liar.say(liar.quote().wire), Noted)
    assert (await market.end_of(buyer, run_id))["kind"] == "result"


@pytest.mark.parametrize("words", ["ask has expired", BUSY_PREFIX + "every slot is taken"])
async def test_a_late_bid_and_a_taken_slot_are_nobodys_lie(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    quoter = await stranger(market)
    [run_id] = [card["id"] for card in quoter.buyer.runs.cards()]
    with monkeypatch.context() as patch:
        patch.setattr(Seller, "_objection", lambda *_: words)
        assert isinstance(await quoter.say(quoter.quote().wire), Noted)
        await until(lambda: quoter.buyer.events(run_id, "rejected"))
    await trio.sleep(1)
    assert isinstance(await quoter.say(quoter.quote().wire), Noted)
    await until(lambda: quoter.buyer.events(run_id, "filled"))
    await market.close()


async def test_floods_of_quotes_are_bounded(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar = await stranger(market)
    held = liar.buyer.buyer.wishes
    monkeypatch.setattr(held, "_wake", lambda _: None)
    answers = [await liar.say(liar.quote(HALF - 10**12 * n).wire) for n in range(32)]
    noted = sum(isinstance(answer, Noted) for answer in answers)
    assert noted == wishes.MAX_QUOTES_PER_ACCOUNT
    reasons = {answer.reason for answer in answers if isinstance(answer, Declined)}
    assert reasons == {"quotes of yours are here already", "too many quotes of yours"}
    [mine] = held._resting.values()
    assert len(mine.quotes) == wishes.MAX_QUOTES_PER_ACCOUNT
    monkeypatch.setattr(wishes, "MAX_QUOTES", 2)
    others = [await market.node(f"other-{n}", price_nusd=PRICE_NUSD) for n in range(2)]
    better = Stranger(others[0], liar.buyer)
    worse = Stranger(others[1], liar.buyer)
    assert "better quotes" in await worse.reason(worse.quote(HALF + 10**12).wire)
    assert isinstance(await better.say(better.quote(HALF // 2).wire), Noted)
    assert len(mine.quotes) == 2
    await market.close()


async def test_streams_that_say_nothing_or_junk_are_bounded(
    market: Market, autojump_clock: object
) -> None:
    liar = await stranger(market)
    open_ones = [
        await liar.node.host.open(liar.buyer.peer, quote_stream.PROTOCOL)
        for _ in range(wishes.MAX_STREAMS_PER_PEER)
    ]
    await trio.sleep(0.1)
    with pytest.raises((ProviderError, ProtocolError)):
        await liar.say(liar.quote().wire)
    for stream in open_ones:
        await stream.aclose()
    await trio.sleep(quote_stream.QUOTE_S + 1)
    for junk in (b"", b"junk", encode(Noted()), m.encode_message(m.Heartbeat())):
        stream = await liar.node.host.open(liar.buyer.peer, quote_stream.PROTOCOL)
        await stream.send(junk)
        with pytest.raises((ProviderError, ProtocolError)):
            await stream.receive()
        await stream.aclose()
    assert isinstance(await liar.say(liar.quote().wire), Noted)
    [run_id] = [card["id"] for card in liar.buyer.runs.cards()]
    assert (await market.end_of(liar.buyer, run_id))["kind"] in ("result", "failed")


async def test_so_many_quotes_that_came_to_nothing_are_remembered(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wishes, "MAX_SPENT", 2)
    monkeypatch.setattr(wishes, "MAX_DISTRUSTED", 2)
    first = await stranger(market)
    held = first.buyer.buyer.wishes
    monkeypatch.setattr(held, "_wake", lambda _: None)
    [mine] = held._resting.values()
    others = [await market.node(f"other-{n}", price_nusd=PRICE_NUSD) for n in range(2)]
    made = []
    for liar in (first, *(Stranger(other, first.buyer) for other in others)):
        made.append((liar, liar.quote()))
        assert isinstance(await liar.say(made[-1][1].wire), Noted)
        [quote] = mine.quotes.values()
        held.spend(mine.ticket(quote), kept=False)
    assert len(held._spent) == len(held._distrusted) == 2
    for liar, shown in made[1:]:
        assert "known already" in await liar.reason(shown.wire)
        assert "was not kept" in await liar.reason(liar.quote().wire)
    assert isinstance(await first.say(made[0][1].wire), Noted), "forgotten: the oldest"
    await market.close()


async def test_quotes_of_all_peers_together_are_bounded(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wishes, "ALL_BURST", 2)
    first = await stranger(market)
    monkeypatch.setattr(first.buyer.buyer.wishes, "_wake", lambda _: None)
    others = [await market.node(f"other-{n}", price_nusd=PRICE_NUSD) for n in range(2)]
    liars = [first, *(Stranger(other, first.buyer) for other in others)]
    answers = [await liar.say(liar.quote().wire) for liar in liars]
    assert answers == [Noted(), Noted(), Declined(quote_stream.TOO_MANY)]
    await trio.sleep(1 / wishes.ALL_PER_S)
    assert await liars[2].say(liars[2].quote().wire) == Noted()
    await market.close()


async def test_streams_of_all_peers_together_are_bounded(
    market: Market, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wishes, "MAX_STREAMS", 1)
    first = await stranger(market)
    second = Stranger(await market.node("other", price_nusd=PRICE_NUSD), first.buyer)
    held = await first.node.host.open(first.buyer.peer, quote_stream.PROTOCOL)
    await trio.sleep(0.1)
    with pytest.raises((ProviderError, ProtocolError)):
        await second.say(second.quote().wire)
    await held.aclose()
    await trio.sleep(0.1)
    assert isinstance(await second.say(second.quote().wire), Noted)
    await market.close()
