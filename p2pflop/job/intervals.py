"""Bounds on the integers of a graph, so that no compiler meets a number without end.

tinygrad folds and simplifies with Python's unbounded integers: its ``_min_max`` does not wrap at
the width of a dtype, so ``x = x * x`` forty times over keeps it busy for ever. Hence two measures
are carried for every integer or bool node:

- ``low`` and ``high``: what the value can be, wrapped at a concrete dtype's width. Shift amounts
  and divisors are judged by it, and a weak integer, which has no width, must stay in 64 bits;
- ``bits``: how large the bounds may be that tinygrad computes for the same node. Every rule here
  is at least as large as its rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from p2pflop.job.graph import MOVEMENT, Dtype, Node, Op
from p2pflop.job.shapes import INTEGERS, ITEM_BYTES, UNSIGNED

WEAK_BITS: Final = 800
WEAK_LOW: Final = -(2**63)
WEAK_HIGH: Final = 2**64 - 1


class Bounds(NamedTuple):
    """``low`` to ``high`` inclusive, and the size of a compiler's bounds in bits."""

    low: int
    high: int
    bits: int


BOOL_BOUNDS: Final = Bounds(0, 1, 1)


def dtype_bounds(dtype: Dtype) -> Bounds | None:
    """What a concrete integer or bool can be; None for floats. Not for WEAKINT."""
    return _DTYPE_BOUNDS.get(dtype)


def _of_dtype(dtype: Dtype) -> Bounds:
    bits = 8 * ITEM_BYTES[dtype]
    if dtype is Dtype.BOOL:
        return BOOL_BOUNDS
    if dtype is Dtype.WEAKINT:
        return Bounds(-(2 ** (WEAK_BITS - 1)), 2 ** (WEAK_BITS - 1) - 1, WEAK_BITS)
    if dtype in UNSIGNED:
        return Bounds(0, 2**bits - 1, bits)
    return Bounds(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, bits)


_DTYPE_BOUNDS: Final = {dtype: _of_dtype(dtype) for dtype in INTEGERS | {Dtype.BOOL}}


def integer_bounds(node: Node, dtype: Dtype, operands: Sequence[Bounds | None]) -> Bounds | None:
    """Bounds of ``node``, of dtype ``dtype``, from those of its operands (None: a float).

    None if ``node`` is a float. A weak integer's bounds may lie outside ``WEAK_LOW`` to
    ``WEAK_HIGH``: the caller refuses it.
    """
    whole = _DTYPE_BOUNDS.get(dtype)
    if whole is None:
        return None
    found = _by_rule(node, whole, operands)
    if dtype is not Dtype.WEAKINT and (found.low < whole.low or found.high > whole.high):
        return Bounds(whole.low, whole.high, max(found.bits, whole.bits))
    return found


def _by_rule(node: Node, whole: Bounds, operands: Sequence[Bounds | None]) -> Bounds:
    op = node.op
    if op is Op.CONST:
        value = node.attrs[1]
        if not isinstance(value, int):
            return whole
        return Bounds(value, value, value.bit_length() + 1)
    if op is Op.IOTA:
        length = node.attrs[1]
        return Bounds(0, max(0, length - 1), whole.bits) if isinstance(length, int) else whole
    known = [bounds for bounds in operands if bounds is not None]
    if len(known) != len(operands) or not known:
        return whole
    if op in MOVEMENT or op in (Op.CAST, Op.CONTIGUOUS, Op.GATHER):
        return _carry(op, whole, known[0])
    if op in (Op.STACK, Op.MAX, Op.WHERE):
        return _hull(known[1:] if op is Op.WHERE else known, is_max=op is Op.MAX)
    if op is Op.MULACC:
        return _add(_multiply(known[0], known[1]), known[2])
    if op is Op.NEG:
        return Bounds(-known[0].high, -known[0].low, max(known[0].bits, whole.bits) + 1)
    return _binary(op, whole, known[0], known[1]) if len(known) == 2 else whole


def _carry(op: Op, whole: Bounds, source: Bounds) -> Bounds:
    low, high, bits = source
    if op is Op.CAST:
        inside = whole.low <= low and high <= whole.high
        return Bounds(low, high, min(bits, whole.bits)) if inside else whole
    if op in (Op.PAD, Op.GATHER):
        low, high = min(low, 0), max(high, 0)
    return Bounds(low, high, max(bits, whole.bits))


def _binary(op: Op, whole: Bounds, left: Bounds, right: Bounds) -> Bounds:
    if op is Op.ADD:
        return _add(left, right)
    if op is Op.SUB:
        return _add(left, Bounds(-right.high, -right.low, right.bits))
    if op is Op.MUL:
        return _multiply(left, right)
    if op in (Op.AND, Op.OR, Op.XOR):
        return _bitwise(op, whole, left, right)
    if op in (Op.SHL, Op.SHR):
        return _shift(op, whole, left, right)
    if op in (Op.CDIV, Op.FLOORDIV):
        return _divide(whole, left, right)
    if op in (Op.CMOD, Op.FLOORMOD):
        return _remainder(op, whole, left, right)
    return whole


def _hull(known: Sequence[Bounds], *, is_max: bool) -> Bounds:
    low = max(each.low for each in known) if is_max else min(each.low for each in known)
    return Bounds(low, max(each.high for each in known), max(each.bits for each in known))


def _add(left: Bounds, right: Bounds) -> Bounds:
    bits = max(left.bits, right.bits) + 1
    return Bounds(left.low + right.low, left.high + right.high, bits)


def _multiply(left: Bounds, right: Bounds) -> Bounds:
    corners = [one * other for one in left[:2] for other in right[:2]]
    return Bounds(min(corners), max(corners), left.bits + right.bits)


def _bitwise(op: Op, whole: Bounds, left: Bounds, right: Bounds) -> Bounds:
    bits = max(left.bits, right.bits, whole.bits)
    if op is Op.AND:
        highs = [each.high for each in (left, right) if each.low >= 0]
        return Bounds(0, min(highs), bits) if highs else whole._replace(bits=bits)
    bits += 1  # the widest negative number of a signed width has one bit more than the others
    if left.low >= 0 and right.low >= 0:
        width = max(left.high, right.high).bit_length()
        return Bounds(0, 2**width - 1, bits)
    return whole._replace(bits=bits)


def _shift(op: Op, whole: Bounds, left: Bounds, right: Bounds) -> Bounds:
    if not 0 <= right.low <= right.high < 64:
        return whole._replace(bits=max(left.bits, whole.bits))
    amounts = (right.low, right.high)
    if op is Op.SHR:
        corners = [value >> amount for value in left[:2] for amount in amounts]
        return Bounds(min(corners), max(corners), max(left.bits, whole.bits))
    corners = [value << amount for value in left[:2] for amount in amounts]
    return Bounds(min(corners), max(corners), max(left.bits, whole.bits) + right.high)


def _divide(whole: Bounds, left: Bounds, right: Bounds) -> Bounds:
    bits = max(left.bits, whole.bits)
    size = max(abs(left.low), abs(left.high))
    if left.low >= 0 and right.low > 0:
        return Bounds(0, left.high, bits)
    return Bounds(-size, size, bits)


def _remainder(op: Op, whole: Bounds, left: Bounds, right: Bounds) -> Bounds:
    bits = max(left.bits, right.bits, whole.bits)
    size = max(abs(right.low), abs(right.high), 1) - 1
    sign = right if op is Op.FLOORMOD else left  # whose sign the remainder takes
    return Bounds(0 if sign.low >= 0 else -size, 0 if sign.high <= 0 else size, bits)
