"""Whether a graph from a stranger may be built at all, and whether a work fits its graphs.

tinygrad's own checks are not made for hostile input (``facts``: graphs that passed them read files,
jumped to chosen addresses, or hung the compiler), so everything a graph may contain is said here:
operations of our own table with fixed arity, references that point back, operands of fitting
dtypes, shapes that work out, values in range, and a named limit on everything that grows.

What is refused although tinygrad would take it, and why:

- a constant without a value (tinygrad's Invalid): what it leaves in memory is not determined;
- POW and SHL of weak integers, weak integers outside 64 bits, integers whose folded bounds grow
  past ``Limits.interval_bits``: they hang the compiler (``intervals``);
- shifts by amounts that are not provably less than the width: undefined in C. ``amount & 31``
  makes them provable;
- BITCAST from or to a bool or weak dtype, or of a 0-d tensor to another width; THREEFRY on
  anything but uint64; REDUCE, GATHER, CONTIGUOUS and storage of weak dtypes;
- a divisor that is always zero, and a weak one that could be. A concrete divisor that depends on
  data is let through: it cannot be decided here, and dividing by zero ends only the worker, which
  is a process of its own, as the job's fault.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from p2pflop.job.graph import (
    BINARY,
    COMPARISON,
    ELEMENTWISE,
    TERNARY,
    Dtype,
    Graph,
    GraphParam,
    Node,
    Op,
)
from p2pflop.job.intervals import (
    WEAK_HIGH,
    WEAK_LOW,
    Bounds,
    dtype_bounds,
    integer_bounds,
)
from p2pflop.job.limits import DEFAULT_LIMITS, Limits
from p2pflop.job.shapes import (
    FLOATS,
    INTEGERS,
    ITEM_BYTES,
    WEAK,
    Shape,
    ShapeError,
    infer_dtype,
    infer_shape,
)

__all__ = ["DEFAULT_LIMITS", "Checked", "Limits", "Refusal", "validate"]

MAX_POWER: Final = 64
_BREAKS: Final = frozenset({Op.PARAM, Op.REDUCE, Op.CONTIGUOUS, Op.GATHER})
_DIVISIONS: Final = frozenset({Op.CDIV, Op.CMOD, Op.FLOORDIV, Op.FLOORMOD})
_INTEGER_ONLY: Final = _DIVISIONS | {Op.SHL, Op.SHR}
_NO_FLOATS: Final = frozenset({Op.AND, Op.OR, Op.XOR})
_NO_WEAK: Final = frozenset({Op.REDUCE, Op.CONTIGUOUS, Op.IOTA, Op.BITCAST})
_EXACT_FLOAT_BITS: Final = {
    Dtype.FLOAT16: 11,
    Dtype.BFLOAT16: 8,
    Dtype.FLOAT32: 24,
    Dtype.FLOAT64: 53,
}


@dataclass(frozen=True, slots=True)
class Checked:
    """A graph that passed ``validate``, with the shape and dtype of every node."""

    graph: Graph
    shapes: tuple[Shape, ...]
    dtypes: tuple[Dtype, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something is not accepted, in words for its author."""

    reason: str


class _Refused(Exception):
    """Leaves the checks from within; becomes a Refusal."""


def validate(graph: Graph, limits: Limits = DEFAULT_LIMITS) -> Checked | Refusal:
    """Check ``graph`` against every rule and limit. Never raises."""
    try:
        params = _check_params(graph, limits)
        checked = _check_nodes(graph, params, limits)
        _check_outputs(checked, params, limits)
    except (_Refused, ShapeError) as error:
        return Refusal(str(error))
    return checked


def stored_bytes(dtype: Dtype, shape: Shape) -> int:
    """The size of a tensor in memory."""
    return ITEM_BYTES[dtype] * math.prod(shape)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _Refused(message)


def _check_params(graph: Graph, limits: Limits) -> dict[int, GraphParam]:
    _require(len(graph.params) <= limits.params, f"{len(graph.params)} params are too many")
    last = -1
    for param in graph.params:
        where = f"param in slot {param.slot}"
        _require(param.slot > last, f"{where}: slots do not rise")
        _require(param.dtype not in WEAK, f"{where}: {param.dtype.name} cannot be stored")
        _check_stored(where, param.dtype, param.shape, limits)
        last = param.slot
    return {param.slot: param for param in graph.params}


def _check_stored(where: str, dtype: Dtype, shape: Shape, limits: Limits) -> None:
    _require(len(shape) <= limits.rank, f"{where}: rank {len(shape)} is over {limits.rank}")
    _require(all(0 < dim <= limits.dim for dim in shape), f"{where}: shape {shape} is out of range")
    size_bytes = stored_bytes(dtype, shape)
    _require(size_bytes <= limits.stored_bytes, f"{where}: {size_bytes} bytes are too many")


def _check_nodes(graph: Graph, params: dict[int, GraphParam], limits: Limits) -> Checked:
    _require(len(graph.nodes) <= limits.nodes, f"{len(graph.nodes)} nodes are too many")
    shapes: list[Shape] = []
    dtypes: list[Dtype] = []
    bounds: list[Bounds | None] = []
    depths: list[int] = []
    chains: list[int] = []
    flop = 0
    for index, node in enumerate(graph.nodes):
        try:
            if any(not 0 <= ref < index for ref in node.refs):
                raise _Refused("a reference does not point back")
            operands = [dtypes[ref] for ref in node.refs]
            around = [shapes[ref] for ref in node.refs]
            dtype, shape = _infer(node, operands, around, params, limits)
            _check_dims(shape, limits)
            _check_dtypes(node, dtype, operands, around)
            found = _check_bounds(node, dtype, [bounds[ref] for ref in node.refs], limits)
        except (_Refused, ShapeError) as error:
            raise _Refused(f"node {index} ({node.op.name}): {error}") from error
        depth = 1 + max((depths[ref] for ref in node.refs), default=0)
        _require(depth <= limits.depth, f"node {index}: deeper than {limits.depth} nodes")
        chain = 0 if node.op in _BREAKS else 1 + max((chains[ref] for ref in node.refs), default=0)
        _require(chain <= limits.chain, f"node {index}: a chain of more than {limits.chain} nodes")
        if node.op in ELEMENTWISE:
            flop += math.prod(shape)
        elif node.op is Op.REDUCE:
            flop += math.prod(around[0])
        _require(flop <= limits.flop, f"node {index}: more than {limits.flop} FLOP")
        shapes.append(shape)
        dtypes.append(dtype)
        bounds.append(found)
        depths.append(depth)
        chains.append(chain)
    return Checked(graph, tuple(shapes), tuple(dtypes))


def _infer(
    node: Node,
    operands: Sequence[Dtype],
    shapes: Sequence[Shape],
    params: dict[int, GraphParam],
    limits: Limits,
) -> tuple[Dtype, Shape]:
    _require(len(node.attrs) <= 2 * limits.rank, f"{len(node.attrs)} attributes are too many")
    if node.op is Op.PARAM:
        param = params.get(node.attrs[0]) if type(node.attrs[0]) is int else None
        if param is None:
            raise _Refused(f"the graph has no param in slot {node.attrs[0]}")
        return param.dtype, param.shape
    _require(len(operands) <= limits.stack, f"{len(operands)} operands are too many")
    dtype = infer_dtype(node, operands)
    return dtype, infer_shape(node, dtype, operands, shapes)


def _check_dims(shape: Shape, limits: Limits) -> None:
    _require(len(shape) <= limits.rank, f"rank {len(shape)} is over the limit of {limits.rank}")
    _require(max(shape, default=0) <= limits.dim, f"shape {shape} is over the limit of a dimension")
    _require(math.prod(shape) <= limits.numel, f"shape {shape} has too many elements")


def _check_dtypes(
    node: Node, dtype: Dtype, operands: Sequence[Dtype], shapes: Sequence[Shape]
) -> None:
    op = node.op
    if op in COMPARISON:
        concrete = {each for each in operands if each not in WEAK}
        _require(len(concrete) <= 1, f"compares {_names(operands)}")
    elif op in BINARY or op in TERNARY or op is Op.STACK:
        values = operands[1:] if op is Op.WHERE else operands
        if op in (Op.SHL, Op.SHR):
            values = [each for each in values if each is not Dtype.UINT32]
        fits = all(each is dtype or each in WEAK for each in values)
        _require(fits, f"mixes {_names(operands)}")
    _check_kind(op, dtype, operands)
    rule = _RULES.get(op)
    if rule is not None:
        rule(node, dtype, operands, shapes)


def _check_kind(op: Op, dtype: Dtype, operands: Sequence[Dtype]) -> None:
    if op in _INTEGER_ONLY:
        _require(dtype in INTEGERS, f"on {dtype.name}: integers only")
    elif op in _NO_FLOATS:
        _require(dtype not in FLOATS, f"on {dtype.name}: no floats")
    elif op is Op.FDIV:
        _require(dtype in FLOATS, f"on {dtype.name}: floats only")
    elif op is Op.THREEFRY:
        _require(set(operands) == {Dtype.UINT64}, f"on {_names(operands)}: UINT64 only")
    elif op in (Op.NEG, Op.TRUNC):
        _require(dtype is not Dtype.BOOL, "on BOOL")
    elif op in _NO_WEAK:
        _require(dtype not in WEAK, f"on {dtype.name}: it has no storage")


def _names(dtypes: Sequence[Dtype]) -> str:
    return ", ".join(dtype.name for dtype in dtypes[:3])


def _check_const(
    node: Node, dtype: Dtype, _operands: Sequence[Dtype], _shapes: Sequence[Shape]
) -> None:
    value = node.attrs[1]
    _require(value is not None, "without a value is not determined")
    if dtype is Dtype.BOOL:
        _require(type(value) is bool, f"{value!r} is not a BOOL")
    elif dtype in FLOATS:
        _require(isinstance(value, float) and _is_exact(dtype, value), f"{value!r} in {dtype.name}")
    else:
        whole = dtype_bounds(dtype)
        low, high = (WEAK_LOW, WEAK_HIGH) if dtype is Dtype.WEAKINT or not whole else whole[:2]
        inside = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        _require(inside, f"{value!r} in {dtype.name}")


def _is_exact(dtype: Dtype, value: float) -> bool:
    """Whether ``dtype`` holds ``value`` without rounding: else one constant had many encodings."""
    if dtype in (Dtype.FLOAT64, Dtype.WEAKFLOAT) or not math.isfinite(value):
        return True
    try:
        if dtype is Dtype.FLOAT16:
            return bool(struct.unpack("<e", struct.pack("<e", value))[0] == value)
        packed = struct.pack("<f", value)
    except OverflowError:
        return False
    if dtype is Dtype.BFLOAT16 and packed[:2] != b"\0\0":
        return False
    return bool(struct.unpack("<f", packed)[0] == value)


def _check_bitcast(
    _node: Node, dtype: Dtype, operands: Sequence[Dtype], shapes: Sequence[Shape]
) -> None:
    _require(operands[0] not in WEAK, f"of {operands[0].name}: it has no storage")
    _require(Dtype.BOOL not in (dtype, operands[0]), "from or to BOOL")
    same = ITEM_BYTES[dtype] == ITEM_BYTES[operands[0]]
    _require(same or bool(shapes[0]), "of a 0-d tensor to another width")


def _check_iota(
    node: Node, dtype: Dtype, _operands: Sequence[Dtype], _shapes: Sequence[Shape]
) -> None:
    length = node.attrs[1]
    _require(isinstance(length, int) and length >= 1, f"of length {length}")
    if not isinstance(length, int):
        return
    whole = dtype_bounds(dtype)
    highest = 2 ** _EXACT_FLOAT_BITS[dtype] if whole is None else whole.high
    _require(dtype is not Dtype.BOOL and length - 1 <= highest, f"of {length} in {dtype.name}")


def _check_gather(
    _node: Node, dtype: Dtype, operands: Sequence[Dtype], shapes: Sequence[Shape]
) -> None:
    _require(dtype not in WEAK, f"of {dtype.name}: it has no storage")
    concrete = operands[1] in INTEGERS and operands[1] not in WEAK
    _require(concrete, f"by {operands[1].name}: concrete integers only")
    _require(shapes[0][0] >= 1, "from no rows")


def _check_reduce(
    node: Node, _dtype: Dtype, _operands: Sequence[Dtype], _shapes: Sequence[Shape]
) -> None:
    _require(node.attrs[1] != 0, "over no axes")


def _check_movement(
    node: Node, _dtype: Dtype, _operands: Sequence[Dtype], _shapes: Sequence[Shape]
) -> None:
    _require(bool(node.attrs), "without axes")


_RULES: Final[dict[Op, Callable[[Node, Dtype, Sequence[Dtype], Sequence[Shape]], None]]] = {
    Op.CONST: _check_const,
    Op.BITCAST: _check_bitcast,
    Op.IOTA: _check_iota,
    Op.GATHER: _check_gather,
    Op.REDUCE: _check_reduce,
    Op.EXPAND: _check_movement,
    Op.PERMUTE: _check_movement,
    Op.FLIP: _check_movement,
}


def _check_bounds(
    node: Node, dtype: Dtype, operands: Sequence[Bounds | None], limits: Limits
) -> Bounds | None:
    op = node.op
    if op in (Op.SHL, Op.SHR):
        amount = operands[1]
        width = 8 * ITEM_BYTES[dtype]
        within = amount is not None and amount.low >= 0 and amount.high < width
        _require(within, f"by an amount that may be outside 0 to {width - 1}")
    if op in _DIVISIONS and operands[1] is not None:
        low, high, _ = operands[1]
        _require((low, high) != (0, 0), "by zero")
        nonzero = low > 0 or high < 0
        _require(dtype is not Dtype.WEAKINT or nonzero, "of weak integers by what may be zero")
    if op is Op.POW and dtype in INTEGERS:
        exponent = operands[1]
        small = exponent is not None and exponent.low >= 0 and exponent.high <= MAX_POWER
        _require(small, f"of integers by what may be outside 0 to {MAX_POWER}")
    weak = dtype is Dtype.WEAKINT
    _require(not weak or op not in (Op.POW, Op.SHL), "on weak integers")
    found = integer_bounds(node, dtype, operands)
    if found is not None:
        _require(
            found.bits <= limits.interval_bits, f"bounds of more than {limits.interval_bits} bits"
        )
        inside = found.low >= WEAK_LOW and found.high <= WEAK_HIGH
        _require(not weak or inside, "weak integers outside 64 bits")
    return found


def _check_outputs(checked: Checked, params: dict[int, GraphParam], limits: Limits) -> None:
    outputs = checked.graph.outputs
    _require(0 < len(outputs) <= limits.outputs, f"{len(outputs)} outputs")
    last = -1
    for number, output in enumerate(outputs):
        where = f"output {number}"
        _require(0 <= output.node < len(checked.dtypes), f"{where}: no node {output.node}")
        dtype, shape = checked.dtypes[output.node], checked.shapes[output.node]
        _require(dtype not in WEAK, f"{where}: {dtype.name} cannot be stored; cast it")
        _check_stored(where, dtype, shape, limits)
        if output.slot is None:
            _require(last < 0, f"{where}: fresh outputs stand before written slots")
            continue
        _require(output.slot > last, f"{where}: written slots do not rise")
        last = output.slot
        param = params.get(output.slot)
        if param is None:
            raise _Refused(f"{where}: the graph has no param in slot {output.slot}")
        same = (param.dtype, param.shape) == (dtype, shape)
        _require(
            same, f"{where}: {dtype.name} {shape} for a slot of {param.dtype.name} {param.shape}"
        )
