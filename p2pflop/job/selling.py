"""The provider's side of a lifecycle: the edge each event takes, what it journals and sends."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final, Protocol

from p2pflop.errors import ProtocolError
from p2pflop.job.buying import JOB_FAULT_PREFIX, MAX_UNSIGNED_RECEIPTS
from p2pflop.job.events import (
    DEADLINE,
    ENDS,
    Action,
    Alive,
    Blame,
    Checkpointed,
    Deny,
    Done,
    Event,
    Fault,
    Grant,
    Lost,
    Ready,
    Received,
    Reveal,
    Send,
    Start,
    State,
    Timer,
    Withdraw,
)
from p2pflop.job.lifecycle import (
    PROVIDER,
    PROVIDER_LIMITS,
    Edge,
    Lifecycle,
    Limit,
    Move,
    Parts,
    Table,
)
from p2pflop.units import NS_PER_S

PROVIDER_EDGES: Final[Mapping[str, tuple[Edge, ...]]] = {
    "bid": (Edge.REPEAT, Edge.QUIET),
    "grant": (Edge.GRANT,),
    "deny": (Edge.DENY,),
    "confirm": (Edge.CONFIRM, Edge.REPEAT),
    "ready": (Edge.READY,),
    "alive": (Edge.ALIVE, Edge.QUIET),
    "lost": (Edge.QUIET,),
    "checkpointed": (Edge.RECEIPT,),
    "done": (Edge.DONE,),
    "reveal": (Edge.REVEAL,),
    "receipt": (Edge.SETTLE, Edge.COUNTERSIGN, Edge.QUIET),
    "abandon": (Edge.ABANDONED, Edge.QUIET),
    "fault": (Edge.FAULT, Edge.QUIET),
    "withdraw": (Edge.WITHDRAW, Edge.DENY, Edge.QUIET),
    "timer": (Edge.DENY, Edge.LAPSE, Edge.SILENT, Edge.UNPAID),
    "deadline": (Edge.DENY, Edge.LAPSE, Edge.DEADLINE),
}


class ProviderDesk(Protocol):
    """Signs and checks the provider's records. ``check_*`` raise ProtocolError."""

    def fill(self, bid: bytes, now_ns: int) -> bytes: ...

    def reject(self, bid: bytes, reason: str) -> bytes: ...

    def check_confirm(self, wire: bytes, bid: bytes, fill: bytes) -> None: ...

    def receipt(
        self, bid: bytes, fill: bytes, previous: bytes, step: int, root: bytes, result: bytes
    ) -> tuple[bytes, int]:
        """The receipt after ``previous`` (empty: none), and its number. ``result`` ends them."""
        ...

    def commit(self, fill: bytes, root: bytes, result: bytes, salt: bytes) -> bytes: ...

    def check_countersigned(
        self, wire: bytes, bid: bytes, receipts: Mapping[int, bytes]
    ) -> int | None:
        """The number of the receipt among ``receipts`` that the buyer signed; None if in none."""
        ...

    def check_closing(
        self, wire: bytes, bid: bytes, fill: bytes, receipts: Collection[bytes]
    ) -> int | None:
        """The number of a closing receipt that comes after one of ``receipts``; None if none."""
        ...

    def abandon(self, bid: bytes, fill: bytes, countersigned: bytes, reason: str) -> bytes: ...

    def check_abandon(self, wire: bytes, bid: bytes, fill: bytes) -> str:
        """The reason given."""
        ...


class Selling:
    """The records of a sale so far. Empty bytes mean: not yet. ``farewell``: reject or abandon."""

    table: Table = PROVIDER
    limits: Mapping[State, Limit] = PROVIDER_LIMITS
    edges: Mapping[str, tuple[Edge, ...]] = PROVIDER_EDGES
    initial = State.OFFERED

    def __init__(self, desk: ProviderDesk, bid: bytes) -> None:
        self.desk = desk
        self.bid = bid
        self.fill = b""
        self.confirm = b""
        self.commit = b""
        self.receipt = b""
        self.salt = b""
        self.unsigned: dict[int, bytes] = {}
        self.countersigned = b""
        self.farewell = b""
        self.last_number = 0
        self._done: tuple[int, bytes, bytes] = (0, b"", b"")
        self._reason = ""
        self._blame = Blame.NOBODY

    def decide(self, name: str, event: Event, state: State, now_ns: int) -> Move:
        """See ``Side``."""
        if isinstance(event, Received):
            return self._on_record(name, event.wire, state)
        if isinstance(event, Alive | Lost | Fault | Timer):
            return self._on_sign(event, state)
        return self._on_own(event, state, now_ns)

    def apply(self, edge: Edge, parts: Parts) -> None:
        """See ``Side``."""
        match edge, parts:
            case Edge.START, (bid,):
                self.bid = bid
            case Edge.GRANT, (fill,):
                self.fill = fill
            case Edge.CONFIRM, (confirm,):
                self.confirm = confirm
            case Edge.READY, ():
                pass
            case ((Edge.RECEIPT | Edge.REVEAL), (receipt, number)):
                self.receipt = self.unsigned[int.from_bytes(number, "big")] = receipt
                if edge is Edge.REVEAL:
                    self.last_number = int.from_bytes(number, "big")
            case Edge.DONE, (commit, step, root, result, salt):
                self.commit, self.salt = commit, salt
                self._done = (int.from_bytes(step, "big"), root, result)
            case ((Edge.COUNTERSIGN | Edge.SETTLE), (countersigned, number)):
                self.countersigned = countersigned
                signed = int.from_bytes(number, "big")
                self.unsigned = {n: wire for n, wire in self.unsigned.items() if n > signed}
            case _, (reason, blame, farewell):
                self._reason, self._blame = reason.decode(), Blame(blame.decode())
                self.farewell = farewell
            case _:
                raise ValueError(f"{edge} with {len(parts)} parts")

    def start_parts(self) -> Parts:
        """See ``Side``."""
        return (self.bid,)

    def limit(self, state: State) -> Limit:
        """See ``Side``."""
        return self.limits[state]

    def stall(self, _state: State) -> Limit | None:
        """See ``Side``."""
        return None

    def revive(self, state: State) -> Sequence[Move]:
        """See ``Side``. The worker died with the node, so a running lease is given back."""
        if state in (State.PREPARING, State.RUNNING):
            return [self._end(Edge.RESTART, "the provider's node was restarted", Blame.PROVIDER)]
        return ()

    def pending(self, state: State) -> Sequence[Action]:
        """See ``Side``. In OFFERED the driver decides again."""
        if state is State.LEASED:
            return [Send("fill", self.fill)]
        if state is State.COMMITTED:
            return [*self._open_claims(), Start("reveal")]
        return self._open_claims() if state is State.RECEIPTED else self._last_word()

    def outcome(self) -> tuple[str, Blame]:
        """See ``Side``."""
        return self._reason, self._blame

    def _on_record(self, name: str, wire: bytes, state: State) -> Move:
        if name == "bid":
            return self._on_bid(wire, state)
        if name == "confirm":
            return self._on_confirm(wire, state)
        if name == "receipt":
            return self._on_countersigned(wire, state)
        if state in ENDS:
            return Move(Edge.QUIET)
        return self._on_abandon(wire)

    def _on_bid(self, wire: bytes, state: State) -> Move:
        if wire != self.bid:
            raise ProtocolError("another bid on the stream of this one")
        if state is State.OFFERED:
            return Move(Edge.QUIET)
        answer = Send("fill", self.fill) if self.fill else Send("reject", self.farewell)
        return Move(Edge.REPEAT, (), [answer])

    def _on_confirm(self, wire: bytes, state: State) -> Move:
        if state is State.LEASED:
            self.desk.check_confirm(wire, self.bid, self.fill)
            return Move(Edge.CONFIRM, (wire,), [Start("prepare")])
        if state in ENDS:
            return Move(Edge.REPEAT, (), self._last_word())
        if wire != self.confirm:
            raise ProtocolError("a second confirm for one fill")
        return Move(Edge.REPEAT, (), self._open_claims())

    def _on_countersigned(self, wire: bytes, state: State) -> Move:
        number = self.desk.check_countersigned(wire, self.bid, self.unsigned)
        if number is None:
            return self._on_closing(wire)
        settles = number == self.last_number and state not in ENDS
        edge = Edge.SETTLE if settles else Edge.COUNTERSIGN
        return Move(edge, (wire, number.to_bytes(4, "big")))

    def _on_closing(self, wire: bytes) -> Move:
        """A buyer that cancels says by itself what it owes."""
        receipts = [*self.unsigned.values(), *filter(None, [self.countersigned])]
        number = self.desk.check_closing(wire, self.bid, self.fill, receipts)
        if number is None:
            return Move(Edge.QUIET)
        return Move(Edge.COUNTERSIGN, (wire, number.to_bytes(4, "big")))

    def _on_abandon(self, wire: bytes) -> Move:
        if not self.fill:
            raise ProtocolError("an abandon without a fill")
        reason = self.desk.check_abandon(wire, self.bid, self.fill)
        parts = (f"the buyer abandoned it: {reason}".encode(), Blame.BUYER.encode(), b"")
        return Move(Edge.ABANDONED, parts)

    def _on_sign(self, event: Alive | Lost | Fault | Timer, state: State) -> Move:
        working = state in (State.PREPARING, State.RUNNING, State.COMMITTED)
        match event:
            case Timer(name):
                return self._on_deadline(state) if name == DEADLINE else self._limit(state)
            case Alive() if state in (State.PREPARING, State.RUNNING):
                return Move(Edge.ALIVE)
            case Fault(reason, job_fault) if working:
                if job_fault:
                    return self._end(Edge.FAULT, JOB_FAULT_PREFIX + reason, Blame.JOB)
                return self._end(Edge.FAULT, reason, Blame.PROVIDER)
            case _:
                return Move(Edge.QUIET)

    def _limit(self, state: State) -> Move:
        if state is State.OFFERED:
            return self._deny("the provider could not decide in time")
        if state is State.LEASED:
            return self._end(Edge.LAPSE, "the fill was not confirmed in time", Blame.BUYER)
        if state is State.RECEIPTED:
            parts = (b"the buyer did not countersign in time", Blame.BUYER.encode(), b"")
            return Move(Edge.UNPAID, parts)
        blame = Blame.PROVIDER if state is State.COMMITTED else Blame.BUYER
        seconds = PROVIDER_LIMITS[state].after_ns // NS_PER_S
        return self._end(Edge.SILENT, f"nothing was heard for {seconds} s", blame)

    def _on_deadline(self, state: State) -> Move:
        if state is State.OFFERED:
            return self._deny("the deadline has passed")
        edge = Edge.LAPSE if state is State.LEASED else Edge.DEADLINE
        return self._end(edge, f"the deadline passed while {state}", Blame.PROVIDER)

    def _on_own(self, event: Event, state: State, now_ns: int) -> Move:
        match event:
            case Grant():
                fill = self.desk.fill(self.bid, now_ns)
                return Move(Edge.GRANT, (fill,), [Send("fill", fill)])
            case Deny(reason):
                return self._deny(reason)
            case Ready():
                return Move(Edge.READY, (), [Start("run")])
            case Checkpointed(step, root) if len(self.unsigned) < MAX_UNSIGNED_RECEIPTS:
                return self._bill(Edge.RECEIPT, step, root, b"", b"")
            case Done(step, root, result, salt):
                commit = self.desk.commit(self.fill, root, result, salt)
                parts = (commit, step.to_bytes(8, "big"), root, result, salt)
                return Move(Edge.DONE, parts, [Send("commit", commit), Start("reveal")])
            case Reveal():
                return self._bill(Edge.REVEAL, *self._done, self.salt)
            case Withdraw(reason, blame):
                return self._withdraw(reason, blame, state)
            case _:
                return Move(Edge.QUIET)

    def _withdraw(self, reason: str, blame: Blame, state: State) -> Move:
        if state is State.OFFERED:
            return self._deny(reason)
        if state in (State.LEASED, State.PREPARING, State.RUNNING):
            return self._end(Edge.WITHDRAW, reason, blame)
        return Move(Edge.QUIET)

    def _bill(self, edge: Edge, step: int, root: bytes, result: bytes, salt: bytes) -> Move:
        wire, number = self.desk.receipt(self.bid, self.fill, self.receipt, step, root, result)
        parts = (wire, number.to_bytes(4, "big"))
        return Move(edge, parts, [Send("receipt", wire, salt)])

    def _deny(self, reason: str) -> Move:
        reject = self.desk.reject(self.bid, reason)
        parts = (reason.encode(), Blame.PROVIDER.encode(), reject)
        return Move(Edge.DENY, parts, [Send("reject", reject)])

    def _end(self, edge: Edge, reason: str, blame: Blame) -> Move:
        wire = self.desk.abandon(self.bid, self.fill, self.countersigned, reason)
        return Move(edge, (reason.encode(), blame.encode(), wire), [Send("abandon", wire)])

    def _open_claims(self) -> list[Send]:
        """What a buyer that comes back may have missed, in order."""
        receipts = [
            Send("receipt", wire, self.salt if number == self.last_number else b"")
            for number, wire in sorted(self.unsigned.items())
        ]
        commit = [Send("commit", self.commit)] if self.commit else []
        return [*receipts[:-1], *commit, *receipts[-1:]]

    def _last_word(self) -> list[Send]:
        if not self.farewell:
            return []
        return [Send("abandon" if self.fill else "reject", self.farewell)]


def provider(desk: ProviderDesk, bid: bytes, deadline_ns: int) -> Lifecycle[Selling]:
    """A sale that has not begun. ``bid`` is the envelope, checked but not yet granted."""
    return Lifecycle(Selling(desk, bid), deadline_ns)
