"""The two lives of a job, the buyer's and the provider's, as state machines without I/O.

Theory of operation
-------------------
A lifecycle is a path through one table: in a **state**, an **event** takes an **edge** to the next
state. Whoever drives it calls ``on(event, now_ns)`` and does what the returned actions say, in
order. Two rules make it safe to die at any moment:

1. **The journal is the path.** Every edge that changes anything is one ``Persist(edge, body)``,
   always the first action; the body holds the signed records that came in or went out with it.
   It must be durable before the rest is done. ``resume(rows, now_ns)`` walks the same table
   again and returns what has to be repeated: the last message, the running timers.
2. **Every state is bounded.** Each state that is not an end has a named limit (``LIMITS``), and the
   deadline bounds all of them up to delivery. An event that comes when a limit has passed is
   dropped and the limit's edge is taken instead, so that a slow driver changes nothing.

A buyer whom every provider refused, and at least one for want of room, waits and ranks again, ever
more rarely, until its deadline. A buyer whose provider is lost takes ``RESUBMIT``: it ranks again
and buys what is not delivered yet, as another stretch of the same work; the first time at once,
then, as long as nothing more is delivered, after ever longer waits, and ``MAX_STALLED`` times at
most. From its first fill on it waits, too, where no ask fits; one that rests does from the start.
Before it believes others that the job itself is at fault, it takes ``DOUBT`` where it can: the job
is run in its own sandbox up to the next checkpoint, and that decides.

Repeating is harmless: the same bid gets the same fill, the same confirm or receipt the same answer,
in end states too. What a buyer has countersigned is owed, so a provider takes that in after its end
as well; a buyer that cancels countersigns a last time, what it then owes. An event that the table
does not allow, or a record that does not check, raises ProtocolError and changes nothing; the
driver then closes the stream and reports ``Lost``.

What the records are and who may sign them is the business of a **desk** (``BuyerDesk``,
``ProviderDesk``; the real ones are in ``p2pflop.market.desk``). Here is only order and time.

An exchange, with what each ``on`` returns (timers left out)::

    buyer                                              provider
    start()      Persist(start)
    Ranked()     Persist(ranked) Send(bid)   -bid->    start()      Persist(start)
                                                       Grant()      Persist(grant) Send(fill)
    Received     Persist(fill) Send(confirm) <-fill-
                                             -confirm-> Received    Persist(confirm) Start(prepare)
    Alive()      Persist(started)            <-frames-  Ready()     Persist(ready) Start(run)
    Received     Persist(commit)             <-commit-  Done(...)   Persist(done) Send(commit)
                                                                    Start(reveal)
    Received     Persist(last receipt)       <-receipt- Reveal()    Persist(reveal) Send(receipt)
                 Start(verify)
    Verified(n)  Persist(verified)
                 Send(countersign) Finish    -receipt-> Received    Persist(settle) Stop Finish

``Send("bid", ...)`` means: close the stream to the last provider, if any, and open one to the
provider that the bid names. ``Stop`` ends the work that a ``Start`` began.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Generic, Protocol, TypeVar

import msgspec

from p2pflop.errors import ProtocolError, StoreError
from p2pflop.job.events import (
    DEADLINE,
    ENDS,
    Action,
    Blame,
    Event,
    Finish,
    Persist,
    SetTimer,
    State,
    Stop,
    Timer,
    event_name,
)
from p2pflop.units import NS_PER_S

CONFIRM_WITHIN_NS: Final = 2 * NS_PER_S
MAX_WAIT_NS: Final = 16 * NS_PER_S


class Edge(StrEnum):
    """The kinds of journal rows. Those in ``VOLATILE`` change nothing: no row."""

    START = "start"
    RANKED = "ranked"
    NO_DEAL = "no deal"
    NEXT = "next"
    WAIT = "wait"
    RESUBMIT = "resubmit"
    DOUBT = "doubt"
    CHECKED = "checked"
    AGAIN = "again"
    EXHAUSTED = "exhausted"
    FILL = "fill"
    STARTED = "started"
    COMMIT = "commit"
    RECEIPT = "receipt"
    LAST_RECEIPT = "last receipt"
    COUNTERSIGN = "countersign"
    VERIFIED = "verified"
    REFUTED = "refuted"
    LOST = "lost"
    SILENT = "silent"
    JOB_FAULT = "job fault"
    GIVEN_UP = "given up"
    CANCEL = "cancel"
    DEADLINE = "deadline"
    GRANT = "grant"
    DENY = "deny"
    CONFIRM = "confirm"
    LAPSE = "lapse"
    READY = "ready"
    DONE = "done"
    REVEAL = "reveal"
    SETTLE = "settle"
    UNPAID = "unpaid"
    FAULT = "fault"
    ABANDONED = "abandoned"
    CLOSED = "closed"
    WITHDRAW = "withdraw"
    RESTART = "restart"
    ALIVE = "alive"
    WORKED = "worked"
    REPEAT = "repeat"
    QUIET = "quiet"


VOLATILE: Final = frozenset({Edge.ALIVE, Edge.WORKED, Edge.REPEAT, Edge.QUIET})
CLAIMS: Final = frozenset({Edge.RECEIPT, Edge.COMMIT, Edge.LAST_RECEIPT})
"""Those by which a provider says, and does not yet show, that it has got on."""

Table = Mapping[State, Mapping[Edge, State]]

_END_ROWS: Final[dict[State, dict[Edge, State]]] = {
    end: {Edge.REPEAT: end, Edge.QUIET: end} for end in ENDS
}

BUYER: Final[Table] = {
    State.RANKING: {
        Edge.RANKED: State.BIDDING,
        Edge.NO_DEAL: State.FAILED,
        Edge.WAIT: State.WAITING,
        Edge.SILENT: State.FAILED,
        Edge.DEADLINE: State.FAILED,
        Edge.CANCEL: State.CANCELLED,
        Edge.QUIET: State.RANKING,
    },
    State.BIDDING: {
        Edge.FILL: State.CONFIRMING,
        Edge.NEXT: State.BIDDING,
        Edge.WAIT: State.WAITING,
        Edge.EXHAUSTED: State.FAILED,
        Edge.DEADLINE: State.FAILED,
        Edge.CANCEL: State.CANCELLED,
        Edge.QUIET: State.BIDDING,
    },
    State.WAITING: {
        Edge.AGAIN: State.RANKING,
        Edge.DEADLINE: State.FAILED,
        Edge.CANCEL: State.CANCELLED,
        Edge.QUIET: State.WAITING,
    },
    State.CHECKING: {
        Edge.CHECKED: State.RANKING,
        Edge.JOB_FAULT: State.FAILED,
        Edge.DEADLINE: State.FAILED,
        Edge.CANCEL: State.CANCELLED,
        Edge.QUIET: State.CHECKING,
    },
    State.CONFIRMING: {
        Edge.STARTED: State.RUNNING,
        Edge.COMMIT: State.RUNNING,
        Edge.RECEIPT: State.RUNNING,
        Edge.NEXT: State.BIDDING,
        Edge.WAIT: State.WAITING,
        Edge.RESUBMIT: State.WAITING,
        Edge.DOUBT: State.CHECKING,
        Edge.LOST: State.FAILED,
        Edge.SILENT: State.FAILED,
        Edge.GIVEN_UP: State.FAILED,
        Edge.JOB_FAULT: State.FAILED,
        Edge.DEADLINE: State.FAILED,
        Edge.CANCEL: State.CANCELLED,
        Edge.REPEAT: State.CONFIRMING,
        Edge.QUIET: State.CONFIRMING,
    },
    State.RUNNING: {
        Edge.RECEIPT: State.RUNNING,
        Edge.COUNTERSIGN: State.RUNNING,
        Edge.COMMIT: State.RUNNING,
        Edge.LAST_RECEIPT: State.VERIFYING,
        Edge.NEXT: State.BIDDING,
        Edge.WAIT: State.WAITING,
        Edge.RESUBMIT: State.WAITING,
        Edge.DOUBT: State.CHECKING,
        Edge.REFUTED: State.FAILED,
        Edge.LOST: State.FAILED,
        Edge.SILENT: State.FAILED,
        Edge.GIVEN_UP: State.FAILED,
        Edge.JOB_FAULT: State.FAILED,
        Edge.DEADLINE: State.FAILED,
        Edge.CANCEL: State.CANCELLED,
        Edge.ALIVE: State.RUNNING,
        Edge.WORKED: State.RUNNING,
        Edge.REPEAT: State.RUNNING,
        Edge.QUIET: State.RUNNING,
    },
    State.VERIFYING: {
        Edge.VERIFIED: State.SETTLED,
        Edge.COUNTERSIGN: State.VERIFYING,
        Edge.RESUBMIT: State.WAITING,
        Edge.REFUTED: State.FAILED,
        Edge.LOST: State.FAILED,
        Edge.SILENT: State.FAILED,
        Edge.GIVEN_UP: State.FAILED,
        Edge.CANCEL: State.CANCELLED,
        Edge.WORKED: State.VERIFYING,
        Edge.REPEAT: State.VERIFYING,
        Edge.QUIET: State.VERIFYING,
    },
    **{end: row for end, row in _END_ROWS.items() if end is not State.RELEASED},
}

PROVIDER: Final[Table] = {
    State.OFFERED: {
        Edge.GRANT: State.LEASED,
        Edge.DENY: State.RELEASED,
        Edge.QUIET: State.OFFERED,
    },
    State.LEASED: {
        Edge.CONFIRM: State.PREPARING,
        Edge.LAPSE: State.RELEASED,
        Edge.ABANDONED: State.RELEASED,
        Edge.WITHDRAW: State.RELEASED,
        Edge.REPEAT: State.LEASED,
        Edge.QUIET: State.LEASED,
    },
    State.PREPARING: {
        Edge.READY: State.RUNNING,
        Edge.FAULT: State.FAILED,
        Edge.ABANDONED: State.RELEASED,
        Edge.WITHDRAW: State.RELEASED,
        Edge.RESTART: State.RELEASED,
        Edge.SILENT: State.RELEASED,
        Edge.DEADLINE: State.RELEASED,
        Edge.ALIVE: State.PREPARING,
        Edge.REPEAT: State.PREPARING,
        Edge.QUIET: State.PREPARING,
    },
    State.RUNNING: {
        Edge.RECEIPT: State.RUNNING,
        Edge.COUNTERSIGN: State.RUNNING,
        Edge.DONE: State.COMMITTED,
        Edge.FAULT: State.FAILED,
        Edge.ABANDONED: State.RELEASED,
        Edge.CLOSED: State.RELEASED,
        Edge.WITHDRAW: State.RELEASED,
        Edge.RESTART: State.RELEASED,
        Edge.SILENT: State.RELEASED,
        Edge.DEADLINE: State.RELEASED,
        Edge.ALIVE: State.RUNNING,
        Edge.REPEAT: State.RUNNING,
        Edge.QUIET: State.RUNNING,
    },
    State.COMMITTED: {
        Edge.REVEAL: State.RECEIPTED,
        Edge.COUNTERSIGN: State.COMMITTED,
        Edge.FAULT: State.FAILED,
        Edge.ABANDONED: State.RELEASED,
        Edge.CLOSED: State.RELEASED,
        Edge.SILENT: State.RELEASED,
        Edge.REPEAT: State.COMMITTED,
        Edge.QUIET: State.COMMITTED,
    },
    State.RECEIPTED: {
        Edge.SETTLE: State.SETTLED,
        Edge.COUNTERSIGN: State.RECEIPTED,
        Edge.ABANDONED: State.FAILED,
        Edge.CLOSED: State.FAILED,
        Edge.UNPAID: State.FAILED,
        Edge.REPEAT: State.RECEIPTED,
        Edge.QUIET: State.RECEIPTED,
    },
    State.SETTLED: _END_ROWS[State.SETTLED],
    # A countersignature that comes late is money owed all the same: the buyer has booked it.
    **{end: {**_END_ROWS[end], Edge.COUNTERSIGN: end} for end in (State.FAILED, State.RELEASED)},
}


@dataclass(frozen=True, slots=True)
class Limit:
    """How long a state may last since its last journalled edge, or ``ALIVE`` where it has that."""

    name: str
    after_ns: int


DELIVERY: Final = Limit("delivery", 60 * NS_PER_S)
"""How long the buyer waits, each time, for a good deal more of what was billed."""
STALL: Final = Limit("stall", 900 * NS_PER_S)
"""How long a provider may be alive without any progress, at most: longer than the longest step.
For small jobs a buyer waits less (``p2pflop.job.patience``)."""

BUYER_LIMITS: Final[Mapping[State, Limit]] = {
    State.RANKING: Limit("ranking", 60 * NS_PER_S),
    State.BIDDING: Limit("answer", 10 * NS_PER_S),
    State.WAITING: Limit("again", MAX_WAIT_NS),
    State.CHECKING: Limit("check", 180 * NS_PER_S),
    State.CONFIRMING: Limit("start", 10 * NS_PER_S),
    State.RUNNING: Limit("provider silence", 30 * NS_PER_S),
    State.VERIFYING: DELIVERY,
}

PROVIDER_LIMITS: Final[Mapping[State, Limit]] = {
    State.OFFERED: Limit("decision", 10 * NS_PER_S),
    State.LEASED: Limit("confirm", CONFIRM_WITHIN_NS),
    State.PREPARING: Limit("buyer silence", 60 * NS_PER_S),
    State.RUNNING: Limit("buyer silence", 60 * NS_PER_S),
    State.COMMITTED: Limit("reveal", 60 * NS_PER_S),
    State.RECEIPTED: Limit("countersignature", 3600 * NS_PER_S),
}
UNTIL_DEADLINE: Final = frozenset(
    {
        State.RANKING,
        State.BIDDING,
        State.WAITING,
        State.CHECKING,
        State.CONFIRMING,
        State.RUNNING,
        State.OFFERED,
        State.LEASED,
        State.PREPARING,
    }
)


Parts = tuple[bytes, ...]
Row = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Move:
    """The edge that an event takes, what is journalled with it, and what is to be done."""

    edge: Edge
    parts: Parts = ()
    actions: Sequence[Action] = ()


class Side(Protocol):
    """One side's content: the records so far, and what they make of an event."""

    table: Table
    limits: Mapping[State, Limit]
    edges: Mapping[str, tuple[Edge, ...]]
    """Which edges an event of that name may take, in whatever state."""
    initial: State

    def decide(self, name: str, event: Event, state: State, now_ns: int) -> Move:
        """Only called if the state has one of the event's edges. Changes nothing."""
        ...

    def apply(self, edge: Edge, parts: Parts) -> None:
        """Take in a journalled edge, now or again. Raises ValueError for parts that do not fit."""
        ...

    def start_parts(self) -> Parts:
        """What the first row of the journal holds."""
        ...

    def limit(self, state: State) -> Limit:
        """How long that state may last from now: at most what ``limits`` says."""
        ...

    def stall(self, state: State, /) -> Limit | None:
        """What else bounds that state: how long it may last without ``WORKED``."""
        ...

    def revive(self, state: State, /) -> Sequence[Move]:
        """The move that a restart in this state means, if any."""
        ...

    def pending(self, state: State) -> Sequence[Action]:
        """What to do again after a restart in this state."""
        ...

    def outcome(self) -> tuple[str, Blame]:
        """Why it ended, and whose doing that is."""
        ...


SideT = TypeVar("SideT", bound=Side)


class Lifecycle(Generic[SideT]):
    """Drives one side through its table. ``side`` holds the records of the job so far."""

    def __init__(self, side: SideT, deadline_ns: int) -> None:
        self.side = side
        self.deadline_ns = deadline_ns
        self.state = side.initial
        self._timers: dict[str, int] = {}

    @property
    def ended(self) -> bool:
        """Whether the state is an end."""
        return self.state in ENDS

    def start(self, now_ns: int) -> list[Action]:
        """To be called once, before the first event of a new job."""
        body = _PARTS.encode(self.side.start_parts())
        return [Persist(Edge.START.value, body), *self._arm(now_ns)]

    def on(self, event: Event, now_ns: int) -> list[Action]:
        """Take in an event. Raises ProtocolError, changing nothing, if it is not allowed now."""
        due = self._due(now_ns)
        if due is not None:
            event = Timer(due)
        elif isinstance(event, Timer):
            return []
        name = event_name(event)
        row = self.side.table[self.state]
        if not any(edge in row for edge in self.side.edges.get(name, ())):
            raise ProtocolError(f"{name} is not allowed in state {self.state}")
        move = self.side.decide(name, event, self.state, now_ns)
        return self._take(move, name, now_ns)

    def resume(self, rows: Iterable[Row], now_ns: int) -> list[Action]:
        """Take up a journalled job: what to do again. Raises StoreError for a broken journal.

        Only for a lifecycle that has not started.
        """
        for kind, body in rows:
            try:
                parts = _PARTS_DECODER.decode(body)
                edge = Edge(kind)
                if edge is not Edge.START:
                    self.state = self.side.table[self.state][edge]
                self.side.apply(edge, parts)
            except (KeyError, ValueError, msgspec.DecodeError) as error:
                raise StoreError(
                    f"the journal has {kind!r} in state {self.state}, which cannot be",
                    hint="The journal is damaged; restore it from a backup.",
                ) from error
        for move in self.side.revive(self.state):
            return self._take(move, "restart", now_ns)
        again = list(self.side.pending(self.state))
        if self.ended:
            return [*again, Finish(self.state, *self.side.outcome())]
        return [*again, *self._arm(now_ns)]

    def _take(self, move: Move, name: str, now_ns: int) -> list[Action]:
        after = self.side.table[self.state].get(move.edge)
        if after is None:
            raise ProtocolError(f"{name} is not allowed in state {self.state}")
        if move.edge in VOLATILE:
            renewed = move.edge in (Edge.ALIVE, Edge.WORKED)
            worked = move.edge is Edge.WORKED
            return [*move.actions, *(self._arm(now_ns, worked=worked) if renewed else ())]
        actions: list[Action] = [Persist(move.edge.value, _PARTS.encode(move.parts)), *move.actions]
        had_ended = self.ended
        self.state = after
        self.side.apply(move.edge, move.parts)
        if had_ended:
            return actions
        if self.ended:
            self._timers.clear()
            return [*actions, Stop(), Finish(after, *self.side.outcome())]
        return [*actions, *self._arm(now_ns, worked=move.edge not in CLAIMS)]

    def _arm(self, now_ns: int, *, worked: bool = True) -> list[Action]:
        limit = self.side.limit(self.state)
        stall = self.side.stall(self.state)
        timers = {limit.name: now_ns + limit.after_ns}
        if stall is not None:
            fresh_ns = now_ns + stall.after_ns
            timers[stall.name] = fresh_ns if worked else self._timers.get(stall.name, fresh_ns)
        self._timers = timers
        if self.state in UNTIL_DEADLINE:
            self._timers[DEADLINE] = self.deadline_ns
        return [SetTimer(name, at_ns) for name, at_ns in self._timers.items()]

    def _due(self, now_ns: int) -> str | None:
        passed = [(at_ns, name) for name, at_ns in self._timers.items() if at_ns <= now_ns]
        return min(passed)[1] if passed else None


_PARTS: Final = msgspec.msgpack.Encoder()
_PARTS_DECODER: Final = msgspec.msgpack.Decoder(tuple[bytes, ...])
