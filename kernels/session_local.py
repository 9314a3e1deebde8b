"""A session in this process, without node, sandbox and class: commands in, answers out.

For tests, and for programs of the user's own. It keeps the books as a node does, so that it refuses
the same commands, and lowers what is defined by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from p2pflop.errors import JobError
from p2pflop.job.commands import AnyCommand, Data, Define, Load, Ran
from p2pflop.job.session import OpenGraph, SessionTable, open_graph
from p2pflop.kernels.engine import Engine, Workspace
from p2pflop.kernels.frames import PART_BYTES

Blobs = Callable[[bytes], bytes]


def _no_blob(address: bytes) -> bytes:
    raise JobError(f"the blob {address.hex()} is not at hand")


class LocalSession:
    """``table`` is what the commands so far add up to; ``blobs`` gives the blobs of Loads.

    A command that is refused, or cannot be done, raises JobError and is not counted in the table if
    it was refused; after that the session is of no more use.
    """

    def __init__(self, engine: Engine, memory_bytes: int, blobs: Blobs = _no_blob) -> None:
        self.table = SessionTable(memory_bytes)
        self._engine = engine
        self._blobs = blobs
        self._workspace: Workspace = engine.workspace()
        self._defined: set[bytes] = set()

    def obey(self, commands: Iterable[AnyCommand]) -> Iterator[Data | Ran]:
        """Obey commands: Data for each Read among them, then one Ran for all. Consume it to the
        end. Raises JobError."""
        start_ns, space = time.monotonic_ns(), self._workspace
        before = space.kernels, space.flop, space.touched_bytes
        for command in commands:
            number = self.table.count
            for check in self.table.checks(command):
                space.obey(check)
            graph = open_graph(command.graph) if isinstance(command, Define) else None
            self.table.apply(command, graph)
            if graph is not None:
                self._define(graph)
            elif isinstance(command, Load):
                self._load(command)
            else:
                answer = space.obey(command)
                if answer is not None:
                    yield from data_of(number, answer)
        after = space.kernels, space.flop, space.touched_bytes
        kernels, flop, touched_bytes = (new - old for new, old in zip(after, before, strict=True))
        busy_ns = time.monotonic_ns() - start_ns
        yield Ran(self.table.count, kernels, flop, touched_bytes, busy_ns)

    def _define(self, graph: OpenGraph) -> None:
        if graph.hash in self._defined:
            return
        plan = self._engine.lower(graph.encoded, lambda _done, _total: None)
        self._workspace.define(graph.hash, plan)
        self._defined.add(graph.hash)

    def _load(self, load: Load) -> None:
        data = self._blobs(load.address)
        if len(data) != load.size_bytes:
            raise JobError(f"a blob of {len(data)} bytes, where {load.size_bytes} are loaded")
        self._workspace.put(load.buffer, load.offset_bytes, data)


def data_of(number: int, answer: memoryview) -> Iterator[Data]:
    """The answer to command ``number`` in pieces of at most ``PART_BYTES``; at least one."""
    starts = range(0, len(answer), PART_BYTES) or range(1)
    for start in starts:
        piece = bytes(answer[start : start + PART_BYTES])
        yield Data(number, piece, start == starts[-1])
