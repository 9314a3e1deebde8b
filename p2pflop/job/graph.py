"""A tensor graph as data.

Nodes stand in topological order. In memory a reference is the index of an earlier node; on the
wire it is the distance back, which makes repeated layers look alike to a compressor. Operations
and dtypes have numbers of our own, frozen by this file, whatever tinygrad renumbers.

Semantics follow tinygrad 0.14's tensor graph op for op:

==================== ============================ ==================================================
op                   attrs                        meaning
==================== ============================ ==================================================
PARAM                ``(slot,)``                  the tensor in that slot of the work's param table
CONST                ``(dtype, value)``           0-d constant; value None is tinygrad's Invalid
CAST, BITCAST        ``(dtype,)``
RESHAPE              ``dims``                     new shape
EXPAND               ``dims``                     new leading dims, put before the input's shape
PAD                  ``(start, size) * rank``     put the input at ``start`` of an axis of ``size``
SHRINK               ``(start, size) * rank``
PERMUTE              axes                         a permutation of the axes
FLIP                 ``0 | 1`` an axis
REDUCE               ``(alu, axes)``              the first ``axes`` axes; alu 0 ADD, 1 MUL, 2 MAX
STACK                ``()``                       a new leading axis over 1..256 equal shapes
CONTIGUOUS           ``()``                       materialise
IOTA                 ``(dtype, length)``          0, 1, ... length-1
GATHER               ``()``                       rows of refs[0] by integer refs[1], along axis 0;
                                                  an index out of range, also negative, gives zeros
ASSIGN               ``()``                       refs[0], a param or an assignment to one, once
                                                  refs[2] is in its view refs[1]; sessions alone
elementwise          ``()``                       unary, binary, ternary, broadcast as in tinygrad
==================== ============================ ==================================================

On the wire a graph is one msgpack array of columns: version, params, one byte an operation, all
references, all attributes, outputs. What repeats in the model must repeat in the bytes, or a
compressor does not see it:

- a reference to one of the ``NEAR`` nodes before is its distance back, the same in every layer;
- one to a node farther back would be a new number at every use. The first such use of a node is 0
  and then the way from the node of the last such first use; later uses are -1, -2, ... for the
  first, second, ... node that was so used. Shared constants and Adam's scalars become one number
  each, and the backward pass follows the forward one in equal strides;
- slots are written as distances, too: a param's from the slot before it, a PARAM node's from the
  PARAM node before it, an output's node from the output before it.

Eight layers of a transformer with AdamW are 3.4 kB after zlib (7.9 kB with plain distances).

Three things make the encoding the only one: no integer has two msgpack forms after the comparison
at the end of ``decode_graph``, NaN has one bit pattern, and a field's type (bool, int, float,
None) is never converted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, ClassVar, Final, Generic, Literal, TypeVar

import msgspec

from p2pflop.errors import JobError, ProtocolError
from p2pflop.ids import content_hash
from p2pflop.job.limits import (
    DEFAULT_LIMITS,
    MAX_DIM,
    MAX_GRAPH_ATTRS,
    MAX_GRAPH_BYTES,
    MAX_GRAPH_NODES,
    MAX_GRAPH_OUTPUTS,
    MAX_GRAPH_PARAMS,
    MAX_GRAPH_REFS,
    MAX_TENSOR_RANK,
    Limits,
)
from p2pflop.wire import Record

Attr = int | float | bool | None
T = TypeVar("T")


class Dtype(IntEnum):
    """Element types. The weak ones occur inside a graph, never in storage."""

    BOOL = 0
    INT8 = 1
    UINT8 = 2
    INT16 = 3
    UINT16 = 4
    INT32 = 5
    UINT32 = 6
    INT64 = 7
    UINT64 = 8
    FLOAT16 = 9
    BFLOAT16 = 10
    FLOAT32 = 11
    FLOAT64 = 12
    WEAKINT = 13
    WEAKFLOAT = 14


class Op(IntEnum):
    """Operations on the wire. Numbers are never reused."""

    PARAM = 0
    CONST = 1
    CAST = 2
    BITCAST = 3
    RESHAPE = 4
    EXPAND = 5
    PERMUTE = 6
    PAD = 7
    SHRINK = 8
    FLIP = 9
    REDUCE = 10
    STACK = 11
    CONTIGUOUS = 12
    IOTA = 13
    GATHER = 14
    ASSIGN = 15
    EXP2 = 20
    LOG2 = 21
    SIN = 22
    SQRT = 23
    RECIPROCAL = 24
    NEG = 25
    TRUNC = 26
    ADD = 30
    MUL = 31
    SUB = 32
    FDIV = 33
    MAX = 34
    CMPLT = 35
    CMPNE = 36
    CMPEQ = 37
    XOR = 38
    OR = 39
    AND = 40
    SHL = 41
    SHR = 42
    CDIV = 43
    CMOD = 44
    FLOORDIV = 45
    FLOORMOD = 46
    THREEFRY = 47
    POW = 48
    WHERE = 60
    MULACC = 61


@dataclass(frozen=True, slots=True)
class GraphParam:
    """A slot of the work's param table as this graph sees it."""

    slot: int
    dtype: Dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. ``refs`` are indices of earlier nodes."""

    op: Op
    attrs: tuple[Attr, ...] = ()
    refs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """A node that leaves the graph: fresh (``slot`` None) or written in place into that slot."""

    node: int
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class Graph:
    """Params in order of slot, nodes in topological order, outputs: fresh ones first."""

    params: tuple[GraphParam, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]


GRAPH_VERSION: Final = 1
NEAR: Final = 32

UNARY: Final = frozenset(
    {Op.EXP2, Op.LOG2, Op.SIN, Op.SQRT, Op.RECIPROCAL, Op.NEG, Op.TRUNC},
)
COMPARISON: Final = frozenset({Op.CMPLT, Op.CMPNE, Op.CMPEQ})
TERNARY: Final = frozenset({Op.WHERE, Op.MULACC})
BINARY: Final = frozenset(op for op in Op if Op.ADD <= op <= Op.POW)
ELEMENTWISE: Final = UNARY | BINARY | TERNARY
MOVEMENT: Final = frozenset(
    {Op.RESHAPE, Op.EXPAND, Op.PERMUTE, Op.PAD, Op.SHRINK, Op.FLIP},
)

_ANY: Final = -1
_ARITY: Final[dict[Op, int]] = {
    **dict.fromkeys((Op.PARAM, Op.CONST, Op.IOTA), 0),
    **dict.fromkeys((Op.CAST, Op.BITCAST, Op.REDUCE, Op.CONTIGUOUS), 1),
    **dict.fromkeys(MOVEMENT | UNARY, 1),
    **dict.fromkeys(BINARY | {Op.GATHER}, 2),
    **dict.fromkeys(TERNARY | {Op.ASSIGN}, 3),
    Op.STACK: _ANY,
}
_ATTRS: Final[dict[Op, int]] = {
    **dict.fromkeys(Op, 0),
    **dict.fromkeys((Op.PARAM, Op.CAST, Op.BITCAST), 1),
    **dict.fromkeys((Op.CONST, Op.REDUCE, Op.IOTA), 2),
    **dict.fromkeys(MOVEMENT, _ANY),
}
_RULES: Final[dict[int, tuple[Op, int, int]]] = {int(op): (op, _ARITY[op], _ATTRS[op]) for op in Op}

_Gap = Annotated[int, msgspec.Meta(ge=0, lt=MAX_GRAPH_PARAMS)]
_Delta = Annotated[int, msgspec.Meta(ge=-MAX_GRAPH_NODES, le=MAX_GRAPH_NODES)]


class _WireParam(Record, frozen=True):
    gap: _Gap
    dtype: Annotated[int, msgspec.Meta(ge=0, le=14)]
    dims: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, le=MAX_DIM)], ...],
        msgspec.Meta(max_length=MAX_TENSOR_RANK),
    ]


class _WireOutput(Record, frozen=True):
    gap: _Gap
    delta: _Delta


class _WireGraph(Record, frozen=True):
    MAX_BYTES: ClassVar[int] = MAX_GRAPH_BYTES

    version: Literal[1]
    params: Annotated[tuple[_WireParam, ...], msgspec.Meta(max_length=MAX_GRAPH_PARAMS)]
    ops: Annotated[bytes, msgspec.Meta(max_length=MAX_GRAPH_NODES)]
    refs: Annotated[tuple[_Delta, ...], msgspec.Meta(max_length=MAX_GRAPH_REFS)]
    attrs: Annotated[
        tuple[int | float | bool | None, ...],
        msgspec.Meta(max_length=MAX_GRAPH_ATTRS),
    ]
    fresh: Annotated[tuple[_Delta, ...], msgspec.Meta(max_length=MAX_GRAPH_OUTPUTS)]
    written: Annotated[tuple[_WireOutput, ...], msgspec.Meta(max_length=MAX_GRAPH_OUTPUTS)]


def encode_graph(graph: Graph) -> bytes:
    """The one encoding of ``graph``.

    Raises JobError for a graph that has none: wrong arity, an attribute of the wrong type, params
    or written slots that do not rise, a fresh output after a written one.
    """
    try:
        return _encode(graph)
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise JobError(f"graph cannot be encoded: {str(error)[:200]}") from error


def decode_graph(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Graph:
    """The graph that ``data`` is the one encoding of.

    Sizes are checked before anything is built. That references point back and that arities hold is
    certain afterwards; shapes, dtypes and values are for ``validate``. Raises ProtocolError.
    """
    if len(data) > min(limits.graph_bytes, MAX_GRAPH_BYTES):
        raise ProtocolError(f"graph of {len(data)} bytes is over the limit of {limits.graph_bytes}")
    try:
        wire = msgspec.msgpack.decode(data, type=_WireGraph)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a valid graph: {str(error)[:200]}") from error
    if len(wire.ops) > limits.nodes:
        raise ProtocolError(f"graph of {len(wire.ops)} nodes is over the limit of {limits.nodes}")
    try:
        graph = _decode(wire)
        again = _encode(graph)
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise ProtocolError(f"not a valid graph: {str(error)[:200]}") from error
    if again != data:
        raise ProtocolError("graph is not in its one encoding")
    return graph


def graph_hash(data: bytes) -> bytes:
    """The hash that names an encoded graph."""
    return content_hash(data)


def _encode(graph: Graph) -> bytes:
    ops = bytearray()
    refs: list[int] = []
    attrs: list[Attr] = []
    far = _FarNodes()
    last_slot = 0
    for index, node in enumerate(graph.nodes):
        op, arity, count = _RULES[int(node.op)]
        values = _attrs(index, node, count)
        ops.append(op)
        if arity == _ANY:
            refs.append(len(node.refs))
        elif arity != len(node.refs):
            raise ValueError(f"node {index}: {op.name} takes {arity} references")
        for ref in node.refs:
            if not 0 <= ref < index:
                raise ValueError(f"node {index}: reference {ref} does not point back")
            refs.extend(far.write(index, ref))
        if op is Op.PARAM:
            slot = _integer(values[0])
            attrs.append(slot - last_slot)
            last_slot = slot
        else:
            if count == _ANY:
                attrs.append(len(values))
            attrs.extend(values)
    slots = [param.slot for param in graph.params]
    params = tuple(
        _WireParam(gap, int(param.dtype), param.shape)
        for gap, param in zip(_gaps(slots), graph.params, strict=True)
    )
    fresh, written = _encode_outputs(graph)
    wire = _WireGraph(GRAPH_VERSION, params, bytes(ops), tuple(refs), tuple(attrs), fresh, written)
    return msgspec.msgpack.encode(wire)


def _encode_outputs(graph: Graph) -> tuple[tuple[int, ...], tuple[_WireOutput, ...]]:
    fresh: list[int] = []
    deltas: list[int] = []
    slots: list[int] = []
    last = 0
    for output in graph.outputs:
        if not 0 <= output.node < len(graph.nodes):
            raise ValueError(f"output refers to node {output.node} of {len(graph.nodes)}")
        delta, last = output.node - last, output.node
        if output.slot is None:
            if slots:
                raise ValueError("a fresh output stands after a written one")
            fresh.append(delta)
        else:
            slots.append(output.slot)
            deltas.append(delta)
    pairs = zip(_gaps(slots), deltas, strict=True)
    return tuple(fresh), tuple(_WireOutput(gap, delta) for gap, delta in pairs)


def _decode(wire: _WireGraph) -> Graph:
    slots = _slots([param.gap for param in wire.params])
    params = tuple(
        GraphParam(slot, Dtype(param.dtype), param.dims)
        for slot, param in zip(slots, wire.params, strict=True)
    )
    refs = _Column("references", wire.refs)
    attrs = _Column("attributes", wire.attrs)
    nodes: list[Node] = []
    far = _FarNodes()
    last_slot = 0
    for index, number in enumerate(wire.ops):
        rule = _RULES.get(number)
        if rule is None:
            raise ValueError(f"node {index}: operation {number} is unknown")
        op, arity, count = rule
        found = [far.read(index, refs) for _ in range(refs.count() if arity == _ANY else arity)]
        values = attrs.take(attrs.count() if count == _ANY else count) if count else ()
        if op is Op.PARAM:
            last_slot += _integer(values[0])
            values = (last_slot,)
        elif op is Op.CONST and isinstance(values[1], float) and math.isnan(values[1]):
            values = (values[0], math.nan)
        nodes.append(Node(op, values, tuple(found)))
    refs.close()
    attrs.close()
    return Graph(params, tuple(nodes), tuple(_decode_outputs(wire)))


def _decode_outputs(wire: _WireGraph) -> Iterator[Output]:
    node = 0  # that it exists is checked by encoding again
    for delta in wire.fresh:
        node += delta
        yield Output(node)
    slots = _slots([output.gap for output in wire.written])
    for slot, output in zip(slots, wire.written, strict=True):
        node += output.delta
        yield Output(node, slot)


class _Column(Generic[T]):
    """A flat column of the wire form, consumed from the front."""

    __slots__ = ("at", "name", "values")

    def __init__(self, name: str, values: tuple[T, ...]) -> None:
        self.name = name
        self.values = values
        self.at = 0

    def take(self, count: int) -> tuple[T, ...]:
        start, self.at = self.at, self.at + count
        if self.at > len(self.values):
            raise ValueError(f"{self.name} end too early")
        return self.values[start : self.at]

    def count(self) -> int:
        count = _integer(self.take(1)[0])
        if count < 0:
            raise ValueError(f"{self.name}: a count of {count}")
        return count

    def close(self) -> None:
        if self.at != len(self.values):
            raise ValueError(f"{len(self.values) - self.at} {self.name} are left over")


class _FarNodes:
    """What both sides remember of references that reach farther back than ``NEAR``."""

    __slots__ = ("nodes", "places")

    def __init__(self) -> None:
        self.nodes: list[int] = []
        self.places: dict[int, int] = {}

    def write(self, index: int, ref: int) -> tuple[int, ...]:
        """The reference from node ``index`` to node ``ref`` as the numbers of the wire."""
        if index - ref <= NEAR:
            return (index - ref,)
        place = self.places.get(ref)
        return (-1 - place,) if place is not None else (0, ref - self._remember(ref))

    def read(self, index: int, column: _Column[int]) -> int:
        """The next reference of ``column``, which belongs to node ``index``."""
        (number,) = column.take(1)
        if number < 0:
            if -1 - number >= len(self.nodes):
                raise ValueError(f"node {index}: reference {number} to no far node")
            return self.nodes[-1 - number]
        ref = index - number
        if number == 0:
            ref = column.take(1)[0] + (self.nodes[-1] if self.nodes else 0)
            self._remember(ref)
        if not 0 <= ref < index:
            raise ValueError(f"node {index}: reference {ref} does not point back")
        return ref

    def _remember(self, ref: int) -> int:
        """Add a node; gives the one added before it, or 0."""
        last = self.nodes[-1] if self.nodes else 0
        self.places[ref] = len(self.nodes)
        self.nodes.append(ref)
        return last


def _attrs(index: int, node: Node, count: int) -> tuple[Attr, ...]:
    if count not in (_ANY, len(node.attrs)):
        raise ValueError(f"node {index}: {node.op.name} takes {count} attributes")
    if node.op is not Op.CONST:
        for value in node.attrs:
            _integer(value)
        return node.attrs
    dtype, value = node.attrs
    if isinstance(value, float):
        value = math.nan if math.isnan(value) else float(value)
    elif value is not None and not isinstance(value, int):
        raise TypeError(f"node {index}: a constant of type {type(value).__name__}")
    return _integer(dtype), value


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"an integer was expected, not {type(value).__name__}")
    return value


def _gaps(slots: Sequence[int]) -> list[int]:
    gaps: list[int] = []
    last = -1
    for slot in slots:
        if slot <= last:
            raise ValueError(f"slot {slot} follows slot {last}: slots must rise")
        gaps.append(slot - last - 1)
        last = slot
    _check_last(last)
    return gaps


def _slots(gaps: Sequence[int]) -> list[int]:
    slots: list[int] = []
    last = -1
    for gap in gaps:
        last += gap + 1
        slots.append(last)
    _check_last(last)
    return slots


def _check_last(slot: int) -> None:
    if slot >= MAX_GRAPH_PARAMS:
        raise ValueError(f"slot {slot} is over the limit of {MAX_GRAPH_PARAMS}")
