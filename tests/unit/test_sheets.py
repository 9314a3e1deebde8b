"""Comparing books over a stream: what one lacks comes, a flood is not heard to its end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from p2pflop.dht.planes import MemoryStream, Stream, memory_stream_pair
from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.ids import content_hash
from p2pflop.keys import PrivateKey
from p2pflop.market import exchange as exchange_module
from p2pflop.market.book import Book
from p2pflop.market.exchange import OUTLINE_BYTES, Listing, Outline, Parcel, Summary, Want
from p2pflop.market.relay import ANSWERED_BURST, MAX_FAULTS
from p2pflop.market.samples import NOW_NS, ask, party
from p2pflop.node.guard import survive
from p2pflop.node.identity import Identity
from p2pflop.node.sheets import (
    HONOURED_SHEETS,
    MAX_TOLD_OF_WITHDRAWAL,
    SheetService,
    subnet_of,
)
from p2pflop.units import NS_PER_S
from p2pflop.wire import encode

OTHER_OUTLINE = encode(Outline(bytes(OUTLINE_BYTES), bytes(32)))


class OneStream:
    """A host whose every ``open`` gives the same stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    async def open(self, peer: str, protocol: str) -> Stream:
        await trio.lowlevel.checkpoint()
        return self.stream

    async def publish(self, topic: str, data: bytes) -> None:
        raise ProviderError("nobody is there")

    def peers(self) -> list[Any]:
        return []


def service(name: str, stream: Stream, **bounds: Any) -> SheetService:
    account, node = (PrivateKey(content_hash(f"{a} {name}".encode())) for a in ("account", "node"))
    identity = Identity(account, node, "main")
    book = Book(bytes(32), **bounds)
    return SheetService(identity, book, OneStream(stream), lambda: NOW_NS)


@pytest.fixture
def streams() -> tuple[MemoryStream, MemoryStream]:
    return memory_stream_pair("left", "right")


async def compare(left: SheetService, right: SheetService, far_end: Stream) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.comparisons.compare, "right")
        nursery.start_soon(right.comparisons.answer, far_end)


async def test_books_of_several_pages_become_the_same(
    streams: tuple[MemoryStream, MemoryStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_module, "MAX_SUMMARIES_A_PAGE", 4)
    monkeypatch.setattr(exchange_module, "MAX_SHEETS_A_FRAME", 3)
    left, right = (service(str(end), stream) for end, stream in enumerate(streams))
    for number in range(13):
        left.book.apply(party(number).sheet(ask()), NOW_NS)
    for number in range(9, 17):
        right.book.apply(party(number).sheet(ask()), NOW_NS)
    await compare(left, right, streams[1])
    assert len(left.book) == 17
    assert left.book.digest(NOW_NS) == right.book.digest(NOW_NS)


async def test_listings_without_end_are_a_fault(
    streams: tuple[MemoryStream, MemoryStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_module, "MAX_SHEETS", 4)
    ours, theirs = streams
    left = service("left", ours)
    page = encode(Listing((Summary(bytes(32), 1, bytes(32)),) * 2, (), last=False))
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def flood() -> None:
            await theirs.send(OTHER_OUTLINE)
            for _ in range(3):
                await theirs.send(page)

        with pytest.raises(ProtocolError, match="too many"):
            await left.comparisons.compare("right")
    assert left.relay.score("right", NOW_NS) == MAX_FAULTS - 1


async def test_what_nobody_asked_for_is_a_fault(streams: tuple[MemoryStream, MemoryStream]) -> None:
    ours, theirs = streams
    left = service("left", ours)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def push() -> None:
            await theirs.send(OTHER_OUTLINE)
            await theirs.send(encode(Listing((), (), last=True)))
            await theirs.send(encode(Want((), ())))
            await theirs.send(encode(Parcel((party(1).sheet().sealed.wire,), (), last=True)))

        with pytest.raises(ProtocolError, match="nobody asked"):
            await left.comparisons.compare("right")
    assert len(left.book) == 0


async def test_who_brings_too_many_strangers_is_not_heard_to_the_end(
    streams: tuple[MemoryStream, MemoryStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_module, "MAX_REFUSED_SHEETS", 8)
    left, right = service("left", streams[0], max_per_source=3), service("right", streams[1])
    for number in range(30):
        right.book.apply(party(number).sheet(ask()), NOW_NS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(survive, right.comparisons.answer, streams[1])
        with pytest.raises(ProviderError, match="room"):
            await left.comparisons.compare("right")
    assert len(left.book) == 3
    assert left.relay.score("right", NOW_NS) == MAX_FAULTS, "that is nobody's fault"


async def test_one_peer_begins_a_bounded_number_of_comparisons(
    streams: tuple[MemoryStream, MemoryStream],
) -> None:
    left = service("left", streams[0])
    begun = [left.relay.gate.may_compare("right", NOW_NS) for _ in range(ANSWERED_BURST + 1)]
    assert begun == [True] * ANSWERED_BURST + [False]
    with pytest.raises(ProviderError, match="too many"):
        await left.comparisons.answer(streams[0])


async def test_a_restarted_node_goes_on_with_higher_numbers(
    streams: tuple[MemoryStream, MemoryStream],
) -> None:
    """Also where its clock has gone back, as peers remember the numbers."""
    before = service("left", streams[0])
    identity = before._identity
    await before.offer(lambda _: (), ())
    again = SheetService(identity, before.book, OneStream(streams[0]), lambda: NOW_NS - NS_PER_S)
    sheet = await again.offer(lambda _: (), ())
    assert sheet.sheet.number == NOW_NS + 1
    assert again.newest == sheet


@pytest.mark.parametrize(
    ("addresses", "subnet"),
    [
        (("/ip4/192.0.2.77/tcp/4001/p2p/x",), "192.0.2.0/24"),
        (("/ip6/2001:db8:1:2::3/tcp/1",), "2001:db8:1::/48"),
        (("/memory/1/p2p/x", "/ip4/192.0.2.1"), "192.0.2.0/24"),
        (("/ip4/nonsense", ""), ""),
        ((), ""),
    ],
)
def test_subnets(addresses: tuple[str, ...], subnet: str) -> None:
    assert subnet_of(addresses) == subnet


async def test_gossip_counts_for_who_forwards_it(
    streams: tuple[MemoryStream, MemoryStream],
) -> None:
    left = service("left", streams[0], max_per_source=2)
    wires = [party(number).sheet(ask()).sealed.wire for number in range(4)]
    assert [left.take(wire, "forwarder") for wire in wires] == [True, True, False, False]
    assert left.take(wires[2], "another")


async def test_bids_are_taken_on_so_many_of_the_newest_own_sheets(
    streams: tuple[MemoryStream, MemoryStream],
) -> None:
    seller = service("seller", streams[0])
    numbers = [
        (await seller.offer(lambda _: (ask(),), ())).sheet.number
        for _ in range(HONOURED_SHEETS + 2)
    ]
    assert list(seller.honoured()) == numbers[2:]


async def test_private_asks_are_in_the_view_and_in_nothing_that_others_are_told(
    streams: tuple[MemoryStream, MemoryStream],
) -> None:
    left, right = (service(str(end), stream) for end, stream in enumerate(streams))
    right.book.apply(party(1).sheet(ask()), NOW_NS)
    private = await left.offer(lambda _: (ask(),), (), is_private=True)
    await compare(left, right, streams[1])
    assert len(left.book) == len(right.book) == 1
    assert left.newest is None
    assert left.newest_wire == b""
    assert not left.selling
    assert private.sheet.number in left.honoured()

    seen = left.view(NOW_NS)
    nodes = [sheet.node for sheet in seen.sheets]
    assert nodes == sorted([party(1).node.public_key, private.node])
    assert seen is left.view(NOW_NS), "made anew only when something has changed"
    left.book.apply(party(2).sheet(ask()), NOW_NS)
    assert len(left.view(NOW_NS).sheets) == 3
    await left.withdraw()
    assert len(left.view(NOW_NS).sheets) == 2
    assert not left.honoured()


@pytest.mark.parametrize("is_remembered", [True, False])
async def test_private_asks_take_back_those_that_a_crash_left_to_others(
    streams: tuple[MemoryStream, MemoryStream], is_remembered: bool
) -> None:
    """Whether the saved book has them, or only a neighbour's."""
    before, neighbour = (service(str(end), stream) for end, stream in enumerate(streams))
    sold = await before.offer(lambda _: (ask(),), ())
    neighbour.take(sold.sealed.wire, "")
    again = service("0", streams[0])
    if is_remembered:
        again.book.load(before.book.dump(), NOW_NS)
        again = SheetService(again._identity, again.book, OneStream(streams[0]), lambda: NOW_NS)
    await again.offer(lambda _: (ask(),), (), is_private=True)
    if not is_remembered:
        await compare(again, neighbour, streams[1])
        await again._take_back()
    streams = memory_stream_pair("left", "right")
    again._host.stream = streams[0]  # type: ignore[attr-defined]
    await compare(again, neighbour, streams[1])
    [left] = neighbour.book.view(NOW_NS).sheets
    assert left.sheet.number > sold.sheet.number
    assert left.sheet.asks == ()
    assert again.book.dump() == neighbour.book.dump()


async def test_so_many_neighbours_are_told_that_the_orders_are_withdrawn(
    streams: tuple[MemoryStream, MemoryStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    seller, told = service("seller", streams[0]), []
    await seller.offer(lambda _: (ask(),), ())

    async def compare_quietly(peer: str) -> None:
        told.append(peer)

    monkeypatch.setattr(seller.comparisons, "compare_quietly", compare_quietly)
    peers = [SimpleNamespace(peer=str(n)) for n in range(2 * MAX_TOLD_OF_WITHDRAWAL)]
    monkeypatch.setattr(OneStream, "peers", lambda _: peers)
    await seller.withdraw()
    assert sorted(told, key=int) == [peer.peer for peer in peers[:MAX_TOLD_OF_WITHDRAWAL]]
