"""Book and tape at rest: a restart forgets neither the market nor what guards it against replay.

A file each, replaced as a whole every ``SAVE_S`` and at the end. What a crash loses of it,
comparing brings back. Everything in it is checked again when it is loaded, as if peers had
brought it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

import msgspec
import trio

SAVE_S: Final = 60.0

D = TypeVar("D")
_log = logging.getLogger(__name__)


class Kept(Protocol[D]):
    """What is kept in a file."""

    def dump(self) -> D:
        """All of it."""

    def load(self, dump: D, now_ns: int) -> object:
        """Add what was saved, once it is checked."""


class KeptFile(Generic[D]):
    """``path`` need not exist. ``kind`` is the dump's type."""

    def __init__(self, path: Path, kind: type[D]) -> None:
        self._path = path
        self._kind = kind
        self._saved: D | None = None

    async def load(self, kept: Kept[D], now_ns: int) -> None:
        """Put what is saved into ``kept``, which nobody else uses yet. Says what it cannot read."""
        try:
            data = await trio.to_thread.run_sync(self._path.read_bytes)
            dump = msgspec.msgpack.decode(data, type=self._kind)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError, RecursionError) as error:
            name = self._path.name
            _log.warning("the saved %s is left out, peers will tell it again: %s", name, error)
            return
        await trio.to_thread.run_sync(kept.load, dump, now_ns)

    async def save(self, kept: Kept[D]) -> None:
        """Replace the file, if anything has changed. Says so if it cannot."""
        dump = kept.dump()
        if dump == self._saved:
            return
        try:
            await trio.to_thread.run_sync(_replace, self._path, dump)
        except OSError as error:
            _log.warning("the %s is not saved: %s", self._path.name, error)
            return
        self._saved = dump

    async def keep(self, kept: Kept[D]) -> None:
        """Save ``kept`` from time to time, until cancelled."""
        while True:
            await trio.sleep(SAVE_S)
            await self.save(kept)


def _replace(path: Path, dump: object) -> None:
    draft = path.with_name(path.name + ".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.msgpack.encode(dump))
    draft.replace(path)
