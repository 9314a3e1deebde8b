"""The buyer's side of a lifecycle: which edge each event takes, and what it journals and sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from p2pflop.errors import ProtocolError
from p2pflop.job.events import (
    DEADLINE,
    ENDS,
    Action,
    Again,
    Alive,
    Blame,
    Cancel,
    Event,
    Fault,
    Fetched,
    Lost,
    Ranked,
    Received,
    Refuted,
    Send,
    Start,
    State,
    Timer,
    Trial,
    Tried,
    Unreachable,
    Verified,
)
from p2pflop.job.lifecycle import (
    BUYER,
    BUYER_LIMITS,
    DELIVERY,
    STALL,
    Edge,
    Lifecycle,
    Limit,
    Move,
    Parts,
    Table,
)
from p2pflop.units import NS_PER_S

MAX_ATTEMPTS: Final = 4_096
"""In a round, as many as a book has room for strangers: asks behind which nobody is cost nothing,
and must not keep a buyer from the ask that comes after them."""
MAX_UNSIGNED_RECEIPTS: Final = 64
JOB_FAULT_PREFIX: Final = "job: "
ONE_OPINION: Final = " (so account {} says, and there is no other to ask; {})"
STRANGERS: Final = " (so say {}, of which none has ever delivered here; {})"
HOW_TO_CHECK: Final = "job.run_local() in Python shows whether it is true"
FAULTS_HERE: Final = " (it does so in this node's own sandbox, too)"
PASSES_HERE: Final = " (it does not in this node's own sandbox)"
ACCOUNT_DIGITS: Final = 12
MAX_STRANGERS: Final = 8
"""So many accounts that have never delivered anything are believed that a job is at fault."""
GAVE_BACK: Final = "the provider gave the lease back: "
BUSY_PREFIX: Final = "busy: "
"""How a provider's reason begins that holds now and may not hold later."""
PASSED_PREFIX: Final = "passed over: "
"""How a buyer's own reason begins that asks another and may come back."""
PREEMPTED_PREFIX: Final = "pre-empted: "
"""How a provider's reason begins whose operator wants it to stop."""

FIRST_WAIT_NS: Final = NS_PER_S // 2
MAX_REST_NS: Final = 300 * NS_PER_S
"""The longest wait of a run that rests: a quote wakes it sooner."""
MAX_STALLED: Final = 5
"""How often a run is submitted again without having been delivered anything more."""

BUYER_EDGES: Final[Mapping[str, tuple[Edge, ...]]] = {
    "ranked": (Edge.RANKED, Edge.NO_DEAL, Edge.WAIT),
    "fill": (Edge.FILL, Edge.REPEAT),
    "reject": (Edge.NEXT,),
    "again": (Edge.AGAIN, Edge.QUIET),
    "commit": (Edge.COMMIT, Edge.REPEAT),
    "receipt": (Edge.RECEIPT, Edge.LAST_RECEIPT, Edge.REPEAT),
    "abandon": (Edge.NEXT, Edge.RESUBMIT, Edge.DOUBT, Edge.GIVEN_UP, Edge.QUIET),
    "tried": (Edge.CHECKED, Edge.JOB_FAULT, Edge.QUIET),
    "fault": (Edge.NEXT, Edge.RESUBMIT, Edge.JOB_FAULT, Edge.QUIET),
    "lost": (Edge.NEXT, Edge.RESUBMIT, Edge.LOST, Edge.QUIET),
    "alive": (Edge.STARTED, Edge.ALIVE, Edge.WORKED, Edge.QUIET),
    "verified": (Edge.VERIFIED, Edge.COUNTERSIGN, Edge.QUIET),
    "refuted": (Edge.RESUBMIT, Edge.REFUTED, Edge.QUIET),
    "fetched": (Edge.WORKED, Edge.QUIET),
    "unreachable": (Edge.RESUBMIT, Edge.LOST, Edge.QUIET),
    "cancel": (Edge.CANCEL, Edge.QUIET),
    "timer": (Edge.NEXT, Edge.SILENT, Edge.AGAIN, Edge.CHECKED),
    "deadline": (Edge.DEADLINE,),
}


class BuyerDesk(Protocol):
    """Signs and checks the buyer's records. ``check_*`` and ``*_number`` raise ProtocolError."""

    def bid(self, attempt: int, now_ns: int) -> bytes | None:
        """A bid on the deal to try as number ``attempt`` (from 0), or None if there is none."""
        ...

    def check_fill(self, wire: bytes, bid: bytes, now_ns: int) -> None: ...

    def check_reject(self, wire: bytes, bid: bytes) -> str:
        """The provider's reason."""
        ...

    def confirm(self, fill: bytes) -> bytes: ...

    def account_of(self, bid: bytes) -> bytes:
        """The account that a bid is to: its nodes have one opinion between them."""
        ...

    def is_own(self, bid: bytes) -> bool:
        """Whether that account is the buyer's own."""
        ...

    def knows(self, account: bytes) -> bool:
        """Whether it has ever delivered to the buyer: to become known costs more than a key."""
        ...

    def may_try(self, bid: bytes) -> bool:
        """Whether the job of a bid can be run in the buyer's own sandbox, in the bid's class."""
        ...

    def check_commit(self, wire: bytes, fill: bytes) -> None: ...

    def receipt_number(self, wire: bytes, fill: bytes) -> int:
        """The number of a receipt that the provider signed for this fill."""
        ...

    def check_receipt(
        self, wire: bytes, bid: bytes, fill: bytes, previous: bytes, commit: bytes, salt: bytes
    ) -> bool:
        """Whether it is the last one. ``previous`` and ``commit`` may be empty: none yet."""
        ...

    def countersign(self, receipt: bytes) -> bytes: ...

    def close(self, bid: bytes, countersigned: bytes) -> bytes:
        """The buyer's receipt for what a cancel owes beyond ``countersigned``, or nothing."""
        ...

    def abandon(self, bid: bytes, fill: bytes, countersigned: bytes, reason: str) -> bytes: ...

    def check_abandon(self, wire: bytes, bid: bytes, fill: bytes) -> str:
        """The reason given."""
        ...


class Buying:
    """The records of a purchase so far. Empty bytes mean: not yet.

    Those of a stretch that was broken off are gone but for ``delivered``, the last receipt that was
    countersigned in each; ``was_paid`` tells whether the latest one had any.

    One that ``rests`` waits until its deadline where no ask fits and nobody takes the job; a
    provider may be alive for ``stall_ns`` without any progress.
    """

    table: Table = BUYER
    limits: Mapping[State, Limit] = BUYER_LIMITS
    edges: Mapping[str, tuple[Edge, ...]] = BUYER_EDGES
    initial = State.RANKING

    def __init__(
        self, desk: BuyerDesk, *, rests: bool = False, stall_ns: int = STALL.after_ns
    ) -> None:
        self.desk = desk
        self.rests = rests
        self._stall = Limit(STALL.name, stall_ns)
        self.attempt = 0
        self.rounds = 0
        self.faulted_by: set[bytes] = set()
        self.trial = Trial.NONE
        self.bid = b""
        self.fill = b""
        self.confirm = b""
        self.commit = b""
        self.receipt = b""
        self.salt = b""
        self.unsigned: dict[int, bytes] = {}
        self.countersigned = b""
        self.delivered: list[bytes] = []
        self.was_paid = False
        self.stalled = 0
        self.abandon = b""
        self.last_number = 0
        self._has_filled = False
        self._first_attempt = 0
        self._busy = False
        self._accepted = 0
        self._reason = ""
        self._blame = Blame.NOBODY

    def decide(self, name: str, event: Event, state: State, now_ns: int) -> Move:
        """See ``Side``."""
        if state in ENDS:
            return self._after_end(name)
        if isinstance(event, Received):
            return self._on_record(name, event, state, now_ns)
        if isinstance(event, Alive | Lost | Fault | Timer):
            return self._on_sign(event, state, now_ns)
        return self._on_own(event, state, now_ns)

    def apply(self, edge: Edge, parts: Parts) -> None:
        """See ``Side``."""
        match edge, parts:
            case Edge.RANKED, (bid,):
                self.bid = bid
            case Edge.CHECKED, (trial,):
                self._note_trial(Trial(trial.decode()))
            case ((Edge.NEXT | Edge.WAIT | Edge.RESUBMIT | Edge.DOUBT), (reason, bid, _)):
                self._leave(reason.decode(), bid, edge is Edge.RESUBMIT)
            case Edge.FILL, (fill, confirm):
                self.fill, self.confirm = fill, confirm
                self._has_filled = True
            case Edge.COMMIT, (commit,):
                self.commit = commit
            case ((Edge.RECEIPT | Edge.LAST_RECEIPT), (receipt, number, salt)):
                self._note_receipt(receipt, int.from_bytes(number, "big"), salt)
                self.last_number = self._accepted if edge is Edge.LAST_RECEIPT else 0
            case ((Edge.COUNTERSIGN | Edge.VERIFIED), (countersigned, number)):
                self.countersigned = countersigned
                signed = int.from_bytes(number, "big")
                self.unsigned = {n: wire for n, wire in self.unsigned.items() if n > signed}
                self._reason = ""
            case ((Edge.START | Edge.STARTED | Edge.AGAIN), ()):
                pass
            case _, (reason, blame, abandon, *closing):
                self._reason, self._blame = reason.decode(), Blame(blame.decode())
                self.abandon = abandon
                self.countersigned = b"".join(closing) or self.countersigned
            case _:
                raise ValueError(f"{edge} with {len(parts)} parts")

    def _note_receipt(self, receipt: bytes, number: int, salt: bytes) -> None:
        self._accepted, self.salt = number, salt
        self.receipt = self.unsigned[number] = receipt

    def _note_trial(self, trial: Trial) -> None:
        self.trial = trial
        if trial is Trial.PASSES:
            self.faulted_by = set()

    @property
    def was_handed_over(self) -> bool:
        """Whether the latest provider had to stop, and brought what it had computed first."""
        return self.was_paid and self._reason.startswith(GAVE_BACK + PREEMPTED_PREFIX)

    def _leave(self, reason: str, bid: bytes, resubmits: bool) -> None:
        """A provider is of no use; ``bid`` is for the next one, empty to wait for another round."""
        self.was_paid = bool(self.countersigned)
        if self.was_paid:
            self.delivered.append(self.countersigned)
            self.stalled, self.faulted_by, self.trial = 0, set(), Trial.NONE
        self.attempt += 1
        if reason.startswith(GAVE_BACK + JOB_FAULT_PREFIX):
            self.faulted_by.add(self.desk.account_of(self.bid))
        self.bid, self._reason = bid, reason
        self._busy = self._busy or _may_change(reason)
        if not bid:
            self._first_attempt, self._busy = self.attempt, False
            self.rounds += 1
        if resubmits:
            self.rounds, self.stalled = self.stalled, self.stalled + 1
        self.fill = self.confirm = self.commit = self.receipt = self.countersigned = b""
        self.unsigned, self._accepted, self.last_number = {}, 0, 0

    def start_parts(self) -> Parts:
        """See ``Side``."""
        return ()

    def limit(self, state: State) -> Limit:
        """See ``Side``. Waits grow with the rounds that have been in vain, from none at all."""
        limit = self.limits[state]
        if state is not State.WAITING:
            return limit
        wait_ns = FIRST_WAIT_NS << min(self.rounds, 16) if self.rounds else 0
        return Limit(limit.name, min(MAX_REST_NS if self.rests else limit.after_ns, wait_ns))

    def stall(self, state: State) -> Limit | None:
        """See ``Side``. What was billed and is not here weighs more than what is told."""
        if state is State.RUNNING and not self.unsigned:
            return self._stall
        return DELIVERY if state in (State.RUNNING, State.VERIFYING) else None

    def revive(self, _state: State) -> Sequence[Move]:
        """See ``Side``: a buyer goes on where it was."""
        return ()

    def pending(self, state: State) -> Sequence[Action]:
        """See ``Side``. In RANKING the driver ranks again."""
        if state is State.WAITING:
            return [Start("rest" if self.rests else "wait")]
        if state is State.CHECKING:
            return [Start("check")]
        if state is State.BIDDING:
            return [Send("bid", self.bid)]
        if state in (State.CONFIRMING, State.RUNNING, State.VERIFYING):
            verify = [Start("verify")] if self.unsigned else []
            return [Send("confirm", self.confirm), *verify]
        return self._last_word()

    def outcome(self) -> tuple[str, Blame]:
        """See ``Side``."""
        return self._reason, self._blame

    def _on_record(self, name: str, event: Received, state: State, now_ns: int) -> Move:
        if name == "fill":
            return self._on_fill(event.wire, state, now_ns)
        if name == "reject":
            return self._on_reject(event.wire, state, now_ns)
        if name == "commit":
            return self._on_commit(event.wire)
        if name == "receipt":
            return self._on_receipt(event.wire, event.salt)
        return self._on_abandon(event.wire, state, now_ns)

    def _on_fill(self, wire: bytes, state: State, now_ns: int) -> Move:
        if state is not State.BIDDING:
            if wire != self.fill:
                raise ProtocolError(f"a second fill in state {state}")
            return Move(Edge.REPEAT, (), [Send("confirm", self.confirm)])
        self.desk.check_fill(wire, self.bid, now_ns)
        confirm = self.desk.confirm(wire)
        return Move(Edge.FILL, (wire, confirm), [Send("confirm", confirm)])

    def _on_reject(self, wire: bytes, state: State, now_ns: int) -> Move:
        if state is not State.BIDDING:
            raise ProtocolError(f"a reject after a fill, in state {state}")
        reason = self.desk.check_reject(wire, self.bid)
        return self._next(f"refused: {reason}", now_ns)

    def _on_commit(self, wire: bytes) -> Move:
        if self.commit:
            if wire != self.commit:
                raise ProtocolError("a second commit for one fill")
            return Move(Edge.REPEAT)
        self.desk.check_commit(wire, self.fill)
        return Move(Edge.COMMIT, (wire,))

    def _on_receipt(self, wire: bytes, salt: bytes) -> Move:
        number = self.desk.receipt_number(wire, self.fill)
        if number <= self._accepted:
            signed = [Send("countersign", self.countersigned)] if self.countersigned else []
            return Move(Edge.REPEAT, (), signed)
        if len(self.unsigned) >= MAX_UNSIGNED_RECEIPTS:
            raise ProtocolError(f"over {MAX_UNSIGNED_RECEIPTS} receipts wait for verification")
        last = self.desk.check_receipt(wire, self.bid, self.fill, self.receipt, self.commit, salt)
        edge = Edge.LAST_RECEIPT if last else Edge.RECEIPT
        return Move(edge, (wire, number.to_bytes(4, "big"), salt), [Start("verify")])

    def _on_abandon(self, wire: bytes, state: State, now_ns: int) -> Move:
        if not self.fill:
            raise ProtocolError("an abandon without a fill")
        reason = self.desk.check_abandon(wire, self.bid, self.fill)
        job_fault = reason.startswith(JOB_FAULT_PREFIX) and state is not State.VERIFYING
        reason = GAVE_BACK + reason
        if job_fault:
            return self._on_job_fault(reason, now_ns)
        return self._start_over(reason, state, now_ns, Edge.GIVEN_UP, fence=False)

    def _on_job_fault(self, reason: str, now_ns: int) -> Move:
        """A provider says that the job itself is to blame: believed of the buyer's own account, and
        of a second account, or where there is no other to ask, if the buyer's own sandbox says so.
        Where that cannot say it, one of two accounts must be no stranger, or many must agree, or
        there must be nobody else, not even one that has no room now. If its other nodes come next,
        ranking anew finds others first: it is avoided."""
        account = self.desk.account_of(self.bid)
        accusers = self.faulted_by | {account}
        if self.desk.is_own(self.bid):
            return self._end(Edge.JOB_FAULT, reason, Blame.JOB, fence=False)
        trial = Trial.NONE if self.countersigned else self.trial
        if trial is Trial.PASSES:
            reason += PASSES_HERE
            return self._start_over(reason, State.RUNNING, now_ns, Edge.GIVEN_UP, fence=False)
        may_try = trial is Trial.NONE and self.desk.may_try(self.bid)
        if may_try and len(accusers) > 1:
            return self._doubt(reason)
        strangers = "" if any(map(self.desk.knows, accusers)) else _doubted(STRANGERS, accusers)
        if (len(accusers) > 1 and not strangers) or len(accusers) >= MAX_STRANGERS:
            return self._end(Edge.JOB_FAULT, reason + strangers, Blame.JOB, fence=False)
        bid = self._next_bid(now_ns)
        is_same = bid is not None and self.desk.account_of(bid) == account
        if bid is not None and (self.countersigned or (is_same and not self.faulted_by)):
            return self._resubmit(reason, fence=False)
        if bid is not None:
            return self._go_to(bid, reason, fence=False)
        if self._busy or self.rests:
            return self._wait(reason, fence=False)
        if may_try:
            return self._doubt(reason)
        doubt = _doubted(ONE_OPINION, accusers) if len(accusers) == 1 else strangers
        return self._end(Edge.JOB_FAULT, reason + doubt, Blame.JOB, fence=False)

    def _doubt(self, reason: str) -> Move:
        return Move(Edge.DOUBT, (reason.encode(), b"", b""), [Start("check")])

    def _on_tried(self, trial: Trial, reason: str) -> Move:
        """The buyer's own sandbox has spoken, or could not."""
        if trial is Trial.FAULTS:
            reason = GAVE_BACK + JOB_FAULT_PREFIX + reason + FAULTS_HERE
            return self._end(Edge.JOB_FAULT, reason, Blame.JOB, fence=False)
        return Move(Edge.CHECKED, (trial.encode(),), [Start("rank")])

    def _start_over(
        self, reason: str, state: State, now_ns: int, edge: Edge, *, fence: bool = True
    ) -> Move:
        """Have another provider do what is not delivered yet: the next one of this round, if it is
        all the same work, else whoever is best by then; end if this has led nowhere."""
        is_same = not self.countersigned and state is not State.VERIFYING
        bid = self._next_bid(now_ns) if is_same else None
        if bid is not None:
            return self._go_to(bid, reason, fence=fence)
        if self.countersigned or self.stalled < MAX_STALLED:
            return self._resubmit(reason, fence=fence)
        return self._end(edge, reason, Blame.PROVIDER, fence)

    def _next_bid(self, now_ns: int) -> bytes | None:
        """A bid to the next provider of this round."""
        attempt = self.attempt + 1
        few = attempt - self._first_attempt < MAX_ATTEMPTS
        return self.desk.bid(attempt, now_ns) if few else None

    def _on_sign(self, event: Alive | Lost | Fault | Timer, state: State, now_ns: int) -> Move:
        match event:
            case Timer(name):
                return (
                    self._on_deadline(state)
                    if name == DEADLINE
                    else self._limit(name, state, now_ns)
                )
            case Alive(worked):
                if state is State.CONFIRMING:
                    return Move(Edge.STARTED)
                alive = Edge.WORKED if worked and not self.unsigned else Edge.ALIVE
                return Move(alive if state is State.RUNNING else Edge.QUIET)
            case _ if state in (State.RANKING, State.WAITING, State.CHECKING, State.VERIFYING):
                # No stream is needed yet, or all that is needed can come over another one.
                return Move(Edge.QUIET)
            case Lost(_, int(attempt)) if (state, attempt) != (State.BIDDING, self.attempt):
                return Move(Edge.QUIET)
            case Lost(reason):
                return self._fall(f"the provider was lost: {reason}", state, now_ns, Edge.LOST)
            case Fault(reason, job_fault):
                if job_fault and state is not State.BIDDING:
                    return self._end(Edge.JOB_FAULT, f"the job failed: {reason}", Blame.JOB)
                return self._fall(f"the provider failed: {reason}", state, now_ns, Edge.LOST)

    def _limit(self, name: str, state: State, now_ns: int) -> Move:
        if state is State.RANKING:
            return self._end(Edge.SILENT, "no deal was found in time", Blame.MARKET)
        if state is State.WAITING:
            return Move(Edge.AGAIN, (), [Start("rank")])
        if state is State.CHECKING:
            return self._on_tried(Trial.UNKNOWN, "")
        limit, did = BUYER_LIMITS[state], "was silent"
        if name == DELIVERY.name:
            limit, did = DELIVERY, "handed over nothing more of what it billed"
        elif name == STALL.name:
            limit, did = self._stall, "made no progress"
        reason = f"the provider {did} for {limit.after_ns // NS_PER_S} s"
        return self._fall(reason, state, now_ns, Edge.SILENT)

    def _on_deadline(self, state: State) -> Move:
        return self._end(Edge.DEADLINE, f"the deadline passed while {state}", Blame.MARKET)

    def _on_own(self, event: Event, state: State, now_ns: int) -> Move:
        match event:
            case Ranked(reason):
                return self._on_ranked(reason, now_ns)
            case Again() if state is State.WAITING:
                return Move(Edge.AGAIN, (), [Start("rank")])
            case Verified(number, wire) if self.unsigned.get(number) == wire:
                return self._on_verified(number)
            case Refuted(reason, wire) if wire in self.unsigned.values():
                return self._start_over(f"wrong delivery: {reason}", state, now_ns, Edge.REFUTED)
            case Fetched() if self.unsigned:
                return Move(Edge.WORKED)
            case Unreachable(reason) if state is State.VERIFYING:
                reason = f"the provider was lost: {reason}"
                return self._start_over(reason, state, now_ns, Edge.LOST)
            case Tried() if state is State.CHECKING and event.attempt == self.attempt:
                return self._on_tried(event.trial, event.reason)
            case Cancel(reason):
                return self._cancel(reason)
            case _:
                return Move(Edge.QUIET)

    def _on_ranked(self, reason: str, now_ns: int) -> Move:
        bid = self.desk.bid(self.attempt, now_ns)
        if bid is not None:
            return Move(Edge.RANKED, (bid,), [Send("bid", bid)])
        if self._has_filled or self.rests:
            return self._wait(reason, fence=False)
        return self._end(Edge.NO_DEAL, reason, Blame.MARKET)

    def _cancel(self, reason: str) -> Move:
        """What is owed then is signed by this side alone."""
        end = self._end(Edge.CANCEL, reason, Blame.BUYER)
        closing = self.desk.close(self.bid, self.countersigned) if self.countersigned else b""
        signed = [Send("countersign", closing)] if closing else []
        return Move(Edge.CANCEL, (*end.parts, closing), [*signed, *end.actions])

    def _on_verified(self, number: int) -> Move:
        signed = self.desk.countersign(self.unsigned[number])
        edge = Edge.VERIFIED if number == self.last_number else Edge.COUNTERSIGN
        return Move(edge, (signed, number.to_bytes(4, "big")), [Send("countersign", signed)])

    def _fall(self, reason: str, state: State, now_ns: int, edge: Edge) -> Move:
        """A provider is of no use."""
        if state is State.BIDDING:
            return self._next(reason, now_ns)
        return self._start_over(reason, state, now_ns, edge)

    def _next(self, reason: str, now_ns: int) -> Move:
        """A provider did not take the job: ask the next one, now or later."""
        bid = self._next_bid(now_ns)
        if bid is not None:
            return self._go_to(bid, reason, fence=True)
        if self._has_filled or self.rests or self._busy or _may_change(reason):
            return self._wait(reason, fence=True)
        message = f"no provider took the job; the last one: {reason}"
        return self._end(Edge.EXHAUSTED, message, Blame.MARKET)

    def _go_to(self, bid: bytes, reason: str, *, fence: bool) -> Move:
        abandon = self._fence(reason) if fence else []
        parts = (reason.encode(), bid, abandon[0].wire if abandon else b"")
        return Move(Edge.NEXT, parts, [*abandon, Send("bid", bid)])

    def _resubmit(self, reason: str, *, fence: bool) -> Move:
        abandon = self._fence(reason) if fence else []
        parts = (reason.encode(), b"", abandon[0].wire if abandon else b"")
        return Move(Edge.RESUBMIT, parts, [*abandon, Start("wait")])

    def _wait(self, reason: str, *, fence: bool) -> Move:
        abandon = self._fence(reason) if fence else []
        parts = (reason.encode(), b"", abandon[0].wire if abandon else b"")
        return Move(Edge.WAIT, parts, [*abandon, Start("rest" if self.rests else "wait")])

    def _end(self, edge: Edge, reason: str, blame: Blame, fence: bool = True) -> Move:
        abandon = self._fence(reason) if fence else []
        wire = abandon[0].wire if abandon else b""
        return Move(edge, (reason.encode(), blame.encode(), wire), abandon)

    def _fence(self, reason: str) -> list[Send]:
        """Once confirmed, claims for later steps are void only by an abandon."""
        if not self.fill:
            return []
        wire = self.desk.abandon(self.bid, self.fill, self.countersigned, reason)
        return [Send("abandon", wire)]

    def _after_end(self, name: str) -> Move:
        if name in ("fill", "commit", "receipt"):
            return Move(Edge.REPEAT, (), self._last_word())
        return Move(Edge.QUIET)

    def _last_word(self) -> list[Send]:
        if self.abandon:
            return [Send("abandon", self.abandon)]
        return [Send("countersign", self.countersigned)] if self.countersigned else []


def _may_change(reason: str) -> bool:
    """Whether who did not take the job for that reason may take it later."""
    return BUSY_PREFIX in reason or PASSED_PREFIX in reason


def _doubted(text: str, accounts: set[bytes]) -> str:
    """Whose word it is, and how to see whether it is true."""
    names = ", ".join(account.hex()[:ACCOUNT_DIGITS] for account in sorted(accounts))
    return text.format(names, HOW_TO_CHECK)


def buyer(
    desk: BuyerDesk, deadline_ns: int, *, rests: bool = False, stall_ns: int = STALL.after_ns
) -> Lifecycle[Buying]:
    """A purchase that has not begun."""
    return Lifecycle(Buying(desk, rests=rests, stall_ns=stall_ns), deadline_ns)
