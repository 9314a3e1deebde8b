"""The dtype and the shape of every node, by tinygrad 0.14's rules.

Mirrors ``UOp.dtype`` (``dtype_from_uop``) and ``UOp._shape`` for the operations of the wire format.
Where tinygrad raises, so does this; where tinygrad only fails later (attributes of a wrong type or
sign), this raises at once. Three rules that surprise:

- broadcasting is part of an elementwise operation, EXPAND only adds leading axes;
- a weak dtype is what a bare Python number has: below every concrete dtype of its kind in the
  promotion lattice, so that ``float16 * 2.0`` stays float16;
- BITCAST to a dtype of another width rescales the last axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final

from p2pflop.job.graph import BINARY, COMPARISON, ELEMENTWISE, TERNARY, Attr, Dtype, Node, Op

Shape = tuple[int, ...]

ITEM_BYTES: Final[dict[Dtype, int]] = {
    Dtype.BOOL: 1,
    Dtype.INT8: 1,
    Dtype.UINT8: 1,
    Dtype.INT16: 2,
    Dtype.UINT16: 2,
    Dtype.INT32: 4,
    Dtype.UINT32: 4,
    Dtype.INT64: 8,
    Dtype.UINT64: 8,
    Dtype.FLOAT16: 2,
    Dtype.BFLOAT16: 2,
    Dtype.FLOAT32: 4,
    Dtype.FLOAT64: 8,
    Dtype.WEAKINT: 8,
    Dtype.WEAKFLOAT: 8,
}
WEAK: Final = frozenset({Dtype.WEAKINT, Dtype.WEAKFLOAT})
FLOATS: Final = frozenset(
    {Dtype.FLOAT16, Dtype.BFLOAT16, Dtype.FLOAT32, Dtype.FLOAT64, Dtype.WEAKFLOAT}
)
UNSIGNED: Final = frozenset({Dtype.UINT8, Dtype.UINT16, Dtype.UINT32, Dtype.UINT64})
SIGNED: Final = frozenset({Dtype.INT8, Dtype.INT16, Dtype.INT32, Dtype.INT64})
INTEGERS: Final = UNSIGNED | SIGNED | {Dtype.WEAKINT}
TO_FLOAT: Final = frozenset({Op.EXP2, Op.LOG2, Op.SIN, Op.SQRT, Op.RECIPROCAL})

_PARENTS: Final[dict[Dtype, tuple[Dtype, ...]]] = {
    Dtype.BOOL: (Dtype.WEAKINT,),
    Dtype.WEAKINT: (Dtype.INT8, Dtype.UINT8),
    Dtype.INT8: (Dtype.INT16,),
    Dtype.UINT8: (Dtype.INT16, Dtype.UINT16),
    Dtype.INT16: (Dtype.INT32,),
    Dtype.UINT16: (Dtype.INT32, Dtype.UINT32),
    Dtype.INT32: (Dtype.INT64,),
    Dtype.UINT32: (Dtype.INT64, Dtype.UINT64),
    Dtype.INT64: (Dtype.WEAKFLOAT,),
    Dtype.UINT64: (Dtype.WEAKFLOAT,),
    Dtype.WEAKFLOAT: (Dtype.FLOAT16, Dtype.BFLOAT16),
    Dtype.FLOAT16: (Dtype.FLOAT32,),
    Dtype.BFLOAT16: (Dtype.FLOAT32,),
    Dtype.FLOAT32: (Dtype.FLOAT64,),
    Dtype.FLOAT64: (),
}
_PRIORITY: Final = {dtype: place for place, dtype in enumerate(_PARENTS)}


class ShapeError(ValueError):
    """A node whose attributes or operands do not fit its operation."""


@cache
def _ancestors(dtype: Dtype) -> frozenset[Dtype]:
    return frozenset({dtype}).union(*(_ancestors(parent) for parent in _PARENTS[dtype]))


@cache
def least_upper_dtype(dtypes: frozenset[Dtype]) -> Dtype:
    """The lowest dtype of the promotion lattice that every one of ``dtypes`` converts to."""
    common = frozenset.intersection(*(_ancestors(dtype) for dtype in dtypes))
    return min(common, key=_PRIORITY.__getitem__)


def _least_upper_float(dtype: Dtype) -> Dtype:
    if dtype is Dtype.WEAKINT:
        return Dtype.WEAKFLOAT
    if dtype in FLOATS:
        return dtype
    return least_upper_dtype(frozenset({dtype, Dtype.FLOAT32}))


def stored_bytes(dtype: Dtype, shape: Shape) -> int:
    """The size of a tensor in memory."""
    return ITEM_BYTES[dtype] * math.prod(shape)


def infer_dtype(node: Node, operands: Sequence[Dtype]) -> Dtype:
    """The dtype of ``node`` from those of its operands. Not for PARAM. Raises ShapeError."""
    op = node.op
    if op in COMPARISON:
        return Dtype.BOOL
    if op in TO_FLOAT:
        return _least_upper_float(operands[0])
    if op is Op.WHERE:
        if operands[0] is not Dtype.BOOL:
            raise ShapeError(f"the condition is {operands[0].name}, not BOOL")
        return least_upper_dtype(frozenset(operands[1:]))
    if op in (Op.SHL, Op.SHR):
        if not INTEGERS.issuperset(operands):
            raise ShapeError("shift operands must be integers")
        return operands[0]
    if op in BINARY or op in TERNARY or op is Op.STACK:
        if not operands:
            raise ShapeError("nothing to stack")
        return least_upper_dtype(frozenset(operands))
    if op in (Op.CONST, Op.IOTA, Op.CAST, Op.BITCAST):
        return _dtype_attr(node.attrs[0])
    return operands[0]


def infer_shape(
    node: Node, dtype: Dtype, dtypes: Sequence[Dtype], shapes: Sequence[Shape]
) -> Shape:
    """The shape of ``node``, whose own dtype is ``dtype``, from its operands' dtypes and shapes.

    Not for PARAM. Raises ShapeError.
    """
    op = node.op
    if op in ELEMENTWISE:
        return _broadcast(shapes)
    if op is Op.CONST:
        return ()
    if op is Op.BITCAST:
        return _bitcast(shapes[0], ITEM_BYTES[dtypes[0]], ITEM_BYTES[dtype])
    if op is Op.GATHER:
        if not shapes[0]:
            raise ShapeError("GATHER from a 0-d tensor")
        return shapes[1] + shapes[0][1:]
    if op is Op.STACK:
        if any(shape != shapes[0] for shape in shapes):
            raise ShapeError("STACK of different shapes")
        return (len(shapes), *shapes[0])
    rule = _MOVES.get(op)
    if rule is not None:
        return rule(_integers(node.attrs), shapes[0] if shapes else ())
    return shapes[0]


def _broadcast(shapes: Sequence[Shape]) -> Shape:
    result = shapes[0]
    for shape in shapes[1:]:
        if shape != result:
            result = _broadcast_two(result, shape)
    return result


def _broadcast_two(one: Shape, other: Shape) -> Shape:
    missing = len(one) - len(other)
    one, other = (1,) * -missing + one, (1,) * missing + other
    result: list[int] = []
    for left, right in zip(one, other, strict=True):
        if left != right and left != 1 and right != 1:
            raise ShapeError(f"shapes {one} and {other} do not broadcast")
        result.append(right if left == 1 else left)
    return tuple(result)


def _bitcast(shape: Shape, old_bytes: int, new_bytes: int) -> Shape:
    if old_bytes == new_bytes or not shape:
        return shape
    last, rest = divmod(shape[-1] * old_bytes, new_bytes)
    if rest:
        raise ShapeError(f"last axis of {shape} does not divide into {new_bytes}-byte elements")
    return (*shape[:-1], last)


def _reshape(dims: Shape, shape: Shape) -> Shape:
    if any(dim < 0 for dim in dims) or math.prod(dims) != math.prod(shape):
        raise ShapeError(f"RESHAPE {shape} to {dims}")
    return dims


def _expand(dims: Shape, shape: Shape) -> Shape:
    if any(dim < 0 for dim in dims):
        raise ShapeError(f"EXPAND by {dims}")
    return dims + shape


def _permute(axes: Shape, shape: Shape) -> Shape:
    if sorted(axes) != list(range(len(shape))):
        raise ShapeError(f"PERMUTE {shape} by {axes}")
    return tuple([shape[axis] for axis in axes])


def _pad(pairs: Shape, shape: Shape) -> Shape:
    starts, sizes = _pairs(pairs, shape)
    for start, size, dim in zip(starts, sizes, shape, strict=True):
        if start < 0 or start + dim > size:
            raise ShapeError(f"PAD {shape} at {starts} of {sizes}")
    return sizes


def _shrink(pairs: Shape, shape: Shape) -> Shape:
    starts, sizes = _pairs(pairs, shape)
    for start, size, dim in zip(starts, sizes, shape, strict=True):
        if start < 0 or size < 0 or start + size > dim:
            raise ShapeError(f"SHRINK {shape} to {sizes} at {starts}")
    return sizes


def _pairs(pairs: Shape, shape: Shape) -> tuple[Shape, Shape]:
    if not pairs or len(pairs) != 2 * len(shape):
        raise ShapeError(f"{len(pairs)} numbers for the axes of {shape}")
    return pairs[0::2], pairs[1::2]


def _flip(flags: Shape, shape: Shape) -> Shape:
    if len(flags) != len(shape) or any(flag not in (0, 1) for flag in flags):
        raise ShapeError(f"FLIP {shape} by {flags}")
    return shape


def _reduce(attrs: Shape, shape: Shape) -> Shape:
    alu, axes = attrs
    if alu not in (0, 1, 2) or not 0 <= axes <= len(shape):
        raise ShapeError(f"REDUCE {alu} over {axes} axes of {shape}")
    return shape[axes:]


def _iota(attrs: Shape, _shape: Shape) -> Shape:
    if attrs[1] < 0:
        raise ShapeError(f"IOTA of length {attrs[1]}")
    return (attrs[1],)


_MOVES: Final[dict[Op, Callable[[Shape, Shape], Shape]]] = {
    Op.RESHAPE: _reshape,
    Op.EXPAND: _expand,
    Op.PERMUTE: _permute,
    Op.PAD: _pad,
    Op.SHRINK: _shrink,
    Op.FLIP: _flip,
    Op.REDUCE: _reduce,
    Op.IOTA: _iota,
}


def _integers(attrs: Sequence[Attr]) -> Shape:
    for value in attrs:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ShapeError(f"{value!r} where an integer belongs")
    return tuple(attrs)  # type: ignore[arg-type]  # each was just checked


def _dtype_attr(value: Attr) -> Dtype:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(Dtype):
        raise ShapeError(f"dtype {value!r} is unknown")
    return Dtype(value)
