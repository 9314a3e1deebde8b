"""What a session's commands add up to: which buffers there are, and what it costs so far.

Buyer and provider each keep a ``SessionTable`` of the same commands, so both know the bill, and
refuse the same command for the same reason before it reaches a worker. The chain of hashes over
the log stands in a session's receipts where a job's have state roots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from p2pflop.errors import JobError
from p2pflop.ids import HASH_BYTES, content_hash
from p2pflop.job.bools import BoolPlaces
from p2pflop.job.commands import (
    Allocate,
    AnyCommand,
    Bind,
    Check,
    Copy,
    Define,
    Free,
    Hold,
    Load,
    Place,
    Read,
    Run,
    Write,
)
from p2pflop.job.graph import Dtype, Graph, Op, decode_graph, graph_hash
from p2pflop.job.limits import DEFAULT_LIMITS, Limits
from p2pflop.job.meter import MAX_LINE_VALUE, Cost, meter
from p2pflop.job.shapes import stored_bytes
from p2pflop.job.symbolic import (
    CheckedSymbolic,
    Range,
    check_values,
    cost_at,
    decode_symbolic,
    is_symbolic,
    validate_symbolic,
)
from p2pflop.job.validate import Checked, Refusal, validate
from p2pflop.wire import encode

MAX_BUFFERS: Final = 65_536
MAX_BINDINGS: Final = 16_384
MAX_PLACES: Final = 1_000_000
"""Of all bindings at once."""
MAX_SESSION_GRAPHS: Final = 4_096
MAX_SESSION_GRAPH_BYTES: Final = 256 * 1024 * 1024


CheckedT = TypeVar("CheckedT", Checked, CheckedSymbolic)


@dataclass(frozen=True, slots=True)
class OpenGraph:
    """A graph that may be defined: checked, metered, and what its params take and are.

    With Variables it has their ``ranges``; ``cost`` is with all at their highest, ``low`` at their
    lowest values.
    """

    hash: bytes
    encoded: bytes
    nodes: int
    cost: Cost
    sizes_bytes: tuple[int, ...]
    written: tuple[bool, ...]
    bools: tuple[bool, ...]
    has_bools: bool
    reads: tuple[bool, ...]
    ranges: tuple[Range, ...] = ()
    low: Cost | None = None

    def cost_of(self, values: Sequence[int]) -> Cost:
        """What a run costs with a value for each Variable. Raises JobError for other values."""
        check_values(self.ranges, values)
        return self.cost if self.low is None else cost_at(self.low, self.cost, self.ranges, values)


def open_graph(data: bytes, limits: Limits = DEFAULT_LIMITS) -> OpenGraph:
    """Decode, check and meter a session's graph. Takes a second for the largest, so not on an
    event loop. Raises ProtocolError if it is no graph, JobError if it is refused."""
    ranges: tuple[Range, ...] = ()
    low: Cost | None = None
    if is_symbolic(data):
        symbolic = decode_symbolic(data, limits)
        both = _accepted(validate_symbolic(symbolic, limits))
        checked, ranges, low = both.high, symbolic.ranges, meter(both.low)
    else:
        checked = _accepted(validate(decode_graph(data, limits), limits, assigns=True))
    graph = checked.graph
    if any(output.slot is None for output in graph.outputs):
        raise JobError("a session's graph has no fresh outputs")
    if any(param.slot != place for place, param in enumerate(graph.params)):
        raise JobError("the params of a session's graph are not in slots 0, 1, ...")
    cost = meter(checked)
    if max(cost.flop, cost.touched_bytes) > MAX_LINE_VALUE:
        raise JobError(f"a run of the graph costs {cost.flop} FLOP, more than can be billed")
    bools = tuple(param.dtype == Dtype.BOOL for param in graph.params)
    return OpenGraph(
        hash=graph_hash(data),
        encoded=data,
        nodes=len(graph.nodes),
        cost=cost,
        sizes_bytes=tuple(stored_bytes(param.dtype, param.shape) for param in graph.params),
        written=_written(graph),
        bools=bools,
        has_bools=any(bools),
        reads=_read(graph),
        ranges=ranges,
        low=low,
    )


def _accepted(found: CheckedT | Refusal) -> CheckedT:
    if isinstance(found, Refusal):
        raise JobError(f"the graph is not valid: {found.reason}")
    return found


def _read(graph: Graph) -> tuple[bool, ...]:
    """Of each param, whether what is in it matters; not of one that is but assigned to in whole."""
    used = {output.node for output in graph.outputs}
    for node in graph.nodes:
        is_whole = node.op is Op.ASSIGN and node.refs[0] == node.refs[1]
        used.update(node.refs[2:] if is_whole else node.refs)
    slots = {graph.nodes[ref].attrs[0] for ref in used if graph.nodes[ref].op is Op.PARAM}
    return tuple(param.slot in slots for param in graph.params)


def _written(graph: Graph) -> tuple[bool, ...]:
    targets = {output.slot for output in graph.outputs}
    return tuple(param.slot in targets for param in graph.params)


@dataclass(frozen=True, slots=True)
class Binding:
    """A graph with its params at places."""

    graph: OpenGraph
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """What the first ``count`` commands add up to, and the hash chain over them.

    ``lowered_nodes`` are those of all graphs that are defined, ``held_seconds`` what Holds say.
    """

    count: int = 0
    chain: bytes = bytes(HASH_BYTES)
    flop: int = 0
    touched_bytes: int = 0
    moved_bytes: int = 0
    lowered_nodes: int = 0
    held_seconds: int = 0

    def since(self, earlier: Mark) -> Mark:
        """What the commands after ``earlier`` add up to."""
        return Mark(
            self.count - earlier.count,
            self.chain,
            self.flop - earlier.flop,
            self.touched_bytes - earlier.touched_bytes,
            self.moved_bytes - earlier.moved_bytes,
            self.lowered_nodes - earlier.lowered_nodes,
            self.held_seconds - earlier.held_seconds,
        )


@dataclass(slots=True)
class SessionTable:
    """The commands so far. ``apply`` takes one more, or raises JobError and changes nothing.

    ``memory_bytes`` bounds the buffers, not what a graph takes while it runs.
    """

    memory_bytes: int
    count: int = 0
    chain: bytes = bytes(HASH_BYTES)
    flop: int = 0
    touched_bytes: int = 0
    moved_bytes: int = 0
    lowered_nodes: int = 0
    held_seconds: int = 0
    held_bytes: int = 0
    buffers: dict[int, int] = field(default_factory=dict)
    changed: dict[int, int] = field(default_factory=dict)
    graphs: dict[bytes, OpenGraph] = field(default_factory=dict)
    bindings: dict[int, Binding] = field(default_factory=dict)
    _bools: BoolPlaces = field(default_factory=BoolPlaces)
    _naming: dict[int, set[int]] = field(default_factory=dict)
    _graph_bytes: int = 0
    _places: int = 0

    def apply(self, command: AnyCommand, graph: OpenGraph | None = None) -> None:
        """Take a command; with a ``Define`` the graph in it, opened. Raises JobError."""
        match command:
            case Run(binding, values):
                self._run(binding, values)
            case Write() | Load():
                self._fill(command)
            case Read(buffer, offset_bytes, size_bytes):
                self._check(buffer, offset_bytes, size_bytes)
                self.moved_bytes += size_bytes
            case Copy():
                self._copy(command)
            case Allocate(buffer, size_bytes):
                self._allocate(buffer, size_bytes)
            case Free(buffer):
                self._free(buffer)
            case Bind(binding, name, places):
                self._bind(binding, name, places)
            case Define():
                self._define(command, graph)
            case Hold(seconds):
                self.held_seconds += seconds
        self.count += 1
        self.chain = content_hash(self.chain + encode(command))

    def checks(self, command: AnyCommand) -> tuple[Check, ...]:
        """What a worker has to look at before it obeys ``command``, which is yet to be applied."""
        binding = self.bindings.get(command.binding) if isinstance(command, Run) else None
        return () if binding is None else self._bools.due(binding)

    def places(self, command: AnyCommand) -> int:
        """How many places have to be looked at to apply ``command``."""
        binding = self.bindings.get(command.binding) if isinstance(command, Run) else None
        return 1 if binding is None else len(binding.places)

    def mark(self) -> Mark:
        """What the commands so far add up to."""
        return Mark(
            self.count,
            self.chain,
            self.flop,
            self.touched_bytes,
            self.moved_bytes,
            self.lowered_nodes,
            self.held_seconds,
        )

    def foresee(self, command: AnyCommand, graph: OpenGraph | None = None) -> Mark:
        """What the commands would add up to with one more, if it is not refused; its place in the
        chain left out."""
        flop = touched_bytes = moved_bytes = lowered_nodes = held_seconds = 0
        match command:
            case Run(binding, values) if binding in self.bindings:
                cost = self.bindings[binding].graph.cost_of(values)
                looked_bytes = sum(check.size_bytes for check in self.checks(command))
                flop, touched_bytes = cost.flop, cost.touched_bytes + looked_bytes
            case Write(_, _, data):
                moved_bytes = len(data)
            case Load() | Read():
                moved_bytes = command.size_bytes
            case Copy():
                touched_bytes = 2 * command.size_bytes
            case Define() if graph is not None and graph.hash not in self.graphs:
                lowered_nodes = graph.nodes
            case Hold():
                held_seconds = command.seconds
        return Mark(
            self.count + 1,
            self.chain,
            self.flop + flop,
            self.touched_bytes + touched_bytes,
            self.moved_bytes + moved_bytes,
            self.lowered_nodes + lowered_nodes,
            self.held_seconds + held_seconds,
        )

    def _allocate(self, buffer: int, size_bytes: int) -> None:
        if buffer in self.buffers:
            raise JobError(f"buffer {buffer} exists")
        if len(self.buffers) >= MAX_BUFFERS:
            raise JobError(f"over {MAX_BUFFERS} buffers")
        if self.held_bytes + size_bytes > self.memory_bytes:
            raise JobError(
                f"{self.held_bytes + size_bytes} bytes are over the session's {self.memory_bytes}"
            )
        self.buffers[buffer] = size_bytes
        self.held_bytes += size_bytes
        self.changed[buffer] = self.count

    def _free(self, buffer: int) -> None:
        self.held_bytes -= self._size(buffer)
        del self.buffers[buffer], self.changed[buffer]
        self._bools.changed(buffer)
        for binding in self._naming.pop(buffer, set()):
            self._unbind(binding)

    def _define(self, command: Define, graph: OpenGraph | None) -> None:
        if graph is None or graph.encoded != command.graph:
            raise ValueError("a Define is applied with its graph, opened")
        if graph.hash in self.graphs:
            return
        if len(self.graphs) >= MAX_SESSION_GRAPHS:
            raise JobError(f"over {MAX_SESSION_GRAPHS} graphs")
        if self._graph_bytes + len(command.graph) > MAX_SESSION_GRAPH_BYTES:
            raise JobError(f"graphs of over {MAX_SESSION_GRAPH_BYTES} bytes")
        self.graphs[graph.hash] = graph
        self.lowered_nodes += graph.nodes
        self._graph_bytes += len(command.graph)

    def _bind(self, number: int, name: bytes, places: Sequence[Place]) -> None:
        graph = self.graphs.get(name)
        if graph is None:
            raise JobError(f"graph {name.hex()[:12]} is not defined")
        if len(places) != len(graph.sizes_bytes):
            raise JobError(f"{len(places)} places for {len(graph.sizes_bytes)} params")
        for (buffer, offset_bytes), size_bytes in zip(places, graph.sizes_bytes, strict=True):
            self._check(buffer, offset_bytes, size_bytes)
        replaced = self.bindings.get(number)
        freed = 0 if replaced is None else len(replaced.places)
        if replaced is None and len(self.bindings) >= MAX_BINDINGS:
            raise JobError(f"over {MAX_BINDINGS} bindings")
        if self._places - freed + len(places) > MAX_PLACES:
            raise JobError(f"bindings of over {MAX_PLACES} places")
        if replaced is not None:
            self._unbind(number)
        self.bindings[number] = Binding(graph, tuple(places))
        self._places += len(places)
        for buffer, _ in places:
            self._naming.setdefault(buffer, set()).add(number)

    def _unbind(self, number: int) -> None:
        binding = self.bindings.pop(number)
        self._places -= len(binding.places)
        for buffer, _ in binding.places:
            naming = self._naming.get(buffer)
            if naming is not None:
                naming.discard(number)

    def _run(self, number: int, values: Sequence[int]) -> None:
        binding = self.bindings.get(number)
        if binding is None:
            raise JobError(f"there is no binding {number}")
        cost = binding.graph.cost_of(values)
        self.flop += cost.flop
        self.touched_bytes += cost.touched_bytes
        if binding.graph.has_bools or self._bools:
            due = self._bools.due(binding)
            self.touched_bytes += sum(check.size_bytes for check in due)
            self._bools.ran(binding, due)
        for (buffer, _), written in zip(binding.places, binding.graph.written, strict=True):
            if written:
                self.changed[buffer] = self.count

    def _copy(self, command: Copy) -> None:
        (target, at), (source, start), size = command.target, command.source, command.size_bytes
        self._check(source, start, size)
        self._check(target, at, size)
        if target == source and at < start + size and start < at + size:
            raise JobError("a copy onto itself")
        self.changed[target] = self.count
        self._bools.changed(target)
        self.touched_bytes += 2 * size

    def _fill(self, command: Write | Load) -> None:
        size_bytes = len(command.data) if isinstance(command, Write) else command.size_bytes
        self._check(command.buffer, command.offset_bytes, size_bytes)
        self.changed[command.buffer] = self.count
        self._bools.changed(command.buffer)
        self.moved_bytes += size_bytes

    def _check(self, buffer: int, offset_bytes: int, size_bytes: int) -> None:
        if offset_bytes + size_bytes > self._size(buffer):
            raise JobError(f"{size_bytes} bytes at {offset_bytes} are outside buffer {buffer}")

    def _size(self, buffer: int) -> int:
        size_bytes = self.buffers.get(buffer)
        if size_bytes is None:
            raise JobError(f"there is no buffer {buffer}")
        return size_bytes
