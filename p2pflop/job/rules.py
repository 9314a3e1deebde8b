"""The rules for one node, beyond shape and dtype inference. ``validate`` says why each is there."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Final

from p2pflop.job.graph import BINARY, COMPARISON, TERNARY, Dtype, Node, Op
from p2pflop.job.intervals import WEAK_HIGH, WEAK_LOW, Bounds, dtype_bounds, integer_bounds
from p2pflop.job.limits import Limits
from p2pflop.job.shapes import FLOATS, INTEGERS, ITEM_BYTES, WEAK, Shape

MAX_POWER: Final = 64
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


class Refused(Exception):
    """Leaves a check from within; ``validate`` makes a Refusal of it."""


def require(condition: bool, message: str) -> None:
    """Raise Refused with ``message`` unless ``condition`` holds."""
    if not condition:
        raise Refused(message)


def check_dtypes(
    node: Node, dtype: Dtype, operands: Sequence[Dtype], shapes: Sequence[Shape]
) -> None:
    """Refuse operands, attributes or constants that do not belong to ``node``'s operation.

    ``dtype`` is the node's own, ``operands`` and ``shapes`` those of what it refers to.
    """
    op = node.op
    if op in COMPARISON:
        if len({each for each in operands if each not in WEAK}) > 1:
            raise Refused(f"compares {_names(operands)}")
    elif op in BINARY or op in TERNARY or op is Op.STACK:
        values = operands[1:] if op is Op.WHERE else operands
        if op in (Op.SHL, Op.SHR):
            values = [each for each in values if each is not Dtype.UINT32]
        for each in values:
            if each is not dtype and each not in WEAK:
                raise Refused(f"mixes {_names(operands)}")
    _check_kind(op, dtype, operands)
    rule = _RULES.get(op)
    if rule is not None:
        rule(node, dtype, operands, shapes)


def _check_kind(op: Op, dtype: Dtype, operands: Sequence[Dtype]) -> None:
    if op in _INTEGER_ONLY:
        require(dtype in INTEGERS, f"on {dtype.name}: integers only")
    elif op in _NO_FLOATS:
        require(dtype not in FLOATS, f"on {dtype.name}: no floats")
    elif op is Op.FDIV:
        require(dtype in FLOATS, f"on {dtype.name}: floats only")
    elif op is Op.THREEFRY:
        require(set(operands) == {Dtype.UINT64}, f"on {_names(operands)}: UINT64 only")
    elif op in (Op.NEG, Op.TRUNC):
        require(dtype is not Dtype.BOOL, "on BOOL")
    elif op in _NO_WEAK:
        require(dtype not in WEAK, f"on {dtype.name}: it has no storage")


def _names(dtypes: Sequence[Dtype]) -> str:
    return ", ".join(dtype.name for dtype in dtypes[:3])


def _check_const(
    node: Node, dtype: Dtype, _operands: Sequence[Dtype], _shapes: Sequence[Shape]
) -> None:
    value = node.attrs[1]
    require(value is not None, "without a value is not determined")
    if dtype is Dtype.BOOL:
        require(type(value) is bool, f"{value!r} is not a BOOL")
    elif dtype in FLOATS:
        require(isinstance(value, float) and _is_exact(dtype, value), f"{value!r} in {dtype.name}")
    else:
        whole = dtype_bounds(dtype)
        low, high = (WEAK_LOW, WEAK_HIGH) if dtype is Dtype.WEAKINT or not whole else whole[:2]
        inside = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        require(inside, f"{value!r} in {dtype.name}")


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
    require(operands[0] not in WEAK, f"of {operands[0].name}: it has no storage")
    require(Dtype.BOOL not in (dtype, operands[0]), "from or to BOOL")
    same = ITEM_BYTES[dtype] == ITEM_BYTES[operands[0]]
    require(same or bool(shapes[0]), "of a 0-d tensor to another width")


def _check_iota(
    node: Node, dtype: Dtype, _operands: Sequence[Dtype], _shapes: Sequence[Shape]
) -> None:
    length = node.attrs[1]
    require(isinstance(length, int) and length >= 1, f"of length {length}")
    if not isinstance(length, int):
        return
    whole = dtype_bounds(dtype)
    highest = 2 ** _EXACT_FLOAT_BITS[dtype] if whole is None else whole.high
    require(dtype is not Dtype.BOOL and length - 1 <= highest, f"of {length} in {dtype.name}")


def _check_gather(
    _node: Node, dtype: Dtype, operands: Sequence[Dtype], shapes: Sequence[Shape]
) -> None:
    require(dtype not in WEAK, f"of {dtype.name}: it has no storage")
    concrete = operands[1] in INTEGERS and operands[1] not in WEAK
    require(concrete, f"by {operands[1].name}: concrete integers only")
    require(shapes[0][0] >= 1, "from no rows")


def _check_reduce(
    node: Node, _dtype: Dtype, _operands: Sequence[Dtype], _shapes: Sequence[Shape]
) -> None:
    require(node.attrs[1] != 0, "over no axes")


def _check_movement(
    node: Node, _dtype: Dtype, _operands: Sequence[Dtype], _shapes: Sequence[Shape]
) -> None:
    require(bool(node.attrs), "without axes")


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


def check_bounds(
    node: Node, dtype: Dtype, operands: Sequence[Bounds | None], limits: Limits
) -> Bounds | None:
    """The integer bounds of ``node`` from its operands'; refuses what they make dangerous."""
    op = node.op
    if op in (Op.SHL, Op.SHR):
        amount = operands[1]
        width = 8 * ITEM_BYTES[dtype]
        within = amount is not None and amount.low >= 0 and amount.high < width
        require(within, f"by an amount that may be outside 0 to {width - 1}")
    if op in _DIVISIONS and operands[1] is not None:
        low, high, _ = operands[1]
        require((low, high) != (0, 0), "by zero")
        nonzero = low > 0 or high < 0
        require(dtype is not Dtype.WEAKINT or nonzero, "of weak integers by what may be zero")
    if op is Op.POW and dtype in INTEGERS:
        exponent = operands[1]
        small = exponent is not None and exponent.low >= 0 and exponent.high <= MAX_POWER
        require(small, f"of integers by what may be outside 0 to {MAX_POWER}")
    weak = dtype is Dtype.WEAKINT
    require(not weak or op not in (Op.POW, Op.SHL, Op.MULACC), "on weak integers")
    found = integer_bounds(node, dtype, operands)
    if found is not None:
        if found.bits > limits.interval_bits:
            raise Refused(f"bounds of more than {limits.interval_bits} bits")
        inside = found.low >= WEAK_LOW and found.high <= WEAK_HIGH
        require(not weak or inside, "weak integers outside 64 bits")
    return found
