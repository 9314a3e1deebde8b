from __future__ import annotations

import pytest
import trio

from p2pflop.dht import announce as announcing
from p2pflop.dht.announce import (
    MAX_IN_WINDOW,
    MAX_SOURCES,
    REPEAT_S,
    RETRY_S,
    WINDOW_S,
    Announcer,
    announcement_key,
)
from p2pflop.dht.memory import MemoryStore
from p2pflop.errors import ProviderError


class Table:
    """A Directory in memory that notes when what was announced."""

    def __init__(self) -> None:
        self.provided: list[tuple[float, bytes]] = []
        self.failures = 0
        self.peers: list[str] = []
        self.asked: list[bytes] = []

    async def provide(self, key: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.failures:
            self.failures -= 1
            raise ProviderError("nobody took it")
        self.provided.append((trio.current_time(), key))

    async def find(self, key: bytes) -> list[str]:
        await trio.lowlevel.checkpoint()
        self.asked.append(key)
        return self.peers

    @property
    def keys(self) -> list[bytes]:
        return [key for _, key in self.provided]


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


async def _run(announcer: Announcer, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await announcer.run()


async def test_public_blobs_are_announced_at_start_and_private_ones_never(
    store: MemoryStore, table: Table, autojump_clock: object
) -> None:
    public = await store.put(b"public", public=True)
    await store.put(b"private")
    await _run(Announcer(store, table), 60)
    assert table.keys == [announcement_key(public.address)]
    assert public.address not in table.keys


async def test_a_new_blob_is_announced_at_once(
    store: MemoryStore, table: Table, autojump_clock: object
) -> None:
    announcer = Announcer(store, table)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(announcer.run)
        await trio.sleep(100)
        info = await store.put(b"new", public=True)
        assert announcer.announce(info.address)
        assert announcer.announce(info.address)
        start = trio.current_time()
        await trio.sleep(1)
        assert table.provided == [(start, announcement_key(info.address))]
        nursery.cancel_scope.cancel()


async def test_the_rate_stays_under_what_peers_accept(
    store: MemoryStore, table: Table, autojump_clock: object
) -> None:
    for number in range(3 * MAX_IN_WINDOW):
        await store.put(bytes([number]), public=True)
    await _run(Announcer(store, table), 60)
    times = [time for time, _ in table.provided]
    assert len(times) == 3 * MAX_IN_WINDOW
    for time in times:
        assert sum(time <= other < time + WINDOW_S for other in times) <= MAX_IN_WINDOW
    assert times[-1] - times[0] == pytest.approx(2 * WINDOW_S)


async def test_announcements_are_repeated_while_the_blob_is_public(
    store: MemoryStore, table: Table, autojump_clock: object
) -> None:
    info = await store.put(b"x", public=True)
    announcer = Announcer(store, table)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(announcer.run)
        await trio.sleep(2.5 * REPEAT_S)
        assert len(table.provided) == 3
        await store.set_public(info.address, False)
        await trio.sleep(3 * REPEAT_S)
        assert len(table.provided) == 3
        assert announcer.statistics().scheduled == 0
        nursery.cancel_scope.cancel()


async def test_what_nobody_took_is_tried_again(
    store: MemoryStore, table: Table, autojump_clock: object
) -> None:
    table.failures = 2
    await store.put(b"x", public=True)
    announcer = Announcer(store, table)
    start = trio.current_time()
    await _run(announcer, 600)
    assert [time - start for time, _ in table.provided] == pytest.approx([2 * RETRY_S])
    statistics = announcer.statistics()
    assert (statistics.announced, statistics.failed, statistics.scheduled) == (1, 2, 1)


async def test_a_restarted_announcer_announces_again(
    store: MemoryStore, table: Table, autojump_clock: object
) -> None:
    await store.put(b"x", public=True)
    for _ in range(2):
        await _run(Announcer(store, table), 60)
    assert len(table.provided) == 2


async def test_the_schedule_is_bounded(
    store: MemoryStore, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing, "MAX_ANNOUNCED", 2)
    announcer = Announcer(store, table)
    answers = [announcer.announce(bytes([number])) for number in (0, 1, 1, 2)]
    assert answers == [True, True, True, False]
    assert announcer.statistics().refused == 1


async def test_locate_asks_for_the_same_key_and_bounds_the_answer(
    store: MemoryStore, table: Table
) -> None:
    table.peers = ["a", "b", "a", *(f"p{number}" for number in range(MAX_SOURCES))]
    found = await Announcer(store, table).locate(b"h" * 32)
    assert table.asked == [announcement_key(b"h" * 32)]
    assert found[:3] == ["a", "b", "p0"]
    assert len(found) == MAX_SOURCES
