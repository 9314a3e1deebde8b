"""What a node must remember to bring every job to an end: rows, in order, durable before acted on.

One row an event: ``(job, seq, at_ns, kind, body)``. ``job`` is a run id on the buying side and the
hex of a bid's id on the selling side. The head of a job tells its side and, once it is over, its
end state; a restart reads the heads that have none and resumes or closes them.

Beside the rows stand: **states**, where the verified state of a work after some step is kept, so
that a stretch that starts there can be bought without saying from what; **fills**, which sale each
belongs to, for a buyer who comes back late; **results**, which run computed what, so that nothing
is bought twice; **letters**, what was countersigned last in a run that is over, until its provider
has acknowledged it; **sheets**, by which runs were decided, the newest ``MAX_SHEETS`` of them;
**unpaid**, what a sale that is over had done of its work and its buyer never countersigned, which
counts against the buyer's credit for a day.

A job's rows are collected in ``JobRows`` and flushed together, before the first thing that others
can see: a signed record that leaves, an answer to the user, the end. So a purchase costs a few
commits, not one a row, and what was promised is always on disk. The ledger is in the same file
(``open_books``): what is signed and what is owed for it go to disk in one commit.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Final

import trio

from p2pflop.dht.blobs import Staged
from p2pflop.dht.database import Database, Operation
from p2pflop.dht.turns import Turn
from p2pflop.errors import StoreError
from p2pflop.units import NS_PER_S

BUYER: Final = "buyer"
PROVIDER: Final = "provider"
SESSION: Final = "session"
"""A script's; its leases have heads of their own."""
PART: Final = "part"
"""Of a job that was bought in a pack, whose own head is a buyer's."""
MAX_LISTED: Final = 1000
MAX_SHEETS: Final = 65_536
"""Up to 500 MB if each were of the largest size; half a kilobyte each as they are."""
UNPAID_FOR_NS: Final = 24 * 3600 * NS_PER_S
MAX_UNPAID: Final = 4096

SCHEMA: Final = """
CREATE TABLE heads (
    job TEXT PRIMARY KEY, side TEXT NOT NULL, opened_ns INTEGER NOT NULL, end_state TEXT,
    summary BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX unfinished ON heads (side) WHERE end_state IS NULL;
CREATE TABLE rows (
    job TEXT NOT NULL REFERENCES heads (job), seq INTEGER NOT NULL, at_ns INTEGER NOT NULL,
    kind TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (job, seq)
) WITHOUT ROWID;
CREATE TABLE states (
    work BLOB NOT NULL, class_id BLOB NOT NULL, step INTEGER NOT NULL, addresses BLOB NOT NULL,
    PRIMARY KEY (work, class_id, step)
) WITHOUT ROWID;
CREATE TABLE results (
    work BLOB NOT NULL, first_step INTEGER NOT NULL, steps INTEGER NOT NULL,
    root_from BLOB NOT NULL, class_id BLOB NOT NULL, job TEXT NOT NULL,
    PRIMARY KEY (work, first_step, steps, root_from, class_id)
) WITHOUT ROWID;
CREATE TABLE fills (fill BLOB PRIMARY KEY, job TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE sheets (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id BLOB UNIQUE NOT NULL, wire BLOB NOT NULL
);
CREATE TABLE letters (
    job TEXT PRIMARY KEY, at_ns INTEGER NOT NULL, peer TEXT NOT NULL, wire BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE unpaid (
    job TEXT PRIMARY KEY, account BLOB NOT NULL, at_ns INTEGER NOT NULL,
    amount_nusd INTEGER NOT NULL
) WITHOUT ROWID
"""
_HEADS: Final = "SELECT job, side, opened_ns, COALESCE(end_state, ''), summary FROM heads "


@dataclass(frozen=True, slots=True)
class Head:
    """A journalled job. ``end_state`` is empty until it is over; ``summary`` is its side's own."""

    job: str
    side: str
    opened_ns: int
    end_state: str
    summary: bytes


@dataclass(frozen=True, slots=True)
class KnownState:
    """The addresses, joined, of the state of a work after ``step`` steps in a class."""

    work: bytes
    class_id: bytes
    step: int
    addresses: bytes


@dataclass(frozen=True, slots=True)
class KnownResult:
    """A run that has settled, by the stretch of a work that it computed in a class.

    ``root_from`` is the state root that it started from, zeros at step 0.
    """

    work: bytes
    first_step: int
    steps: int
    root_from: bytes
    class_id: bytes
    job: str


@dataclass(frozen=True, slots=True)
class Letter:
    """The newest countersignature of a stretch that is over, for the provider ``peer``: what is
    signed is owed, however it ended. ``job`` is its run, with the number of the stretch if another
    one followed."""

    job: str
    at_ns: int
    peer: str
    wire: bytes


@dataclass(frozen=True, slots=True)
class Unpaid:
    """Work that was begun for ``account`` and never countersigned."""

    account: bytes
    at_ns: int
    amount_nusd: int


@dataclass(slots=True)
class Batch:
    """What is to be written of a job: rows ``(at_ns, kind, body)``, and for the tables beside."""

    rows: list[tuple[int, str, bytes]] = field(default_factory=list)
    states: list[KnownState] = field(default_factory=list)
    results: list[KnownResult] = field(default_factory=list)
    fills: list[bytes] = field(default_factory=list)
    letters: list[Letter] = field(default_factory=list)
    sheets: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Id and envelope."""
    unpaid: list[Unpaid] = field(default_factory=list)
    blobs: list[Staged] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(getattr(self, each.name) for each in fields(self))

    def __add__(self, later: Batch) -> Batch:
        names = [each.name for each in fields(self)]
        return Batch(*(getattr(self, name) + getattr(later, name) for name in names))


@dataclass(frozen=True, slots=True)
class Ending:
    """What a job's end adds to its rows: more of them, and the last summary of its head."""

    rows: tuple[tuple[str, bytes], ...]
    summary: bytes
    end_state: str
    result: KnownResult | None = None

    def batch(self, at_ns: int) -> Batch:
        """What of it goes beside the head."""
        rows = [(at_ns, *row) for row in self.rows]
        return Batch(rows, results=[] if self.result is None else [self.result])


@dataclass(frozen=True, slots=True)
class Row:
    """One durable row of a job."""

    seq: int
    at_ns: int
    kind: str
    body: bytes


class Journal:
    """See the head of this module. Raises StoreError when the disk fails."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known_sheets: dict[bytes, None] = {}

    async def append(
        self,
        head: Head,
        batch: Batch,
        *,
        is_new: bool = True,
        forget: Sequence[str] = (),
        beside: Sequence[Operation] = (),
    ) -> None:
        """Add a batch, make ``head`` the job's head if it ``is_new``, forget its rows of some
        kinds, and do what is to be done ``beside``, in one transaction."""

        def change(connection: sqlite3.Connection) -> None:
            for operation in (*(staged.keep for staged in batch.blobs), *beside):
                operation(connection)
            if is_new:
                connection.execute(
                    "INSERT INTO heads VALUES (?, ?, ?, NULLIF(?, ''), ?) ON CONFLICT (job)"
                    " DO UPDATE SET end_state = excluded.end_state, summary = excluded.summary",
                    (head.job, head.side, head.opened_ns, head.end_state, head.summary),
                )
            (last,) = connection.execute(
                "SELECT COALESCE(MAX(seq), -1) FROM rows WHERE job = ?", (head.job,)
            ).fetchone()
            connection.executemany(
                "INSERT INTO rows VALUES (?, ?, ?, ?, ?)",
                [(head.job, last + 1 + place, *row) for place, row in enumerate(batch.rows)],
            )
            connection.executemany(
                "INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?)",
                [(s.work, s.class_id, s.step, s.addresses) for s in batch.states],
            )
            connection.executemany(
                "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?)",
                [astuple(result) for result in batch.results],
            )
            connection.executemany(
                "INSERT OR REPLACE INTO fills VALUES (?, ?)",
                [(fill, head.job) for fill in batch.fills],
            )
            connection.executemany(
                "INSERT OR REPLACE INTO letters VALUES (?, ?, ?, ?)",
                [(letter.job, letter.at_ns, letter.peer, letter.wire) for letter in batch.letters],
            )
            if batch.sheets:
                connection.executemany(
                    "INSERT OR IGNORE INTO sheets (id, wire) VALUES (?, ?)", batch.sheets
                )
                connection.execute(
                    "DELETE FROM sheets WHERE number <= (SELECT MAX(number) FROM sheets) - ?",
                    (MAX_SHEETS,),
                )
            for unpaid in batch.unpaid:
                connection.execute(
                    "DELETE FROM unpaid WHERE at_ns < ?", (unpaid.at_ns - UNPAID_FOR_NS,)
                )
                connection.execute(
                    "INSERT OR REPLACE INTO unpaid VALUES (?, ?, ?, ?)",
                    (head.job, unpaid.account, unpaid.at_ns, unpaid.amount_nusd),
                )
            connection.executemany(
                "DELETE FROM rows WHERE job = ? AND kind = ?", [(head.job, kind) for kind in forget]
            )

        await self._database.write(change)

    def states(self, work: bytes, step: int) -> dict[bytes, bytes]:
        """The joined addresses of the state after ``step`` steps, by class, as far as known."""
        found = self._database.read(
            "SELECT class_id, addresses FROM states WHERE work = ? AND step = ?", work, step
        )
        return {bytes(class_id): bytes(addresses) for class_id, addresses in found}

    def results(
        self, work: bytes, first_step: int, steps: int, root_from: bytes
    ) -> list[KnownResult]:
        """The newest run of that stretch in each class."""
        found = self._database.read(
            "SELECT * FROM results WHERE work = ? AND first_step = ? AND steps = ?"
            " AND root_from = ?",
            work,
            first_step,
            steps,
            root_from,
        )
        return [KnownResult(*row) for row in found]

    def job_of_fill(self, fill: bytes) -> str | None:
        """The sale that a fill is of, or None if there is none."""
        found = self._database.read("SELECT job FROM fills WHERE fill = ?", fill)
        return str(found[0][0]) if found else None

    def unknown(self, sheets: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Those that no job of this process has had written yet."""
        found = [sheet for sheet in sheets if sheet[0] not in self._known_sheets]
        for sheet_id, _ in found:
            self._known_sheets[sheet_id] = None
        while len(self._known_sheets) > MAX_SHEETS:
            del self._known_sheets[next(iter(self._known_sheets))]
        return found

    def sheet(self, sheet_id: bytes) -> bytes | None:
        """The envelope of a sheet by which a run was decided; None if it is kept no more."""
        found = self._database.read("SELECT wire FROM sheets WHERE id = ?", sheet_id)
        return bytes(found[0][0]) if found else None

    def letters(self) -> list[Letter]:
        """What nobody has acknowledged yet, oldest first."""
        found = self._database.read("SELECT job, at_ns, peer, wire FROM letters ORDER BY at_ns")
        return [Letter(*row) for row in found]

    async def forget_letters(self, jobs: Sequence[str]) -> None:
        """These are acknowledged, or of no more use."""

        def change(connection: sqlite3.Connection) -> None:
            connection.executemany("DELETE FROM letters WHERE job = ?", [(job,) for job in jobs])

        await self._database.write(change)

    def unpaid(self) -> list[Unpaid]:
        """The newest ``MAX_UNPAID``, oldest first."""
        found = self._database.read(
            "SELECT account, at_ns, amount_nusd FROM unpaid ORDER BY at_ns DESC LIMIT ?", MAX_UNPAID
        )
        return [Unpaid(*row) for row in reversed(found)]

    def unpaid_of(self, job: str) -> Unpaid | None:
        """What a sale that is over showed in vain, if it did."""
        found = self._database.read(
            "SELECT account, at_ns, amount_nusd FROM unpaid WHERE job = ?", job
        )
        return Unpaid(*found[0]) if found else None

    def rows(self, job: str) -> list[Row]:
        """The rows of ``job``, oldest first."""
        found = self._database.read(
            "SELECT seq, at_ns, kind, body FROM rows WHERE job = ? ORDER BY seq", job
        )
        return [Row(*row) for row in found]

    def bodies(self, kinds: Sequence[str], jobs: int) -> list[bytes]:
        """The bodies of all rows of these kinds, of the newest ``jobs`` jobs of both sides."""
        found = self._database.read(
            "SELECT body FROM rows WHERE kind IN (SELECT value FROM json_each(?)) AND job IN"
            " (SELECT job FROM heads ORDER BY opened_ns DESC LIMIT ?)",
            json.dumps(kinds),
            jobs,
        )
        return [bytes(body) for (body,) in found]

    def bodies_since(self, kind: str, side: str, opened_ns: int) -> list[bytes]:
        """The bodies of the rows of a kind, of all jobs of a side that were opened from then on."""
        found = self._database.read(
            "SELECT body FROM rows JOIN heads USING (job)"
            " WHERE kind = ? AND side = ? AND opened_ns >= ?",
            *(kind, side, opened_ns),
        )
        return [bytes(body) for (body,) in found]

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

    def with_row(self, side: str, kind: str, since_ns: int, limit: int) -> list[tuple[str, int]]:
        """The jobs of a side that had a row of that kind since then, and when; the newest
        ``limit``, of the newest ``MAX_LISTED`` of all."""
        found = self._database.read(
            "SELECT job, at_ns FROM rows WHERE kind = ? AND at_ns >= ? AND job IN"
            " (SELECT job FROM heads WHERE side = ? ORDER BY opened_ns DESC LIMIT ?)"
            " ORDER BY at_ns DESC LIMIT ?",
            *(kind, since_ns, side, MAX_LISTED, limit),
        )
        return [(str(job), int(at_ns)) for job, at_ns in found]

    def _heads(self, where: str, *values: object) -> list[Head]:
        return [Head(*row) for row in self._database.read(_HEADS + where, *values)]


class JobRows:
    """The rows of one job on their way to the journal."""

    def __init__(self, journal: Journal, head: Head, now_ns: Callable[[], int]) -> None:
        self.head = head
        self._journal = journal
        self._now_ns = now_ns
        self._pending = Batch()
        self._to_forget: tuple[str, ...] = ()
        self._changed = False
        self._is_head_new = True
        self._flushing = Turn()
        self._flushed = trio.Event()
        self._fault: StoreError | None = None

    def add(self, kind: str, body: bytes) -> None:
        """To be written with the next flush."""
        self._pending.rows.append((self._now_ns(), kind, body))

    def add_state(self, state: KnownState) -> None:
        """A state that is here and verified; written with the next flush."""
        self._pending.states.append(state)

    def add_fill(self, fill: bytes) -> None:
        """The id of a fill of this job; written with the next flush."""
        self._pending.fills.append(fill)

    def add_sheets(self, sheets: Sequence[tuple[bytes, bytes]]) -> None:
        """Ids and envelopes of sheets by which it is decided; written with the next flush."""
        self._pending.sheets.extend(self._journal.unknown(sheets))

    def add_letter(self, peer: str, wire: bytes, stretch: int = 0) -> Letter:
        """For ``peer`` to acknowledge; written with the next flush. ``stretch`` numbers, from 1,
        those of the stretches that were broken off."""
        name = f"{self.head.job}/{stretch}" if stretch else self.head.job
        letter = Letter(name, self._now_ns(), peer, wire)
        self._pending.letters.append(letter)
        return letter

    def add_blobs(self, staged: Staged) -> None:
        """Small blobs that the job needs; kept with the next flush."""
        self._pending.blobs.append(staged)

    def add_unpaid(self, unpaid: Unpaid) -> None:
        """What this sale showed in vain, in the place of what was said of it before; written with
        the next flush."""
        self._pending.unpaid.append(unpaid)

    def forget(self, *kinds: str) -> None:
        """Rows of these kinds are of no more use; gone with the next flush."""
        self._to_forget = kinds
        self._changed = True

    def set_head(self, *, summary: bytes, end_state: str = "") -> None:
        """A new summary and, at the end, the end state; written with the next flush."""
        job, side, opened_ns = self.head.job, self.head.side, self.head.opened_ns
        self.head = Head(job, side, opened_ns, end_state or self.head.end_state, summary)
        self._changed = self._is_head_new = True

    async def flush(self, ending: Ending | None = None, *beside: Operation | None) -> None:
        """Return once everything added so far is on disk, and with it the job's ``ending`` and what
        is done ``beside``: an entry of the ledger, blobs that are kept. These are not kept for
        another try if the disk fails."""
        operations = [operation for operation in beside if operation is not None]
        async with self._flushing:
            if not (self._pending or self._changed or ending or operations):
                return
            before = head = self.head
            forgotten = self._to_forget
            batch = kept = self._pending
            self._pending = Batch()
            if ending is not None:
                batch = kept + ending.batch(self._now_ns())
                head = replace(head, summary=ending.summary, end_state=ending.end_state)
            try:
                is_new = self._is_head_new or ending is not None
                await self._journal.append(
                    head, batch, is_new=is_new, forget=forgotten, beside=operations
                )
            except BaseException as error:
                # After a disk that failed once, no row may be missing between two others.
                self._pending = kept + self._pending
                if isinstance(error, StoreError):
                    self._fault = error
                    self._flushed.set()
                raise
            if self._to_forget is forgotten:
                self._to_forget = ()
            self._changed = self._is_head_new = self.head is not before
            if ending is not None:
                self.head = head
            self._fault = None
            self._flushed.set()
            for staged in batch.blobs:
                await staged.settle()

    async def wait_flushed(self) -> None:
        """Return once there has been a flush: the job is in the journal. Raises StoreError."""
        await self._flushed.wait()
        if self._fault is not None:
            raise self._fault
