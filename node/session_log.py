"""What a session can be built anew from: its last snapshot, and the commands since.

Pure. The buyer's node keeps one for each session. A snapshot says of each buffer where its bytes
are: nowhere (zeros), in a blob that the script itself has loaded, in memory if they are few, or in
a private blob of this node's that was read back from the provider. Only what has changed since the
snapshot before, and is in none of these, is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from p2pflop.job.commands import (
    MAX_WRITE_BYTES,
    Allocate,
    AnyCommand,
    Bind,
    Define,
    Load,
    Place,
    Write,
)
from p2pflop.job.session import Mark, SessionTable
from p2pflop.units import MIB, NS_PER_S

MAX_LOG_COMMANDS: Final = 50_000
MAX_LOG_BYTES: Final = 64 * MIB
MAX_REPLAY_NS: Final = 60 * NS_PER_S
"""Of the provider's work since the snapshot: to do so much again costs a wait."""
COMMAND_BYTES: Final = 64
"""What a command takes beside the data in it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The bytes of a buffer at a snapshot: ``data``, the blob at ``address``, or zeros. ``ours``:
    the blob was put by this node for the snapshot."""

    size_bytes: int
    data: bytes = b""
    address: bytes = b""
    ours: bool = False


@dataclass(slots=True)
class Snapshot:
    """The state before command ``mark.count``. ``kept`` lacks the buffers that ``missing`` names
    with their sizes until they are read."""

    mark: Mark = field(default_factory=Mark)
    kept: dict[int, Kept] = field(default_factory=dict)
    missing: dict[int, int] = field(default_factory=dict)
    bindings: dict[int, tuple[bytes, tuple[Place, ...]]] = field(default_factory=dict)

    @property
    def loaded_bytes(self) -> int:
        """What it moves to a provider that begins with it."""
        return sum(each.size_bytes for each in self.kept.values() if each.address or each.data)

    def commands(self) -> Iterator[AnyCommand]:
        """What builds it anew, in an empty session; graphs are to be defined before their Binds."""
        for buffer, kept in self.kept.items():
            yield Allocate(buffer, kept.size_bytes)
            if kept.address:
                yield Load(buffer, 0, kept.address, kept.size_bytes)
            elif kept.data:
                yield Write(buffer, 0, kept.data)
        for binding, (graph, places) in self.bindings.items():
            yield Bind(binding, graph, places)

    def addresses(self) -> set[bytes]:
        """The blobs that it needs."""
        return {kept.address for kept in self.kept.values() if kept.address}

    def ours(self) -> set[bytes]:
        """Those that were put for it."""
        return {kept.address for kept in self.kept.values() if kept.ours}


@dataclass(slots=True)
class SessionLog:
    """The newest snapshot and all commands since. ``size_bytes`` is what they take."""

    snapshot: Snapshot = field(default_factory=Snapshot)
    size_bytes: int = 0
    busy_ns: int = 0
    _commands: list[AnyCommand] = field(default_factory=list)
    _loads: set[bytes] = field(default_factory=set)
    _begun_with: set[bytes] = field(default_factory=set)

    @property
    def first(self) -> int:
        """The number of the first command in the log."""
        return self.snapshot.mark.count

    @property
    def is_long(self) -> bool:
        """Whether there should be another snapshot."""
        return (
            len(self._commands) >= MAX_LOG_COMMANDS
            or self.size_bytes >= MAX_LOG_BYTES
            or self.busy_ns >= MAX_REPLAY_NS
        )

    def add(self, command: AnyCommand) -> None:
        """The next command of the session."""
        self._commands.append(command)
        if isinstance(command, Load):
            self._loads.add(command.address)
        self.size_bytes += _size_bytes(command)

    def command(self, number: int) -> AnyCommand:
        """Command ``number``, which must be in the log."""
        return self._commands[number - self.first]

    def needs(self, address: bytes) -> bool:
        """Whether snapshot or log need that blob."""
        return address in self._loads or address in self._begun_with

    def begin(
        self,
        table: SessionTable,
        since: int,
        number: int,
        command_at: Callable[[int], AnyCommand],
    ) -> Snapshot:
        """A snapshot before the script's command ``number``, when a lease's ``table`` has all that
        come before it. ``since`` is how many commands that had when the last snapshot was taken, or
        built; ``command_at`` gives the later ones by their numbers there."""
        taken = Snapshot(Mark(number))
        for buffer, size_bytes in table.buffers.items():
            changed = table.changed[buffer]
            if changed < since:
                taken.kept[buffer] = self.snapshot.kept[buffer]
                continue
            kept = _kept(size_bytes, command_at(changed))
            if kept is None:
                taken.missing[buffer] = size_bytes
            else:
                taken.kept[buffer] = kept
        taken.bindings = {
            number: (binding.graph.hash, binding.places)
            for number, binding in table.bindings.items()
        }
        return taken

    def finish(self, taken: Snapshot) -> set[bytes]:
        """From now on begin with ``taken``, of which nothing is missing; the blobs that were put
        for the one before and are needed no more."""
        old = self.snapshot.ours()
        del self._commands[: taken.mark.count - self.first]
        self._loads = {each.address for each in self._commands if isinstance(each, Load)}
        self._begun_with = taken.addresses()
        self.snapshot = taken
        self.size_bytes = sum(map(_size_bytes, self._commands))
        self.busy_ns = 0
        return old - taken.ours()


def is_small(size_bytes: int) -> bool:
    """Whether a snapshot has so many bytes in memory."""
    return size_bytes <= MAX_WRITE_BYTES


def _kept(size_bytes: int, changed: AnyCommand) -> Kept | None:
    """Where the bytes of a buffer are that ``changed`` was the last to change."""
    match changed:
        case Allocate():
            return Kept(size_bytes)
        case Load(_, 0, address, loaded_bytes) if loaded_bytes == size_bytes:
            return Kept(size_bytes, address=address)
        case Write(_, 0, data) if len(data) == size_bytes:
            return Kept(size_bytes, data=data)
    return None


def _size_bytes(command: AnyCommand) -> int:
    match command:
        case Write(_, _, data):
            return COMMAND_BYTES + len(data)
        case Define(graph):
            return COMMAND_BYTES + len(graph)
        case Bind(_, _, places):
            return COMMAND_BYTES * (1 + len(places))
    return COMMAND_BYTES
