"""The journal keeps what it was given, in order, over a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pflop.errors import StoreError
from p2pflop.node.journal import BUYER, PROVIDER, Journal


async def test_events_come_back_in_order_after_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    assert await journal.open("run-1", BUYER, 5, b"{}")
    await journal.append("run-1", 6, [("ranked", b"a"), ("filled", b"b")])
    await journal.append("run-1", 7, [("settled", b"c")], end_state="settled", summary=b"[]")
    journal.close()
    again = Journal(tmp_path / "journal.db")
    assert [(event.seq, event.kind, event.body) for event in again.events("run-1")] == [
        (0, "ranked", b"a"),
        (1, "filled", b"b"),
        (2, "settled", b"c"),
    ]
    head = again.head("run-1")
    assert head is not None
    assert (head.end_state, head.summary, head.opened_ns) == ("settled", b"[]", 5)
    again.close()


async def test_only_jobs_without_an_end_are_unfinished(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    for number, side in enumerate([BUYER, BUYER, PROVIDER]):
        await journal.open(f"job-{number}", side, number, b"")
    await journal.append("job-0", 9, [("failed", b"")], end_state="failed")
    assert [head.job for head in journal.unfinished(BUYER)] == ["job-1"]
    assert [head.job for head in journal.heads(BUYER)] == ["job-1", "job-0"]
    assert [head.job for head in journal.unfinished(PROVIDER)] == ["job-2"]
    journal.close()


async def test_a_job_is_opened_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    assert await journal.open("run-1", BUYER, 1, b"first")
    assert not await journal.open("run-1", BUYER, 2, b"second")
    head = journal.head("run-1")
    assert head is not None
    assert head.summary == b"first"
    journal.close()


def test_a_file_that_is_no_database_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"not a database, not at all" * 100)
    with pytest.raises(StoreError, match=r"journal\.db"):
        Journal(tmp_path / "journal.db")
