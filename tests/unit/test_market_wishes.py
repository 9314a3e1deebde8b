"""Wishes and quotes: which are made, which are believed, and why the others are not."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from p2pflop.keys import PrivateKey
from p2pflop.market import evidence
from p2pflop.market.book import Book
from p2pflop.market.fills import OpenBid, check_bid
from p2pflop.market.ranking import Deal, Policy, Quoted, rank, sum_costs
from p2pflop.market.records import (
    MAX_QUOTE_BYTES,
    MAX_SHEET_BYTES,
    ZERO_HASH,
    Ask,
    Bid,
    Quote,
    Rejected,
    Sheet,
    Wish,
)
from p2pflop.market.samples import (
    CLASS_ID,
    COSTS,
    JOB,
    NONCE,
    NOW_NS,
    SALT,
    TERMS,
    ask,
    bid,
    book,
    look,
    need,
)
from p2pflop.market.samples import party as make_party
from p2pflop.market.sheets import OpenSheet
from p2pflop.market.wishes import (
    ANY_PRICE_NUSD,
    MAX_QUOTE_LIFETIME_NS,
    MAX_SIZE,
    OpenQuote,
    check_quote,
    check_ticket,
    commit_to,
    crosses,
    depth,
    make_quote,
    make_wish,
    offer_to,
    ticket,
)
from p2pflop.units import MAX_NUSD, NS_PER_S
from p2pflop.wire import Sealed, seal

BUYER, SELLER, OTHER = make_party(1), make_party(2), make_party(3)
FLOP, TOUCHED = sum_costs(COSTS)
UNTIL_NS = NOW_NS + 900 * NS_PER_S


def wish(**changes: Any) -> Wish:
    """The wish of the sample job, which costs 350,000 nano-dollars on the sample ask."""
    values: dict[str, Any] = {
        "limit_nusd": 200_000,
        "flop": FLOP,
        "touched_bytes": TOUCHED,
        "moved_bytes": TERMS.moved_bytes,
        "memory_bytes": TERMS.memory_bytes,
        "commitment": commit_to(SALT, JOB),
        "valid_until_ns": UNTIL_NS,
        **changes,
    }
    return make_wish(values.pop("number", 1), values.pop("class_id", CLASS_ID), **values)


def quoted(offer: Ask | None = None, key: PrivateKey = SELLER.node, **changes: Any) -> bytes:
    """What a provider signs, whether or not it should."""
    made = quote(offer, key)
    return seal(replace(made.record, **changes), key).wire if changes else made.wire


def quote(
    offer: Ask | None = None, key: PrivateKey = SELLER.node, answered: Wish | None = None
) -> Sealed[Quote]:
    offer = ask(price_nusd=500_000) if offer is None else offer
    answered = wish() if answered is None else answered
    return make_quote(key, BUYER.node.public_key, answered, offer, nonce=NONCE, now_ns=NOW_NS)


def checked(
    data: bytes, *, sheet: OpenSheet | None = None, now_ns: int = NOW_NS
) -> OpenQuote | Rejected:
    sheet = SELLER.sheet(ask()) if sheet is None else sheet
    return check_quote(
        data,
        buyer=BUYER.node.public_key,
        wishes={wish().commitment: wish()},
        sheet_of=lambda node: sheet if node == sheet.node else None,
        now_ns=now_ns,
    )


def reason(data: bytes, **more: Any) -> str:
    found = checked(data, **more)
    assert isinstance(found, Rejected)
    return found.reason


def test_a_wish_says_less_than_the_job_and_never_too_much_money() -> None:
    made = wish(flop=123_456_789, limit_nusd=987_654, moved_bytes=1001, memory_bytes=7)
    assert (made.flop, made.limit_nusd) == (124_000_000, 987_000)
    assert (made.moved_bytes, made.memory_bytes) == (1010, 7)
    assert commit_to(bytes(32), JOB) != commit_to(SALT, JOB)


def test_a_wish_has_bounded_sizes() -> None:
    assert wish(flop=MAX_SIZE).flop == MAX_SIZE
    with pytest.raises(ValueError, match="sizes of up to"):
        wish(flop=MAX_SIZE + 1)


def test_an_ask_crosses_by_class_memory_and_the_whole_quote() -> None:
    at_half = ask(price_nusd=500_000)
    assert crosses(at_half, wish())
    assert crosses(at_half, wish(class_id=ZERO_HASH))
    assert not crosses(ask(), wish())
    assert not crosses(ask(price_nusd=500_000, class_id=bytes([1]) * 32), wish())
    assert not crosses(ask(price_nusd=500_000, memory_bytes=2**30 - 1), wish())
    assert not crosses(ask(price_nusd=500_000, setup_nusd=50_000), wish())
    assert not crosses(ask(price_nusd=500_000, min_charge_nusd=200_001 // 1000 * 1010), wish())
    assert not crosses(ask(price_nusd=500_000, byte_price_nusd=10**8), wish())


def test_a_provider_offers_its_cheapest_ask_and_goes_down_as_far_as_it_is_set() -> None:
    asks = [ask(1), ask(2, 900_000)]
    assert offer_to(asks, wish()) is None
    offered = offer_to(asks, wish(), 400_000)
    assert offered is not None
    assert (offered.number, offered.price_nusd) == (1, 400_000)
    assert offer_to([ask(3, 300_000)], wish(), 400_000) == ask(3, 300_000)
    assert offer_to([ask(4, 450_000), ask(3, 300_000)], wish()) == ask(3, 300_000)


def test_a_quote_is_believed_with_the_sheet_of_its_node() -> None:
    found = checked(quoted())
    assert isinstance(found, OpenQuote)
    assert found.total_nusd == 175_000
    assert found.ask.firm_until_ns == found.ask.valid_until_ns == NOW_NS + MAX_QUOTE_LIFETIME_NS
    assert found.sheet.account == SELLER.account.public_key
    assert len(quoted()) <= MAX_QUOTE_BYTES


def test_a_quote_ends_with_the_ask_and_the_wish() -> None:
    soon_ns = NOW_NS + NS_PER_S
    assert quote(ask(price_nusd=1, valid_until_ns=soon_ns)).record.ask.firm_until_ns == soon_ns
    assert quote(answered=wish(valid_until_ns=soon_ns)).record.ask.firm_until_ns == soon_ns


def test_a_quote_that_is_not_for_this_wish_is_refused() -> None:
    assert "another buyer" in reason(quoted(buyer=OTHER.node.public_key))
    assert "no such wish" in reason(quoted(commitment=bytes(32)))
    assert "does not cross" in reason(quoted(ask()))
    assert "does not cross" in reason(quoted(ask(price_nusd=1, memory_bytes=1)))
    assert "not a valid" in reason(b"junk")


def test_a_quote_that_is_early_late_or_loose_is_refused() -> None:
    end_ns = NOW_NS + MAX_QUOTE_LIFETIME_NS
    assert isinstance(checked(quoted(), now_ns=end_ns - 1), OpenQuote)
    assert "expired" in reason(quoted(), now_ns=end_ns)
    assert "future" in reason(quoted(), now_ns=NOW_NS - 30 * NS_PER_S - 1)
    assert "lives for up to 60 s" in reason(quoted(issued_ns=NOW_NS - 1))
    loose = replace(ask(price_nusd=1), valid_until_ns=end_ns, firm_until_ns=0)
    assert "not firm" in reason(quoted(ask=loose))


def test_a_quote_that_its_sheet_belies_is_refused() -> None:
    sheet = SELLER.sheet(ask(price_nusd=400_000))
    assert "dearer than its node's own sheet" in reason(quoted(), sheet=sheet)
    assert "no sheet" in reason(quoted(), sheet=OTHER.sheet(ask()))
    assert "does not have" in reason(quoted(ask(2, 1)))
    assert "does not have" in reason(quoted(), sheet=SELLER.sheet(ask(class_id=bytes(32))))
    assert "digits" in reason(quoted(ask=replace(quote().record.ask, price_nusd=1234)))


def test_a_node_that_has_equivocated_quotes_nothing() -> None:
    book = Book(bytes(32))
    for sheet in (SELLER.sheet(ask()), SELLER.sheet(ask(price_nusd=7))):
        book.apply(sheet, NOW_NS)
    found = check_quote(
        quoted(),
        buyer=BUYER.node.public_key,
        wishes={wish().commitment: wish()},
        sheet_of=lambda node: book.get(node, NOW_NS),
        now_ns=NOW_NS,
    )
    assert found == Rejected("the book has no sheet of the quote's node")


def quoted_deal(made: Sealed[Quote] | None = None) -> Deal:
    """The deal that the sample quote makes, ranked beside the seller's dearer ask."""
    made = quote() if made is None else made
    sheet = SELLER.sheet(ask())
    offers = [Quoted(sheet, made.record.ask, ticket(SALT, made))]
    ranked = rank([sheet], need(), Policy(), NOW_NS, quoted=offers)
    assert [entry.total_nusd for entry in ranked] == [175_000, 350_000]
    assert isinstance(ranked[0], Deal)
    return ranked[0]


def provider_says(data: bytes, now_ns: int = NOW_NS) -> OpenBid | Rejected:
    sheets: dict[int, Sheet] = {}
    return check_bid(data, node=SELLER.node.public_key, sheets=sheets, now_ns=now_ns)


def test_a_bid_on_a_quote_holds_whatever_became_of_the_sheet() -> None:
    made = bid(BUYER, quoted_deal())
    found = provider_says(made.wire)
    assert isinstance(found, OpenBid)
    assert (found.quote_id, found.ask.price_nusd) == (quote().id, 500_000)
    assert found.bid.quote_nusd == 175_000


def test_a_bid_on_a_quote_is_late_when_the_quote_is() -> None:
    end_ns = NOW_NS + MAX_QUOTE_LIFETIME_NS
    made = bid(BUYER, quoted_deal(), now_ns=end_ns)
    assert provider_says(made.wire, end_ns) == Rejected("ask has expired")


def test_a_ticket_opens_one_bid_of_one_buyer_for_one_job() -> None:
    deal = quoted_deal()

    def why(made: Sealed[Bid]) -> str:
        found = check_ticket(made)
        assert isinstance(found, Rejected)
        assert provider_says(made.wire) == found
        return found.reason

    assert isinstance(check_ticket(bid(BUYER, deal)), Sealed)
    assert "another job" in why(bid(BUYER, deal, job=replace(JOB, steps=99)))
    assert "another buyer" in why(bid(OTHER, deal))
    on_two = replace(deal.ask, number=2)
    assert "another ask" in why(bid(BUYER, replace(deal, ask=on_two)))
    forged = ticket(SALT, quote(key=OTHER.node))
    assert "another provider" in why(bid(BUYER, replace(deal, ticket=forged)))
    assert "not a valid" in why(bid(BUYER, replace(deal, ticket=SALT + b"junk")))
    assert "shows no quote" in why(bid(BUYER, replace(deal, ticket=b"short")))


def test_evidence_takes_a_quote_that_beats_the_book_and_no_other() -> None:
    sheet = SELLER.sheet(ask())
    cheap = OTHER.sheet(ask(price_nusd=100_000))

    def verdict(deal: Deal, *sheets: OpenSheet) -> evidence.Verdict:
        view = book(*sheets).view(NOW_NS)
        seen = look(view, bid(BUYER, deal, book_digest=view.digest))
        [replayed] = evidence.replay(evidence.Evidence(2, "main", (seen,)))
        return replayed.bids[0].verdict

    deal = quoted_deal()
    assert verdict(deal, sheet) is evidence.Verdict.BEST
    assert verdict(deal, sheet, cheap) is evidence.Verdict.WORSE
    assert verdict(deal, cheap) is evidence.Verdict.UNKNOWN_ASK
    forged = replace(deal, ticket=ticket(SALT, quote(key=OTHER.node)))
    assert verdict(forged, sheet) is evidence.Verdict.FORGED


def test_a_sheet_holds_as_many_wishes_as_orders() -> None:
    many = tuple(wish(number=number, limit_nusd=10**17) for number in range(32))
    sheet = SELLER.sheet(wishes=many)
    assert len(sheet.sealed.wire) < MAX_SHEET_BYTES


def test_the_depth_of_a_book_tells_no_buyer() -> None:
    sheets = [
        BUYER.sheet(wishes=(wish(number=1), wish(number=2, limit_nusd=201_000))),
        OTHER.sheet(wishes=(wish(), wish(number=3, limit_nusd=400_000))),
        SELLER.sheet(wishes=(wish(class_id=ZERO_HASH, valid_until_ns=NOW_NS),)),
    ]
    dear, cheap = depth(sheets, NOW_NS)
    assert (dear.price_nusd, dear.wishes, dear.limit_nusd) == (1_100_000, 1, 400_000)
    assert (cheap.price_nusd, cheap.wishes, cheap.limit_nusd) == (570_000, 3, 601_000)
    assert cheap.flop == 3 * 350 * 10**12
    assert cheap.class_id == CLASS_ID


def test_wishes_without_a_limit_are_one_level() -> None:
    wishes = [wish(number=n, limit_nusd=MAX_NUSD, flop=10**n) for n in range(4)]
    [level] = depth([BUYER.sheet(wishes=wishes)], NOW_NS)
    assert (level.price_nusd, level.wishes) == (ANY_PRICE_NUSD, 4)
    assert {each.limit_nusd for each in wishes} == {ANY_PRICE_NUSD}
