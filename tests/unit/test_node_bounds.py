"""What is bounded in a node's memories, answers and queues, at each limit."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio

from p2pflop.errors import ConfigError, P2PFlopError, ProtocolError, ProviderError
from p2pflop.ids import content_hash
from p2pflop.market.records import ZERO_HASH
from p2pflop.node import (
    api,
    api_guard,
    api_market,
    api_money,
    execute,
    franchise,
    franchise_service,
    franchise_stream,
    host,
    letters,
    libp2p_addresses,
    libp2p_streams,
    main,
    orders,
    payment_stream,
    quote_stream,
    registry_client,
)
from p2pflop.node import goods as goods_module
from p2pflop.node import journal as journal_module
from p2pflop.node import labour as labour_module
from p2pflop.node import messages as m
from p2pflop.node import payment_book as payment_book_module
from p2pflop.node.books import open_books
from p2pflop.node.config import MAX_CONNECT, load_settings
from p2pflop.node.journal import BUYER, Batch, Head, Journal, Letter
from p2pflop.node.libp2p_gossip import Gossip
from p2pflop.node.payment_book import Payment, PaymentBook, Side, State
from p2pflop.node.printable import MAX_PRINTED, printable
from p2pflop.node.service import MAX_FIND_TIMEOUT_S
from p2pflop.wire import Record, decode, encode
from tests.serving import error_of, serving

PEER = "12D3KooWDN2Nx9DhYgP6zzgfgHruUKHFeY6YiYF4zs4d6KxsdT58"
ADDRESSES = tuple(f"/ip4/192.0.2.{number}/tcp/1" for number in range(1, 6))


def like(**fields: Any) -> Any:
    """Something that has these, for what needs no more of its object."""
    return SimpleNamespace(**fields)


async def test_of_many_jobs_the_newest_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "MAX_LISTED", 2)
    books = open_books(tmp_path)
    journal = Journal(books)
    for number in range(4):
        batch = Batch(rows=[(number, "kind", b"")])
        await journal.append(Head(f"job-{number}", BUYER, number, "", b"{}"), batch)
    assert [head.job for head in journal.heads(BUYER)] == ["job-3", "job-2"]
    assert journal.with_row(BUYER, "kind", 0, 9) == [("job-3", 3), ("job-2", 2)]
    assert len(journal.unfinished(BUYER)) == 4, "a restart forgets none"
    await books.aclose()


async def test_of_many_payments_those_that_wait_are_listed_before_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payment_book_module, "MAX_LISTED", 2)
    books = open_books(tmp_path)
    book = PaymentBook(books)
    paid = Payment(ZERO_HASH, Side.PAID, ZERO_HASH, 1, 0, "", State.ACKNOWLEDGED)
    for at_ns in range(1, 5):
        await book.put(replace(paid, id=content_hash(bytes([at_ns])), at_ns=at_ns))
    claim = replace(paid, side=Side.RECEIVED, state=State.CLAIMED)
    await book.put(claim)
    assert [payment.at_ns for payment in book.listed()] == [0, 4]
    await books.aclose()


async def test_rows_wait_in_the_worker_once_enough_wait_for_the_confirm_to_be_on_disk(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    monkeypatch.setattr(labour_module, "MAX_HELD_ROWS", 2)
    told: list[m.Rows] = []
    sale = like(begun=like(show=lambda *_: None), offer=told.append)
    labour = like(_rows=[], _kept=trio.Event(), _sale=sale)
    labour.note_kept = lambda: labour_module.Labour.note_kept(labour)

    async def work() -> None:
        for step in range(5):
            rows = like(first_step=step, last_step=step, values=())
            await labour_module.Labour._tell_rows(labour, rows)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await trio.sleep(1)
        assert (len(labour._rows), told) == (2, [])
        labour.note_kept()
    assert [rows.first_step for rows in told] == list(range(5))


@pytest.mark.parametrize("room", [2, main.MAX_GOSSIP_WAITING])
async def test_gossip_that_nobody_takes_is_dropped_and_counted(room: int) -> None:
    sink, source = trio.open_memory_channel[tuple[str, bytes]](room)
    gossip: Any = Gossip.__new__(Gossip)
    gossip._peer, gossip._counts = "this node", Counter()

    async def messages() -> AsyncIterator[Any]:
        for number in range(room + 3):
            yield like(from_id=b"\x00\x01x", data=b"%d" % number)

    await gossip._deliver("topic", messages(), sink)
    assert source.statistics().current_buffer_used == room
    assert gossip._counts == {"gossip_received": room, "gossip_dropped": 3}


def test_of_many_classes_in_which_a_state_is_known_a_few_are_told() -> None:
    names = [content_hash(bytes([number])) for number in range(orders.MAX_CLASSES_TOLD + 2)]
    told = orders._unknown_start(7, names).message
    assert [name.hex() in told for name in names] == [True] * orders.MAX_CLASSES_TOLD + [False] * 2


def test_of_a_peer_and_of_peers_a_bounded_number_of_addresses_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(libp2p_addresses, "MAX_ADDRESSES_PER_PEER", 2)
    monkeypatch.setattr(host, "MAX_ADDRESSES_PER_PEER", 2)
    monkeypatch.setattr(host, "MAX_KNOWN_PEERS", 3)
    dialable = libp2p_addresses.dialable(PEER, ADDRESSES)
    assert dialable == tuple(f"{address}/p2p/{PEER}" for address in ADDRESSES[:2])
    known = like(_known=OrderedDict())
    for number in range(5):
        host.Host._remember(known, f"peer {number}", ADDRESSES)
    assert list(known._known) == ["peer 2", "peer 3", "peer 4"]
    host.Host._remember(known, "peer 2", ADDRESSES[3:])
    assert known._known["peer 2"] == ADDRESSES[3:], "the newest come first"


def test_causes_that_go_in_a_circle_are_looked_at_a_bounded_number_of_times() -> None:
    error, other = OSError("one"), OSError("other")
    error.__cause__, other.__cause__ = other, error
    assert host._reason(error, PEER) == ""


def test_at_most_so_many_peers_are_dialled_by_settings(tmp_path: Path) -> None:
    address = f"{ADDRESSES[0]}/p2p/{PEER}"
    most = {"home": tmp_path, "connect": (address,) * MAX_CONNECT}
    assert len(load_settings(most).connect) == MAX_CONNECT
    with pytest.raises(ConfigError, match=f"at most {MAX_CONNECT} peers"):
        load_settings(most | {"connect": (address,) * (MAX_CONNECT + 1)})


def test_handshakes_and_connections_are_bounded_in_all_and_from_an_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, most in (
        ("MAX_HANDSHAKES", 4),
        ("MAX_HANDSHAKES_PER_ADDRESS", 2),
        ("MAX_CONNECTIONS_PER_ADDRESS", 3),
    ):
        monkeypatch.setattr(libp2p_streams, name, most)
    transport = libp2p_streams._Transport()
    transport._handshakes["a"] = 2
    assert transport._full("a")
    assert not transport._full("b")
    transport._handshakes["b"] = transport._handshakes["c"] = 1
    assert transport._full("d"), "others' fill the node"
    transport._handshakes.clear()
    transport._connections["a"] = 3
    assert transport._full("a")
    assert not transport._full("d")


async def test_streams_that_libp2p_does_not_take_are_reset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting, _accepted = trio.open_memory_channel[Any](libp2p_streams.MAX_WAITING_STREAMS)
    reset: list[int] = []
    for number in range(libp2p_streams.MAX_WAITING_STREAMS + 2):
        stream = like(reset=lambda number=number: reset.append(number))
        libp2p_streams.MuxedConnection.hand_over(like(_waiting=waiting), stream)
    assert reset == [libp2p_streams.MAX_WAITING_STREAMS, libp2p_streams.MAX_WAITING_STREAMS + 1]


@pytest.mark.parametrize(
    ("most", "over"),
    [
        (
            m.Offer(b"", bytes(m.MAX_BODY_BYTES)),
            m.Offer(b"", bytes(m.MAX_BODY_BYTES + 1)),
        ),
        (
            m.Confirmed(b"", ((ZERO_HASH, b""),) * m.MAX_INLINE_BLOBS),
            m.Confirmed(b"", ((ZERO_HASH, b""),) * (m.MAX_INLINE_BLOBS + 1)),
        ),
        (
            m.Checkpoint(1, b"", ((ZERO_HASH, bytes(m.MAX_INLINE_BYTES)),)),
            m.Checkpoint(1, b"", ((ZERO_HASH, bytes(m.MAX_INLINE_BYTES + 1)),)),
        ),
        (
            m.Checkpoint(1, bytes(m.MAX_RESULT_BYTES), ()),
            m.Checkpoint(1, bytes(m.MAX_RESULT_BYTES + 1), ()),
        ),
        (
            m.Rows(0, 1, ((0, 0, 0, b""),) * m.MAX_ROWS),
            m.Rows(0, 1, ((0, 0, 0, b""),) * (m.MAX_ROWS + 1)),
        ),
    ],
)
def test_messages_of_a_job_are_bounded(most: m.Message, over: m.Message) -> None:
    assert m.decode_message(m.encode_message(most), PEER) == most
    with pytest.raises(ProtocolError):
        m.decode_message(msgspec.msgpack.encode(over), PEER)


def told(**lists: tuple[bytes, ...]) -> franchise_stream.Told:
    names = ("heads", "attestations", "revocations", "forks", "wanted")
    return franchise_stream.Told(1, b"", 1, (), "", *(lists.get(name, ()) for name in names))


@pytest.mark.parametrize(
    ("field", "most"),
    [
        ("attestations", franchise_stream.MAX_TOLD_ATTESTATIONS),
        ("revocations", franchise_stream.MAX_TOLD_REVOCATIONS),
        ("forks", franchise_stream.MAX_TOLD_FORKS),
        ("wanted", franchise_stream.MAX_WANTED),
    ],
)
def test_what_is_told_of_registries_at_once_is_bounded(field: str, most: int) -> None:
    full = told(**{field: (ZERO_HASH,) * most})
    assert decode(franchise_stream.Told, encode(full)) == full
    with pytest.raises(ProtocolError, match="length"):
        decode(franchise_stream.Told, encode(told(**{field: (ZERO_HASH,) * (most + 1)})))
    proofs = told(attestations=(bytes(10_000),) * 30)
    assert len(encode(proofs)) > franchise_stream.MAX_TOLD_BYTES
    with pytest.raises(ProtocolError, match="over its limit"):
        decode(franchise_stream.Told, encode(proofs))


@pytest.mark.parametrize(
    ("most", "over"),
    [
        (
            quote_stream.Quoted(bytes(quote_stream.MAX_QUOTE_WIRE_BYTES), b""),
            quote_stream.Quoted(bytes(quote_stream.MAX_QUOTE_WIRE_BYTES + 1), b""),
        ),
        (
            payment_stream.Claimed(bytes(payment_stream.MAX_WIRE_BYTES)),
            payment_stream.Claimed(bytes(payment_stream.MAX_WIRE_BYTES + 1)),
        ),
    ],
)
def test_words_about_quotes_and_payments_are_bounded(most: Record, over: Record) -> None:
    assert decode(type(most), encode(most)) == most
    with pytest.raises(ProtocolError):
        decode(type(over), encode(over))


def test_a_lease_is_given_back_that_computes_far_more_than_is_paid_for() -> None:
    metered_flop = execute.MIN_DEAR_FLOP
    most_flop = execute.MAX_COST_RATIO * metered_flop
    assert not execute.is_dear(most_flop, metered_flop)
    assert execute.is_dear(most_flop + 1, metered_flop)
    assert not execute.is_dear(execute.MIN_DEAR_FLOP, 1), "of little work nobody minds"


@pytest.mark.parametrize(
    ("path", "most"),
    [
        ("/v1/trades?since_ns={}", api_money.MAX_TIME_NS),
        ("/v1/jobs/ab/events?wait_ms={}", api_market.MAX_WAIT_MS),
        (f"/blob/{'ab' * 32}?timeout_s={{}}", MAX_FIND_TIMEOUT_S),
    ],
)
async def test_numbers_that_are_given_over_http_are_bounded(path: str, most: float) -> None:
    async with serving() as server:
        refused = error_of(await server.get(path.format(int(most) + 1)))
        assert refused["kind"] == "ConfigError"
        assert str(int(most)) in refused["message"]


def test_heads_of_a_registry_come_a_bounded_number_at_once() -> None:
    def reply(count: int) -> registry_client.HeadsReply:
        data = json.dumps({"heads": ["00"] * count}).encode()
        return msgspec.json.decode(data, type=registry_client.HeadsReply)

    assert len(reply(registry_client.MAX_HEADS).heads) == registry_client.MAX_HEADS
    with pytest.raises(msgspec.ValidationError, match="length"):
        reply(registry_client.MAX_HEADS + 1)


async def test_blobs_of_a_delivery_are_fetched_a_few_at_once(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    monkeypatch.setattr(goods_module, "MAX_PARALLEL_FETCHES", 3)
    under_way: set[int] = set()
    most = 0

    async def fetch(blob: Any) -> None:
        nonlocal most
        under_way.add(blob.address)
        most = max(most, len(under_way))
        await trio.sleep(1)
        under_way.discard(blob.address)

    async def has(_: Any) -> bool:
        return False

    goods = like(_small={}, _has=has, _fetch=fetch)
    await goods_module.Goods._fetch_all(goods, [like(address=number) for number in range(10)])
    assert most == 3
    assert trio.current_time() == pytest.approx(4)


async def test_conversations_about_registries_are_bounded() -> None:
    heard: list[object] = []

    async def hear(stream: object, *, answering: bool) -> None:
        assert answering
        heard.append(stream)

    service = like(_now_ns=lambda: 0, _rates=like(allow=lambda *_: True), _hear=hear)
    service._talks = franchise_service.MAX_TALKS - 1
    answer = franchise_service.FranchiseService.answer
    await answer(service, like(peer=PEER))
    assert service._talks == franchise_service.MAX_TALKS - 1
    service._talks += 1
    with pytest.raises(ProviderError, match="too many conversations"):
        await answer(service, like(peer=PEER))
    assert len(heard) == 1


def test_peers_that_leave_this_node_out_are_remembered_a_bounded_number_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(franchise_service, "MAX_LEFT_OUT", 2)
    left_out: dict[str, str] = {}
    service = like(franchise=like(left_out_by=left_out))
    note = franchise_service.FranchiseService._note_standing
    for peer in ("a", "b", "c"):
        note(service, peer, like(standing="unpaid"))
    assert left_out == {"a": "unpaid", "b": "unpaid"}
    note(service, "a", like(standing="revoked"))
    note(service, "b", like(standing=""))
    assert left_out == {"a": "revoked"}


def test_a_few_registries_say_why_an_account_is_left_out() -> None:
    one = like(
        roll=like(issuers=range(franchise.MAX_REASONS + 2)),
        _now_ns=lambda: 0,
        admits=lambda *_: False,
        _why_not=lambda issuer, _: f"registry {issuer}",
    )
    assert franchise.Franchise.standing_of(one, b"").count(";") == franchise.MAX_REASONS - 1


async def test_a_letter_is_brought_again_ever_later_and_not_later_than_that(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    tried_at: list[float] = []

    async def leave_word(*_: object) -> bool:
        tried_at.append(trio.current_time())
        return len(tried_at) == 20

    monkeypatch.setattr(letters, "leave_word", leave_word)
    done: list[str] = []
    sender = like(_under_way=set(), _now_ns=lambda: 0, _dialer=None, acknowledge=done.append)
    await letters.Letters.deliver(sender, Letter("job", 0, PEER, b""))
    waits = [later - earlier for earlier, later in pairwise(tried_at)]
    assert waits == sorted(waits)
    assert waits[-1] == letters.MAX_DELIVER_AGAIN_S
    assert (done, sender._under_way) == (["job"], set())


async def test_what_the_api_lists_and_says_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_ITEMS", 2)

    async def produce() -> list[dict[str, Any]]:
        return [{"id": number} for number in range(5)]

    answer = await api._listing("jobs", produce, like())
    assert json.loads(bytes(answer.body)) == {"jobs": [{"id": 0}, {"id": 1}], "total": 5}
    body = api_guard.error_body(P2PFlopError("x" * 9999, hint="y" * 9999))
    assert len(body["message"]) == len(body["hint"]) == api_guard.MAX_MESSAGE_CHARS


def test_a_line_of_a_strangers_text_is_cut() -> None:
    assert printable("x" * MAX_PRINTED) == "x" * MAX_PRINTED
    cut = printable("x" * (MAX_PRINTED + 1))
    assert (len(cut), cut[-1]) == (MAX_PRINTED, "\N{HORIZONTAL ELLIPSIS}")
