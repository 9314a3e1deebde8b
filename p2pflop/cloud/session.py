"""The script's end of a session: commands numbered, gathered, sent ahead; answers taken.

Theory of operation. A command is put into a queue and numbered by its place in it. The queue goes
out as a batch when it is large, when a run follows a pause, or when an answer is needed. Whatever
the node has said is read at the same moments, without waiting; only a read-back waits, and a
window that is full. There is no thread, so nothing happens between two operations of the script.

Python may collect a buffer between any two lines of this, which gives a ``Free``: it joins the
queue just before the next command, so that it takes nobody's number and sends nothing.

Threads share it: whoever calls it has ``process.LOCK``.

Ctrl-C can strike in any wait: an answer that nobody waits for any more is dropped when it comes.
After ``Failed`` every operation raises the same error, with the lines of the program that gave the
command that is to blame.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn, cast

from p2pflop.cloud.link import Link, Uninterrupted
from p2pflop.cloud.settings import CloudSettings
from p2pflop.cloud.stacks import Stack, describe, user_stack
from p2pflop.errors import ConfigError, JobError, P2PFlopError, ProtocolError, ProviderError
from p2pflop.job.commands import (
    NOBODY,
    AnyCommand,
    Batch,
    Bind,
    Close,
    Closed,
    Data,
    Define,
    Failed,
    Frame,
    Free,
    Leased,
    NodeFrame,
    Note,
    Open,
    Ran,
    Read,
    Write,
    decode_frame,
    encode_frame,
)
from p2pflop.kernels.classes import assignments
from p2pflop.units import (
    FLOP_PER_PFLOP,
    NS_PER_S,
    format_bytes,
    format_flop,
    format_usd,
)

BATCH_COMMANDS: Final = 512
BATCH_BYTES: Final = 32 * 1024
GATHER_S: Final = 0.001
"""How long commands are gathered: a run that comes later than that after the last batch goes at
once, so that nobody waits while the script thinks."""
CLOSE_S: Final = 10.0
"""How long the end of a script waits for the last words of its session."""
VERSION: Final = 1
MAX_NAME_CHARS: Final = 80
_COMMAND_BYTES: Final = 24
_PLACE_BYTES: Final = 12
_Wanted = dict[int, bytearray]
_NODE_FRAME = cast(type[Frame], NodeFrame)


@dataclass(slots=True)
class Window:
    """What may be under way, and what is: bytes of each batch that no ``Ran`` has covered."""

    commands: int = BATCH_COMMANDS
    size_bytes: int = BATCH_BYTES
    covered: int = 0
    sent_bytes: int = 0
    batches: deque[tuple[int, int]] = field(default_factory=deque)

    def sent(self, upto: int, size_bytes: int) -> None:
        """A batch that ends before ``upto`` was sent."""
        self.batches.append((upto, size_bytes))
        self.sent_bytes += size_bytes

    def ran(self, upto: int) -> None:
        """All before ``upto`` are obeyed."""
        self.covered = max(self.covered, upto)
        while self.batches and self.batches[0][0] <= upto:
            self.sent_bytes -= self.batches.popleft()[1]

    def has_room(self, upto: int, size_bytes: int) -> bool:
        """Whether commands before ``upto``, of that size, may be sent now. The first always may."""
        if not self.batches:
            return True
        is_near = upto - self.covered <= self.commands
        return is_near and self.sent_bytes + size_bytes <= self.size_bytes


class ScriptSession:
    """One session, from ``Open`` to ``Closed``. ``say`` gets lines for the person, ``on_ran`` each
    ``Ran``. Raises what ``Failed`` tells, or NodeUnreachableError, from any method."""

    def __init__(
        self,
        link: Link,
        settings: CloudSettings,
        say: Callable[[str], None],
        on_ran: Callable[[Ran], None],
        *,
        verbose: bool = False,
    ) -> None:
        self._link = link
        self._settings = settings
        self._say = say
        self._on_ran = on_ran
        self._verbose = verbose
        self._pid = os.getpid()
        self._queue: list[AnyCommand] = []
        self._freed: list[AnyCommand] = []
        self._queued_bytes = 0
        self._first = 0
        self._flushed_s = 0.0
        self._window = Window()
        self._stacks: deque[tuple[int, Stack]] = deque()
        self._wanted: _Wanted = {}
        self._answered: set[int] = set()
        self._failure: P2PFlopError | None = None
        self.leased: Leased | None = None
        self.closed: Closed | None = None
        self.sent_bytes = 0

    @property
    def count(self) -> int:
        """Commands given so far."""
        return self._first + len(self._queue)

    @property
    def is_over(self) -> bool:
        """Whether it has failed or is closed."""
        return self._failure is not None or self.closed is not None

    def open(self) -> None:
        """Ask for a lease, and wait for it."""
        settings = self._settings
        self._send(
            Open(
                VERSION,
                settings.class_name,
                settings.memory_bytes,
                settings.max_nusd,
                settings.wait_s,
                settings.fallback,
                self._verbose,
                script_name(),
            )
        )
        while self.leased is None:
            self._listen(None)

    def give(self, command: AnyCommand) -> None:
        """Put a command into the queue."""
        self._check()
        if isinstance(command, Free):
            self._freed.append(command)
            return
        self._queue_freed()
        self._put(command)

    def _put(self, command: AnyCommand) -> None:
        self._queued_bytes += _size(command)
        self._queue.append(command)
        if self._queued_bytes >= BATCH_BYTES or len(self._queue) >= BATCH_COMMANDS:
            self.flush()

    def _queue_freed(self) -> None:
        freed, self._freed = self._freed, []
        self._queue += freed
        self._queued_bytes += _COMMAND_BYTES * len(freed)

    def run(self, command: AnyCommand, *, wait: bool = False) -> None:
        """``give`` a command that computes. ``wait`` until it has."""
        stack = user_stack()
        self._check()
        self._queue_freed()
        self._stacks.append((self.count, stack))
        self._put(command)
        if wait or self._settings.sync:
            self.synchronize()
        elif time.monotonic() - self._flushed_s > GATHER_S:
            self.flush()

    def read(self, command: Read) -> bytearray:
        """Ask for bytes, and wait for them."""
        stack = user_stack()
        self._check()
        self._queue_freed()
        number = self.count
        self._wanted[number] = bytearray()
        try:
            self._stacks.append((number, stack))
            self._put(command)
            self.flush()
            while number not in self._answered:
                self._listen(None)
            data = self._wanted[number]
        finally:
            self._wanted.pop(number, None)
            self._answered.discard(number)
        if len(data) != command.size_bytes:
            raise ProtocolError(f"the node sent {len(data)} of {command.size_bytes} bytes")
        return data

    def synchronize(self) -> None:
        """Wait until all commands are obeyed."""
        self.flush()
        while self._window.covered < self._first:
            self._listen(None)

    def flush(self) -> None:
        """Send what is queued, as far as the window goes; wait for it to open if need be."""
        self._check()
        self._queue_freed()
        while self._queue:
            while not self._send_batch():
                self._listen(None)
        self._flushed_s = time.monotonic()
        self._listen(0)

    def _send_batch(self) -> bool:
        """Send the next commands, if there is room for them."""
        batch = self._queue[:BATCH_COMMANDS]
        size_bytes = sum(_size(command) for command in batch)
        upto = self._first + len(batch)
        if not self._window.has_room(upto, size_bytes):
            return False
        with Uninterrupted():
            self._send(Batch(self._first, tuple(batch)))
            self._window.sent(upto, size_bytes)
            self._first = upto
            del self._queue[: len(batch)]
            self._queued_bytes = sum(_size(command) for command in self._queue)
        return True

    def close(self) -> Closed | None:
        """Say farewell; None if the node does not answer in time.

        What is queued is sent as far as there is room: nobody will see what it computes, only
        whether it fails.
        """
        if self._pid != os.getpid():
            return None
        if not self.is_over:
            while self._queue and self._send_batch():
                pass
            self._send(Close())
        deadline_s = time.monotonic() + CLOSE_S
        while self.closed is None and (left_s := deadline_s - time.monotonic()) > 0:
            self._hear(left_s)
        self._link.close()
        return self.closed

    @property
    def failure(self) -> P2PFlopError | None:
        """What ended it, if something did."""
        return self._failure

    def leave(self) -> None:
        """In a forked child: close its end of what is the parent's."""
        self._link.leave()

    def _send(self, frame: Open | Batch | Close) -> None:
        encoded = encode_frame(frame)
        self.sent_bytes += len(encoded)
        self._link.send(encoded)

    def _listen(self, wait_s: float | None) -> None:
        self._hear(wait_s)
        self._check()

    def _hear(self, wait_s: float | None) -> None:
        try:
            for frame in self._link.receive(wait_s):
                self._take(decode_frame(_NODE_FRAME, frame))
        except P2PFlopError as error:
            self._failure = self._failure or error
            raise

    def _take(self, frame: Frame) -> None:
        match frame:
            case Ran(upto):
                self._window.ran(upto)
                while self._stacks and self._stacks[0][0] < upto:
                    self._stacks.popleft()
                self._on_ran(frame)
            case Data(number, data, last):
                if number in self._wanted:
                    self._wanted[number] += data
                    if last:
                        self._answered.add(number)
            case Note(text):
                self._say(text)
            case Leased():
                self._take_lease(frame)
            case Failed():
                self._failure = self._failure or self._fault(frame)
            case Closed():
                self.closed = frame

    def _take_lease(self, leased: Leased) -> None:
        self._window.commands = leased.window_commands
        self._window.size_bytes = leased.window_bytes
        if self.leased is None:
            self._say(opening_line(leased))
            if self._settings.debug:
                self._say(equal_line(leased))
        self.leased = leased

    def _fault(self, failed: Failed) -> P2PFlopError:
        kind = JobError if failed.job else ProviderError
        error = kind(failed.text, hint=failed.hint)
        if failed.number != NOBODY and self._stacks:
            # What allocates, defines and binds comes before the run that needs it.
            last = self._stacks[-1]
            _, stack = next((s for s in self._stacks if s[0] >= failed.number), last)
            error.add_note(f"It was asked for here:\n{describe(stack)}")
        return error

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise JobError(
                "a forked process cannot use the CLOUD session of its parent",
                hint="Start workers with multiprocessing's 'spawn', or use tensors in one process.",
            )
        if self._failure is not None:
            self._raise(self._failure)
        if self.closed is not None:
            raise ProviderError("the CLOUD session is over", hint="Start the script again.")

    @staticmethod
    def _raise(failure: P2PFlopError) -> NoReturn:
        again = type(failure)(failure.message, hint=failure.hint)
        for note in getattr(failure, "__notes__", [])[bool(failure.hint) :]:
            again.add_note(note)
        raise again


def script_name() -> str:
    """What the program is called: the file that python runs, if it is one."""
    path = getattr(sys.modules.get("__main__"), "__file__", None) or ""
    return Path(path).name[:MAX_NAME_CHARS]


def opening_line(leased: Leased) -> str:
    """The line before the first operation."""
    return (
        f"{leased.provider[:12]} computes in {leased.class_name} for "
        f"{format_usd(leased.price_nusd)} a PFLOP, at most {format_usd(leased.cap_nusd)} in all "
        "(CLOUD_MAX_USD)"
    )


def equal_line(leased: Leased) -> str:
    """What to type for equal bytes here."""
    try:
        return f"equal bytes here with {assignments(leased.dev)}"
    except ConfigError as error:
        return f"{leased.class_name} is not to be had here: {error.message}"


def closing_line(closed: Closed) -> str:
    """The line at the end."""
    pflop = closed.flop / FLOP_PER_PFLOP
    speed = closed.flop * NS_PER_S // closed.busy_ns if closed.busy_ns else 0
    return (
        f"{pflop:.3g} PFLOP at {format_flop(speed)}/s, {format_bytes(closed.moved_bytes)} moved, "
        f"{format_usd(closed.cost_nusd)}"
    )


def _size(command: AnyCommand) -> int:
    """About what it takes in a batch."""
    match command:
        case Write(_, _, data):
            return _COMMAND_BYTES + len(data)
        case Define(graph):
            return _COMMAND_BYTES + len(graph)
        case Bind(_, graph, places):
            return _COMMAND_BYTES + len(graph) + _PLACE_BYTES * len(places)
        case _:
            return _COMMAND_BYTES
