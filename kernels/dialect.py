"""tinygrad's words for ours, both ways: dtypes, operations, row gathers and counters.

``gather_rows`` and ``iota`` build exactly what tinygrad builds for ``X[index]`` and ``arange``.
tinygrad interns its nodes, so ``trace`` recognises these patterns by building them again and
comparing identity, and ``lower`` gives back the very graph that tinygrad would have scheduled:
the pattern is fused away as in a native run, and the bytes are the same. ``nn.Embedding`` writes
the lookup in its own way, which is recognised too and lowered as ``X[index]``: one row is picked
either way, so the bytes are equal here as well. ``X.gather(dim, index)`` becomes rows of the flat
table (``flat_gather``), of one element each.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Final

from tinygrad.dtype import DType, dtypes
from tinygrad.uop.ops import Ops, UOp

from p2pflop.job.graph import Dtype, Op

DTYPES: Final[dict[Dtype, DType]] = {
    Dtype.BOOL: dtypes.bool,
    Dtype.INT8: dtypes.int8,
    Dtype.UINT8: dtypes.uint8,
    Dtype.INT16: dtypes.int16,
    Dtype.UINT16: dtypes.uint16,
    Dtype.INT32: dtypes.int32,
    Dtype.UINT32: dtypes.uint32,
    Dtype.INT64: dtypes.int64,
    Dtype.UINT64: dtypes.uint64,
    Dtype.FLOAT16: dtypes.float16,
    Dtype.BFLOAT16: dtypes.bfloat16,
    Dtype.FLOAT32: dtypes.float32,
    Dtype.FLOAT64: dtypes.float64,
    Dtype.WEAKINT: dtypes.weakint,
    Dtype.WEAKFLOAT: dtypes.weakfloat,
}
OUR_DTYPES: Final = {theirs: ours for ours, theirs in DTYPES.items()}

OPS: Final[dict[Op, Ops]] = {
    op: getattr(Ops, op.name) for op in Op if op not in (Op.IOTA, Op.GATHER, Op.ASSIGN)
}
OUR_OPS: Final = {theirs: ours for ours, theirs in OPS.items()}

REDUCTIONS: Final = (Ops.ADD, Ops.MUL, Ops.MAX)
_VIEWS: Final = (Ops.PERMUTE, Ops.EXPAND, Ops.RESHAPE)
_FLAT_INDICES: Final = (
    dtypes.int8,
    dtypes.uint8,
    dtypes.int16,
    dtypes.uint16,
    dtypes.int32,
    dtypes.uint32,
    dtypes.int64,
)
_ARANGE_DTYPES: Final = (dtypes.int32, dtypes.uint32, dtypes.int64, dtypes.weakint)


def iota(dtype: DType, length: int) -> UOp:
    """0, 1, ... ``length - 1``, as ``Tensor.arange(length)`` builds it."""
    return UOp.arange(length, dtype=dtype)


def gather_rows(table: UOp, index: UOp) -> UOp:
    """Rows of ``table`` by ``index`` (any shape of rank 1 or more) along axis 0.

    It is ``Tensor._getitem`` for one tensor index, after negative indices are folded.
    """
    full = index.shape + table.shape
    spread = index.reshape(index.shape + (1,) * len(table.shape)).expand(full)
    mask = spread._one_hot_along_dim(num_classes=table.shape[0], dim=-len(table.shape))
    rows = table.reshape((1,) * len(index.shape) + table.shape)
    return mask.where(rows, 0).sum((len(index.shape),), dtype=table.dtype)


def flat_gather(node: UOp) -> UOp | None:
    """What ``table.gather(dim, index)`` picks, as ``gather_rows`` of the flat table, if ``node`` is
    that. An index outside of the table picks a zero either way."""
    choice = _choice(node)
    if choice is None:
        return None
    equal = _behind_views(choice.src[0])
    for index in _chain(equal.src[0].src[0]):
        if index.shape != node.shape or index.dtype not in _FLAT_INDICES:
            continue
        for table in _chain(choice.src[1]):
            dims = range(len(table.shape)) if len(table.shape) == len(node.shape) else ()
            for dim in dims:
                if _gathers(node, table, dim, index):
                    return _gather_flat(table, dim, index)
    return None


def match_iota(node: UOp) -> tuple[DType, int, int] | None:
    """``(dtype, length, start)`` if ``node`` is an ``arange`` of step one, in whole or up to its
    last addition."""
    if node.op is Ops.ADD and len(node.src) == 2 and node.src[0].op is Ops.REDUCE:
        return _match_arange(node, 0)
    if node.op is Ops.REDUCE:
        return _match_arange(node, 1)
    return None


def match_gather(node: UOp) -> tuple[UOp, UOp] | None:
    """``(table, index)`` if ``node`` is what ``X[index]`` or ``nn.Embedding`` builds from them."""
    choice = _choice(node)
    if choice is None:
        return None
    equal = _behind_views(choice.src[0])
    rows = choice.src[1]
    tables = (rows, rows.src[0]) if rows.op is Ops.RESHAPE else (rows,)
    for table in tables:
        for side in equal.src[0].src:
            index = _find_index(node, table, side)
            if index is not None:
                return table, index
    return None


def _choice(node: UOp) -> UOp | None:
    """The choice by ``a == b`` of which ``node`` is the sum over one axis."""
    if node.op is not Ops.REDUCE or node.arg != (Ops.ADD, 1):
        return None
    if any(isinstance(size, UOp) for size in node.src[0].shape):
        return None  # a size that depends on a Variable is never compared
    choice = _behind_views(node.src[0])
    if choice.op is not Ops.WHERE:
        return None
    equal = _behind_views(choice.src[0])
    is_equality = equal.op is Ops.CMPNE and equal.src[0].op is Ops.CMPNE
    return choice if is_equality else None


def _gathers(node: UOp, table: UOp, dim: int, index: UOp) -> bool:
    """Whether ``node`` is built as ``Tensor.gather`` builds it."""
    pairs = zip(table.shape, index.shape, strict=True)
    if any(size < wanted for axis, (size, wanted) in enumerate(pairs) if axis != dim):
        return False
    within = (size if axis != dim else None for axis, size in enumerate(index.shape))
    rows = table.shrink_to(tuple(within)).unsqueeze(-1).transpose(-1, dim)
    mask = index.unsqueeze(-1)._one_hot_along_dim(table.shape[dim])
    return mask.where(rows, 0).sum(-1, dtype=table.dtype) is node


def _gather_flat(table: UOp, dim: int, index: UOp) -> UOp | None:
    length = prod(table.shape)
    if length > dtypes.int32.max:
        return None
    strides = [prod(table.shape[axis + 1 :]) for axis in range(len(table.shape))]
    # Outside of the table is -1, which is no place in the flat one either.
    inside = (index >= 0) & (index < table.shape[dim])
    places = index.cast(dtypes.int32) * strides[dim]
    for axis, size in enumerate(index.shape):
        if axis != dim and size > 1:
            ones = (1,) * (len(index.shape) - axis - 1)
            places = places + iota(dtypes.int32, size).reshape((size, *ones)) * strides[axis]
    places = inside.where(places, -1)
    picked = gather_rows(table.reshape((length,)), places.reshape((prod(index.shape),)))
    return picked.reshape(index.shape)


def _chain(node: UOp) -> Iterator[UOp]:
    """``node``, and what it is a view of, or the same numbers in another dtype."""
    yield node
    while node.op in (*_VIEWS, Ops.SHRINK, Ops.CAST):
        node = node.src[0]
        yield node


def _find_index(node: UOp, table: UOp, side: UOp) -> UOp | None:
    rank = len(node.shape) - len(table.shape) + 1
    if rank < 1 or not table.shape:
        return None
    while side.op in _VIEWS:
        side = side.src[0]
        if side.shape == node.shape[:rank] and dtypes.is_int(side.dtype):
            built = (gather_rows(table, side), _embed(table, side))
            if any(form is node for form in built):
                return side
    return None


def _embed(table: UOp, index: UOp) -> UOp:
    """The rows as ``nn.Embedding`` asks for them: the same values in another order of axes."""
    width = (1,) * (len(table.shape) - 1)
    numbers = iota(dtypes.int32, table.shape[0])
    chosen = numbers.eq(index.reshape((*index.shape, 1)))
    rows = chosen.reshape(chosen.shape + width).where(table, 0)
    return rows.sum((len(index.shape),), dtype=table.dtype)


def _behind_views(node: UOp) -> UOp:
    while node.op in _VIEWS:
        node = node.src[0]
    return node


def _match_arange(node: UOp, start: int) -> tuple[DType, int, int] | None:
    if len(node.shape) != 1 or node.dtype not in _ARANGE_DTYPES:
        return None
    if isinstance(node.shape[0], UOp) or node.shape[0] < 2:
        return None
    whole = iota(node.dtype, node.shape[0])
    built = whole.src[0] if start else whole
    return (node.dtype, node.shape[0], start) if built is node else None
