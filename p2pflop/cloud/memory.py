"""Numbered buffers and bindings of a session: which there are, and what to say to have one.

Pure bookkeeping over a session: it gives commands and remembers them, so that nothing is said
twice. Bindings are forgotten oldest first, buffers when tinygrad lets go of them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple, Protocol

from p2pflop.job.commands import Allocate, AnyCommand, Bind, Define, Free, Place
from p2pflop.job.session import MAX_BUFFERS

MAX_HELD_BINDINGS: Final = 8192
MAX_HELD_PLACES: Final = 500_000


class Region(NamedTuple):
    """Bytes of a buffer; tinygrad keeps it as the memory of one of its own buffers."""

    buffer: int
    offset_bytes: int
    size_bytes: int


class Taker(Protocol):
    """Takes commands."""

    def give(self, command: AnyCommand) -> None:
        """Take one."""


class SessionMemory:
    """Buffers, graphs and bindings of one session, whose buffers have ``limit_bytes`` in all."""

    def __init__(self, taker: Taker, limit_bytes: int) -> None:
        self._taker = taker
        self._limit_bytes = limit_bytes
        self._sizes: dict[int, int] = {}
        self._free: list[int] = []
        self._next = 0
        self._defined: set[bytes] = set()
        self._bindings: OrderedDict[tuple[bytes, tuple[Place, ...]], int] = OrderedDict()
        self._naming: dict[int, set[tuple[bytes, tuple[Place, ...]]]] = {}
        self._places = 0
        self._spare: list[int] = []
        self._next_binding = 0
        self.held_bytes = 0
        self.epoch = 0
        """Grows whenever a binding is forgotten."""

    def allocate(self, size_bytes: int) -> Region:
        """A new buffer. Raises MemoryError if it goes over the session's limits."""
        if self.held_bytes + size_bytes > self._limit_bytes:
            raise MemoryError(
                f"{self.held_bytes + size_bytes} bytes are over the session's "
                f"{self._limit_bytes}: set CLOUD_MEMORY to more"
            )
        if len(self._sizes) >= MAX_BUFFERS:
            raise MemoryError(f"a session has {MAX_BUFFERS} buffers at most")
        if self._free:
            number = self._free.pop()
        else:
            number, self._next = self._next, self._next + 1
        self._taker.give(Allocate(number, size_bytes))
        self._sizes[number] = size_bytes
        self.held_bytes += size_bytes
        return Region(number, 0, size_bytes)

    def free(self, region: Region) -> None:
        """Let a buffer go, with the bindings that name it."""
        size_bytes = self._sizes.pop(region.buffer, None)
        if size_bytes is None:
            return
        self._taker.give(Free(region.buffer))
        self.held_bytes -= size_bytes
        self._free.append(region.buffer)
        for key in list(self._naming.get(region.buffer, ())):
            self._spare.append(self._forget(key))

    def define(self, graph_hash: bytes, encoded: bytes) -> None:
        """Have a graph over there, once."""
        if graph_hash not in self._defined:
            self._taker.give(Define(encoded))
            self._defined.add(graph_hash)

    def bind(self, graph_hash: bytes, places: tuple[Place, ...]) -> int:
        """The binding of a defined graph to ``places``."""
        key = graph_hash, places
        number = self._bindings.get(key)
        if number is not None:
            self._bindings.move_to_end(key)
            return number
        while self._bindings and (
            len(self._bindings) >= MAX_HELD_BINDINGS or self._places + len(places) > MAX_HELD_PLACES
        ):
            self._spare.append(self._forget(next(iter(self._bindings))))
        if self._spare:
            number = self._spare.pop()
        else:
            number, self._next_binding = self._next_binding, self._next_binding + 1
        self._taker.give(Bind(number, graph_hash, places))
        self._bindings[key] = number
        self._places += len(places)
        for buffer, _ in places:
            self._naming.setdefault(buffer, set()).add(key)
        return number

    def _forget(self, key: tuple[bytes, tuple[Place, ...]]) -> int:
        self.epoch += 1
        number = self._bindings.pop(key)
        self._places -= len(key[1])
        for buffer, _ in key[1]:
            naming = self._naming.get(buffer)
            if naming is not None:
                naming.discard(key)
                if not naming:
                    del self._naming[buffer]
        return number
