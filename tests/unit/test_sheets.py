"""Comparing books over a stream: what one lacks comes, a flood is not heard to its end."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from p2pflop.dht.planes import MemoryStream, Stream, memory_stream_pair
from p2pflop.errors import ProtocolError, ProviderError
from p2pflop.ids import content_hash
from p2pflop.keys import PrivateKey
from p2pflop.market import book as book_module
from p2pflop.market.book import Book, Summaries, Summary
from p2pflop.market.samples import NOW_NS, ask, party
from p2pflop.node import sheets as sheets_module
from p2pflop.node.identity import Identity
from p2pflop.node.sheets import Sheets, SheetService
from p2pflop.wire import encode


class OneStream:
    """A host whose every ``open`` gives the same stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    async def open(self, peer: str, protocol: str) -> Stream:
        await trio.lowlevel.checkpoint()
        return self.stream

    async def publish(self, topic: str, data: bytes) -> None:
        raise NotImplementedError

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
        nursery.start_soon(left.compare, "right")
        nursery.start_soon(right.answer, far_end)


async def test_books_of_several_pages_become_the_same(
    streams: tuple[MemoryStream, MemoryStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(book_module, "MAX_SUMMARIES_A_PAGE", 4)
    left, right = (service(str(end), stream) for end, stream in enumerate(streams))
    for number in range(13):
        left.book.apply(party(number).sheet(ask()), NOW_NS)
    for number in range(9, 17):
        right.book.apply(party(number).sheet(ask()), NOW_NS)
    await compare(left, right, streams[1])
    assert len(left.book) == 17
    assert left.book.digest(NOW_NS) == right.book.digest(NOW_NS)


async def test_summaries_without_end_are_a_fault(
    streams: tuple[MemoryStream, MemoryStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(book_module, "MAX_SUMMARIES_A_PAGE", 2)
    monkeypatch.setattr(sheets_module, "MAX_SHEETS", 4)
    ours, theirs = streams
    left = service("left", ours)
    page = encode(Summaries((Summary(bytes(32), 1, bytes(32)),) * 2))
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def flood() -> None:
            for _ in range(3):
                await theirs.send(page)

        with pytest.raises(ProtocolError, match="too many"):
            await left.compare("right")


async def test_who_brings_too_many_strangers_is_not_heard_to_the_end(
    streams: tuple[MemoryStream, MemoryStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheets_module, "MAX_REFUSED_SHEETS", 8)
    ours, theirs = streams
    left = service("left", ours, max_per_source=3)
    wires = tuple(party(number).sheet(ask()).sealed.wire for number in range(30))
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def flood() -> None:
            await theirs.send(encode(Summaries(())))
            await theirs.send(encode(Sheets(wires, last=True)))

        with pytest.raises(ProviderError, match="room"):
            await left.compare("right")
    assert len(left.book) == 3


async def test_gossip_counts_for_who_forwards_it(
    streams: tuple[MemoryStream, MemoryStream],
) -> None:
    left = service("left", streams[0], max_per_source=2)
    wires = [party(number).sheet(ask()).sealed.wire for number in range(4)]
    assert [left.take(wire, "forwarder") for wire in wires] == [True, True, False, False]
    assert left.take(wires[2], "another")
