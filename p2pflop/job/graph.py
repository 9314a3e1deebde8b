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
EXPAND               ``dims``                     leading dims, as in tinygrad
PAD                  ``(start, size) * rank``     place the input at ``start`` of an axis of ``size``
SHRINK               ``(start, size) * rank``
PERMUTE              axes                         a permutation of the axes
FLIP                 ``0 | 1`` an axis
REDUCE               ``(alu, axes)``              over the first ``axes`` axes; alu 0 ADD, 1 MUL, 2 MAX
STACK                ``()``                       a new leading axis over 1..256 equal shapes
CONTIGUOUS           ``()``                       materialise
IOTA                 ``(dtype, length)``          0, 1, ... length-1
GATHER               ``()``                       rows of refs[0] by integer refs[1], along axis 0;
                                                  an index out of range gives zeros, as tinygrad does
elementwise          ``()``                       unary, binary, ternary, broadcast as in tinygrad
==================== ============================ ==================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

Attr = int | float | bool | None


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
    """A node that leaves the graph: fresh (``slot`` None), or written in place into a state slot."""

    node: int
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class Graph:
    """Params in order of slot, nodes in topological order, outputs: fresh ones first."""

    params: tuple[GraphParam, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]
