"""Runs tell their events in order, to early and late listeners, and survive a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from p2pflop.errors import ConfigError
from p2pflop.node import runs as runs_module
from p2pflop.node.books import open_books
from p2pflop.node.journal import Journal
from p2pflop.node.runs import GATHER_S, MAX_LIVE_EVENTS, Runs


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    books = open_books(tmp_path)
    yield Journal(books)
    await books.aclose()


async def collect(runs: Runs, run_id: str, after: int = 0) -> list[dict[str, Any]]:
    return [event async for events in runs.follow(run_id, after) for event in events]


async def test_a_listener_hears_what_was_and_what_comes(journal: Journal) -> None:
    runs = Runs(journal, now_ns=lambda: 7)
    run = runs.create({"title": "digits"})
    await runs.emit(run, "ranked", deals=[], misses=[])
    heard: list[dict[str, Any]] = []

    async def listen() -> None:
        heard.extend(await collect(runs, run.id))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await trio.testing.wait_all_tasks_blocked()
        await runs.emit(run, "rows", rows=[])
        await runs.emit(run, "failed", error="ProviderError", message="gone", hint="")
    assert [(event["seq"], event["kind"]) for event in heard] == [
        (1, "ranked"),
        (2, "rows"),
        (3, "failed"),
    ]
    assert await collect(runs, run.id, after=2) == heard[2:]
    assert runs.cards()[0]["end_state"] == "failed"


async def test_after_a_restart_the_kept_events_are_there(journal: Journal) -> None:
    runs = Runs(journal)
    run = runs.create({"title": "digits"})
    await runs.emit(run, "ranked", deals=[], misses=[])
    await runs.emit(run, "progress", step=3, steps=9)
    await run.rows.flush()
    assert [head.job for head in runs.unfinished()] == [run.id]
    again = Runs(journal)
    revived = again.adopt(again.unfinished()[0])
    await again.emit(revived, "cancelled")
    assert [event["kind"] for event in await collect(again, run.id)] == ["ranked", "cancelled"]
    third = Runs(journal)
    assert [event["kind"] for event in await collect(third, run.id)] == ["ranked", "cancelled"]
    assert third.unfinished() == []


async def test_a_flood_of_rows_does_not_push_out_what_matters(journal: Journal) -> None:
    runs = Runs(journal)
    run = runs.create({})
    await runs.emit(run, "ranked", deals=[], misses=[])
    for _ in range(MAX_LIVE_EVENTS + 5):
        await runs.emit(run, "rows", rows=[])
    assert len(run.events) == MAX_LIVE_EVENTS
    assert run.events[0]["kind"] == "ranked"


async def test_of_the_rows_of_a_run_the_newest_are_live(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few events may have many rows."""
    monkeypatch.setattr(runs_module, "MAX_LIVE_ROWS", 10)
    runs = Runs(journal)
    run = runs.create({})
    await runs.emit(run, "ranked", deals=[], misses=[])
    for first in range(0, 16, 4):
        await runs.emit(run, "rows", rows=[{"step": first + n} for n in range(4)])
    first_event, *others = run.events
    steps = [row["step"] for event in others for row in event["rows"]]
    assert steps == list(range(8, 16))
    assert first_event["kind"] == "ranked"


async def test_finished_runs_leave_memory(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_module, "MAX_FINISHED", 2)
    runs = Runs(journal)
    ids = []
    for _ in range(3):
        run = runs.create({})
        await runs.emit(run, "rows", rows=[])
        await runs.emit(run, "cancelled")
        ids.append(run.id)
    kinds = [[event["kind"] for event in await collect(runs, run_id)] for run_id in ids]
    assert kinds == [["cancelled"], ["rows", "cancelled"], ["rows", "cancelled"]]


@pytest.mark.parametrize("run_id", ["", "0" * 12, "../../etc", "x" * 5000])
async def test_an_unknown_run_is_a_clear_error(journal: Journal, run_id: str) -> None:
    with pytest.raises(ConfigError, match="no job"):
        Runs(journal).get(run_id)


async def test_events_that_come_together_are_told_together_and_the_last_at_once(
    journal: Journal, autojump_clock: trio.testing.MockClock
) -> None:
    runs = Runs(journal, now_ns=lambda: 7)
    run = runs.create({"title": "digits"})
    heard: list[tuple[float, list[int]]] = []

    async def listen() -> None:
        async for events in runs.follow(run.id, 0):
            seqs = [event["seq"] for event in events]
            heard.append((trio.current_time(), seqs))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        began = trio.current_time()
        await runs.emit(run, "ranked", deals=[], misses=[])
        await trio.sleep(GATHER_S / 2)
        await runs.emit(run, "progress", step=1)
        await trio.sleep(1)
        await runs.emit(run, "progress", step=2)
        runs.tell_last(run, runs.last(run, "cancelled"))
    assert [(round(at - began, 3), seqs) for at, seqs in heard] == [
        (GATHER_S, [1, 2]),
        (round(1 + GATHER_S / 2, 3), [3, 4]),
    ]


async def test_a_run_taken_up_again_is_where_its_receipts_say(journal: Journal) -> None:
    runs = Runs(journal)
    run = runs.create({"title": "digits", "steps": 400})
    for number in (1, 2):
        await runs.emit(run, "receipt", number=number, to_step=100 * number, amount_nusd=number)
    await run.rows.flush()
    again = Runs(journal)
    assert again.get(run.id).card["step"] == 200
