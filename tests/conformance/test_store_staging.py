"""Both stores keep small blobs in a commit that is not theirs, or not at all."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from p2pflop.dht.blobs import SMALL_BYTES, Store
from p2pflop.dht.database import Database
from p2pflop.dht.index import open_index
from p2pflop.dht.manifest import address_of, manifest_of
from p2pflop.dht.memory import MemoryStore
from p2pflop.dht.store import FileStore
from p2pflop.errors import StoreError, StoreFullError

ALICE = b"a" * 32


@dataclass
class Stage:
    """A store and the database of its index, which a MemoryStore does not need."""

    store: Store
    database: Database


@pytest.fixture(params=["file", "memory"])
async def stage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stage]:
    database = open_index(tmp_path / "shared.db")
    quota_bytes = 2 * SMALL_BYTES
    store: Store = MemoryStore(quota_bytes=quota_bytes)
    if request.param == "file":
        store = FileStore(tmp_path / "store", database, quota_bytes=quota_bytes)
    yield Stage(store, database)
    await store.aclose()
    await database.aclose()


async def test_small_blobs_are_kept_in_the_commit_of_another(stage: Stage) -> None:
    store, blobs = stage.store, [b"", b"small", bytes(SMALL_BYTES)]
    staged = store.stage(blobs)
    assert await store.list() == ()
    await stage.database.write(staged.keep)
    await staged.settle()
    for data in blobs:
        assert await store.get(address_of(data)) == data
        assert (await store.manifest(address_of(data))) == manifest_of(data)
    assert store.statistics().used_bytes == sum(map(len, blobs))
    assert not await store.may_read(address_of(b"small"), ALICE)


async def test_what_is_staged_twice_or_a_strangers_already_counts_once(stage: Stage) -> None:
    store = stage.store
    await store.put(b"theirs", owner=ALICE)
    for _ in range(2):
        staged = store.stage([b"theirs", b"ours"])
        await stage.database.write(staged.keep)
        await staged.settle()
    assert {info.owner for info in await store.list()} == {b""}
    assert store.statistics().used_bytes == len(b"theirs" + b"ours")
    assert await store.may_read(address_of(b"theirs"), ALICE)


async def test_what_is_staged_has_to_fit_the_quota(stage: Stage) -> None:
    blobs = [bytes([seed]) * SMALL_BYTES for seed in range(3)]
    stage.store.stage(blobs[:2])
    with pytest.raises(StoreFullError, match="quota"):
        stage.store.stage(blobs)


async def test_a_transaction_that_fails_keeps_nothing(tmp_path: Path) -> None:
    database = open_index(tmp_path / "shared.db")
    async with FileStore(tmp_path / "store", database) as store:
        staged = store.stage([b"small"])

        def fail(connection: sqlite3.Connection) -> None:
            staged.keep(connection)
            raise StoreError("what goes with it cannot be written")

        with pytest.raises(StoreError, match="goes with it"):
            await database.write(fail)
        assert await store.list() == ()
    await database.aclose()
