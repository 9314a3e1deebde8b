"""SQLite with one writer thread and group commit.

Every change that waits while a commit is under way goes into the next transaction, so that many
jobs share one flush to disk. A change that raises is rolled back alone, to its savepoint. When
``write`` returns the change is on disk (``synchronous=FULL``).
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from p2pflop.errors import StoreError

T = TypeVar("T")
MAX_GROUP: Final = 256
BUSY_TIMEOUT_S: Final = 10.0


@dataclass(slots=True)
class _Change:
    apply: Callable[[sqlite3.Connection], Any]
    token: trio.lowlevel.TrioToken
    done: trio.Event = field(default_factory=trio.Event)
    result: Any = None
    error: BaseException | None = None


class Database:
    """One SQLite file. Raises StoreError if it cannot be opened or written."""

    def __init__(self, path: Path, schema: str) -> None:
        self.path = path
        self._schema = schema
        self._changes: queue.SimpleQueue[_Change | None] = queue.SimpleQueue()
        try:
            with self._connect() as connection:
                connection.executescript(schema)
        except sqlite3.Error as error:
            raise StoreError(
                f"cannot open the database {path}: {error}",
                hint="Check that the disk is writable and not full.",
            ) from error
        self._reader = self._connect()
        self._thread = threading.Thread(target=self._write_loop, name=path.name, daemon=True)
        self._thread.start()

    async def write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``change`` in the writer's next transaction; return what it returned, once durable.

        A cancelled caller does not undo a change that was handed over.
        """
        item = _Change(change, trio.lowlevel.current_trio_token())
        self._changes.put(item)
        await item.done.wait()
        if isinstance(item.error, sqlite3.Error):
            raise StoreError(
                f"cannot write {self.path.name}: {item.error}", hint="Is the disk full?"
            ) from item.error
        if item.error is not None:
            raise item.error
        result: T = item.result
        return result

    def read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """All rows of a small query, on the event loop. For little, indexed data only."""
        try:
            return self._reader.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"cannot read {self.path.name}: {error}") from error

    def close(self) -> None:
        """Finish what was handed over, then close."""
        self._changes.put(None)
        self._thread.join()
        self._reader.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def _write_loop(self) -> None:
        connection = self._connect()
        while (first := self._changes.get()) is not None:
            group, ended = [first], False
            while len(group) < MAX_GROUP and not self._changes.empty():
                change = self._changes.get()
                if change is None:
                    ended = True
                    break
                group.append(change)
            self._commit(connection, group)
            if ended:
                break
        connection.close()

    def _commit(self, connection: sqlite3.Connection, group: list[_Change]) -> None:
        try:
            connection.execute("BEGIN IMMEDIATE")
            for item in group:
                _apply(connection, item)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            for item in group:
                item.error = error
        for item in group:
            try:
                item.token.run_sync_soon(item.done.set)
            except trio.RunFinishedError:
                continue  # The caller went with its event loop; the change is durable all the same.


def _apply(connection: sqlite3.Connection, item: _Change) -> None:
    connection.execute("SAVEPOINT change")
    try:
        item.result = item.apply(connection)
        connection.execute("RELEASE change")
    except Exception as error:  # noqa: BLE001 - handed to the caller, who alone knows what it means
        item.error = error
        connection.execute("ROLLBACK TO change")
        connection.execute("RELEASE change")
