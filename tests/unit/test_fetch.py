from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest
import trio
import trio.testing

from p2pflop.dht import slots, transfer
from p2pflop.dht.fetch import (
    FRAME_TIMEOUT_S,
    MAX_SOURCES,
    MAX_STREAMS_PER_PEER,
    BlobServer,
    fetch,
    serve,
)
from p2pflop.dht.manifest import CHUNK_BYTES, Manifest, address_of, manifest_of
from p2pflop.dht.memory import MemoryStore
from p2pflop.dht.planes import EndOfStream, MemoryDialer, Stream, memory_stream_pair
from p2pflop.dht.transfer import (
    BLOB_PROTOCOL,
    MAX_RANGES,
    MAX_TOKEN_BYTES,
    WHOLE_BLOB,
    Answer,
    Request,
    answer_absent,
    answer_found,
)
from p2pflop.errors import (
    BlobNotFoundError,
    P2PFlopError,
    ProtocolError,
    ProviderError,
    StoreError,
    VerificationError,
)
from p2pflop.wire import decode, encode

ALICE, BOB = b"a" * 32, b"b" * 32
SIZE = 5 * CHUNK_BYTES + 9
DATA = hashlib.shake_128(b"data").digest(SIZE)
MANIFEST = manifest_of(DATA)
ADDRESS = MANIFEST.address

Handler = Callable[[Stream], Awaitable[None]]


def _chunk(index: int) -> bytes:
    return DATA[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]


class World:
    """A requester with an empty store, and sources by name."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.store = MemoryStore()
        self.dialer = MemoryDialer(nursery, "me")
        self.asked: list[str] = []
        self.faults: list[tuple[str, type[P2PFlopError]]] = []
        self.progress: list[int] = []

    def add(self, peer: str, handler: Handler) -> None:
        async def answer(stream: Stream) -> None:
            self.asked.append(peer)
            await handler(stream)

        self.dialer.handle(peer, BLOB_PROTOCOL, answer)

    async def add_holder(self, peer: str, data: bytes = DATA, public: bool = True) -> MemoryStore:
        store = MemoryStore()
        await store.put(data, public=public)
        self.add(peer, lambda stream: serve(stream, store))
        return store

    async def fetch(self, *sources: str, address: bytes = ADDRESS, **options: object) -> None:
        await fetch(
            self.store,
            address,
            sources,
            self.dialer,
            progress=lambda done, total: self.progress.append(done),
            on_fault=lambda peer, error: self.faults.append((peer, type(error))),
            **options,  # type: ignore[arg-type]
        )


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(nursery)
        nursery.cancel_scope.cancel()


def _script(*frames: bytes) -> Handler:
    """A source that takes the request and says ``frames``, whatever was asked."""

    async def handler(stream: Stream) -> None:
        await stream.receive()
        for frame in frames:
            await stream.send(frame)

    return handler


async def _empty(stream: Stream) -> None:
    await serve(stream, MemoryStore())


# Fetching from peers that keep to the protocol.


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, SIZE])
async def test_a_blob_comes_whole(world: World, size: int) -> None:
    data = DATA[:size]
    await world.add_holder("peer", data)
    await world.fetch("peer", address=address_of(data), max_bytes=size, owner=ALICE, public=True)
    assert await world.store.get(address_of(data)) == data
    info = await world.store.stat(address_of(data))
    assert info is not None
    assert (info.owner, info.public) == (ALICE, True)
    assert world.progress[-1] == size
    assert world.progress == sorted(world.progress)
    assert world.faults == []


async def test_what_is_here_is_not_asked_for(world: World) -> None:
    await world.store.put(DATA)
    await world.fetch("peer")
    assert world.asked == []
    assert not await world.store.may_read(ADDRESS, b"")
    await world.fetch("peer", public=True)
    assert world.asked == []
    assert await world.store.may_read(ADDRESS, b"")


async def test_another_accounts_copy_does_not_answer(world: World) -> None:
    await world.store.put(DATA, owner=ALICE)
    with pytest.raises(BlobNotFoundError):
        await world.fetch(owner=BOB)
    await world.add_holder("peer")
    await world.fetch("peer", owner=BOB)
    assert world.asked == ["peer"]
    assert await world.store.may_read(ADDRESS, BOB)


async def test_sources_are_tried_in_order_until_one_has_it(world: World) -> None:
    world.add("empty", _empty)
    await world.add_holder("holder")
    await world.fetch("unreachable", "empty", "holder", "never asked")
    assert world.asked == ["empty", "holder"]
    assert world.faults == [("unreachable", ProviderError)]


async def test_nobody_has_it(world: World) -> None:
    world.add("empty", _empty)
    with pytest.raises(BlobNotFoundError) as caught:
        await world.fetch("empty", "unreachable")
    assert "empty does not have it" in caught.value.message
    assert "unreachable" in caught.value.message
    assert caught.value.hint
    with pytest.raises(BlobNotFoundError, match="nobody to ask"):
        await world.fetch()


async def test_no_more_sources_are_asked_than_the_limit(world: World) -> None:
    names = [f"peer{number}" for number in range(MAX_SOURCES + 1)]
    for name in names:
        world.add(name, _empty)
    with pytest.raises(BlobNotFoundError):
        await world.fetch(*names)
    assert world.asked == names[:-1]


async def test_the_next_source_goes_on_where_one_broke_off(world: World) -> None:
    wanted: list[Request] = []

    async def listen(stream: Stream) -> None:
        request = await stream.receive()
        wanted.append(decode(Request, request))
        store = MemoryStore()
        await store.put(DATA, public=True)
        ours, theirs = memory_stream_pair("me", "second")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, theirs, store)
            await ours.send(request)
            try:
                while True:
                    await stream.send(await ours.receive())
            except EndOfStream:
                return

    world.add("first", _script(*answer_found(MANIFEST), _chunk(0), _chunk(1)))
    world.add("second", listen)
    await world.fetch("first", "second")
    assert [request.ranges for request in wanted] == [((2, 6),)]
    assert world.faults == [("first", ProviderError)]
    assert await world.store.get(ADDRESS) == DATA


async def test_a_later_fetch_goes_on_where_one_failed(world: World) -> None:
    world.add("broken", _script(*answer_found(MANIFEST), _chunk(0)))
    with pytest.raises(ProviderError) as caught:
        await world.fetch("broken")
    assert str(CHUNK_BYTES) in caught.value.hint
    assert await world.store.stat(ADDRESS) is None
    world.progress.clear()
    await world.add_holder("holder")
    await world.fetch("holder")
    assert world.progress[:2] == [CHUNK_BYTES, 2 * CHUNK_BYTES]


async def test_more_gaps_than_a_request_can_name(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.add_holder("holder")
    async with await world.store.begin(MANIFEST) as partial:
        for index in (1, 3):
            await partial.write_chunk(index, _chunk(index))
    monkeypatch.setattr(transfer, "MAX_RANGES", 2)
    await world.fetch("holder")
    assert world.asked == ["holder", "holder"]
    assert await world.store.get(ADDRESS) == DATA


async def test_a_cancelled_fetch_keeps_what_it_has(world: World) -> None:
    async def stall(stream: Stream) -> None:
        await _script(*answer_found(MANIFEST), _chunk(0))(stream)
        await trio.sleep_forever()

    world.add("slow", stall)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.fetch, "slow")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    partial = await world.store.resume(ADDRESS)
    assert partial is not None
    assert partial.missing() == [(1, 6)]


# Limits.


async def test_a_blob_over_the_limit_is_refused(world: World) -> None:
    await world.add_holder("holder")
    with pytest.raises(StoreError) as caught:
        await world.fetch("holder", max_bytes=SIZE - 1)
    assert caught.value.hint
    await world.store.put(DATA)
    with pytest.raises(StoreError):
        await world.fetch("holder", max_bytes=SIZE - 1)


async def test_a_source_that_only_says_it_is_too_large_is_passed_over(world: World) -> None:
    world.add("liar", _script(encode(Answer(1, 0, 2**31))))
    await world.add_holder("holder")
    await world.fetch("liar", "holder", max_bytes=SIZE)
    assert world.faults == [("liar", ProviderError)]


async def test_a_full_store_ends_the_fetch(world: World) -> None:
    world.store = MemoryStore(quota_bytes=SIZE - 1)
    await world.add_holder("holder")
    with pytest.raises(StoreError, match="quota"):
        await world.fetch("holder", "never asked")
    assert world.asked == ["holder"]


# Fetching from liars.


OTHER = manifest_of(b"other")
LIES: list[tuple[tuple[bytes, ...], type[P2PFlopError]]] = [
    ((b"garbage",), ProtocolError),
    ((b"",), ProtocolError),
    ((bytes(100),), ProtocolError),
    ((encode(Answer(1, 0, 0)),), ProtocolError),
    ((msgspec.msgpack.encode([1, 3, 0]),), ProtocolError),
    (tuple(answer_found(OTHER)), VerificationError),
    ((next(answer_found(MANIFEST)), encode(MANIFEST)[:-1]), ProtocolError),
    ((next(answer_found(MANIFEST)), encode(MANIFEST) + b"x"), ProtocolError),
    ((*answer_found(MANIFEST), _chunk(1)), VerificationError),
    ((*answer_found(MANIFEST), _chunk(0)[:-1]), ProtocolError),
    ((*answer_found(MANIFEST), _chunk(0) + b"x"), ProtocolError),
    ((*answer_found(MANIFEST), b""), ProtocolError),
    ((*answer_found(MANIFEST), bytes(CHUNK_BYTES)), VerificationError),
    (tuple(answer_found(MANIFEST)), ProviderError),
    ((), ProviderError),
]


@pytest.mark.parametrize(("frames", "fault"), LIES)
async def test_a_liar_is_noted_and_the_next_source_serves(
    world: World, frames: tuple[bytes, ...], fault: type[P2PFlopError]
) -> None:
    world.add("liar", _script(*frames))
    await world.add_holder("holder")
    await world.fetch("liar", "holder")
    assert world.faults == [("liar", fault)]
    assert await world.store.get(ADDRESS) == DATA


async def test_only_liars(world: World) -> None:
    world.add("liar", _script(*answer_found(OTHER)))
    with pytest.raises(BlobNotFoundError):
        await world.fetch("liar")
    assert world.store.statistics().partials == 0


async def test_silence_is_not_waited_for(world: World, autojump_clock: object) -> None:
    async def silent(stream: Stream) -> None:
        await trio.sleep_forever()

    world.add("silent", silent)
    await world.add_holder("holder")
    start = trio.current_time()
    await world.fetch("silent", "holder")
    assert trio.current_time() - start == pytest.approx(FRAME_TIMEOUT_S)
    assert world.faults == [("silent", ProviderError)]


# Serving.


async def _ask(store: MemoryStore, request: bytes, **options: object) -> list[bytes]:
    """Every frame that a server answers ``request`` with."""
    ours, theirs = memory_stream_pair("me", "server")
    frames: list[bytes] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve(theirs, store, **options))  # type: ignore[arg-type]
        await ours.send(request)
        while True:
            try:
                frames.append(await ours.receive())
            except EndOfStream:
                return frames


def _request(address: bytes = ADDRESS, token: bytes = b"", ranges: object = WHOLE_BLOB) -> bytes:
    return encode(Request(1, address, ranges, token))  # type: ignore[arg-type]


async def test_ranges_are_served_and_cut_at_the_end() -> None:
    store = MemoryStore()
    await store.put(DATA, public=True)
    frames = await _ask(store, _request(ranges=((1, 2), (4, 99), (200, 300))))
    assert decode(Manifest, frames[1]) == MANIFEST
    assert frames[2:] == [_chunk(1), _chunk(4), _chunk(5)]


async def test_unknown_and_forbidden_look_the_same() -> None:
    store = MemoryStore()
    await store.put(DATA, owner=ALICE)
    asked: list[tuple[str, bytes, bytes]] = []

    async def authorise(peer: str, token: bytes, address: bytes) -> bool:
        asked.append((peer, token, address))
        return token == b"good"

    unknown = b"\0" * 32
    assert await _ask(store, _request(), authorise=authorise) == [answer_absent()]
    assert await _ask(store, _request(unknown), authorise=authorise) == [answer_absent()]
    assert await _ask(store, _request(unknown, b"good"), authorise=authorise) == [answer_absent()]
    assert await _ask(store, _request()) == [answer_absent()]
    assert len(await _ask(store, _request(token=b"good"), authorise=authorise)) == 8
    assert asked[0] == ("me", b"", ADDRESS)
    assert len(asked) == 4


async def test_public_blobs_need_no_right() -> None:
    store = MemoryStore()
    await store.put(DATA, public=True)

    async def never(peer: str, token: bytes, address: bytes) -> bool:
        raise AssertionError

    assert len(await _ask(store, _request(), authorise=never)) == 8


async def test_a_token_opens_a_private_blob(world: World) -> None:
    store = await world.add_holder("holder", public=False)

    async def authorise(peer: str, token: bytes, address: bytes) -> bool:
        return (peer, token, address) == ("me", b"lease", ADDRESS)

    world.add("leased", lambda stream: serve(stream, store, authorise))
    with pytest.raises(BlobNotFoundError):
        await world.fetch("holder", "leased")
    await world.fetch("leased", token=b"lease")
    assert await world.store.get(ADDRESS) == DATA


async def test_a_damaged_chunk_is_not_sent(world: World) -> None:
    store = await world.add_holder("damaged")
    store._whole[ADDRESS].chunks[2] = bytes(CHUNK_BYTES)
    await world.add_holder("sound")
    await world.fetch("damaged", "sound")
    assert world.asked == ["damaged", "sound"]
    assert world.faults == [("damaged", ProviderError)]
    assert await _ask(store, _request()) == [answer_absent()]


@pytest.mark.parametrize(
    "fields",
    [
        [2, ADDRESS, [[0, 1]], b""],
        [1, ADDRESS[:-1], [[0, 1]], b""],
        [1, ADDRESS, [], b""],
        [1, ADDRESS, [[1, 1]], b""],
        [1, ADDRESS, [[2, 1]], b""],
        [1, ADDRESS, [[0, 1], [1, 2]], b""],
        [1, ADDRESS, [[3, 4], [1, 2]], b""],
        [1, ADDRESS, [[-1, 2]], b""],
        [1, ADDRESS, [[0, 2**32]], b""],
        [1, ADDRESS, [[2 * i, 2 * i + 1] for i in range(MAX_RANGES + 1)], b""],
        [1, ADDRESS, [[0, 1]], bytes(MAX_TOKEN_BYTES + 1)],
        [1, ADDRESS, [[0, 1]]],
        "request",
    ],
)
async def test_requests_that_are_none_are_refused(fields: object) -> None:
    ours, theirs = memory_stream_pair("me", "server")
    await ours.send(msgspec.msgpack.encode(fields))
    with pytest.raises(ProtocolError) as caught:
        await serve(theirs, MemoryStore())
    assert caught.value.peer == "me"
    with pytest.raises(EndOfStream):
        await ours.receive()


def test_the_largest_request_passes() -> None:
    ranges = tuple((2**32 - 1000 + 2 * i, 2**32 - 999 + 2 * i) for i in range(MAX_RANGES))
    request = Request(1, ADDRESS, ranges, bytes(MAX_TOKEN_BYTES))
    assert decode(Request, encode(request)) == request


async def test_a_requester_that_leaves_or_stalls_is_let_go(autojump_clock: object) -> None:
    store = MemoryStore()
    data = bytes(40 * CHUNK_BYTES)
    await store.put(data, public=True)
    for leaves in (True, False):
        ours, theirs = memory_stream_pair("me", "server")
        await ours.send(_request(address_of(data)))
        if leaves:
            await ours.aclose()
        with pytest.raises(ProviderError):
            await serve(theirs, store)


async def test_a_server_bounds_the_streams_of_one_peer(autojump_clock: object) -> None:
    store = MemoryStore()
    await store.put(b"x", public=True)
    server = BlobServer(store)
    async with trio.open_nursery() as nursery:
        waiting: list[Stream] = []
        for _ in range(MAX_STREAMS_PER_PEER):
            ours, theirs = memory_stream_pair("me", "server")
            waiting.append(ours)
            nursery.start_soon(server.handle, theirs)
        await trio.testing.wait_all_tasks_blocked()

        async def ask(peer: str) -> list[bytes]:
            ours, theirs = memory_stream_pair(peer, "server")
            await ours.send(_request(address_of(b"x")))
            await server.handle(theirs)
            return [await ours.receive()]

        assert decode(Answer, (await ask("me"))[0]).status == 2
        assert decode(Answer, (await ask("another"))[0]).status == 0
        await waiting[0].send(_request(address_of(b"x")))
        await trio.testing.wait_all_tasks_blocked()
        assert decode(Answer, (await ask("me"))[0]).status == 0
        for stream in waiting[1:]:
            await stream.send(_request())


async def test_a_server_bounds_all_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "MAX_STREAMS", 0)
    store = MemoryStore()
    await store.put(b"x", public=True)
    ours, theirs = memory_stream_pair("me", "server")
    await ours.send(_request(address_of(b"x")))
    await BlobServer(store).handle(theirs)
    assert decode(Answer, await ours.receive()).status == 2


async def test_peers_that_hold_all_slots_keep_out_neither_strangers_nor_lessees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slots, "MAX_STREAMS", 6)
    monkeypatch.setattr(slots, "MAX_PUBLIC_STREAMS", 4)
    store = MemoryStore()
    private = b"private" * 1000
    await store.put(DATA * 4, public=True)
    await store.put(private)

    async def lessee(peer: str, token: bytes, address: bytes) -> bool:
        await trio.lowlevel.checkpoint()
        return peer == "lessee"

    server = BlobServer(store, lessee)
    ended: list[str] = []

    async def handle(stream: Stream) -> None:
        try:
            await server.handle(stream)
        except ProviderError as error:
            ended.append(error.message)

    async with trio.open_nursery() as nursery:

        async def ask(peer: str, address: bytes) -> int:
            ours, theirs = memory_stream_pair(peer, "server")
            held.append(ours)
            await ours.send(_request(address))
            nursery.start_soon(handle, theirs)
            return decode(Answer, await ours.receive()).status

        held: list[Stream] = []
        for _ in range(4):
            assert await ask("hoarder", address_of(DATA * 4)) == 0
        assert await ask("stranger", address_of(DATA * 4)) == 0
        await trio.testing.wait_all_tasks_blocked()
        assert len(ended) == 1
        assert "hoarder" in ended[0]
        for _ in range(2):
            assert await ask("lessee", address_of(private)) == 0
        nursery.cancel_scope.cancel()


async def test_a_busy_source_is_passed_over(world: World) -> None:
    world.add("busy", _script(encode(Answer(1, 2, 0))))
    await world.add_holder("holder")
    await world.fetch("busy", "holder")
    assert world.asked == ["busy", "holder"]
