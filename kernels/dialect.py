"""tinygrad's words for ours, both ways: dtypes, operations, row gathers and counters.

``gather_rows`` and ``iota`` build exactly what tinygrad builds for ``X[index]`` and ``arange``.
tinygrad interns its nodes, so ``trace`` recognises these patterns by building them again and
comparing identity, and ``lower`` gives back the very graph that tinygrad would have scheduled:
the pattern is fused away as in a native run, and the bytes are the same. ``nn.Embedding`` writes
the lookup in its own way, which is recognised too and lowered as ``X[index]``: one row is picked
either way, so the bytes are equal here as well.
"""

from __future__ import annotations

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
    op: getattr(Ops, op.name) for op in Op if op not in (Op.IOTA, Op.GATHER)
}
OUR_OPS: Final = {theirs: ours for ours, theirs in OPS.items()}

REDUCTIONS: Final = (Ops.ADD, Ops.MUL, Ops.MAX)
_VIEWS: Final = (Ops.PERMUTE, Ops.EXPAND, Ops.RESHAPE)
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
    if node.op is not Ops.REDUCE or node.arg != (Ops.ADD, 1):
        return None
    choice = _behind_views(node.src[0])
    if choice.op is not Ops.WHERE:
        return None
    equal = _behind_views(choice.src[0])
    if equal.op is not Ops.CMPNE or equal.src[0].op is not Ops.CMPNE:
        return None
    rows = choice.src[1]
    tables = (rows, rows.src[0]) if rows.op is Ops.RESHAPE else (rows,)
    for table in tables:
        for side in equal.src[0].src:
            index = _find_index(node, table, side)
            if index is not None:
                return table, index
    return None


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
    if len(node.shape) != 1 or node.dtype not in _ARANGE_DTYPES or node.shape[0] < 2:
        return None
    whole = iota(node.dtype, node.shape[0])
    built = whole.src[0] if start else whole
    return (node.dtype, node.shape[0], start) if built is node else None
