"""Runs: what this node buys for its own user, and the story that each tells.

A run's events go to whoever watches. Those that matter after a restart are journalled with the
run's next flush; traced rows and progress are told but not kept, because the result has them. The
end of a run is on disk before anybody hears of it.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Final

import trio

from p2pflop.errors import ConfigError, P2PFlopError, StoreError
from p2pflop.ids import HASH_BYTES
from p2pflop.node.journal import (
    BUYER,
    MAX_LISTED,
    SESSION,
    Ending,
    Head,
    JobRows,
    Journal,
    KnownResult,
    Row,
)
from p2pflop.node.service import LAST_EVENT_KINDS, Json

MAX_LIVE_EVENTS: Final = 10_000
MAX_LIVE_ROWS: Final = 200_000
"""Rows in all live events of a run; older ones are in the result's trace, not here."""
GATHER_S: Final = 0.01
"""How long an event waits for others to be told with it, unless it is the last."""
MAX_FINISHED: Final = 64
"""Runs that are over but still tell passing events, such as rows, to those who come late."""

SEQ_LEAP: Final = 2**32
EVENT_ROW: Final = "event"
ROUND_ROW: Final = "round"
"""An event of a look at the book, forgotten with it."""
ROUND_KINDS: Final = frozenset({"ranked", "rejected"})
KEPT_KINDS: Final = frozenset(
    {"ranked", "filled", "rejected", "resubmitted", "checkpoint", "receipt"} | LAST_EVENT_KINDS
)
END_STATES: Final = {
    "result": "settled",
    "failed": "failed",
    "cancelled": "cancelled",
    "closed": "closed",
}
_RUN_ID: Final = re.compile(r"[0-9a-f]{12}")

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """One submission, or the session of a script. ``card`` is what ``jobs`` lists; ``rows`` its way
    to the journal."""

    id: str
    card: Json
    rows: JobRows
    events: deque[Json] = field(default_factory=deque)
    next_seq: int = 1
    live_rows: int = 0
    news: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    cancel_requested: trio.Event = field(default_factory=trio.Event)

    @property
    def over(self) -> bool:
        """Whether the last event has been told."""
        return bool(self.card["end_state"])

    @property
    def is_session(self) -> bool:
        """Whether it is that of a script, of which only the last event is kept."""
        return self.rows.head.side == SESSION

    @property
    def end_step(self) -> int:
        """The step that it ends with."""
        return int(self.card["first_step"] + self.card["steps"])


@dataclass(frozen=True, slots=True)
class Last:
    """The last event of a run, and its card then."""

    event: Json
    card: Json

    def ending(self) -> Ending:
        """For the run's rows."""
        rows, card = ((EVENT_ROW, _dump(self.event)),), self.card
        return Ending(rows, _dump(card), card["end_state"], _known_result(card))


class Runs:
    """All runs of this node: those under way in memory, the others in the journal."""

    def __init__(self, journal: Journal, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._journal = journal
        self._now_ns = now_ns
        self._live: dict[str, Run] = {}
        self._finished: deque[str] = deque()

    def create(self, card: Json, run_id: str | None = None, *, side: str = BUYER) -> Run:
        """A new run, on disk with its first flush. ``card`` is JSON; id and state are added.

        ``side`` may be ``SESSION``."""
        run_id = secrets.token_hex(6) if run_id is None else run_id
        now_ns = self._now_ns()
        card = {"id": run_id, "state": "ranking", "end_state": "", "submitted_ns": now_ns, **card}
        head = Head(run_id, side, now_ns, "", _dump(card))
        run = self._live[run_id] = Run(run_id, card, JobRows(self._journal, head, self._now_ns))
        return run

    def adopt(self, head: Head) -> Run:
        """A run as the journal has it; one that is not over is live again."""
        rows = JobRows(self._journal, head, self._now_ns)
        run = Run(head.job, json.loads(head.summary), rows)
        for row in self._journal.rows(head.job):
            if row.kind in (EVENT_ROW, ROUND_ROW):
                event = json.loads(row.body)
                _tell(run, event)
                if event["kind"] == "receipt":
                    run.card["step"] = max(run.card.get("step", 0), event["to_step"])
        if not run.over:
            # What was told but not kept had numbers too; a client's "after" must stay behind.
            run.next_seq += SEQ_LEAP
        if not run.over:
            self._live[run.id] = run
        return run

    async def emit(self, run: Run, kind: str, **fields: Any) -> None:
        """Tell an event. The last one closes the run and is on disk before it is told."""
        if kind in LAST_EVENT_KINDS:
            last = self.last(run, kind, **fields)
            await run.rows.flush(last.ending())
            self.tell_last(run, last)
            return
        event: Json = {"seq": run.next_seq, "at_ns": self._now_ns(), "kind": kind, **fields}
        if kind == "state":
            run.card["state"] = fields["state"]
        elif kind == "progress":
            run.card["step"] = fields["step"]
        if kind in KEPT_KINDS and not run.is_session:
            run.rows.add(ROUND_ROW if kind in ROUND_KINDS else EVENT_ROW, _dump(event))
        _tell(run, event)

    async def forget_rounds(self, run: Run, *kinds: str) -> None:
        """Forget what was told of looks at the book, and the rows of these ``kinds``. Raises
        StoreError."""
        run.rows.forget(ROUND_ROW, *kinds)
        await run.rows.flush()
        kept = [event for event in run.events if event["kind"] not in ROUND_KINDS]
        run.events.clear()
        run.events.extend(kept)

    def last(self, run: Run, kind: str, **fields: Any) -> Last:
        """The last event of a run, to be put on disk first and told then (``tell_last``)."""
        event: Json = {"seq": run.next_seq, "at_ns": self._now_ns(), "kind": kind, **fields}
        end_state = END_STATES[kind]
        ended = {"state": end_state, "end_state": end_state, "ended_ns": event["at_ns"]}
        return Last(event, run.card | ended)

    def tell_last(self, run: Run, last: Last) -> None:
        """Close a run whose last event is on disk."""
        run.card |= last.card
        self._retire(run)
        _tell(run, last.event)

    async def fail(self, run: Run, error: P2PFlopError, hint: str = "") -> None:
        """End a run with an error; ``hint`` comes after its own. Never raises: without a disk, only
        this process knows of it."""
        told = {
            "error": type(error).__name__,
            "message": error.message,
            "hint": " ".join(filter(None, (error.hint, hint))),
            "cost_nusd": run.card.get("cost_nusd", 0),
        }
        try:
            await self.emit(run, "failed", **told)
        except StoreError as fault:
            _log.error("job %s: its end is not on disk: %s", run.id, fault)
            self.lose(run, **told)

    def lose(self, run: Run, **fields: Any) -> None:
        """End a run as failed in memory, because the disk does not take it."""
        at_ns = self._now_ns()
        run.card |= {"state": "failed", "end_state": "failed", "ended_ns": at_ns}
        self._retire(run)
        _tell(run, {"seq": run.next_seq, "at_ns": at_ns, "kind": "failed", **fields})

    def get(self, run_id: str) -> Run:
        """A run by id. Raises ConfigError if there is none."""
        if run_id in self._live:
            return self._live[run_id]
        head = self._journal.head(run_id) if _RUN_ID.fullmatch(run_id) else None
        if head is None or head.side not in (BUYER, SESSION):
            raise ConfigError(f"there is no job {run_id[:40]!r} here", hint="See p2pflop jobs.")
        return self.adopt(head)

    async def knows(self, run_id: str) -> bool:
        """Whether there is such a run; if so, it is on disk. Raises ConfigError for no id."""
        if _RUN_ID.fullmatch(run_id) is None:
            raise ConfigError(f"{run_id[:40]!r} is no id of a job", hint="Use 12 hex digits.")
        if self._journal.head(run_id) is None and run_id in self._live:
            await self._live[run_id].rows.wait_flushed()
        return run_id in self._live or self._journal.head(run_id) is not None

    def results(
        self, work: bytes, first_step: int, steps: int, root_from: bytes
    ) -> list[KnownResult]:
        """The newest run of that stretch in each class."""
        return self._journal.results(work, first_step, steps, root_from)

    def rows(self, run_id: str) -> list[Row]:
        """What the journal has of a run."""
        return self._journal.rows(run_id)

    def sheet(self, sheet_id: bytes) -> bytes | None:
        """The envelope of a sheet by which a run was decided."""
        return self._journal.sheet(sheet_id)

    def states(self, work: bytes, step: int) -> dict[bytes, tuple[bytes, ...]]:
        """The addresses of the state of a work after ``step`` steps that runs have brought, by
        class."""
        return {
            class_id: tuple(
                joined[place : place + HASH_BYTES] for place in range(0, len(joined), HASH_BYTES)
            )
            for class_id, joined in self._journal.states(work, step).items()
        }

    def cards(self) -> list[Json]:
        """The card of every run, newest first."""
        heads = [*self._journal.heads(BUYER), *self._journal.heads(SESSION)]
        return [
            self._live[head.job].card if head.job in self._live else json.loads(head.summary)
            for head in sorted(heads, key=attrgetter("opened_ns"), reverse=True)[:MAX_LISTED]
        ]

    def keep_card(self, run: Run) -> None:
        """Have the card as it is now on disk with the next flush."""
        run.rows.set_head(summary=_dump(run.card))

    def unfinished(self, side: str = BUYER) -> list[Head]:
        """What a restart finds without an end, oldest first."""
        return self._journal.unfinished(side)

    def under_way(self) -> int:
        """How many runs are not over."""
        return sum(not run.over for run in self._live.values())

    async def follow(self, run_id: str, after_seq: int) -> AsyncIterator[list[Json]]:
        """The events after ``after_seq``, waiting for new ones; ends with the last kind.

        Those that come within ``GATHER_S`` come together.
        """
        run = self.get(run_id)
        while not (run.over and (not run.events or run.events[-1]["seq"] <= after_seq)):
            if run.events and run.events[-1]["seq"] > after_seq:
                with trio.move_on_after(GATHER_S):
                    await run.ended.wait()
                if events := [event for event in run.events if event["seq"] > after_seq]:
                    after_seq = events[-1]["seq"]
                    yield events
            else:
                await run.news.wait()

    def _retire(self, run: Run) -> None:
        self._finished.append(run.id)
        if len(self._finished) > MAX_FINISHED:
            self._live.pop(self._finished.popleft(), None)


def _known_result(card: Json) -> KnownResult | None:
    """What the end of a run with that card lets later submissions find."""
    if card["end_state"] != "settled" or "class_id" not in card or "earlier" in card:
        return None
    return KnownResult(
        bytes.fromhex(card["work"]),
        card["first_step"],
        card["steps"],
        bytes.fromhex(card["root_from"]),
        bytes.fromhex(card["class_id"]),
        card["id"],
    )


def _tell(run: Run, event: Json) -> None:
    run.events.append(event)
    run.next_seq = event["seq"] + 1
    run.live_rows += _rows_in(event)
    while len(run.events) > MAX_LIVE_EVENTS or run.live_rows > MAX_LIVE_ROWS:
        run.live_rows -= _rows_in(_drop_oldest_passing(run.events))
    if event["kind"] in LAST_EVENT_KINDS:
        run.ended.set()
    if run.news.statistics().tasks_waiting:
        run.news.set()
        run.news = trio.Event()


def _rows_in(event: Json) -> int:
    return len(event["rows"]) if event["kind"] == "rows" else 0


def _drop_oldest_passing(events: deque[Json]) -> Json:
    """Forget the oldest event that is not kept, so that what matters outlives a flood of rows."""
    for index, event in enumerate(events):
        if event["kind"] not in KEPT_KINDS:
            del events[index]
            return event
    return events.popleft()


def _dump(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
