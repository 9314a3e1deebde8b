"""The book at rest: a restart forgets neither the market nor what guards it against replay.

One file, replaced as a whole every ``SAVE_S`` and at the end. What a crash loses of it, comparing
books brings back. Everything in it is checked again when it is loaded, as if peers had brought it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

import msgspec
import trio

from p2pflop.market.book import Book, Dump

SAVE_S: Final = 60.0

_log = logging.getLogger(__name__)


class BookFile:
    """``path`` need not exist."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved: Dump | None = None

    async def load(self, book: Book, now_ns: int) -> None:
        """Put what is saved into ``book``, which nobody else uses yet. Says what it cannot read."""
        try:
            data = await trio.to_thread.run_sync(self._path.read_bytes)
            dump = msgspec.msgpack.decode(data, type=Dump)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError, RecursionError) as error:
            _log.warning("the saved book is left out, peers will tell it again: %s", error)
            return
        await trio.to_thread.run_sync(book.load, dump, now_ns)

    async def save(self, book: Book) -> None:
        """Replace the file, if the book has changed. Says so if it cannot."""
        dump = book.dump()
        if dump == self._saved:
            return
        try:
            await trio.to_thread.run_sync(_replace, self._path, dump)
        except OSError as error:
            _log.warning("the book is not saved: %s", error)
            return
        self._saved = dump

    async def keep(self, book: Book) -> None:
        """Save ``book`` from time to time, until cancelled."""
        while True:
            await trio.sleep(SAVE_S)
            await self.save(book)


def _replace(path: Path, dump: Dump) -> None:
    draft = path.with_name(path.name + ".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.msgpack.encode(dump))
    draft.replace(path)
