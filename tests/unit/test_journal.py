"""The journal keeps what it was given, in order, over a restart."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from p2pflop.dht.manifest import address_of
from p2pflop.dht.store import FileStore
from p2pflop.errors import StoreError, StoreFullError
from p2pflop.node import journal as journal_module
from p2pflop.node.books import open_books
from p2pflop.node.journal import (
    BUYER,
    PROVIDER,
    UNPAID_FOR_NS,
    Batch,
    Ending,
    Head,
    JobRows,
    Journal,
    KnownState,
    Letter,
    Unpaid,
)


def head(job: str, side: str = BUYER, opened_ns: int = 5) -> Head:
    return Head(job, side, opened_ns, "", b"{}")


async def test_rows_come_back_in_order_after_a_restart(tmp_path: Path) -> None:
    books = open_books(tmp_path)
    journal = Journal(books)
    rows = JobRows(journal, head("run-1"), now_ns=lambda: 6)
    rows.add("ranked", b"a")
    rows.add("filled", b"b")
    await rows.flush()
    rows.add("settled", b"c")
    rows.set_head(summary=b"[]", end_state="settled")
    await rows.flush()
    await books.aclose()
    books = open_books(tmp_path)
    again = Journal(books)
    assert [(row.seq, row.at_ns, row.kind, row.body) for row in again.rows("run-1")] == [
        (0, 6, "ranked", b"a"),
        (1, 6, "filled", b"b"),
        (2, 6, "settled", b"c"),
    ]
    assert again.head("run-1") == Head("run-1", BUYER, 5, "settled", b"[]")
    await books.aclose()


async def test_nothing_is_written_before_the_flush(tmp_path: Path) -> None:
    books = open_books(tmp_path)
    journal = Journal(books)
    rows = JobRows(journal, head("run-1"), now_ns=lambda: 6)
    rows.add("ranked", b"a")
    assert journal.head("run-1") is None
    await rows.flush()
    assert journal.head("run-1") is not None
    await books.aclose()


async def test_only_jobs_without_an_end_are_unfinished(tmp_path: Path) -> None:
    books = open_books(tmp_path)
    journal = Journal(books)
    for number, side in enumerate([BUYER, BUYER, PROVIDER]):
        await journal.append(head(f"job-{number}", side, number), Batch())
    rows = JobRows(journal, head("job-0"), now_ns=lambda: 9)
    rows.set_head(summary=b"", end_state="failed")
    await rows.flush()
    assert [found.job for found in journal.unfinished(BUYER)] == ["job-1"]
    assert [found.job for found in journal.heads(BUYER)] == ["job-1", "job-0"]
    assert [found.job for found in journal.unfinished(PROVIDER)] == ["job-2"]
    await books.aclose()


async def test_states_are_found_by_work_class_and_step_after_a_restart(tmp_path: Path) -> None:
    books = open_books(tmp_path)
    journal = Journal(books)
    rows = JobRows(journal, head("run-1"), now_ns=lambda: 6)
    rows.add_state(KnownState(b"work", b"class", 40, b"a" * 64))
    assert journal.states(b"work", 40) == {}
    await rows.flush()
    rows.add_state(KnownState(b"work", b"class", 40, b"b" * 64))
    rows.add_state(KnownState(b"work", b"other", 40, b"c" * 64))
    await rows.flush()
    await books.aclose()
    books = open_books(tmp_path)
    again = Journal(books)
    assert again.states(b"work", 40) == {b"class": b"b" * 64, b"other": b"c" * 64}
    assert again.states(b"work", 41) == {}
    assert again.states(b"another", 40) == {}
    await books.aclose()


async def test_fills_are_found_and_rows_of_no_use_are_gone_with_the_end(tmp_path: Path) -> None:
    books = open_books(tmp_path)
    journal = Journal(books)
    rows = JobRows(journal, head("sale-1", PROVIDER), now_ns=lambda: 6)
    rows.add("body", b"large")
    rows.add("bid", b"small")
    rows.add_fill(b"f" * 32)
    await rows.flush()
    assert journal.job_of_fill(b"f" * 32) == "sale-1"
    assert journal.job_of_fill(b"g" * 32) is None
    rows.forget("body", "absent")
    rows.set_head(summary=b"", end_state="settled")
    await rows.flush()
    assert [row.kind for row in journal.rows("sale-1")] == ["bid"]
    await books.aclose()


async def test_blobs_go_to_disk_with_the_rows_and_wait_for_a_disk_that_takes_them(
    tmp_path: Path,
) -> None:
    books = open_books(tmp_path)
    store = FileStore(tmp_path / "store", books)
    rows = JobRows(Journal(books), head("run-1"), now_ns=lambda: 6)
    rows.add_blobs(store.stage([b"input"]))

    def fails(_: object) -> None:
        raise StoreError("the disk is full")

    with pytest.raises(StoreError, match="full"):
        await rows.flush(None, fails)
    assert await store.list() == ()
    assert store.statistics().used_bytes == 0
    await rows.flush()
    assert await store.get(address_of(b"input")) == b"input"
    assert store.statistics().used_bytes == len(b"input")
    await store.aclose()
    await books.aclose()


async def test_an_ending_and_an_entry_go_to_disk_with_the_rows_or_not_at_all(
    tmp_path: Path,
) -> None:
    books = open_books(tmp_path)
    journal = Journal(books)
    rows = JobRows(journal, head("run-1"), now_ns=lambda: 6)
    rows.add("life:verified", b"a")
    ending = Ending((("event", b"result"),), b"done", "settled")

    def fails(_: object) -> None:
        raise StoreError("the disk is full")

    with pytest.raises(StoreError, match="full"):
        await rows.flush(ending, fails)
    assert journal.head("run-1") is None
    assert rows.head.end_state == ""
    insert = "INSERT INTO entries (account, body) VALUES (x'', ?)"
    await rows.flush(ending, lambda connection: connection.execute(insert, (b"entry",)))
    assert books.read("SELECT body FROM entries") == [(b"entry",)]
    assert [row.kind for row in journal.rows("run-1")] == ["life:verified", "event"]
    assert journal.head("run-1") == rows.head == Head("run-1", BUYER, 5, "settled", b"done")
    await rows.flush()
    assert len(journal.rows("run-1")) == 2
    await books.aclose()


async def test_a_letter_is_there_until_it_is_acknowledged(tmp_path: Path) -> None:
    books = open_books(tmp_path)
    times = iter([8, 7])
    for job in ("run-2", "run-1"):
        rows = JobRows(Journal(books), head(job), now_ns=lambda: next(times))
        rows.add_letter("peer", job.encode())
        await rows.flush()
    await books.aclose()
    books = open_books(tmp_path)
    journal = Journal(books)
    first, second = Letter("run-1", 7, "peer", b"run-1"), Letter("run-2", 8, "peer", b"run-2")
    assert journal.letters() == [first, second]
    await journal.forget_letters(["run-1", "unknown"])
    assert journal.letters() == [second]
    await books.aclose()


async def test_what_was_shown_in_vain_is_there_for_a_day(tmp_path: Path) -> None:
    books = open_books(tmp_path)
    for number, at_ns in enumerate((5, UNPAID_FOR_NS + 5, UNPAID_FOR_NS + 6)):
        rows = JobRows(Journal(books), head(f"sale-{number}"), now_ns=lambda: 6)
        rows.add_unpaid(Unpaid(b"account", at_ns, number))
        await rows.flush()
        await rows.flush()
    await books.aclose()
    books = open_books(tmp_path)
    kept = [(unpaid.at_ns, unpaid.amount_nusd) for unpaid in Journal(books).unpaid()]
    assert kept == [(UNPAID_FOR_NS + 5, 1), (UNPAID_FOR_NS + 6, 2)]
    await books.aclose()


async def test_no_more_than_so_many_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "MAX_UNPAID", 2)
    books = open_books(tmp_path)
    for number in range(3):
        rows = JobRows(Journal(books), head(f"sale-{number}"), now_ns=lambda: 6)
        rows.add_unpaid(Unpaid(b"account", number, number))
        await rows.flush()
    assert [unpaid.at_ns for unpaid in Journal(books).unpaid()] == [1, 2]
    await books.aclose()


async def test_the_books_of_another_format_are_a_clear_error(tmp_path: Path) -> None:
    await open_books(tmp_path).aclose()
    with sqlite3.connect(tmp_path / "journal.db") as connection:
        connection.execute("PRAGMA user_version=1")
    with pytest.raises(StoreError, match="has format 1, and this version reads format 4"):
        open_books(tmp_path)


def test_a_file_that_is_no_database_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"not a database, not at all" * 100)
    with pytest.raises(StoreError, match=r"journal\.db is damaged") as caught:
        open_books(tmp_path)
    assert str(tmp_path / "journal.db") in caught.value.message
    assert "backup" in caught.value.hint


async def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    database = open_books(tmp_path)

    def fill(connection: sqlite3.Connection) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        connection.execute("CREATE TABLE large AS SELECT zeroblob(1000000)")

    with pytest.raises(StoreFullError) as caught:
        await database.write(fill)
    assert caught.value.message == f"the disk of {tmp_path / 'journal.db'} is full"
    assert "p2pflop rm HASH" in caught.value.hint
    await database.aclose()
