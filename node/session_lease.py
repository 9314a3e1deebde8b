"""One lease of a session, on the buyer's side: what was sent and not yet obeyed, and what it costs.

``Lease`` is what the session speaks to. ``RemoteLease`` is a provider's, ``LocalLease`` a worker of
this node's own. Commands are gathered into Batches and sent on within the window; what comes back
must be just what is due, in its order: whatever else a provider sends ends the lease.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import trio
from msgspec.structs import replace

from p2pflop.errors import P2PFlopError, ProtocolError, ProviderError
from p2pflop.job.commands import (
    MAX_BATCH_COMMANDS,
    AnyCommand,
    Batch,
    Data,
    Define,
    Ran,
    Read,
    Write,
)
from p2pflop.job.patience import session_stall_ns
from p2pflop.job.session import Mark, OpenGraph, SessionTable
from p2pflop.node.session_messages import WINDOW_BYTES, WINDOW_COMMANDS
from p2pflop.units import MIB, NS_PER_S
from p2pflop.wire import encode

BATCH_COMMANDS: Final = min(256, MAX_BATCH_COMMANDS)
BATCH_BYTES: Final = MIB // 2
MAX_MARKS: Final = 65_536
"""Batches obeyed since the last receipt; one for an earlier is not countersigned."""


class QuoteUsedUp(Exception):
    """The next command would cost more than the lease may bill, or be over a limit of its ask. It
    was not sent; ``adds`` is what it counts."""

    def __init__(self, adds: Mark) -> None:
        super().__init__()
        self.adds = adds


class Answer(Protocol):
    """Who asked for bytes."""

    async def take(self, data: bytes, *, last: bool) -> None:
        """The next of them."""


def nothing() -> None:
    """What is called where nobody wants to know."""


OnRan = Callable[[int, Ran], Awaitable[None]]
"""Called with the ``upto`` of ``flush`` and what the batch took."""


@dataclass(slots=True)
class _Reading:
    number: int
    left_bytes: int
    answer: Answer


@dataclass(slots=True)
class _Sent:
    mark: Mark
    size_bytes: int
    upto: int
    reads: deque[_Reading]


@dataclass(slots=True)
class Outstanding:
    """The commands of one lease: those that gather, and those that are under way."""

    table: SessionTable
    on_ran: OnRan
    on_stood: Callable[[], None] = nothing
    busy_ns: int = 0
    obeyed: Mark = field(default_factory=Mark)
    sent_to: Mark = field(default_factory=Mark)
    marks: dict[int, Mark] = field(default_factory=dict)
    moved_at: float = field(default_factory=trio.current_time)
    ran_at: float = field(default_factory=trio.current_time)
    _gathered: list[AnyCommand] = field(default_factory=list)
    _gathered_bytes: int = 0
    _reads: deque[_Reading] = field(default_factory=deque)
    _sent: deque[_Sent] = field(default_factory=deque)
    _sent_bytes: int = 0
    _news: trio.Event = field(default_factory=trio.Event)

    @property
    def is_full(self) -> bool:
        """Whether the batch that gathers should be sent."""
        return len(self._gathered) >= BATCH_COMMANDS or self._gathered_bytes >= BATCH_BYTES

    @property
    def stalled(self) -> bool:
        """Whether the batch that is due has been so for longer than it may take."""
        if not self._sent:
            return False
        due = self._sent[0]
        patience_ns = session_stall_ns(self.obeyed, due.mark, due.size_bytes)
        return trio.current_time() - self.moved_at > patience_ns / NS_PER_S

    def add(self, command: AnyCommand, graph: OpenGraph | None, answer: Answer | None) -> None:
        """Gather a command that fits. Raises JobError."""
        if isinstance(command, Read):
            if answer is None:
                raise ValueError("a Read that nobody asks for")
            self._reads.append(_Reading(self.table.count, command.size_bytes, answer))
        self.table.apply(command, graph)
        self._gathered.append(command)
        if isinstance(command, Write | Define):
            self._gathered_bytes += len(
                command.data if isinstance(command, Write) else command.graph
            )

    async def next_batch(self, upto: int) -> Batch | None:
        """The batch to be sent now, once the window lets it through; None if nothing gathers."""
        if not self._gathered:
            return None
        first = self.table.count - len(self._gathered)
        batch = Batch(first, tuple(self._gathered))
        size_bytes = len(encode(batch))
        while self._sent and (
            self.table.count - self.obeyed.count > WINDOW_COMMANDS
            or self._sent_bytes + size_bytes > WINDOW_BYTES
        ):
            await self._news.wait()
        if not self._sent:
            self.moved_at = self.ran_at = trio.current_time()
        self.sent_to = self.table.mark()
        self._sent.append(_Sent(self.sent_to, size_bytes, upto, self._reads))
        self._sent_bytes += size_bytes
        self._gathered, self._gathered_bytes, self._reads = [], 0, deque()
        return batch

    async def take(self, said: Ran | Data) -> None:
        """What a provider says. Raises ProtocolError if it is not what is due."""
        if not self._sent:
            raise ProtocolError("the provider answers what nobody asked")
        sent = self._sent[0]
        self.moved_at = trio.current_time()
        if isinstance(said, Data):
            await self._take_data(sent, said)
            return
        if said.upto != sent.mark.count or sent.reads:
            raise ProtocolError(f"the provider obeyed up to {said.upto}, out of turn")
        self._sent.popleft()
        self._sent_bytes -= sent.size_bytes
        self.obeyed = self.marks[sent.mark.count] = sent.mark
        if len(self.marks) > MAX_MARKS:
            del self.marks[next(iter(self.marks))]
        self.wake()
        # No longer than it can have been: long work has this end take snapshots, which it pays for.
        ran_at, self.ran_at = self.ran_at, self.moved_at
        possible_ns = int((self.ran_at - ran_at) * NS_PER_S)
        ran = replace(said, busy_ns=min(said.busy_ns, possible_ns))
        self.busy_ns += ran.busy_ns
        await self.on_ran(sent.upto, ran)

    async def _take_data(self, sent: _Sent, data: Data) -> None:
        if not sent.reads or sent.reads[0].number != data.number:
            raise ProtocolError("the provider answers what nobody asked")
        reading = sent.reads[0]
        reading.left_bytes -= len(data.data)
        if reading.left_bytes < 0 or data.last != (reading.left_bytes == 0):
            raise ProtocolError("the provider's answer is not as long as what was asked")
        if data.last:
            sent.reads.popleft()
        elif not data.data:
            raise ProtocolError("the provider sends nothing, and more of it")
        await reading.answer.take(data.data, last=data.last)

    def wake(self) -> None:
        """Have whoever waits look again."""
        self._news.set()
        self._news = trio.Event()

    async def wait_obeyed(self) -> None:
        """Return once nothing is under way."""
        while self._sent:
            await self._news.wait()


class Lease(Protocol):
    """Where a session runs. All methods raise what has ended the lease: ProviderError,
    ProtocolError, JobError with the command's number in the lease as ``number``."""

    @property
    def outstanding(self) -> Outstanding:
        """What was sent."""

    @property
    def owed_nusd(self) -> int:
        """What is countersigned."""

    @property
    def is_due(self) -> bool:
        """Whether its time is almost over, and it is to be given back."""

    async def obey(
        self, command: AnyCommand, graph: OpenGraph | None = None, answer: Answer | None = None
    ) -> None:
        """Gather a command. Raises QuoteUsedUp."""

    async def hold(self) -> None:
        """Gather what pays for the time that the lease has stood. Raises QuoteUsedUp."""

    async def flush(self, upto: int) -> None:
        """Send what gathers, with a Hold that is due; ``upto`` is told when it is obeyed."""

    async def close(self) -> None:
        """End it in order: everything is obeyed and paid for."""


class HandedOver(ProviderError):
    """The provider ends the lease, and says why. It has not failed."""


class CommandFault(ProviderError):
    """The provider says that a command of the lease is to blame: its ``number``, and why."""

    def __init__(self, number: int, message: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.number = number


class StuckError(ProviderError):
    """Lease after lease ends before a command of the script, its ``number``, is obeyed."""

    def __init__(self, number: int, leases: int, last: P2PFlopError) -> None:
        super().__init__(
            f"{leases} leases in a row got no further; the last one: {last.message}",
            hint=last.hint or "If it is this line each time, realize what it computes in parts.",
        )
        self.number = number
