"""Shape, dtype and interval inference against tinygrad's own, node by node on random graphs."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad import Tensor
from tinygrad.dtype import dtypes as tiny_dtypes
from tinygrad.uop.ops import Ops, UOp, shape_to_shape_arg
from tinygrad.uop.spec import spec_tensor

from p2pflop.job.graph import BINARY, MOVEMENT, TERNARY, UNARY, Attr, Dtype, Node, Op
from p2pflop.job.intervals import Bounds, dtype_bounds, integer_bounds
from p2pflop.job.limits import DEFAULT_LIMITS
from p2pflop.job.rules import Refused, check_bounds, check_dtypes
from p2pflop.job.shapes import (
    ITEM_BYTES,
    WEAK,
    Shape,
    ShapeError,
    infer_dtype,
    infer_shape,
    least_upper_dtype,
)

TINY = {dtype: getattr(tiny_dtypes, dtype.name.lower()) for dtype in Dtype}
OURS = {theirs: ours for ours, theirs in TINY.items()}
REDUCTIONS = (Ops.ADD, Ops.MUL, Ops.MAX)
STORED = [dtype for dtype in Dtype if dtype not in WEAK]
OPS = [
    *sorted(MOVEMENT | UNARY | BINARY | TERNARY),
    Op.CAST,
    Op.BITCAST,
    Op.REDUCE,
    Op.STACK,
    Op.CONTIGUOUS,
]


class Built:
    """A random graph as ours and as tinygrad's: one entry a node."""

    def __init__(self) -> None:
        self.dtypes: list[Dtype] = []
        self.shapes: list[Shape] = []
        self.bounds: list[Bounds | None] = []
        self.theirs: list[Any] = []

    def add(self, dtype: Dtype, shape: Shape, bounds: Bounds | None, theirs: Any) -> None:
        self.dtypes.append(dtype)
        self.shapes.append(shape)
        self.bounds.append(bounds)
        self.theirs.append(theirs)


def add_param(built: Built, dtype: Dtype, shape: Shape) -> None:
    slot = len(built.theirs)
    theirs = UOp.param(slot, TINY[dtype], shape, "CPU")
    built.add(dtype, shape, dtype_bounds(dtype), theirs)


def add_const(built: Built, dtype: Dtype, value: float) -> None:
    node = Node(Op.CONST, (int(dtype), value))
    built.add(dtype, (), integer_bounds(node, dtype, ()), UOp.const(value, TINY[dtype]))


@st.composite
def attributes(draw: st.DrawFn, op: Op, shape: Shape) -> tuple[Attr, ...]:
    """Mostly what fits ``shape``, sometimes what does not."""
    rank = len(shape)
    wild = draw(st.integers(0, 7)) == 0
    if op in (Op.CAST, Op.BITCAST):
        return (int(draw(st.sampled_from(Dtype))),)
    if op is Op.REDUCE:
        return draw(st.integers(0, 2)), draw(st.integers(0, rank + wild))
    if op is Op.PERMUTE:
        axes = tuple(draw(st.permutations(range(rank))))
        return (*axes[:-1], 0) if wild and rank else axes
    if op is Op.FLIP:
        return tuple(draw(st.integers(0, 1)) for _ in range(rank + wild))
    if op is Op.EXPAND:
        return tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    if op is Op.RESHAPE:
        if wild:
            return tuple(draw(st.lists(st.integers(-1, 6), max_size=3)))
        return draw(st.sampled_from([shape, (1, *shape), (math.prod(shape),), (*shape, 1)]))
    if op is Op.PAD:
        starts = [draw(st.integers(-wild, 2)) for _ in shape]
        ends = [draw(st.integers(-wild, 2)) for _ in shape]
        triples = zip(starts, shape, ends, strict=True)
        return tuple(each for start, dim, end in triples for each in (start, start + dim + end))
    if op is Op.SHRINK:
        starts = [draw(st.integers(-wild, dim)) for dim in shape]
        sizes = [
            draw(st.integers(-wild, max(0, dim - start) + wild))
            for start, dim in zip(starts, shape, strict=True)
        ]
        return tuple(each for pair in zip(starts, sizes, strict=True) for each in pair)
    return ()


def build_theirs(node: Node, sources: list[Any]) -> Any:
    """The same operation as tinygrad's own node. Raises whatever tinygrad raises."""
    op, attrs = node.op, node.attrs
    theirs = getattr(Ops, op.name)
    if op in (Op.RESHAPE, Op.EXPAND):
        return UOp(theirs, src=(*sources, shape_to_shape_arg(attrs)))
    if op in (Op.PAD, Op.SHRINK):
        halves = (shape_to_shape_arg(attrs[0::2]), shape_to_shape_arg(attrs[1::2]))
        return UOp(theirs, src=(*sources, *halves))
    argument: Any = None
    if op is Op.PERMUTE:
        argument = attrs
    elif op is Op.FLIP:
        argument = tuple(bool(flag) for flag in attrs)
    elif op in (Op.CAST, Op.BITCAST):
        argument = TINY[Dtype(int(attrs[0] or 0))]
    elif op is Op.REDUCE:
        argument = (REDUCTIONS[int(attrs[0] or 0)], attrs[1])
    return UOp(theirs, src=tuple(sources), arg=argument)


def infer(node: Node, dtypes: list[Dtype], shapes: list[Shape]) -> tuple[Dtype, Shape] | None:
    try:
        dtype = infer_dtype(node, dtypes)
        return dtype, infer_shape(node, dtype, dtypes, shapes)
    except ShapeError:
        return None


def infer_theirs(node: Node, sources: list[Any]) -> tuple[Dtype, Shape, Any] | None:
    try:
        theirs = build_theirs(node, sources)
        return OURS[theirs.dtype], theirs.shape, theirs
    except (RuntimeError, ValueError, IndexError, AssertionError, ZeroDivisionError):
        return None


def is_left_to_rules(node: Node, shape: Shape) -> bool:
    """PAD and SHRINK of a 0-d tensor: tinygrad takes them, the wire format has no such thing."""
    return node.op in (Op.PAD, Op.SHRINK) and not shape


@settings(max_examples=300)
@given(st.data())
def test_inference_agrees_with_tinygrad(data: st.DataObject) -> None:
    built = Built()
    for _ in range(2):
        shape = data.draw(st.sampled_from([(), (1,), (4,), (2, 4), (1, 4), (3, 2, 4), (0, 4)]))
        add_param(built, data.draw(st.sampled_from(STORED)), shape)
    add_const(built, Dtype.WEAKINT, data.draw(st.integers(-9, 9)))
    add_const(built, Dtype.WEAKFLOAT, 0.5)
    add_const(built, Dtype.BOOL, True)
    for _ in range(data.draw(st.integers(1, 10))):
        op = data.draw(st.sampled_from(OPS))
        count = 2 if op in BINARY else 3 if op in TERNARY else 1
        if op is Op.STACK:
            count = data.draw(st.integers(1, 3))
        refs = tuple(data.draw(st.integers(0, len(built.theirs) - 1)) for _ in range(count))
        node = Node(op, data.draw(attributes(op, built.shapes[refs[0]])), refs)
        operands = [built.dtypes[ref] for ref in refs]
        around = [built.shapes[ref] for ref in refs]
        found = infer(node, operands, around)
        sources = [built.theirs[ref] for ref in refs]
        theirs = infer_theirs(node, sources)
        weak_bitcast = op is Op.BITCAST and not WEAK.isdisjoint(
            {*operands, Dtype(int(node.attrs[0] or 0))}
        )
        if weak_bitcast or is_left_to_rules(node, around[0]):
            continue
        unequal_stack = op is Op.STACK and any(shape != around[0] for shape in around)
        if unequal_stack:  # tinygrad's shape does not look, its spec does
            assert found is None
            continue
        assert found == (None if theirs is None else theirs[:2]), node
        if found is None or theirs is None:
            continue
        dtype, shape = found
        try:
            check_dtypes(node, dtype, operands, around)
            bounds = check_bounds(node, dtype, [built.bounds[ref] for ref in refs], DEFAULT_LIMITS)
        except Refused:
            continue
        assert spec_tensor.rewrite(theirs[2]) is True, node
        if len(shape) > 8 or math.prod(shape) > 10**6:
            continue
        if bounds is not None:
            low, high = theirs[2]._min_max  # what its compiler computes with
            assert max(int(low).bit_length(), int(high).bit_length()) <= bounds.bits, node
        built.add(dtype, shape, bounds, theirs[2])


def test_promotion_agrees_with_tinygrad() -> None:
    from tinygrad.dtype import least_upper_dtype as theirs

    for one in Dtype:
        for other in Dtype:
            for third in (one, Dtype.UINT64, Dtype.FLOAT16):
                found = least_upper_dtype(frozenset({one, other, third}))
                assert TINY[found] is theirs(TINY[one], TINY[other], TINY[third])


def test_item_sizes_agree_with_tinygrad() -> None:
    for dtype in STORED:
        assert ITEM_BYTES[dtype] == TINY[dtype].itemsize


@given(st.sampled_from([(5,), (5, 3), (5, 3, 2)]), st.sampled_from([(), (4,), (2, 3)]))
def test_gather_has_the_shape_of_an_indexed_tensor(table: Shape, index: Shape) -> None:
    ours = infer_shape(Node(Op.GATHER, (), (0, 1)), Dtype.FLOAT32, [], [table, index])
    rows = Tensor.empty(*table)[Tensor.empty(*(index or (1,)), dtype=tiny_dtypes.int32)]
    assert ours == (rows.shape if index else rows.shape[1:])


@settings(max_examples=300)
@given(st.data())
def test_integers_stay_within_their_bounds(data: st.DataObject) -> None:
    whole = dtype_bounds(Dtype.INT32)
    assert whole is not None
    values: list[int] = []
    bounds: list[Bounds | None] = []
    for _ in range(3):
        value = data.draw(st.integers(whole.low, whole.high) | st.integers(-3, 40))
        is_const = data.draw(st.booleans())
        node = Node(Op.CONST, (int(Dtype.INT32), value))
        values.append(value)
        bounds.append(integer_bounds(node, Dtype.INT32, ()) if is_const else whole)
    for _ in range(data.draw(st.integers(1, 8))):
        op = data.draw(st.sampled_from(sorted(EVALUATE)))
        one, other = (data.draw(st.integers(0, len(values) - 1)) for _ in range(2))
        found = integer_bounds(
            Node(op, (), (one, other)), Dtype.INT32, [bounds[one], bounds[other]]
        )
        value = EVALUATE[op](values[one], values[other])
        if value is None:
            continue
        values.append((value - whole.low) % 2**32 + whole.low)
        bounds.append(found)
        assert found is not None
        assert found.low <= values[-1] <= found.high, op


def truncated(one: int, other: int) -> int:
    return abs(one) // abs(other) * (1 if (one < 0) == (other < 0) else -1)


EVALUATE: dict[Op, Any] = {
    Op.ADD: lambda one, other: one + other,
    Op.SUB: lambda one, other: one - other,
    Op.MUL: lambda one, other: one * other,
    Op.MAX: max,
    Op.AND: lambda one, other: one & other,
    Op.OR: lambda one, other: one | other,
    Op.XOR: lambda one, other: one ^ other,
    Op.SHL: lambda one, other: one << other if 0 <= other < 32 else None,
    Op.SHR: lambda one, other: one >> other if 0 <= other < 32 else None,
    Op.CDIV: lambda one, other: truncated(one, other) if other else None,
    Op.CMOD: lambda one, other: one - other * truncated(one, other) if other else None,
    Op.FLOORDIV: lambda one, other: one // other if other else None,
    Op.FLOORMOD: lambda one, other: one % other if other else None,
}
