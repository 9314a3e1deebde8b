"""What only a store on disk can do: fill up, restart, be swept, be locked, be damaged."""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from p2pflop.dht import database as database_module
from p2pflop.dht import files, writing
from p2pflop.dht.blobs import SMALL_BYTES
from p2pflop.dht.database import Database
from p2pflop.dht.index import Index
from p2pflop.dht.manifest import CHUNK_BYTES, address_of, manifest_of
from p2pflop.dht.store import PARTIAL_LIFETIME_NS, RESERVE_BYTES, FileStore
from p2pflop.errors import BlobNotFoundError, StoreError, StoreFullError, VerificationError

SIZE = 3 * CHUNK_BYTES + 1
DATA = bytes(range(256)) * (SIZE // 256) + b"\0" * (SIZE % 256)
ADDRESS = address_of(DATA)


def _files(path: Path) -> list[Path]:
    return list((path / "blobs").iterdir())


async def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    async with FileStore(tmp_path) as store:
        large = await store.put(DATA, public=True, owner=b"o")
        small = await store.put(b"small")
        await store.grant(small.address, b"r")
    async with FileStore(tmp_path) as store:
        assert await store.list() == (large, small)
        assert await store.get(large.address) == DATA
        assert await store.get(small.address) == b"small"
        assert await store.may_read(small.address, b"r")
        assert store.statistics().used_bytes == SIZE + 5


async def test_the_quota_counts_what_was_there_at_the_start(tmp_path: Path) -> None:
    async with FileStore(tmp_path) as store:
        await store.put(DATA)
        await store.begin(manifest_of(b"x" * SIZE))
    async with FileStore(tmp_path, quota_bytes=2 * SIZE) as store:
        with pytest.raises(StoreFullError, match="quota"):
            await store.put(b"x")


async def test_left_over_files_are_swept_and_named_ones_stay(tmp_path: Path) -> None:
    async with FileStore(tmp_path) as store:
        await store.put(DATA)
        await store.begin(manifest_of(b"x" * SIZE))
    (tmp_path / "blobs" / "left over").write_bytes(b"x")
    async with FileStore(tmp_path) as store:
        assert len(_files(tmp_path)) == 2
        assert await store.get(ADDRESS) == DATA


async def test_a_forgotten_fetch_is_given_up(tmp_path: Path) -> None:
    now_ns = 10**18
    async with FileStore(tmp_path, clock_ns=lambda: now_ns) as store:
        await store.begin(manifest_of(DATA))
    now_ns += PARTIAL_LIFETIME_NS
    async with FileStore(tmp_path, clock_ns=lambda: now_ns) as store:
        assert store.statistics().partials == 1
    now_ns += 1
    async with FileStore(tmp_path, clock_ns=lambda: now_ns) as store:
        assert store.statistics().partials == 0
        assert store.statistics().used_bytes == 0
        assert _files(tmp_path) == []


async def test_a_store_is_one_processes_own(tmp_path: Path) -> None:
    code = f"""
import trio
from pathlib import Path
from p2pflop.dht.store import FileStore
from p2pflop.errors import StoreError
async def main():
    try:
        FileStore(Path({str(tmp_path)!r}))
    except StoreError as error:
        print(error.message, error.hint)
trio.run(main)
"""
    async with FileStore(tmp_path):
        with pytest.raises(StoreError, match="another process"):
            FileStore(tmp_path)
        result = await trio.run_process([sys.executable, "-c", code], capture_stdout=True)
        assert b"another process" in result.stdout
    async with FileStore(tmp_path):
        return


async def test_names_of_files_say_nothing_of_blobs(tmp_path: Path) -> None:
    async with FileStore(tmp_path) as store:
        await store.put(DATA)
    (file,) = _files(tmp_path)
    assert len(file.name) == 32
    int(file.name, 16)
    assert file.stat().st_mode & 0o077 == 0


async def test_a_partial_takes_only_the_space_of_its_chunks(tmp_path: Path) -> None:
    async with FileStore(tmp_path) as store:
        async with await store.begin(manifest_of(DATA)) as partial:
            await partial.write_chunk(3, DATA[3 * CHUNK_BYTES :])
        (file,) = _files(tmp_path)
        assert file.stat().st_size == SIZE
        assert file.stat().st_blocks * 512 < CHUNK_BYTES


async def test_data_is_on_disk_before_the_index_promises_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process leaves its writes to the kernel; only this order survives a power cut."""
    events: list[str] = []

    def note(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def noted(*arguments: object) -> object:
            events.append(name)
            return function(*arguments)

        return noted

    monkeypatch.setattr(os, "pwrite", note("write", os.pwrite))
    monkeypatch.setattr(files, "_sync_data", note("sync", files._sync_data))
    monkeypatch.setattr(os, "fsync", note("sync folder", os.fsync))
    monkeypatch.setattr(Index, "keep", note("commit", Index.keep))
    monkeypatch.setattr(Index, "begin", note("commit begin", Index.begin))
    monkeypatch.setattr(Index, "save_bits", note("commit bits", Index.save_bits))
    monkeypatch.setattr(Index, "promote", note("commit", Index.promote))
    async with FileStore(tmp_path) as store:
        await store.put(DATA)
        assert events == ["write", "sync", "sync folder", "commit"]
        events.clear()
        async with store.writer() as writer:
            await writer.write(b"x" * CHUNK_BYTES)
            await writer.finish()
        assert [event for event in events if event != "write"] == ["sync", "sync folder", "commit"]
        assert events.index("sync") > max(i for i, e in enumerate(events) if e == "write")
        events.clear()
        async with await store.begin(manifest_of(b"y" * CHUNK_BYTES)) as partial:
            await partial.write_chunk(0, b"y" * CHUNK_BYTES)
            await partial.finish()
        begin = ["sync", "sync folder", "commit begin"]
        assert events == [*begin, "write", "sync", "commit bits", "commit"]


# Disks that fail.


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk with space for one more mebibyte."""
    room = [CHUNK_BYTES]
    pwrite = os.pwrite

    def limited(descriptor: int, data: memoryview, offset: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = pwrite(descriptor, data[: room[0]], offset)
        room[0] -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", limited)
        yield


@pytest.mark.usefixtures("full_disk")
async def test_a_full_disk_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    async with FileStore(tmp_path) as store:
        with pytest.raises(StoreFullError) as caught:
            await store.put(DATA)
        assert f"the disk of the store at {tmp_path} is full: No space" in caught.value.message
        assert "space" in caught.value.hint
        async with store.writer() as writer:
            with pytest.raises(StoreError, match="No space"):
                await writer.write(DATA)
            with pytest.raises(StoreError):
                await writer.finish()
        assert _files(tmp_path) == []
        assert store.statistics().used_bytes == 0
        assert await store.stat(ADDRESS) is None


@pytest.mark.usefixtures("full_disk")
async def test_a_fetch_on_a_full_disk_keeps_what_fitted(tmp_path: Path) -> None:
    async with FileStore(tmp_path) as store:
        async with await store.begin(manifest_of(DATA)) as partial:
            await partial.write_chunk(1, DATA[CHUNK_BYTES : 2 * CHUNK_BYTES])
            with pytest.raises(StoreError, match="No space"):
                await partial.write_chunk(2, DATA[2 * CHUNK_BYTES : 3 * CHUNK_BYTES])
            with pytest.raises(StoreError, match="missing"):
                await partial.finish()
        resumed = await store.resume(ADDRESS)
        assert resumed is not None
        async with resumed:
            assert resumed.missing() == [(0, 1), (2, 4)]


async def test_an_index_that_fails_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise StoreError("index.db: database or disk is full")

    async with FileStore(tmp_path) as store:
        monkeypatch.setattr(Index, "keep", fail)
        monkeypatch.setattr(Index, "begin", fail)
        with pytest.raises(StoreError, match="full"):
            await store.put(DATA)
        with pytest.raises(StoreError, match="full"):
            await store.begin(manifest_of(DATA))
        async with store.writer() as writer:
            await writer.write(DATA)
            with pytest.raises(StoreError, match="full"):
                await writer.finish()
        assert _files(tmp_path) == []
        assert store.statistics().used_bytes == 0


async def test_chunks_that_could_not_be_flushed_are_missing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async with FileStore(tmp_path) as store:
        async with await store.begin(manifest_of(DATA)) as partial:
            for index in range(4):
                start = index * CHUNK_BYTES
                await partial.write_chunk(index, DATA[start : start + CHUNK_BYTES])
            with monkeypatch.context() as patch:
                patch.setattr(files, "_sync_data", fail)
                with pytest.raises(StoreError, match="Input/output"):
                    await partial.finish()
            assert partial.missing() == [(0, 4)]
        assert await store.stat(ADDRESS) is None


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError) as caught:
        FileStore(tmp_path / "store")
    assert "write" in caught.value.hint


async def test_a_path_that_is_no_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StoreError):
        FileStore(tmp_path / "store")


async def test_an_index_that_is_no_index_is_explained(tmp_path: Path) -> None:
    (tmp_path / "index.db").write_bytes(b"not a database " * 100)
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            FileStore(tmp_path)
        assert caught.value.hint


async def test_a_later_format_is_not_touched(tmp_path: Path) -> None:
    async with FileStore(tmp_path):
        pass
    connection = sqlite3.connect(tmp_path / "index.db")
    connection.execute("PRAGMA user_version=2")
    connection.close()
    with pytest.raises(StoreError, match="format 2"):
        FileStore(tmp_path)


# Damage that only a disk knows.


async def test_a_file_that_is_gone_or_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with FileStore(tmp_path) as store:
        await store.put(DATA)
        _files(tmp_path)[0].unlink()
        with pytest.raises(VerificationError):
            await store.get(ADDRESS)
        (told,) = caplog.records
        assert told.levelname == "WARNING"
        assert f"{ADDRESS.hex()} is damaged" in told.getMessage()
        with pytest.raises(BlobNotFoundError):
            await store.get(ADDRESS)
        assert store.statistics().used_bytes == 0
        await store.put(DATA)
        os.truncate(_files(tmp_path)[0], SIZE - 1)
        assert await store.read_chunk(ADDRESS, 2) == DATA[2 * CHUNK_BYTES : 3 * CHUNK_BYTES]
        with pytest.raises(VerificationError):
            await store.read_chunk(ADDRESS, 3)
        async with await store.begin(manifest_of(DATA)) as partial:
            assert partial.missing() == [(3, 4)]


@pytest.mark.parametrize("column", ["data", "manifest"])
async def test_a_damaged_row_is_never_served(tmp_path: Path, column: str) -> None:
    data = DATA if column == "manifest" else DATA[:SMALL_BYTES]
    address = address_of(data)
    async with FileStore(tmp_path) as store:
        await store.put(data)
    connection = sqlite3.connect(tmp_path / "index.db")
    connection.execute(f"UPDATE blobs SET {column} = x'00'")  # noqa: S608
    connection.commit()
    connection.close()
    async with FileStore(tmp_path) as store:
        with pytest.raises(VerificationError):
            await store.get(address)
        assert await store.stat(address) is None
        await store.put(data)
        assert await store.get(address) == data


async def test_a_partial_whose_file_is_gone_starts_over(tmp_path: Path) -> None:
    async with FileStore(tmp_path) as store:
        async with await store.begin(manifest_of(DATA)) as partial:
            await partial.write_chunk(0, DATA[:CHUNK_BYTES])
        _files(tmp_path)[0].unlink()
        async with await store.begin(manifest_of(DATA)) as partial:
            assert partial.missing() == [(0, 4)]
        assert store.statistics().used_bytes == SIZE


async def test_chunks_are_committed_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash costs at most a batch: what was committed does not wait for the fetch to end."""
    monkeypatch.setattr(writing, "BATCH_CHUNKS", 2)
    async with FileStore(tmp_path) as store:
        partial = await store.begin(manifest_of(DATA))
        for index in range(3):
            start = index * CHUNK_BYTES
            await partial.write_chunk(index, DATA[start : start + CHUNK_BYTES])
    async with FileStore(tmp_path) as store:
        resumed = await store.resume(ADDRESS)
        assert resumed is not None
        async with resumed:
            assert resumed.missing() == [(2, 4)]


# The database under it.


async def test_one_bad_operation_does_not_undo_the_group(tmp_path: Path) -> None:
    database = Database(tmp_path / "db", "CREATE TABLE t (x INTEGER PRIMARY KEY)", 1)
    faults: list[str] = []

    async def write(number: int) -> None:
        def operation(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO t VALUES (?)", (number,))
            if number % 3 == 0:
                raise StoreError(f"no {number}")
            if number % 5 == 0:
                connection.execute("INSERT INTO t VALUES (?)", (number,))

        try:
            await database.write(operation)
        except StoreError as error:
            faults.append(error.message)

    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(write, number)
    rows = [row for (row,) in database.read("SELECT x FROM t ORDER BY x")]
    assert rows == [number for number in range(30) if number % 3 and number % 5]
    assert len(faults) == 30 - len(rows)
    assert "no 3" in faults
    with pytest.raises(StoreError):
        await database.write(lambda connection: connection.execute("nonsense"))
    with pytest.raises(StoreError):
        database.read("nonsense")
    await database.aclose()
    with pytest.raises(StoreError, match="closed"):
        await database.write(lambda connection: connection.execute("SELECT 1"))


async def test_a_full_disk_can_be_made_room_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = tmp_path / "reserve"
    async with FileStore(tmp_path) as store:
        assert reserve.stat().st_blocks * 512 >= RESERVE_BYTES
        large = await store.put(bytes(5 * CHUNK_BYTES))
        small = await store.put(b"small")
        delete = store.index.delete

        async def full(address: bytes, owner: bytes | None = None) -> Any:
            if reserve.exists():
                raise StoreFullError("the disk is full")
            return await delete(address, owner)

        monkeypatch.setattr(store.index, "delete", full)
        assert await store.delete(large.address)
        assert reserve.exists()  # taken again, since there is room now
        reserve.unlink()
        monkeypatch.setattr(store._reserve, "_path", tmp_path / "absent" / "reserve")
        monkeypatch.setattr(store.index, "delete", delete)
        assert await store.delete(small.address)


async def test_without_a_reserve_a_full_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FileStore(tmp_path) as store:
        blob = await store.put(b"small")

        async def full(_address: bytes, _owner: bytes | None = None) -> Any:
            raise StoreFullError("the disk is full")

        monkeypatch.setattr(store.index, "delete", full)
        with pytest.raises(StoreFullError):
            await store.delete(blob.address)
        with pytest.raises(StoreFullError):
            await store.delete(blob.address)


async def test_only_so_many_writes_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "MAX_WAITING", 2)
    database = Database(tmp_path / "some.db", "CREATE TABLE numbers (number INTEGER)", 1)
    disk = threading.Event()

    def insert(number: int, connection: sqlite3.Connection) -> None:
        disk.wait()
        connection.execute("INSERT INTO numbers VALUES (?)", (number,))

    async with trio.open_nursery() as nursery:
        for number in range(7):
            nursery.start_soon(database.write, partial(insert, number))
        await trio.testing.wait_all_tasks_blocked()
        assert database._unfinished == 2
        disk.set()
    assert database._unfinished == 0
    written = database.read("SELECT number FROM numbers ORDER BY number")
    assert written == [(number,) for number in range(7)]
    await database.aclose()
