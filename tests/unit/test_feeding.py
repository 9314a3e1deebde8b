"""Shards on their way to a worker: in order, a few ahead, checked before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from p2pflop.dht.manifest import address_of
from p2pflop.dht.memory import MemoryStore
from p2pflop.errors import JobError
from p2pflop.ids import content_hash
from p2pflop.job.collection import Collection, CollectionEntry, numbered
from p2pflop.job.delivery import check_collected
from p2pflop.job.file import CheckedJob, decode_file, open_job
from p2pflop.job.spec import (
    MODE_COLLECT,
    ROLE_FEED,
    ROLE_INPUT,
    FeedSource,
    Job,
    NamedOutput,
    WorkParam,
    collected,
    ever_stands_still,
    is_fed,
    shard_at,
    shards_of,
    source_addresses,
    stands_still,
    work_id,
)
from p2pflop.job.validate import Refusal, validate_job, validate_work
from p2pflop.node.feeding import READ_AHEAD, Feeds
from p2pflop.node.memory_market import sample_file
from p2pflop.wire import encode

SHARDS = [bytes([number]) * 16 for number in range(10)]
SOURCE = FeedSource(b"c" * 32, 5, 3)
DATA = 1


def fed(
    steps: int = 20,
    first_step: int = 0,
    shards: Sequence[bytes] = SHARDS,
    hold: int = 1,
    *,
    collect: bool = False,
) -> tuple[CheckedJob, bytes]:
    """The sample job with a feed in the place of its input, and the feed's collection."""
    job = open_job(decode_file(sample_file()).body)
    assert isinstance(job, CheckedJob)
    addresses = [address_of(shard) for shard in shards]
    data = encode(numbered(range(len(shards)), addresses, 16))
    work, params = job.work, list(job.work.params)
    source = FeedSource(address_of(data), len(shards), hold)
    params[DATA] = WorkParam(params[DATA].dtype, params[DATA].shape, ROLE_FEED, source)
    (phase,) = work.phases
    if collect:
        modes = (phase.modes[0], MODE_COLLECT)
        phase = type(phase)(phase.graph, 2, 0, modes)
    work = type(work)(work.version, (phase,), tuple(params), work.seed)
    stretch = Job(work_id(work), first_step, steps)
    return dataclasses.replace(job, work=work, job=stretch, work_id=work_id(work)), data


def test_which_shard_is_where() -> None:
    assert [shard_at(SOURCE, step) for step in (0, 2, 3, 14, 15)] == [0, 0, 1, 4, 0]
    assert [step for step in range(8) if is_fed(SOURCE, step)] == [0, 3, 6]
    assert not is_fed(FeedSource(b"c" * 32, 1, 3), 3), "a single shard never changes"
    assert shards_of(SOURCE, 0, 3) == [0]
    assert shards_of(SOURCE, 2, 2) == [0, 1]
    assert shards_of(SOURCE, 13, 1000) == [4, 0, 1, 2, 3]


def test_where_a_run_stands_still() -> None:
    job, _ = fed(hold=3, collect=True)
    assert ever_stands_still(job.work)
    assert [step for step in range(1, 9) if stands_still(job.work, step)] == [2, 3, 4, 6, 8]
    assert collected(job.work, 1) == [(0, 1)]
    assert collected(job.work, 2) == []
    plain = open_job(decode_file(sample_file()).body)
    assert isinstance(plain, CheckedJob)
    assert not ever_stands_still(plain.work)


def test_a_feed_and_its_role_go_together() -> None:
    job, _ = fed()
    assert validate_work(job.work, job.graphs) is None
    assert source_addresses(job.work)[1:] == (job.feeds[0][1].collection,)
    params = list(job.work.params)
    params[DATA] = WorkParam(params[DATA].dtype, params[DATA].shape, ROLE_INPUT, SOURCE)
    wrong = type(job.work)(1, job.work.phases, tuple(params), 0)
    refusal = validate_work(wrong, job.graphs)
    assert refusal is not None
    assert "a feed and its shards go together" in refusal.reason


def test_too_many_values_are_not_collected() -> None:
    most, _ = fed(steps=2 * 65_536 + 1, collect=True)
    assert validate_job(most.work, most.job, most.graphs) is None
    over, _ = fed(steps=2 * 65_537, collect=True)
    refusal = validate_job(over.work, over.job, over.graphs)
    assert refusal is not None
    assert "collected" in refusal.reason


def test_a_collection_must_have_one_value_for_each_due_step() -> None:
    job, _ = fed(steps=5, first_step=3, collect=True)
    addresses = [content_hash(bytes([step])) for step in (3, 5, 7)]
    size_bytes = 8
    output = NamedOutput(0, 1, b"a" * 32, 0)
    good = numbered([3, 5, 7], addresses, size_bytes)
    found = check_collected(job, 5, output, encode(good))
    assert not isinstance(found, Refusal)
    assert [(blob.address, blob.size_bytes) for blob in found] == [(a, 8) for a in addresses]
    for wrong in (
        numbered([3, 5], addresses[:2], size_bytes),
        numbered([3, 5, 6], addresses, size_bytes),
        numbered([3, 5, 7], addresses, 4),
        Collection(1, (*good.entries, CollectionEntry("x", b"b" * 32, 8))),
    ):
        assert isinstance(check_collected(job, 5, output, encode(wrong)), Refusal)
    assert isinstance(check_collected(job, 5, output, b"?"), Refusal)


class Source:
    """Where shards come from; notes the order."""

    def __init__(self, store: MemoryStore, blobs: Sequence[bytes]) -> None:
        self.brought: list[bytes] = []
        self.held: list[bytes] = []
        self._store = store
        self._blobs = {address_of(blob): blob for blob in blobs}

    async def bring(self, address: bytes, max_bytes: int) -> None:
        data = self._blobs[address]
        assert len(data) <= max_bytes
        await self._store.put(data)
        self.brought.append(data)

    async def hold(self, addresses: list[bytes]) -> None:
        self.held += addresses


async def test_shards_come_in_order_and_only_a_few_ahead(
    autojump_clock: trio.testing.MockClock,
) -> None:
    job, data = fed(steps=25, first_step=8)
    store = MemoryStore()
    source = Source(store, [data, *SHARDS])
    feeds = Feeds(job, store, source.bring, source.hold)
    await feeds.open()
    assert source.brought == [data]
    assert set(source.held) == {address_of(shard) for shard in SHARDS}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feeds.run)
        await trio.testing.wait_all_tasks_blocked()
        order = [SHARDS[number % 10] for number in range(8, 18)]
        assert source.brought[1:] == order[:READ_AHEAD]
        for step in range(8, 33):
            got = [address async for _, address in feeds.due(step, first=step == 8)]
            assert got == [address_of(SHARDS[step % 10])]
            await trio.testing.wait_all_tasks_blocked()
            assert source.brought[1:] == order[: step - 7 + READ_AHEAD], "each comes once"


@pytest.mark.parametrize(
    "data",
    [
        b"not a collection",
        encode(numbered(range(9), [address_of(s) for s in SHARDS[:9]], 16)),
        encode(numbered(range(1, 11), [address_of(s) for s in SHARDS], 16)),
        encode(numbered(range(10), [address_of(s) for s in SHARDS], 15)),
    ],
)
async def test_what_is_not_the_feed_is_refused_before_anything_runs(data: bytes) -> None:
    job, _ = fed()
    params = list(job.work.params)
    source = FeedSource(address_of(data), 10, 1)
    params[DATA] = WorkParam(params[DATA].dtype, params[DATA].shape, ROLE_FEED, source)
    work = type(job.work)(1, job.work.phases, tuple(params), 0)
    store = MemoryStore()
    shards = Source(store, [data])
    feeds = Feeds(dataclasses.replace(job, work=work), store, shards.bring, shards.hold)
    with pytest.raises(JobError, match="the feed of slot 1 is"):
        await feeds.open()
