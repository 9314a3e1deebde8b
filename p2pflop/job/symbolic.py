"""A session's graph whose sizes depend on Variables, such as the place of a token in a cache.

It is a graph as it is with every Variable at its highest value (``graph``), and the attributes that
change with them (``changes``): sizes and offsets of movements, and integer constants. What an
attribute is for other values is linear, ``factor`` for each step away from the highest value; what
is not linear does not travel like this. A graph for some values is so a graph as any other, with
the rules of any other, and one plan serves all of them: a ``Run`` brings the values.

::

    [2, graph, [[low, high], ...], [[node, place, variable, factor], ...]]

is the wire form, in msgpack as a graph. Variables have numbers and no names.

Not every value can be tried. The graph is validated with each Variable at its lowest and at its
highest value, in every combination, and with all of them half way: what holds at both ends of a
range holds in between if it is linear, which offsets and equal sizes are. The rest (a RESHAPE whose
products agree at the ends and half way alone) is found where a graph is lowered, where tinygrad
compares the sizes as expressions, or harms the memory of its own session and nothing else.

A run costs what follows from the costs at both ends: a line between them, at the Variable that is
nearest to its highest value. No size may shrink as a Variable grows, so every FLOP count is convex
and the line is nowhere below it. With one Variable, and one size of each tensor that depends on it,
it is exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, ClassVar, Final, Literal

import msgspec

from p2pflop.errors import JobError, ProtocolError
from p2pflop.job.graph import Dtype, Graph, Node, Op, decode_graph, encode_graph
from p2pflop.job.limits import (
    DEFAULT_LIMITS,
    MAX_GRAPH_BYTES,
    MAX_GRAPH_NODES,
    MAX_VARIABLES,
    Limits,
)
from p2pflop.job.meter import Cost
from p2pflop.job.rules import Refused, require
from p2pflop.job.shapes import INTEGERS
from p2pflop.job.validate import Checked, Refusal, validate
from p2pflop.wire import Record

MAX_VALUE: Final = 2**31 - 1
MAX_CHANGES: Final = 65_536
MAX_FACTOR: Final = 2**40

_SIZES_ALONE: Final = frozenset({Op.RESHAPE, Op.EXPAND})
_PAIRS: Final = frozenset({Op.PAD, Op.SHRINK})
_FIRST_BYTES: Final = b"\x94\x02"


class Range(Record, frozen=True):
    """What a Variable can be, both ends included."""

    low: Annotated[int, msgspec.Meta(ge=0, le=MAX_VALUE)]
    high: Annotated[int, msgspec.Meta(ge=0, le=MAX_VALUE)]


class Change(Record, frozen=True):
    """Attribute ``place`` of a node grows by ``factor`` as a Variable grows by 1."""

    node: Annotated[int, msgspec.Meta(ge=0, lt=MAX_GRAPH_NODES)]
    place: Annotated[int, msgspec.Meta(ge=0, lt=256)]
    variable: Annotated[int, msgspec.Meta(ge=0, lt=MAX_VARIABLES)]
    factor: Annotated[int, msgspec.Meta(ge=-MAX_FACTOR, le=MAX_FACTOR)]


class _Wire(Record, frozen=True):
    MAX_BYTES: ClassVar[int] = MAX_GRAPH_BYTES

    version: Literal[2]
    graph: Annotated[bytes, msgspec.Meta(max_length=MAX_GRAPH_BYTES)]
    ranges: Annotated[tuple[Range, ...], msgspec.Meta(min_length=1, max_length=MAX_VARIABLES)]
    changes: Annotated[tuple[Change, ...], msgspec.Meta(min_length=1, max_length=MAX_CHANGES)]


@dataclass(frozen=True, slots=True)
class SymbolicGraph:
    """``graph`` with every Variable at the high end of its range; ``changes`` in the order of their
    nodes, places and variables, each once."""

    graph: Graph
    ranges: tuple[Range, ...]
    changes: tuple[Change, ...]

    def at(self, values: Sequence[int]) -> Graph:
        """The graph for these values."""
        nodes = list(self.graph.nodes)
        for change in self.changes:
            node = nodes[change.node]
            attrs = list(node.attrs)
            grown = values[change.variable] - self.ranges[change.variable].high
            before = attrs[change.place]
            attrs[change.place] = int(before or 0) + change.factor * grown
            nodes[change.node] = Node(node.op, tuple(attrs), node.refs)
        return replace(self.graph, nodes=tuple(nodes))


@dataclass(frozen=True, slots=True)
class CheckedSymbolic:
    """A symbolic graph that passed ``validate_symbolic``, checked at both ends of its ranges."""

    symbolic: SymbolicGraph
    low: Checked
    high: Checked


def is_symbolic(data: bytes) -> bool:
    """Whether ``data`` is meant as a symbolic graph, not as one without Variables."""
    return data.startswith(_FIRST_BYTES)


def encode_symbolic(symbolic: SymbolicGraph) -> bytes:
    """The one encoding. Raises JobError for what has none."""
    wire = _Wire(2, encode_graph(symbolic.graph), symbolic.ranges, symbolic.changes)
    data = msgspec.msgpack.encode(wire)
    try:
        decode_symbolic(data)
    except ProtocolError as error:
        raise JobError(f"graph cannot be encoded: {error.message}") from error
    return data


def decode_symbolic(data: bytes, limits: Limits = DEFAULT_LIMITS) -> SymbolicGraph:
    """The symbolic graph that ``data`` is the one encoding of. Raises ProtocolError."""
    if len(data) > min(limits.graph_bytes, MAX_GRAPH_BYTES):
        raise ProtocolError(f"graph of {len(data)} bytes is over the limit of {limits.graph_bytes}")
    try:
        wire = msgspec.msgpack.decode(data, type=_Wire)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a valid symbolic graph: {str(error)[:200]}") from error
    if msgspec.msgpack.encode(wire) != data:
        raise ProtocolError("symbolic graph is not in its one encoding")
    graph = decode_graph(wire.graph, limits)
    order = [(change.node, change.place, change.variable) for change in wire.changes]
    if any(after <= before for before, after in itertools.pairwise(order)):
        raise ProtocolError("the changes of a symbolic graph do not rise")
    for change in wire.changes:
        _check_place(graph, change, len(wire.ranges))
    return SymbolicGraph(graph, wire.ranges, wire.changes)


def _check_place(graph: Graph, change: Change, variables: int) -> None:
    """Raises ProtocolError for a change of what is not there, or is no integer."""
    if change.node >= len(graph.nodes) or change.variable >= variables or not change.factor:
        raise ProtocolError("a change of a symbolic graph changes nothing")
    attrs = graph.nodes[change.node].attrs
    if change.place >= len(attrs) or type(attrs[change.place]) is not int:
        raise ProtocolError(f"node {change.node} has no integer in place {change.place}")


def validate_symbolic(
    symbolic: SymbolicGraph, limits: Limits = DEFAULT_LIMITS
) -> CheckedSymbolic | Refusal:
    """Check it as a session's graph, which may assign. See the head of the module."""
    try:
        for number, (low, high) in enumerate(_ends(symbolic)):
            require(low < high, f"Variable {number} is never but {low}")
        for change in symbolic.changes:
            _check_change(symbolic.graph.nodes[change.node], change)
    except Refused as error:
        return Refusal(str(error))
    half = tuple((low + high) // 2 for low, high in _ends(symbolic))
    checked: list[Checked] = []
    for values in (*itertools.product(*_ends(symbolic)), half):
        found = validate(symbolic.at(values), limits, assigns=True)
        if isinstance(found, Refusal):
            told = ", ".join(map(str, values))
            return Refusal(f"for values {told} of its Variables: {found.reason}")
        checked.append(found)
    return CheckedSymbolic(symbolic, checked[0], checked[-2])


def _ends(symbolic: SymbolicGraph) -> list[tuple[int, int]]:
    return [(each.low, each.high) for each in symbolic.ranges]


def _check_change(node: Node, change: Change) -> None:
    where = f"node {change.node} ({node.op.name})"
    if node.op is Op.CONST:
        whole = change.place == 1 and Dtype(int(node.attrs[0] or 0)) in INTEGERS
        require(whole, f"{where}: only an integer's value can depend on a Variable")
        return
    require(node.op in _SIZES_ALONE | _PAIRS, f"{where}: nothing of it can depend on a Variable")
    is_size = node.op in _SIZES_ALONE or change.place % 2 == 1
    require(not is_size or change.factor > 0, f"{where}: a size shrinks as a Variable grows")


def check_values(ranges: Sequence[Range], values: Sequence[int]) -> None:
    """Raises JobError unless there is a value in range for each Variable."""
    if len(values) != len(ranges):
        raise JobError(f"{len(values)} values for {len(ranges)} Variables")
    for value, each in zip(values, ranges, strict=True):
        if not each.low <= value <= each.high:
            raise JobError(f"a Variable of {each.low} to {each.high} cannot be {value}")


def cost_at(low: Cost, high: Cost, ranges: Sequence[Range], values: Sequence[int]) -> Cost:
    """What a run costs with these values, from what it costs at both ends. See the head."""
    pairs = zip(values, ranges, strict=True)
    part = max(Fraction(value - each.low, each.high - each.low) for value, each in pairs)

    def between(least: int, most: int) -> int:
        return least - (-(most - least) * part.numerator // part.denominator)

    return Cost(
        between(low.flop, high.flop),
        between(low.touched_bytes, high.touched_bytes),
        high.peak_bytes,
    )
