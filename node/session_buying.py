"""One session of a script: its log, the leases that it runs on, and what the script is told.

The session outlives its leases. While there is something to do it has one; after ``IDLE_S`` without
a command it takes a snapshot and gives the lease back. When the provider dies, leaves, misbehaves,
or the lease's time, its quote or a limit of its ask is used up, the next one begins with the
snapshot and the log since: equal commands give equal bytes in the class, so the script sees nothing
but a note. A Read that was answered in part is asked again, and what the script has of it already
is left out.

A script that is stopped in the middle of an answer (Ctrl-Z) is not the provider's fault: the rest
of what comes is dropped, the lease given back in order, and once the script reads again the next
lease answers from there.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio
from msgspec.structs import replace

from p2pflop.errors import (
    JobError,
    P2PFlopError,
    ProtocolError,
    ProviderError,
    StoreError,
    first_error,
)
from p2pflop.job.commands import (
    MAX_SCRIPT_TEXT,
    NOBODY,
    AnyCommand,
    Batch,
    Bind,
    Close,
    Closed,
    Data,
    Define,
    Failed,
    Hold,
    Note,
    Open,
    Ran,
    Read,
    Run,
)
from p2pflop.job.session import Mark, SessionTable
from p2pflop.market.limits import Known, Limit
from p2pflop.node.session_lease import CommandFault, Outstanding, QuoteUsedUp, StuckError
from p2pflop.node.session_local import LocalLease
from p2pflop.node.session_log import SessionLog
from p2pflop.node.session_messages import WINDOW_BYTES, WINDOW_COMMANDS
from p2pflop.node.session_purchase import RemoteLease
from p2pflop.node.session_script import Outbox, ScriptLine
from p2pflop.node.session_snapshots import Keeper
from p2pflop.node.session_story import SessionStory
from p2pflop.node.session_work import PLACES_AT_ONCE
from p2pflop.wire import encode

if TYPE_CHECKING:
    from p2pflop.node.session_service import SessionBuyer

IDLE_S: Final = 10.0
FAREWELL_S: Final = 10.0
"""For a lease to end in order after its script has gone."""
MAX_FRUITLESS: Final = 8
"""Leases one after the other that end before anything more is obeyed."""
MAX_PAUSE_S: Final = 8.0
WINDOW_SLACK: Final = 2
"""A script may run ahead of what it was told by so many windows before it is cut off."""

CANCELLED: Final = "the session was cancelled with 'p2pflop cancel'"

AnyLease = RemoteLease | LocalLease

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Totals:
    """Over the leases that are over."""

    flop: int = 0
    moved_bytes: int = 0
    cost_nusd: int = 0
    busy_ns: int = 0


class Session:
    """See the head of this module."""

    def __init__(
        self, buyer: SessionBuyer, session_id: bytes, line: ScriptLine, wish: Open
    ) -> None:
        self.id = session_id
        self.wish = wish
        self.table = SessionTable(wish.memory_bytes)
        self.log = SessionLog()
        self.totals = Totals()
        self.outbox = Outbox(line)
        self.outbox.verbose = wish.verbose
        self.class_id = b""
        self.faulted: dict[bytes, CommandFault] = {}
        self.lease: AnyLease | None = None
        self.provider = ""
        self.is_cancelled = False
        self.ran_to = 0
        self._refusal: P2PFlopError | None = None
        self._buyer = buyer
        self._line = line
        self._next = self._since = 0
        self._base = self._fed = self._refused = Mark()
        self._answered_to = 0
        self._partial_bytes = 0
        self._waiting_bytes: dict[int, int] = {}
        self._places: list[tuple[int, int]] = []
        self._active_at = trio.current_time()
        self._closing = self._gone = self._unread = False
        self._stopped: P2PFlopError | None = None
        self._news = trio.Event()
        self.story = SessionStory(buyer.base.runs, self)

    def refuse(self, why: P2PFlopError) -> None:
        """It is not to begin at all."""
        self._refusal = why

    def stop(self, why: P2PFlopError) -> None:
        """Give the lease back in order, and tell the script."""
        self._stopped, self._gone = why, True
        self._wake()

    def again(self) -> Mark:
        """What a new provider has to do before it is where the script is."""
        table, begun = self.table, self.log.snapshot
        return Mark(
            count=1,
            lowered_nodes=table.lowered_nodes,
            flop=table.flop - begun.mark.flop,
            touched_bytes=table.touched_bytes - begun.mark.touched_bytes,
            moved_bytes=max(0, table.moved_bytes - begun.mark.moved_bytes) + begun.loaded_bytes,
        )

    def known(self) -> Known:
        """What limits of asks are compared with: what a new provider has to do before it gets any
        further than the last one was asked to, graphs that are bound included."""
        fed, refused, begun = self._fed, self._refused, self.log.snapshot
        bound = {each.graph.hash: each.graph.nodes for each in self.table.bindings.values()}
        moved_bytes = max(0, fed.moved_bytes - begun.mark.moved_bytes) + begun.loaded_bytes
        return (
            (Limit.FLOP, max(0, fed.flop - begun.mark.flop) + refused.flop),
            (Limit.MOVED, moved_bytes + refused.moved_bytes),
            (Limit.NODES, max(sum(bound.values()), refused.lowered_nodes)),
        )

    def outstanding(self) -> Outstanding:
        """For the next lease."""
        return Outstanding(SessionTable(self.wish.memory_bytes), self.on_ran, self._wake)

    @property
    def is_gone(self) -> bool:
        """Whether the script is."""
        return self._gone

    @property
    def left_nusd(self) -> int:
        """What it may still cost."""
        return self.wish.cap_nusd - self.spent_nusd

    @property
    def spent_nusd(self) -> int:
        """What is owed for it so far."""
        return self.totals.cost_nusd + (0 if self.lease is None else self.lease.owed_nusd)

    async def run(self) -> None:
        """Serve the script to its end. Never raises but for bugs."""
        failure: P2PFlopError | None = None
        async with trio.open_nursery() as telling:
            telling.start_soon(self._tell)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._hear)
                    nursery.start_soon(self._heed_cancel)
                    await self._run_on_leases()
                    nursery.cancel_scope.cancel()
            except* P2PFlopError as group:
                failure = first_error(group)
            self._say_last(self._stopped or failure)
            self.outbox.close()
            await self.story.end(self._stopped or failure)
            telling.cancel_scope.deadline = trio.current_time() + FAREWELL_S
        await self._buyer.forget(self, self.log.snapshot.ours())

    # The script

    async def _hear(self) -> None:
        while True:
            frame = await self._line.receive()
            match frame:
                case None:
                    self._gone = self._closing = True
                    self._wake()
                    return
                case Batch():
                    await self._take(frame)
                case Close():
                    self._closing = True
                    self._wake()
                case _:
                    raise ProtocolError("a script does not send that")

    async def _heed_cancel(self) -> None:
        """Its user has had enough of it: what was obeyed is paid, and that is all."""
        await self.story.run.cancel_requested.wait()
        self.is_cancelled = True
        self.stop(ProviderError(CANCELLED, hint="Start the script again."))

    async def _take(self, batch: Batch) -> None:
        if batch.first != self.table.count:
            raise ProtocolError(f"commands from {batch.first}, where {self.table.count} is due")
        while self.log.is_long and self.lease is not None:
            await self._news.wait()
        waiting = self.table.count - self.ran_to
        if (
            waiting > WINDOW_SLACK * WINDOW_COMMANDS
            or sum(self._waiting_bytes.values()) > WINDOW_SLACK * WINDOW_BYTES
        ):
            raise ProtocolError("the script sends more than the window lets through")
        places = 0
        for command in batch.commands:
            graph = None
            places += self.table.places(command)
            if places > PLACES_AT_ONCE:
                places = 0
                await trio.lowlevel.checkpoint()
            if isinstance(command, Hold):
                raise ProtocolError("a script does not pay for the time that its lease stands")
            if isinstance(command, Define):
                graph = await self._buyer.open_graph(command.graph)
            try:
                self.table.apply(command, graph)
            except JobError as error:
                raise CommandFault(self.table.count, error.message, error.hint) from error
            self.log.add(command)
        self._waiting_bytes[self.table.count] = len(encode(batch))
        self._active_at = trio.current_time()
        self._wake()

    async def _tell(self) -> None:
        try:
            await self.outbox.run()
        except P2PFlopError as error:
            _log.debug("a script is gone: %s", error)
            self.outbox.close()
            self._gone = self._closing = True
            self._wake()

    def _say_last(self, failure: P2PFlopError | None) -> None:
        if failure is not None:
            number = failure.number if isinstance(failure, CommandFault | StuckError) else NOBODY
            is_job = isinstance(failure, JobError | CommandFault)
            text, hint = failure.message[:MAX_SCRIPT_TEXT], failure.hint[:MAX_SCRIPT_TEXT]
            self.outbox.put(Failed(number, is_job, text, hint))
        totals = self.totals
        self.outbox.put(Closed(totals.flop, totals.moved_bytes, totals.cost_nusd, totals.busy_ns))

    def note(self, text: str) -> None:
        """Tell the person something."""
        self.outbox.put(Note(text[:MAX_SCRIPT_TEXT]))

    # Leases

    async def _run_on_leases(self) -> None:
        """Raises what the script is to be told."""
        await self.story.keep()
        if self._refusal is not None:
            raise self._refusal
        first, fruitless = True, 0
        while first or await self._has_work():
            first, before = False, self.ran_to
            lease = await self._buyer.lease(self)
            failure = await self._use(lease)
            is_stuck = self.ran_to == before and (failure is not None or self._waits)
            fruitless = fruitless + 1 if is_stuck else 0
            if fruitless > MAX_FRUITLESS:
                raise StuckError(self.ran_to, fruitless, failure or _used_up())
            if fruitless > 1:
                await trio.sleep(min(MAX_PAUSE_S, 2.0 ** (fruitless - 2)))
            if failure is None:
                continue
            _log.info("session %s: %s", self.id.hex()[:12], failure)
            if isinstance(failure, StoreError):
                raise failure
            if isinstance(failure, CommandFault):
                failure = self._blame(lease, failure)
            await self._buyer.lost(self, lease, failure)

    async def _has_work(self) -> bool:
        """Wait for a command; False once the script is done."""
        if self._unread:
            await self.outbox.wait_room()
            self._unread = False
        while self._answered_up() and not self._closing and not self._gone:
            await self._news.wait()
        return not self._gone and not self._answered_up()

    @property
    def _waits(self) -> bool:
        """Whether there is something to do, and somebody to have it."""
        return not self._answered_up() and not self._unread and not self._gone

    def _answered_up(self) -> bool:
        return self.ran_to == self.table.count

    def _blame(self, lease: AnyLease, fault: CommandFault) -> CommandFault:
        """A fault that another provider has found too, or that nobody else can check, is the
        script's. Raises it then."""
        number = self._ours(fault.number)
        found = CommandFault(number, fault.message, fault.hint)
        if not isinstance(lease, RemoteLease) or self._buyer.is_own(lease.account):
            raise found
        if self.faulted and lease.account not in self.faulted:
            raise found
        self.faulted[lease.account] = found
        return found

    async def _use(self, lease: AnyLease) -> P2PFlopError | None:
        """Run on ``lease`` until it is given back (None) or lost."""
        self.lease, self._places, self.log.busy_ns = lease, [], 0
        self._refused = Mark()
        failure: P2PFlopError | None = None
        try:
            async with lease.live():
                await self._feed(lease)
        except* P2PFlopError as group:
            failure = first_error(group)
        finally:
            table = lease.outstanding.table
            self.totals.flop += table.flop
            self.totals.moved_bytes += table.moved_bytes
            self.totals.cost_nusd += lease.owed_nusd
            self.lease = None
            self._wake()
        return failure

    async def _feed(self, lease: AnyLease) -> None:
        try:
            await self.story.keep()
            await self._restore(lease)
            try:
                await self._feed_on(lease)
            finally:
                self._fed = self._mark_of(lease.outstanding.table, self._next)
        except QuoteUsedUp as used_up:
            self._refused = used_up.adds
            await lease.flush(self._next)
            await self._give_back(lease)

    async def _feed_on(self, lease: AnyLease) -> None:
        """From where the script is to the end of the lease in order. Raises QuoteUsedUp."""
        while True:
            if self._gone:
                with trio.move_on_after(FAREWELL_S):
                    await lease.close()
                return
            if self._unread:
                await lease.close()
                return
            await lease.hold()
            await lease.flush(self._next)
            if lease.is_due:
                await self._give_back(lease)
                return
            if self._next < self.table.count:
                await self._feed_all(lease)
            elif self.log.is_long:
                await self._snapshot(lease)
            elif self._closing:
                await lease.close()
                return
            elif not await self._await_news(lease):
                await self._give_back(lease)
                await self.story.became("idle")
                return

    async def _await_news(self, lease: AnyLease) -> bool:
        """Whether there is some within the time that a lease may idle."""
        news = self._news
        if isinstance(lease, LocalLease) or not self._answered_up():
            await news.wait()
            return True
        with trio.move_on_after(max(0, self._active_at + IDLE_S - trio.current_time())):
            await news.wait()
            return True
        return False

    async def _give_back(self, lease: AnyLease) -> None:
        try:
            await self._snapshot(lease)
        except QuoteUsedUp:
            await lease.flush(self._next)  # the snapshot before this one, and the log, do as well
        await lease.close()

    async def _restore(self, lease: AnyLease) -> None:
        """Build what the snapshot says, and begin the log."""
        for command in self.log.snapshot.commands():
            await self._obey(lease, command)
            if lease.outstanding.is_full:
                await lease.flush(0)
        await lease.flush(0)
        table = lease.outstanding.table
        self._next, self._since, self._base = self.log.first, table.count, table.mark()

    async def _feed_all(self, lease: AnyLease) -> None:
        """All that there is, in batches; what was obeyed before ends with a batch."""
        while self._next < self.table.count and not self._gone and not self._unread:
            if lease.is_due:
                return
            number, command = self._next, self.log.command(self._next)
            if not isinstance(command, Read) or number >= self._answered_to:
                theirs = lease.outstanding.table.count
                if not self._places or theirs - number != self._shift:
                    self._places.append((theirs, number))
                await self._obey(lease, command, number)
            self._next += 1
            tells = self._next == self.ran_to or (self.wish.verbose and isinstance(command, Run))
            if lease.outstanding.is_full or tells:
                await lease.flush(self._next)
        await lease.flush(self._next)

    def _ours(self, theirs: int) -> int:
        """The script's number of a command of the lease; NOBODY if the script did not send it."""
        at = bisect_right(self._places, (theirs, NOBODY)) - 1
        if at < 0:
            return NOBODY
        first_theirs, first_ours = self._places[at]
        return min(first_ours + theirs - first_theirs, self.table.count)

    def _command_at(self, theirs: int) -> AnyCommand:
        return self.log.command(self._ours(theirs))

    @property
    def _shift(self) -> int:
        theirs, ours = self._places[-1]
        return theirs - ours

    async def _obey(self, lease: AnyLease, command: AnyCommand, number: int = -1) -> None:
        table = lease.outstanding.table
        if isinstance(command, Bind) and command.graph not in table.graphs:
            graph = self.table.graphs[command.graph]
            await lease.obey(Define(graph.encoded), graph)
        if isinstance(command, Define):
            await lease.obey(command, await self._buyer.open_graph(command.graph))
        elif isinstance(command, Read):
            await lease.obey(command, answer=_ScriptRead(self, number))
        else:
            await lease.obey(command)

    async def _snapshot(self, lease: AnyLease) -> None:
        """Have all that has changed since the last one in the store. Raises QuoteUsedUp."""
        table, number = lease.outstanding.table, self._next
        taken = self.log.begin(table, self._since, number, self._command_at)
        taken.mark = self._mark_of(table, number)
        owner = self._buyer.base.identity.account.public_key
        keepers: dict[int, Keeper] = {}
        async with AsyncExitStack() as stack:
            for buffer, size_bytes in taken.missing.items():
                keepers[buffer] = Keeper(self._buyer.base.store, size_bytes, owner, stack)
                await lease.obey(Read(buffer, 0, size_bytes), answer=keepers[buffer])
                if lease.outstanding.is_full:
                    await lease.flush(number)
            await lease.flush(number)
            await lease.outstanding.wait_obeyed()
        for buffer, keeper in keepers.items():
            if keeper.kept is None:
                raise RuntimeError("a Read of a snapshot was obeyed without an answer")
            taken.kept[buffer] = keeper.kept
        taken.missing = {}
        await self._buyer.blobs.hold(self.id, taken.ours())
        if self._unread:  # a Read that the log has is yet to be answered
            await self._buyer.forget(self, taken.ours() - self.log.snapshot.ours())
            return
        await self._buyer.forget(self, self.log.finish(taken))
        self._since, self._base = table.count, table.mark()
        self._wake()

    def _mark_of(self, table: SessionTable, number: int) -> Mark:
        """What the script's commands before ``number``, the last that ``table`` has, add up to:
        near enough, since a lease leaves out some Reads and adds others."""
        begun, base = self.log.snapshot.mark, self._base
        return Mark(
            number,
            self.table.chain,
            begun.flop + table.flop - base.flop,
            begun.touched_bytes + table.touched_bytes - base.touched_bytes,
            begun.moved_bytes + table.moved_bytes - base.moved_bytes,
        )

    async def on_ran(self, upto: int, ran: Ran) -> None:
        """A batch of the lease is obeyed: all commands before ``upto`` are."""
        self.totals.busy_ns += ran.busy_ns
        self.log.busy_ns += ran.busy_ns
        if upto <= self.ran_to or self._unread:
            return
        self.ran_to, self._active_at = upto, trio.current_time()
        for count in [count for count in self._waiting_bytes if count <= upto]:
            del self._waiting_bytes[count]
        self.outbox.put(replace(ran, upto=upto))
        self._wake()

    async def answer(self, number: int, at: int, data: bytes, *, last: bool) -> None:
        """``data`` is the answer to Read ``number`` from byte ``at`` on; the script gets what it
        lacks of it."""
        if number < self._answered_to or self._unread:
            return
        fresh = data[max(0, self._partial_bytes - at) :]
        if (fresh or last) and not await self.outbox.put_data(Data(number, fresh, last)):
            self._unread = True
            self._wake()
            return
        self._partial_bytes = max(self._partial_bytes, at + len(data))
        if last:
            self._answered_to, self._partial_bytes = number + 1, 0

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()


def _used_up() -> ProviderError:
    return ProviderError("its time, its quote or a limit of its ask was used up")


class _ScriptRead:
    """``session_lease.Answer`` for the script."""

    def __init__(self, session: Session, number: int) -> None:
        self._session = session
        self._number = number
        self._got_bytes = 0

    async def take(self, data: bytes, *, last: bool) -> None:
        """See Answer."""
        at, self._got_bytes = self._got_bytes, self._got_bytes + len(data)
        await self._session.answer(self._number, at, data, last=last)
