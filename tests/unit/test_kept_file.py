"""The book over restarts: what was saved is there again, and what cannot be read is said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from p2pflop.market.book import Book, Dump
from p2pflop.market.records import Rejected
from p2pflop.market.samples import NOW_NS, ask, book, party
from p2pflop.node.kept_file import KeptFile
from p2pflop.units import NS_PER_S


async def test_a_restart_brings_back_sheets_proofs_and_guards(tmp_path: Path) -> None:
    old, withdrawal = party(3).sheet(ask()), party(3).sheet(number=2, lifetime_ns=60 * NS_PER_S)
    made = book(party(1).sheet(ask()), party(2).sheet(ask(1)), party(2).sheet(ask(2)), withdrawal)
    await KeptFile(tmp_path / "book", Dump).save(made)
    again, now_ns = Book(b"s" * 32), NOW_NS + 120 * NS_PER_S
    await KeptFile(tmp_path / "book", Dump).load(again, now_ns)
    assert again.digest(now_ns) == made.digest(now_ns)
    assert again.convicted() == made.convicted() == {party(2).node.public_key: 1}
    assert isinstance(again.apply(old, now_ns), Rejected)
    assert not (tmp_path / "book.new").exists()


async def test_an_unchanged_book_is_not_written_again(tmp_path: Path) -> None:
    file, made = KeptFile(tmp_path / "book", Dump), book(party(1).sheet(ask()))
    await file.save(made)
    (tmp_path / "book").unlink()
    await file.save(made)
    assert not (tmp_path / "book").exists()


@pytest.mark.parametrize("junk", [b"", b"junk", b"\x82\xa6sheets\x90", bytes(1000)])
async def test_what_cannot_be_read_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, junk: bytes
) -> None:
    (tmp_path / "book").write_bytes(junk)
    made = Book(bytes(32))
    with caplog.at_level(logging.WARNING):
        await KeptFile(tmp_path / "book", Dump).load(made, NOW_NS)
    assert len(made) == 0
    assert "saved book is left out" in caplog.text


async def test_no_file_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await KeptFile(tmp_path / "book", Dump).load(Book(bytes(32)), NOW_NS)
    assert not caplog.records


async def test_a_full_disk_is_said_and_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await KeptFile(tmp_path / "missing" / "book", Dump).save(Book(bytes(32)))
    assert "the book is not saved" in caplog.text
