"""What holds for any ask, any wish and any quote."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pflop.errors import ProtocolError
from p2pflop.keys import PrivateKey
from p2pflop.market.ranking import Deal, Policy, rank, total_nusd
from p2pflop.market.ranking import Quoted as Offer
from p2pflop.market.records import ZERO_HASH, Ask, Rejected, Wish
from p2pflop.market.samples import CLASS_ID, JOB, NONCE, NOW_NS, SALT, ask, need, party
from p2pflop.market.wishes import (
    OpenQuote,
    check_quote,
    commit_to,
    crosses,
    make_quote,
    make_wish,
    offer_to,
    ticket,
    wish_total_nusd,
)
from p2pflop.node.quote_stream import Declined, Noted, Quoted, decode_message
from p2pflop.units import is_price, round_price
from p2pflop.wire import encode

BUYER, SELLER = party(1), party(2)
UNTIL_NS = NOW_NS + 10**12
PRICES = st.integers(0, 10**12).map(round_price)
ASKS = st.builds(
    lambda price, **rest: ask(1, price, **rest),
    PRICES,
    class_id=st.sampled_from([CLASS_ID, bytes([1]) * 32]),
    memory_bytes=st.integers(0, 2**34),
    flop_per_byte=st.sampled_from([0, 1, 10**4]),
    setup_nusd=st.integers(0, 10**6).map(round_price),
    min_charge_nusd=st.integers(0, 10**6).map(round_price),
    byte_price_nusd=st.integers(0, 10**8).map(round_price),
)
SIZES = st.integers(0, 10**18)
JOBS = st.tuples(SIZES, SIZES, st.integers(0, 10**12), st.integers(0, 2**34), st.integers(0, 2**62))
WORDS = st.one_of(
    st.builds(Quoted, st.binary(max_size=9), st.binary(max_size=9)),
    st.just(Noted()),
    st.builds(Declined, st.text(max_size=250)),
).map(encode)
CLASSES = st.sampled_from([CLASS_ID, ZERO_HASH])


def wish_of(job: tuple[int, int, int, int, int], class_id: bytes = CLASS_ID) -> Wish:
    flop, touched_bytes, moved_bytes, memory_bytes, limit_nusd = job
    return make_wish(
        1,
        class_id,
        limit_nusd=limit_nusd,
        flop=flop,
        touched_bytes=touched_bytes,
        moved_bytes=moved_bytes,
        memory_bytes=memory_bytes,
        commitment=commit_to(SALT, JOB),
        valid_until_ns=UNTIL_NS,
    )


@given(ASKS, JOBS, CLASSES)
def test_what_crosses_the_wish_does_for_the_job(
    offer: Ask, job: tuple[int, int, int, int, int], class_id: bytes
) -> None:
    flop, touched_bytes, moved_bytes, memory_bytes, limit_nusd = job
    if crosses(offer, wish_of(job, class_id)):
        assert class_id in (offer.class_id, ZERO_HASH)
        assert offer.memory_bytes >= memory_bytes
        assert total_nusd(offer, flop, touched_bytes, moved_bytes) <= limit_nusd


@given(JOBS)
def test_a_wish_is_near_its_job_and_rounded(job: tuple[int, int, int, int, int]) -> None:
    made = wish_of(job)
    sizes = (made.flop, made.touched_bytes, made.moved_bytes, made.memory_bytes)
    for told, real in zip(sizes, job, strict=False):
        assert is_price(told)
        assert real <= told <= real + real // 100 + 1
    assert is_price(made.limit_nusd)
    assert job[-1] - job[-1] // 100 - 1 <= made.limit_nusd <= job[-1]


@given(st.lists(ASKS, max_size=4), JOBS, PRICES | st.none())
def test_an_offer_crosses_and_is_never_dearer_than_the_ask(
    asks: list[Ask], job: tuple[int, int, int, int, int], lowest: int | None
) -> None:
    wanted = wish_of(job)
    offer = offer_to(asks, wanted, lowest)
    crossing = [each for each in asks if crosses(each, wanted)]
    if offer is None:
        assert not crossing
        return
    assert crosses(offer, wanted)
    for each in crossing:
        assert wish_total_nusd(offer, wanted) <= wish_total_nusd(each, wanted)


@given(ASKS, JOBS, PRICES)
def test_an_honest_answer_is_believed(
    public: Ask, job: tuple[int, int, int, int, int], lowest: int
) -> None:
    wanted = wish_of(job)
    offer = offer_to([public], wanted, lowest)
    if offer is None:
        return
    made = make_quote(SELLER.node, BUYER.node.public_key, wanted, offer, nonce=NONCE, now_ns=NOW_NS)
    sheet = SELLER.sheet(public)
    found = check_quote(
        made.wire,
        buyer=BUYER.node.public_key,
        wishes={wanted.commitment: wanted},
        sheet_of=lambda _: sheet,
        now_ns=NOW_NS,
    )
    assert isinstance(found, OpenQuote)
    assert found.total_nusd <= wanted.limit_nusd


@given(ASKS, JOBS, st.binary(max_size=600), st.integers(0, 599))
def test_no_bytes_are_believed_but_the_providers(
    public: Ask, job: tuple[int, int, int, int, int], junk: bytes, cut: int
) -> None:
    wanted = wish_of(job)
    made = make_quote(PrivateKey(SALT), bytes(32), wanted, public, nonce=NONCE, now_ns=NOW_NS).wire
    for data in (junk, made[:cut], made[:cut] + junk, made):
        found = check_quote(
            data,
            buyer=BUYER.node.public_key,
            wishes={wanted.commitment: wanted},
            sheet_of=lambda _: None,
            now_ns=NOW_NS,
        )
        assert isinstance(found, Rejected)


@given(st.binary(max_size=200) | WORDS)
def test_any_frame_is_a_word_in_its_one_encoding_or_refused(frame: bytes) -> None:
    try:
        message = decode_message(frame, "peer")
    except ProtocolError:
        return
    assert encode(message) == frame


@given(st.permutations([10**5, 2 * 10**5, 2 * 10**5, 3 * 10**5]))
def test_the_order_in_which_quotes_came_ranks_nothing(prices: list[int]) -> None:
    sheet = SELLER.sheet(ask())
    wanted = wish_of((10**15, 0, 0, 0, 10**9))
    offers = []
    for price in prices:
        offer = ask(price_nusd=price)
        nonce = price.to_bytes(16, "big")
        made = make_quote(
            SELLER.node, BUYER.node.public_key, wanted, offer, nonce=nonce, now_ns=NOW_NS
        )
        offers.append(Offer(sheet, made.record.ask, ticket(SALT, made)))
    ranked = rank([sheet], need(), Policy(), NOW_NS, quoted=offers)
    again = rank([sheet], need(), Policy(), NOW_NS, quoted=sorted(offers, key=lambda o: o.ticket))
    assert ranked == again
    assert [entry.ask.price_nusd for entry in ranked] == [*sorted(prices), 10**6]
    assert all(isinstance(entry, Deal) for entry in ranked)
