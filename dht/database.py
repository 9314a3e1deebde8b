"""One SQLite file with one writer thread, which commits in groups, and a reader.

With ``synchronous=FULL`` a commit waits for the disk, about a millisecond; doing it on the event
loop would stop everything else, and doing it once a row would cap the rate at the disk's. So
operations queue for one thread, which runs all that wait as one transaction, each in its own
savepoint if there are several, and wakes their tasks only after the commit: what ``write`` returned
is on disk.

The reader runs on the event loop, for look-ups by key: WAL lets it read while the writer writes.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Generic, TypeVar

import trio

from p2pflop.dht.files import FREE_SPACE
from p2pflop.errors import StoreError, StoreFullError

MAX_GROUP: Final = 256
MAX_WAITING: Final = 4096
BUSY_TIMEOUT_S: Final = 5.0

_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
"""The low byte of an extended error code is the code."""

T = TypeVar("T")

Operation = Callable[[sqlite3.Connection], object]
"""A change, made in the writer thread inside a transaction."""


class _Request(Generic[T]):
    def __init__(self, operation: Callable[[sqlite3.Connection], T]) -> None:
        self.operation = operation
        self.token = trio.lowlevel.current_trio_token()
        self.task = trio.lowlevel.current_task()
        self.result: T
        self.fault: BaseException | None = None

    async def wait(self) -> None:
        """Return once it is on disk, or has failed; a cancellation waits too."""
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)

    def run(self, connection: sqlite3.Connection, *, alone: bool) -> None:
        """Do it. Beside others it is undone alone if it fails; ``alone``, so is the transaction."""
        if alone:
            self.result = self.operation(connection)
            return
        connection.execute("SAVEPOINT operation")
        try:
            self.result = self.operation(connection)
        except BaseException as fault:
            self.fault = fault  # Raised again in the task that waits.
            if not connection.in_transaction:
                raise  # SQLite gave up the whole transaction, as it does when the disk is full.
            connection.execute("ROLLBACK TO operation")
        connection.execute("RELEASE operation")

    def wake(self) -> None:
        try:
            self.token.run_sync_soon(trio.lowlevel.reschedule, self.task)
        except trio.RunFinishedError:
            return  # The event loop is gone, and with it the task that waited.


class Database:
    """``schema`` is run if the file is new; ``version`` is written to it and checked after that."""

    def __init__(self, path: Path, schema: str, version: int) -> None:
        self.path = path
        self._closed = False
        self._queue: SimpleQueue[_Request[Any] | None] = SimpleQueue()
        self._unfinished = 0
        self._fewer = trio.Event()
        try:
            self._connection = self._connect(schema, version)
            self._reader = sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_S)
        except sqlite3.Error as error:
            raise self._fault(error) from error
        self._thread = threading.Thread(target=self._run, name=f"commits {path.name}", daemon=True)
        self._thread.start()

    async def write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``operation`` in the writer thread and return its result once it is on disk.

        Not cancellable once it is queued, so that a caller always knows if it was done. Raises
        StoreError if the database fails, and whatever ``operation`` raises, which undoes it alone.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._unfinished >= MAX_WAITING:
            await self._fewer.wait()
        if self._closed:
            raise StoreError(f"{self.path} is closed")
        request = _Request(operation)
        self._unfinished += 1
        self._queue.put(request)
        await request.wait()
        self._unfinished -= 1
        if self._fewer.statistics().tasks_waiting:
            self._fewer.set()
            self._fewer = trio.Event()
        if isinstance(request.fault, sqlite3.Error):
            raise self._fault(request.fault) from request.fault
        if request.fault is not None:
            raise request.fault
        return request.result

    def read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of a short query. Raises StoreError."""
        if self._closed:
            raise StoreError(f"{self.path} is closed")
        try:
            return self._reader.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._fault(error) from error

    async def aclose(self) -> None:
        """Finish what waits and close the file."""
        self._stop()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._thread.join)
        self._reader.close()

    def _stop(self) -> None:
        if not self._closed:
            self._closed = True
            self._queue.put(None)

    def _connect(self, schema: str, version: int) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, isolation_level=None, timeout=BUSY_TIMEOUT_S, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found == 0:
            connection.executescript(f"BEGIN; {schema}; PRAGMA user_version={version}; COMMIT")
        elif found != version:
            raise StoreError(
                f"{self.path} has format {found}, and this version reads format {version}",
                hint="Use the version of p2pflop that wrote it, or move the file away.",
            )
        return connection

    def _run(self) -> None:
        while True:
            group = [self._queue.get()]
            while len(group) < MAX_GROUP and not self._queue.empty():
                group.append(self._queue.get())
            requests = [request for request in group if request is not None]
            if requests:
                self._commit(requests)
            if len(requests) < len(group):
                self._connection.close()
                return

    def _commit(self, requests: list[_Request[Any]]) -> None:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for request in requests:
                request.run(self._connection, alone=len(requests) == 1)
            self._connection.execute("COMMIT")
        except BaseException as error:  # noqa: BLE001 - raised in the tasks that wait
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            for request in requests:
                request.fault = error
        for request in requests:
            request.wake()

    def _fault(self, error: sqlite3.Error) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _DAMAGED:
            return StoreError(
                f"{self.path} is damaged: {error}",
                hint="Restore it from a backup. If it is moved away, the node begins a new one "
                "without what was in it.",
            )
        if code == sqlite3.SQLITE_FULL:
            return StoreFullError(f"the disk of {self.path} is full", hint=FREE_SPACE)
        return StoreError(
            f"{self.path}: {error}",
            hint=f"See that {self.path.parent} is writable and its disk has space and is sound.",
        )
