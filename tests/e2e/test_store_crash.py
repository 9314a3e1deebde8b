"""A store whose process is killed, again and again: nothing acknowledged is lost."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from p2pflop.dht.blobs import SMALL_BYTES
from p2pflop.dht.manifest import CHUNK_BYTES, address_of, manifest_of
from p2pflop.dht.store import FileStore

SIZES = (10, SMALL_BYTES, SMALL_BYTES + 1, CHUNK_BYTES + 7, 20 * CHUNK_BYTES)


def data_of(size: int, seed: int) -> bytes:
    return hashlib.shake_128(b"%d/%d" % (size, seed)).digest(size)


async def _put(store: FileStore, data: bytes) -> None:
    await store.put(data)


async def _stream(store: FileStore, data: bytes) -> None:
    async with store.writer() as writer:
        for start in range(0, len(data), 700_000):
            await writer.write(data[start : start + 700_000])
        await writer.finish()


async def _fetch(store: FileStore, data: bytes) -> None:
    manifest = manifest_of(data)
    async with await store.begin(manifest) as blob:
        for first, end in blob.missing():
            for index in range(first, end):
                start = index * CHUNK_BYTES
                await blob.write_chunk(index, data[start : start + CHUNK_BYTES])
        await blob.finish()


async def victim(path: Path, first_seed: int) -> None:
    """Put blobs in three ways at once and say each that was acknowledged, until killed."""
    seeds = iter(range(first_seed, first_seed + 1_000_000))

    async def work(way: object) -> None:
        while True:
            seed = next(seeds)
            size = SIZES[seed % len(SIZES)]
            await way(store, data_of(size, seed))  # type: ignore[operator]
            os.write(1, b"put %d %d\n" % (size, seed))
            if seed % 7 == 0:
                await store.delete(address_of(data_of(size, seed)))
                os.write(1, b"deleted %d %d\n" % (size, seed))

    async with FileStore(path) as store, trio.open_nursery() as nursery:
        for way in (_put, _stream, _fetch):
            nursery.start_soon(work, way)


def _run_and_kill(path: Path, first_seed: int, rng: random.Random) -> dict[tuple[int, int], bool]:
    """What the victim acknowledged: ``(size, seed)`` to whether it was put or deleted."""
    command = [sys.executable, __file__, str(path), str(first_seed)]
    acknowledged: dict[tuple[int, int], bool] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(rng.randrange(1, 25)):
            _note(process.stdout.readline(), acknowledged)
        # Any moment is a good one; which, the seed and the machine decide.
        try:
            process.wait(rng.uniform(0, 0.03))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        for line in process.stdout:
            _note(line, acknowledged)
    assert process.returncode == -signal.SIGKILL
    return acknowledged


def _note(line: bytes, acknowledged: dict[tuple[int, int], bool]) -> None:
    if line.endswith(b"\n"):
        kind, size, seed = line.split()
        acknowledged[int(size), int(seed)] = kind == b"put"


async def _check(path: Path, acknowledged: dict[tuple[int, int], bool]) -> None:
    async with FileStore(path) as store:
        listed = {info.address: info for info in await store.list()}
        for address, info in listed.items():
            data = await store.get(address)
            assert (address_of(data), len(data)) == (address, info.size_bytes)
        for (size, seed), is_there in acknowledged.items():
            address = address_of(data_of(size, seed))
            if is_there and seed % 7:
                assert await store.get(address) == data_of(size, seed)
            elif not is_there:
                assert address not in listed
        statistics = store.statistics()
        large = sum(info.size_bytes > SMALL_BYTES for info in listed.values())
        assert len(list(store.folder.iterdir())) == large + statistics.partials


async def _rounds(path: Path, count: int, rng: random.Random) -> None:
    acknowledged: dict[tuple[int, int], bool] = {}
    for number in range(count):
        run = partial(_run_and_kill, path, number * 100_000, rng)
        acknowledged |= await trio.to_thread.run_sync(run)
        await _check(path, acknowledged)
    assert sum(acknowledged.values()) >= count / 2


async def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path: Path) -> None:
    await _rounds(tmp_path, 5, random.Random(1))  # noqa: S311


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
async def test_nothing_acknowledged_is_lost_by_many_kills(tmp_path: Path, seed: int) -> None:
    await _rounds(tmp_path, 8, random.Random(seed))  # noqa: S311


async def test_a_fetch_that_was_killed_goes_on(tmp_path: Path) -> None:
    """Killed between batches, a partial still has what was committed, and only sound chunks."""
    data = data_of(40 * CHUNK_BYTES, 0)
    code = f"""
import sys, trio
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_store_crash import *
async def main():
    data = data_of(40 * CHUNK_BYTES, 0)
    async with FileStore(Path({str(tmp_path)!r})) as store:
        blob = await store.begin(manifest_of(data))
        for index in range(36):
            await blob.write_chunk(index, data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
        os.kill(os.getpid(), signal.SIGKILL)
trio.run(main)
"""
    result = await trio.run_process([sys.executable, "-c", code], check=False)
    assert result.returncode == -signal.SIGKILL
    async with FileStore(tmp_path) as store:
        assert await store.list() == ()
        blob = await store.resume(address_of(data))
        assert blob is not None
        async with blob:
            assert blob.missing() == [(32, 40)]
            for index in range(32, 40):
                start = index * CHUNK_BYTES
                await blob.write_chunk(index, data[start : start + CHUNK_BYTES])
            await blob.finish()
        assert await store.get(address_of(data)) == data


if __name__ == "__main__":
    trio.run(victim, Path(sys.argv[1]), int(sys.argv[2]))
