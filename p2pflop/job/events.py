"""What goes into a lifecycle, its events, and what comes out, its actions. Plain data, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from p2pflop.wire import envelope_kind

DEADLINE: Final = "deadline"


class State(StrEnum):
    """Of both sides; ``SETTLED``, ``FAILED``, ``CANCELLED`` and ``RELEASED`` are ends."""

    RANKING = "ranking"
    WAITING = "waiting"
    BIDDING = "bidding"
    CONFIRMING = "confirming"
    CHECKING = "checking"
    VERIFYING = "verifying"
    OFFERED = "offered"
    LEASED = "leased"
    PREPARING = "preparing"
    COMMITTED = "committed"
    RECEIPTED = "receipted"
    RUNNING = "running"
    SETTLED = "settled"
    FAILED = "failed"
    CANCELLED = "cancelled"
    RELEASED = "released"


ENDS: Final = frozenset({State.SETTLED, State.FAILED, State.CANCELLED, State.RELEASED})


class Blame(StrEnum):
    """Whose doing an end is, for the choice of error and of what to try next."""

    NOBODY = ""
    MARKET = "market"
    PROVIDER = "provider"
    BUYER = "buyer"
    JOB = "job"


@dataclass(frozen=True, slots=True)
class Received:
    """A signed record came, as an envelope; ``salt`` goes with the last receipt."""

    wire: bytes
    salt: bytes = b""


@dataclass(frozen=True, slots=True)
class Alive:
    """Anything else came from the other side. ``worked``: progress or rows, not a heartbeat."""

    worked: bool = False


@dataclass(frozen=True, slots=True)
class Lost:
    """The stream broke, could not be opened, or was closed because of what came on it.

    With ``attempt``, of a buyer's: the bid of that number was not answered. It tells nothing of one
    that is answered by now, nor of a later bid.
    """

    reason: str
    attempt: int | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """The work failed: at the provider, or so it told the buyer. ``job_fault`` blames the job."""

    reason: str
    job_fault: bool = False


@dataclass(frozen=True, slots=True)
class Timer:
    """A ``SetTimer`` of this name is due. Early or outdated ones are ignored."""

    name: str


@dataclass(frozen=True, slots=True)
class Ranked:
    """Buyer: the book is ranked; the desk has the deals. ``reason`` tells why if it has none."""

    reason: str = "no ask satisfies the job"


@dataclass(frozen=True, slots=True)
class Again:
    """Buyer: somebody may have room now, so do not wait any longer."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Buyer: everything that receipt ``number`` is about is held and verified.

    ``wire`` is that receipt: the check may have outlived the provider that it was of.
    """

    number: int
    wire: bytes


@dataclass(frozen=True, slots=True)
class Refuted:
    """Buyer: what was delivered is not what was bought; ``wire`` is the receipt about it."""

    reason: str
    wire: bytes


@dataclass(frozen=True, slots=True)
class Fetched:
    """Buyer: a good deal more of what receipts are about is here."""


@dataclass(frozen=True, slots=True)
class Unreachable:
    """Buyer: what the last receipt is about is not all here, and its provider is gone."""

    reason: str


class Trial(StrEnum):
    """How a job fared in the buyer's own sandbox, from its newest checkpoint to the next."""

    NONE = ""
    FAULTS = "faults"
    PASSES = "passes"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Tried:
    """Buyer: the job was run here, because others say that it faults; ``reason`` is what it did.

    ``attempt`` is that after which it was begun: an older one tells nothing of a newer doubt.
    """

    attempt: int
    trial: Trial
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Buyer: the user wants no more of it."""

    reason: str = "cancelled by the user"


@dataclass(frozen=True, slots=True)
class Grant:
    """Provider: the allocator has reserved a slot."""


@dataclass(frozen=True, slots=True)
class Deny:
    """Provider: the bid is refused."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ready:
    """Provider: inputs are here and every graph is lowered."""


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """Provider: the state after ``step`` steps of the work is there to fetch and to be billed."""

    step: int
    root: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """Provider: the job is over after ``step`` steps of the work. ``salt`` is 32 random bytes."""

    step: int
    root: bytes
    result: bytes
    salt: bytes


@dataclass(frozen=True, slots=True)
class Reveal:
    """Provider: the commit is out; show the result."""


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Provider: give the lease back (``cost``, shutdown, a buyer that does not countersign)."""

    reason: str
    blame: Blame = Blame.PROVIDER


Event = (
    Received
    | Alive
    | Lost
    | Fault
    | Timer
    | Ranked
    | Again
    | Verified
    | Refuted
    | Fetched
    | Unreachable
    | Tried
    | Cancel
    | Grant
    | Deny
    | Ready
    | Checkpointed
    | Done
    | Reveal
    | Withdraw
)


@dataclass(frozen=True, slots=True)
class Persist:
    """Journal this row before doing anything else."""

    kind: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Send:
    """Send a signed record. ``salt`` goes with the last receipt.

    ``kind`` is that of the record, but ``countersign`` for the buyer's envelope around a receipt.
    """

    kind: str
    wire: bytes
    salt: bytes = b""


@dataclass(frozen=True, slots=True)
class Start:
    """Begin ``prepare``, ``run`` or ``reveal`` (provider), or ``verify``, ``wait``, ``rest``,
    ``check`` or ``rank``. To rest is to wait for a quote, too, and begins once it is on disk."""

    task: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End whatever was started for this job and free what it holds."""


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Report ``Timer(name)`` at ``at_ns``; replaces the timer of that name."""

    name: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The job is over on this side."""

    state: State
    reason: str
    blame: Blame


Action = Persist | Send | Start | Stop | SetTimer | Finish


def event_name(event: Event) -> str:
    """What the tables call an event: the kind of a received record, ``timer``, or its class."""
    if isinstance(event, Received):
        return envelope_kind(event.wire)
    if isinstance(event, Timer):
        return DEADLINE if event.name == DEADLINE else "timer"
    return type(event).__name__.lower()
