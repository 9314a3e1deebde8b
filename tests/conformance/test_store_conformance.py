"""Both stores keep the promises of p2pflop.dht.blobs, damage included."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from p2pflop.dht.blobs import MAX_GRANTS, MAX_READER_BYTES, SMALL_BYTES, Store, StoreStatistics
from p2pflop.dht.manifest import CHUNK_BYTES, address_of, manifest_of
from p2pflop.dht.memory import MemoryStore
from p2pflop.dht.store import FileStore
from p2pflop.errors import BlobNotFoundError, StoreError, VerificationError

ALICE, BOB, CAROL = b"a" * 32, b"b" * 32, b"c" * 32
LARGE = 2 * CHUNK_BYTES + 5


def _data(size: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(b"%d/%d" % (size, seed)).digest(size)


@dataclass
class Bench:
    """A store, how to make another like it, and how its disk or memory fails."""

    store: Store
    make: Callable[[int | None], Store]
    damage: Callable[[bytes, int], None]


@pytest.fixture(params=["file", "memory"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    times = iter(range(1_000, 1_000_000))
    made: list[Store] = []

    def make(quota_bytes: int | None) -> Store:
        store: Store
        if request.param == "file":
            path = tmp_path / f"store{len(made)}"
            store = FileStore(path, quota_bytes=quota_bytes, clock_ns=lambda: next(times))
        else:
            store = MemoryStore(quota_bytes=quota_bytes, clock_ns=lambda: next(times))
        made.append(store)
        return store

    store = make(None)

    def damage(address: bytes, index: int) -> None:
        if isinstance(store, MemoryStore):
            chunks = store._whole[address].chunks
            chunks[index] = chunks[index][:-1] + bytes([chunks[index][-1] ^ 1])
            return
        assert isinstance(store, FileStore)
        row = store.index.whole(address)
        assert row is not None
        with (store.folder / row.file).open("r+b") as file:
            file.seek(index * CHUNK_BYTES)
            byte = file.read(1)
            file.seek(index * CHUNK_BYTES)
            file.write(bytes([byte[0] ^ 1]))

    yield Bench(store, make, damage)
    for store in made:
        await store.aclose()


@pytest.fixture
def store(bench: Bench) -> Store:
    return bench.store


SIZES = [0, 1, SMALL_BYTES, SMALL_BYTES + 1, CHUNK_BYTES, CHUNK_BYTES + 1, LARGE]


@pytest.mark.parametrize("size", SIZES)
async def test_what_is_put_is_got(store: Store, size: int) -> None:
    data = _data(size)
    info = await store.put(data)
    assert (info.address, info.size_bytes, info.public, info.owner) == (
        address_of(data),
        size,
        False,
        b"",
    )
    assert await store.get(info.address) == data
    assert await store.stat(info.address) == info
    manifest = await store.manifest(info.address)
    assert manifest == manifest_of(data)
    chunks = [await store.read_chunk(info.address, i) for i in range(len(manifest.chunks))]
    assert b"".join(chunks) == data
    for index in (-1, len(chunks)):
        with pytest.raises(IndexError):
            await store.read_chunk(info.address, index)
    assert store.statistics().used_bytes == size


@pytest.mark.parametrize("kind", [bytearray, memoryview])
@pytest.mark.parametrize("size", [10, LARGE])
async def test_any_buffer_can_be_put(store: Store, kind: type, size: int) -> None:
    info = await store.put(kind(_data(size)))
    assert await store.get(info.address) == _data(size)


@pytest.mark.parametrize("size", SIZES)
async def test_a_writer_makes_the_same_blob(store: Store, size: int) -> None:
    data = _data(size)
    async with store.writer(public=True, owner=ALICE) as writer:
        for start in range(0, size, 300_000):
            await writer.write(data[start : start + 300_000])
        info = await writer.finish()
        with pytest.raises(StoreError):
            await writer.write(b"more")
        with pytest.raises(StoreError):
            await writer.finish()
    assert (info.address, info.public, info.owner) == (address_of(data), True, ALICE)
    assert await store.get(info.address) == data
    assert store.statistics().used_bytes == size


@pytest.mark.parametrize("size", [10, LARGE])
async def test_a_writer_that_is_left_leaves_nothing(store: Store, size: int) -> None:
    async with store.writer() as writer:
        await writer.write(_data(size))
    assert await store.list() == ()
    assert store.statistics().used_bytes == 0


async def test_a_write_that_was_cancelled_can_be_no_blob(store: Store) -> None:
    async with store.writer() as writer:
        with trio.CancelScope() as scope:
            scope.cancel()
            await writer.write(_data(LARGE))
        with pytest.raises(StoreError):
            await writer.finish()
    assert store.statistics().used_bytes == 0


async def test_what_is_not_there_is_not_found(store: Store) -> None:
    address = b"\0" * 32
    assert await store.stat(address) is None
    assert await store.delete(address) is False
    assert await store.may_read(address, ALICE) is False
    assert await store.resume(address) is None
    await store.revoke(address, ALICE)
    for call in (
        lambda: store.get(address),
        lambda: store.read_chunk(address, 0),
        lambda: store.manifest(address),
        lambda: store.set_public(address),
        lambda: store.grant(address, ALICE),
    ):
        with pytest.raises(BlobNotFoundError):
            await call()


async def test_get_refuses_what_is_over_its_limit(store: Store) -> None:
    info = await store.put(b"12345")
    assert await store.get(info.address, 5) == b"12345"
    with pytest.raises(StoreError) as caught:
        await store.get(info.address, 4)
    assert caught.value.hint


async def test_the_list_is_in_the_order_of_putting(store: Store) -> None:
    infos = [await store.put(_data(100, seed)) for seed in range(5)]
    await store.put(_data(100, 2))
    assert list(await store.list()) == infos
    assert [info.created_ns for info in infos] == sorted({info.created_ns for info in infos})
    assert store.statistics().blobs == 5


@pytest.mark.parametrize("size", [10, LARGE])
async def test_a_deleted_blob_is_gone_and_can_come_back(store: Store, size: int) -> None:
    info = await store.put(_data(size))
    assert await store.delete(info.address) is True
    assert await store.stat(info.address) is None
    with pytest.raises(BlobNotFoundError):
        await store.get(info.address)
    assert store.statistics().used_bytes == 0
    await store.put(_data(size))
    assert await store.get(info.address) == _data(size)


# Who may read.


async def test_who_may_read(store: Store) -> None:
    address = (await store.put(b"secret", owner=ALICE)).address
    assert await store.may_read(address, ALICE)
    assert not await store.may_read(address, BOB)
    assert not await store.may_read(address, b"")
    await store.grant(address, BOB)
    assert await store.may_read(address, BOB)
    await store.revoke(address, BOB)
    assert not await store.may_read(address, BOB)
    assert (await store.set_public(address)).public
    assert await store.may_read(address, BOB)
    assert await store.may_read(address, b"")
    assert not (await store.set_public(address, False)).public
    assert not await store.may_read(address, b"")


async def test_the_nodes_own_blobs_are_private(store: Store) -> None:
    address = (await store.put(b"own")).address
    assert not await store.may_read(address, b"")
    assert not await store.may_read(address, ALICE)


@pytest.mark.parametrize("size", [10, LARGE])
async def test_putting_again_adds_an_owner_and_may_publish(store: Store, size: int) -> None:
    first = await store.put(_data(size), owner=ALICE)
    again = await store.put(_data(size), owner=BOB)
    assert (again.owner, again.created_ns) == (ALICE, first.created_ns)
    assert await store.may_read(first.address, BOB)
    assert not await store.may_read(first.address, CAROL)
    assert (await store.put(_data(size), public=True)).public
    assert (await store.put(_data(size))).public
    assert store.statistics().used_bytes == size


async def test_deleting_takes_grants_back(store: Store) -> None:
    address = (await store.put(b"x", owner=ALICE)).address
    await store.grant(address, BOB)
    await store.delete(address)
    await store.put(b"x", owner=ALICE)
    assert not await store.may_read(address, BOB)


async def test_the_most_grants(store: Store) -> None:
    address = (await store.put(b"x")).address
    for number in range(MAX_GRANTS):
        await store.grant(address, number.to_bytes(4, "big"))
    await store.grant(address, (0).to_bytes(4, "big"))
    with pytest.raises(StoreError):
        await store.grant(address, b"one more")


async def test_the_longest_reader(store: Store) -> None:
    address = (await store.put(b"x", owner=b"o" * MAX_READER_BYTES)).address
    await store.grant(address, b"r" * MAX_READER_BYTES)
    for call in (
        lambda: store.put(b"y", owner=b"o" * (MAX_READER_BYTES + 1)),
        lambda: store.grant(address, b"r" * (MAX_READER_BYTES + 1)),
    ):
        with pytest.raises(ValueError, match="over"):
            await call()


# Partials.


@pytest.mark.parametrize("size", SIZES)
async def test_chunks_in_any_order_make_a_blob(store: Store, size: int) -> None:
    data = _data(size)
    manifest = manifest_of(data)
    async with await store.begin(manifest, public=True, owner=ALICE) as partial:
        for index in reversed(range(len(manifest.chunks))):
            assert await store.stat(manifest.address) is None
            with pytest.raises(StoreError):
                await partial.finish()
            start = index * CHUNK_BYTES
            await partial.write_chunk(index, data[start : start + CHUNK_BYTES])
        assert partial.missing() == []
        info = await partial.finish()
    assert (info.public, info.owner) == (True, ALICE)
    assert await store.get(manifest.address) == data
    assert store.statistics().used_bytes == size
    assert store.statistics().partials == 0


async def test_a_partial_goes_on_where_it_was_left(store: Store) -> None:
    data = _data(LARGE)
    manifest = manifest_of(data)
    async with await store.begin(manifest, owner=ALICE) as partial:
        assert partial.missing() == [(0, 3)]
        await partial.write_chunk(1, data[CHUNK_BYTES : 2 * CHUNK_BYTES])
    assert await store.resume(manifest.address, BOB) is None
    resumed = await store.resume(manifest.address, ALICE)
    assert resumed is not None
    assert resumed.manifest == manifest
    async with resumed:
        assert resumed.missing() == [(0, 1), (2, 3)]
        await resumed.write_chunk(0, data[:CHUNK_BYTES])
        await resumed.write_chunk(2, data[2 * CHUNK_BYTES :])
        await resumed.finish()
    assert await store.resume(manifest.address, ALICE) is None
    assert await store.get(manifest.address) == data


async def test_a_wrong_chunk_is_refused_and_changes_nothing(store: Store) -> None:
    data = _data(LARGE)
    manifest = manifest_of(data)
    async with await store.begin(manifest) as partial:
        for wrong in (data[CHUNK_BYTES : 2 * CHUNK_BYTES], data[: CHUNK_BYTES - 1], b""):
            with pytest.raises(VerificationError):
                await partial.write_chunk(0, wrong)
        assert partial.missing() == [(0, 3)]


async def test_knowing_a_manifest_does_not_make_an_owner(store: Store) -> None:
    """A buyer who learned another's address gets it only by delivering all the bytes."""
    data = _data(LARGE)
    manifest = manifest_of(data)
    await store.put(data, owner=ALICE)
    async with await store.begin(manifest, owner=BOB) as partial:
        assert partial.missing() == [(0, 3)]
        with pytest.raises(StoreError):
            await partial.finish()
        assert not await store.may_read(manifest.address, BOB)
        for index in range(3):
            start = index * CHUNK_BYTES
            await partial.write_chunk(index, data[start : start + CHUNK_BYTES])
        await partial.finish()
    assert await store.may_read(manifest.address, BOB)
    assert await store.may_read(manifest.address, ALICE)
    assert not await store.may_read(manifest.address, CAROL)
    assert store.statistics().used_bytes == LARGE
    assert await store.get(manifest.address) == data


async def test_nothing_is_missing_for_who_may_read(store: Store) -> None:
    for owner, public in ((ALICE, False), (BOB, True)):
        data = _data(LARGE, int(public))
        await store.put(data, owner=ALICE, public=public)
        async with await store.begin(manifest_of(data), owner=owner) as partial:
            assert partial.missing() == []
            assert (await partial.finish()).owner == ALICE


async def test_what_the_node_puts_or_fetches_becomes_its_own(store: Store) -> None:
    for number, finish in enumerate((False, True)):
        data = _data(LARGE, number)
        address = (await store.put(data, owner=ALICE)).address
        if finish:
            async with await store.begin(manifest_of(data)) as partial:
                assert partial.missing() == []
                assert (await partial.finish()).owner == b""
        else:
            assert (await store.put(data)).owner == b""
        assert await store.may_read(address, ALICE), "who put it first may still read it"
        assert not await store.may_read(address, BOB)
        assert not await store.delete(address, owner=ALICE), "it is no longer for ALICE to delete"
        assert await store.get(address) == data


async def test_an_owners_delete_spares_what_is_public_or_anothers(store: Store) -> None:
    mine = await store.put(_data(LARGE, 1), owner=ALICE)
    public = await store.put(_data(LARGE, 2), owner=ALICE, public=True)
    absent = manifest_of(_data(LARGE, 3)).address
    assert not await store.delete(mine.address, owner=BOB)
    assert not await store.delete(public.address, owner=ALICE)
    assert not await store.delete(absent, owner=ALICE)
    assert await store.delete(mine.address, owner=ALICE)
    assert [info.address for info in await store.list()] == [public.address]


async def test_old_partials_of_strangers_are_forgotten_but_for_some(store: Store) -> None:
    manifests = [manifest_of(_data(LARGE, number)) for number in range(3)]
    for number, (manifest, owner) in enumerate(zip(manifests, (ALICE, BOB, b""), strict=True)):
        async with await store.begin(manifest, owner=owner) as partial:
            await partial.write_chunk(0, _data(LARGE, number)[:CHUNK_BYTES])
    assert await store.forget_partials(0) == 0, "they are younger"
    later = 2**62
    assert await store.forget_partials(later, {manifests[1].address}) == 1
    assert await store.resume(manifests[0].address, ALICE) is None
    for manifest, owner in zip(manifests[1:], (BOB, b""), strict=True):
        partial_left = await store.resume(manifest.address, owner)
        assert partial_left is not None
        async with partial_left:
            assert partial_left.missing()
    assert store.statistics().partials == 2


async def test_a_partial_of_a_deleted_blob_cannot_finish(store: Store) -> None:
    data = _data(LARGE)
    manifest = manifest_of(data)
    async with await store.begin(manifest) as partial:
        for index in range(3):
            start = index * CHUNK_BYTES
            await partial.write_chunk(index, data[start : start + CHUNK_BYTES])
        assert await store.delete(manifest.address)
        with pytest.raises(StoreError, match="deleted"):
            await partial.finish()
        with pytest.raises(BlobNotFoundError):
            await store.get(manifest.address)
    assert store.statistics().used_bytes == 0


async def test_a_put_may_overtake_a_fetch(store: Store) -> None:
    data = _data(LARGE)
    manifest = manifest_of(data)
    async with await store.begin(manifest, owner=ALICE) as partial:
        for index in range(3):
            start = index * CHUNK_BYTES
            await partial.write_chunk(index, data[start : start + CHUNK_BYTES])
        put = await store.put(data, owner=ALICE)
        assert await partial.finish() == put
    assert await store.get(manifest.address) == data
    assert store.statistics().used_bytes == LARGE


async def test_two_fetches_of_one_blob_at_once(store: Store) -> None:
    data = _data(LARGE)
    manifest = manifest_of(data)

    async def fetch(order: list[int]) -> None:
        async with await store.begin(manifest) as partial:
            for index in order:
                start = index * CHUNK_BYTES
                await partial.write_chunk(index, data[start : start + CHUNK_BYTES])
            await partial.finish()

    for _ in range(8):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, [0, 1, 2])
            nursery.start_soon(fetch, [2, 1, 0])
            nursery.start_soon(store.put, data)
        assert await store.get(manifest.address) == data
        assert store.statistics() == StoreStatistics(1, 0, LARGE, None)
        await store.delete(manifest.address)


# At once.


@pytest.mark.parametrize("size", [100, LARGE])
async def test_puts_and_gets_at_once(store: Store, size: int) -> None:
    data = _data(size)
    address = address_of(data)

    async def get() -> None:
        try:
            assert await store.get(address) == data
        except BlobNotFoundError:
            return

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(lambda n: store.put(data, owner=bytes([n])), number)
            nursery.start_soon(get)
    assert await store.get(address) == data
    assert store.statistics().used_bytes == size


async def test_deleting_while_reading_and_putting(store: Store) -> None:
    data = _data(LARGE)
    address = address_of(data)
    await store.put(data)

    async def get() -> None:
        for _ in range(5):
            try:
                assert await store.get(address) == data
            except BlobNotFoundError:
                await store.put(data)

    async def delete() -> None:
        for _ in range(5):
            await store.delete(address)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(get)
        nursery.start_soon(get)
        nursery.start_soon(delete)
    await store.delete(address)
    assert store.statistics().used_bytes == 0


# Quota.


async def test_the_quota_is_exact_and_given_back(bench: Bench) -> None:
    store = bench.make(LARGE)
    await store.put(_data(LARGE))
    for call in (lambda: store.put(b"x"), lambda: store.begin(manifest_of(_data(CHUNK_BYTES)))):
        with pytest.raises(StoreError) as caught:
            await call()
        assert caught.value.hint
    async with store.writer() as writer:
        with pytest.raises(StoreError):
            await writer.write(b"x")
    await store.delete(address_of(_data(LARGE)))
    async with await store.begin(manifest_of(_data(LARGE))):
        with pytest.raises(StoreError):
            await store.put(b"x")
    await store.delete(address_of(_data(LARGE)))
    await store.put(b"x" * LARGE)
    assert store.statistics().used_bytes == LARGE


# Damage.


@pytest.mark.parametrize("read", ["get", "read_chunk"])
async def test_a_damaged_chunk_is_never_served_and_can_be_fetched_again(
    bench: Bench, read: str
) -> None:
    store, data = bench.store, _data(LARGE)
    manifest = manifest_of(data)
    await store.put(data, public=True)
    bench.damage(manifest.address, 1)
    arguments = (manifest.address,) if read == "get" else (manifest.address, 1)
    with pytest.raises(VerificationError):
        await getattr(store, read)(*arguments)
    assert await store.stat(manifest.address) is None
    assert await store.list() == ()
    with pytest.raises(BlobNotFoundError):
        await store.read_chunk(manifest.address, 0)
    async with await store.begin(manifest) as partial:
        assert partial.missing() == [(1, 2)]
        await partial.write_chunk(1, data[CHUNK_BYTES : 2 * CHUNK_BYTES])
        info = await partial.finish()
    assert info.public
    assert await store.get(manifest.address) == data
    assert store.statistics().used_bytes == LARGE


async def test_sound_chunks_of_a_damaged_blob_are_read_until_the_bad_one(bench: Bench) -> None:
    data = _data(LARGE)
    address = (await bench.store.put(data)).address
    bench.damage(address, 1)
    assert await bench.store.read_chunk(address, 0) == data[:CHUNK_BYTES]


async def test_putting_mends_damage_that_nobody_has_noticed(bench: Bench) -> None:
    data = _data(LARGE)
    address = (await bench.store.put(data)).address
    bench.damage(address, 2)
    await bench.store.put(data)
    assert await bench.store.get(address) == data
    assert bench.store.statistics().used_bytes == LARGE


async def test_a_closed_store_says_so(store: Store) -> None:
    await store.put(b"x")
    await store.aclose()
    await store.aclose()
    for call in (lambda: store.put(b"x"), lambda: store.get(address_of(b"x")), store.list):
        with pytest.raises(StoreError):
            await call()
