"""Two books compared, without streams: who says what, and that both are whole afterwards."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from p2pflop.dht.planes import MAX_FRAME_BYTES
from p2pflop.errors import ProtocolError
from p2pflop.market import exchange as exchange_module
from p2pflop.market.book import MAX_PROOFS, MAX_SHEETS, Book
from p2pflop.market.exchange import (
    MAX_PROOFS_A_FRAME,
    MAX_SHEETS_A_FRAME,
    MAX_SUMMARIES_A_PAGE,
    OUTLINE_BYTES,
    Conviction,
    Exchange,
    Listing,
    Message,
    OpenParcel,
    Outline,
    Parcel,
    Summary,
    Want,
    read,
)
from p2pflop.market.records import MAX_SHEET_LIFETIME_NS
from p2pflop.market.relay import MAX_FAULTS, MAX_SHEET_WIRE_BYTES, TURNED_AWAY_NS, Relay
from p2pflop.market.samples import NOW_NS, ask, book, party
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS
from p2pflop.wire import encode

SELLER = party(1)


def relay(made: Book | None = None) -> Relay:
    return Relay(book() if made is None else made, lambda: 0.5)


def converse(left: Relay, right: Relay, now_ns: int = NOW_NS) -> list[Message]:
    """What was said. Turns are strict: one side sends until it has no more to say."""
    said: list[Message] = []
    dialler = Exchange(left, "right", dialling=True)
    listener = Exchange(right, "left", dialling=False)
    frames: Iterable[bytes] = list(dialler.start(now_ns))
    speaker, hearer = dialler, listener
    while frames:
        answer: list[bytes] = []
        for frame in frames:
            assert not answer, "the other side has not ended its turn"
            assert len(frame) <= MAX_FRAME_BYTES
            said.append(read(hearer.expects, frame, "main"))
            answer += hearer.receive(said[-1], now_ns)
        frames, speaker, hearer = answer, hearer, speaker
    assert dialler.done
    assert listener.done
    return said


def kinds(said: Iterable[Message]) -> list[type[Message]]:
    return [type(message) for message in said]


def test_equal_books_say_no_more_than_their_outlines() -> None:
    left, right = (relay(book(SELLER.sheet(ask()))) for _ in range(2))
    assert kinds(converse(left, right)) == [Outline, Outline]


def test_books_become_the_same_and_only_what_differs_is_sent() -> None:
    common, mine, theirs = (party(number).sheet(ask()) for number in (1, 2, 3))
    newer = SELLER.sheet(ask(), number=2)
    left, right = relay(book(common, mine)), relay(book(common, theirs, newer))
    said = converse(left, right)
    assert kinds(said) == [Outline, Outline, Listing, Listing, Want, Want, OpenParcel, OpenParcel]
    sent = [message.sheets for message in said if isinstance(message, OpenParcel)]
    assert set(sent[0]) == {theirs, newer}
    assert sent[1] == (mine,)
    assert left.book.digest(NOW_NS) == right.book.digest(NOW_NS)
    assert kinds(converse(left, right)) == [Outline, Outline]


def test_a_conflict_convicts_on_one_side_and_the_proof_on_the_other() -> None:
    left, right = relay(book(SELLER.sheet(ask(1)))), relay(book(SELLER.sheet(ask(2))))
    converse(left, right)
    assert left.book.convicted() == {SELLER.node.public_key: 1}
    converse(right, left)
    assert right.book.convicted() == left.book.convicted()
    assert kinds(converse(left, right)) == [Outline, Outline]


def test_proofs_are_passed_on() -> None:
    left = relay(book(SELLER.sheet(ask(1)), SELLER.sheet(ask(2))))
    right = relay(book(SELLER.sheet(ask(1))))
    converse(right, left)
    assert right.book.convicted() == left.book.convicted() == {SELLER.node.public_key: 1}
    assert right.book.view(NOW_NS).sheets == ()
    third = relay()
    converse(third, right)
    assert third.book.convicted() == left.book.convicted()


def test_other_proofs_of_the_same_conviction_are_not_exchanged_for_ever() -> None:
    one, two, three = (SELLER.sheet(ask(number)) for number in (1, 2, 3))
    left, right = relay(book(one, two)), relay(book(two, three))
    assert kinds(converse(left, right)) == [Outline, Outline]


@pytest.mark.parametrize("count", [7, 8, 9])
def test_pages_and_parcels_are_filled(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    for name, value in {
        "MAX_SUMMARIES_A_PAGE": 4,
        "MAX_SHEETS_A_FRAME": 2,
        "MAX_PROOFS_A_FRAME": 1,
    }.items():
        monkeypatch.setattr(exchange_module, name, value)
    left, right = relay(), relay()
    for number in range(count):
        right.book.apply(party(number).sheet(ask()), NOW_NS)
    for number in range(100, 103):
        right.book.apply(party(number).sheet(ask(1)), NOW_NS)
        right.book.apply(party(number).sheet(ask(2)), NOW_NS)
    said = converse(left, right)
    pages = [message for message in said if isinstance(message, Listing)]
    assert [len(page.entries) for page in pages[:-1]] == [4] * (count // 4) + [count % 4] * (
        count % 4 > 0
    )
    assert left.book.digest(NOW_NS) == right.book.digest(NOW_NS)
    assert left.book.convicted() == right.book.convicted()


def test_what_is_refused_is_not_asked_for_again_at_once() -> None:
    """Two full books differ for as long as they are full: that must not cost traffic for ever."""
    left = relay(Book(bytes(32), max_strangers=4))
    right = relay(Book(b"s" * 32, max_strangers=4))
    for number in range(4):
        left.book.apply(party(number).sheet(ask()), NOW_NS)
        right.book.apply(party(number + 10).sheet(ask()), NOW_NS)
    for _ in range(3):
        converse(left, right)
    again = [m for m in converse(left, right) if isinstance(m, OpenParcel)]
    assert not any(message.sheets for message in again)
    later = [m for m in converse(left, right, NOW_NS + TURNED_AWAY_NS) if isinstance(m, OpenParcel)]
    assert any(message.sheets for message in later)


def test_a_clock_that_is_off_is_nobodys_fault() -> None:
    left, right = relay(), relay()
    early_ns = NOW_NS - CLOCK_TOLERANCE_NS - 1
    for number in range(MAX_FAULTS + 1):
        right.book.apply(party(number).sheet(ask()), NOW_NS)
    converse(left, right, early_ns)
    assert len(left.book) == 0
    assert left.score("right", early_ns) == MAX_FAULTS


def test_bad_sheets_and_proofs_are_the_peers_fault() -> None:
    bad = bytearray(SELLER.sheet(ask()).sealed.wire)
    bad[-1] ^= 1
    for parcel in (Parcel((bytes(bad),), (), last=True), Parcel((), ((b"", b""),), last=True)):
        left = relay()
        exchange = Exchange(left, "right", dialling=True)
        list(exchange.start(NOW_NS))
        list(exchange.receive(Outline(bytes(OUTLINE_BYTES), bytes(32)), NOW_NS))
        entry = Summary(SELLER.node.public_key, 1, bytes(32))
        conviction = Conviction(party(2).node.public_key, 1)
        list(exchange.receive(Listing((entry,), (conviction,), last=True), NOW_NS))
        list(exchange.receive(Want((), ()), NOW_NS))
        list(exchange.receive(read(Parcel, encode(parcel), "main"), NOW_NS))
        assert exchange.done
        assert left.score("right", NOW_NS) == MAX_FAULTS - 1


def test_who_sends_bad_sheets_is_not_heard_to_the_end() -> None:
    left = relay()
    exchange = Exchange(left, "right", dialling=True)
    list(exchange.start(NOW_NS))
    list(exchange.receive(Outline(bytes(OUTLINE_BYTES), bytes(32)), NOW_NS))
    entries = tuple(Summary(bytes([n]) * 32, 1, bytes(32)) for n in range(MAX_FAULTS))
    list(exchange.receive(Listing(entries, (), last=True), NOW_NS))
    list(exchange.receive(Want((), ()), NOW_NS))
    parcel = read(Parcel, encode(Parcel((b"junk",) * MAX_FAULTS, (), last=True)), "main")
    with pytest.raises(ProtocolError, match="bad sheets"):
        list(exchange.receive(parcel, NOW_NS))
    assert left.is_shunned("right", NOW_NS)


@pytest.mark.parametrize("kind", [Outline, Listing, Want, Parcel])
def test_junk_is_a_protocol_error(kind: type) -> None:
    for junk in (b"", b"\x93", encode(Want((), ()))[:-1], b"\xc1" * 100):
        with pytest.raises(ProtocolError):
            read(kind, junk, "main")


def test_what_is_gone_meanwhile_is_not_sent() -> None:
    left, right = relay(), relay(book(SELLER.sheet(ask())))
    dialler = Exchange(left, "right", dialling=True)
    listener = Exchange(right, "left", dialling=False)
    [outline] = dialler.start(NOW_NS)
    answer = list(listener.receive(read(Outline, outline, "main"), NOW_NS))
    replies: list[bytes] = []
    for frame in answer:
        replies += dialler.receive(read(dialler.expects, frame, "main"), NOW_NS)
    late_ns = NOW_NS + MAX_SHEET_LIFETIME_NS
    final: list[bytes] = []
    for frame in replies:
        final += listener.receive(read(listener.expects, frame, "main"), late_ns)
    assert read(Parcel, final[-1], "main") == OpenParcel((), (), last=True)


def test_the_largest_messages_fit_a_frame() -> None:
    entry, conviction = Summary(bytes(32), 2**63 - 1, bytes(32)), Conviction(bytes(32), 2**63 - 1)
    wire = bytes(MAX_SHEET_WIRE_BYTES)
    messages = [
        Listing((entry,) * MAX_SUMMARIES_A_PAGE, (conviction,) * MAX_PROOFS, last=True),
        Want((bytes(32),) * MAX_SHEETS, (bytes(32),) * MAX_PROOFS),
        Parcel((wire,) * MAX_SHEETS_A_FRAME, ((wire, wire),) * MAX_PROOFS_A_FRAME, last=True),
    ]
    for message in messages:
        assert len(encode(message)) <= min(MAX_FRAME_BYTES, message.MAX_BYTES)
