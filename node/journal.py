"""What a node must remember to bring every job to an end: events, durable before acted on.

One row an event: ``(job, seq, at_ns, kind, body)``. ``job`` is a run id on the buying side and a
bid id in hex on the selling side. The head of a job tells its side and, once it is over, its end
state; a restart reads the heads that have none and resumes or closes them.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from p2pflop.dht.database import Database

BUYER: Final = "buyer"
PROVIDER: Final = "provider"
MAX_LISTED: Final = 1000

_SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE heads (
    job TEXT PRIMARY KEY, side TEXT NOT NULL, opened_ns INTEGER NOT NULL, end_state TEXT,
    summary BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX unfinished ON heads (side) WHERE end_state IS NULL;
CREATE TABLE events (
    job TEXT NOT NULL REFERENCES heads (job), seq INTEGER NOT NULL, at_ns INTEGER NOT NULL,
    kind TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (job, seq)
) WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class Head:
    """A journalled job. ``end_state`` is empty until it is over; ``summary`` is a JSON card."""

    job: str
    side: str
    opened_ns: int
    end_state: str
    summary: bytes


@dataclass(frozen=True, slots=True)
class Event:
    """One durable event of a job."""

    seq: int
    at_ns: int
    kind: str
    body: bytes


class Journal:
    """See the head of this module. Raises StoreError when the disk fails."""

    def __init__(self, path: Path) -> None:
        self._database = Database(path, _SCHEMA, _SCHEMA_VERSION)

    async def open(self, job: str, side: str, at_ns: int, summary: bytes) -> bool:
        """Start the journal of ``job``. False if there is one already."""

        def change(connection: sqlite3.Connection) -> bool:
            cursor = connection.execute(
                "INSERT OR IGNORE INTO heads VALUES (?, ?, ?, NULL, ?)", (job, side, at_ns, summary)
            )
            return cursor.rowcount == 1

        return await self._database.write(change)

    async def append(
        self,
        job: str,
        at_ns: int,
        events: list[tuple[str, bytes]],
        *,
        end_state: str = "",
        summary: bytes | None = None,
    ) -> None:
        """Add events in one transaction, with the new end state and summary, if given."""

        def change(connection: sqlite3.Connection) -> None:
            (last,) = connection.execute(
                "SELECT COALESCE(MAX(seq), -1) FROM events WHERE job = ?", (job,)
            ).fetchone()
            connection.executemany(
                "INSERT INTO events VALUES (?, ?, ?, ?, ?)",
                [(job, last + 1 + n, at_ns, kind, body) for n, (kind, body) in enumerate(events)],
            )
            if end_state:
                connection.execute("UPDATE heads SET end_state = ? WHERE job = ?", (end_state, job))
            if summary is not None:
                connection.execute("UPDATE heads SET summary = ? WHERE job = ?", (summary, job))

        await self._database.write(change)

    def events(self, job: str) -> list[Event]:
        """The events of ``job``, oldest first."""
        rows = self._database.read(
            "SELECT seq, at_ns, kind, body FROM events WHERE job = ? ORDER BY seq", job
        )
        return [Event(*row) for row in rows]

    def head(self, job: str) -> Head | None:
        """The head of ``job``, or None if it is unknown."""
        rows = self._database.read(_HEADS + "WHERE job = ?", job)
        return Head(*rows[0]) if rows else None

    def heads(self, side: str) -> list[Head]:
        """The newest ``MAX_LISTED`` jobs of a side, newest first."""
        return self._heads("WHERE side = ? ORDER BY opened_ns DESC LIMIT ?", side, MAX_LISTED)

    def unfinished(self, side: str) -> list[Head]:
        """The jobs of a side that are not over, oldest first."""
        return self._heads("WHERE side = ? AND end_state IS NULL ORDER BY opened_ns", side)

    def close(self) -> None:
        """Flush and close."""
        self._database.close()

    def _heads(self, where: str, *values: object) -> list[Head]:
        return [Head(*row) for row in self._database.read(_HEADS + where, *values)]


_HEADS: Final = "SELECT job, side, opened_ns, COALESCE(end_state, ''), summary FROM heads "
