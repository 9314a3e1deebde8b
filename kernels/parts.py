"""Writing to parts of tensors while a function is traced.

tinygrad writes to a view by putting the assignment under everything that was ever computed from
the base, so that a value which a program computed before (and, natively, realized) would see it,
and refuses ``x[i] = v`` where it notices. Nothing is realized while a function is traced, so here
the base and the views of it change, and what was computed from them before does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tinygrad import Tensor
from tinygrad.dtype import dtypes, least_upper_dtype
from tinygrad.tensor import all_tensors
from tinygrad.uop.ops import GroupOp, Ops, UOp

_VIEWS: Final = frozenset({*GroupOp.Movement, Ops.BITCAST, Ops.DETACH})


def renew_views(renewed: Mapping[UOp, UOp], name: str) -> None:  # noqa: ARG001 - tinygrad's own
    """Every tensor that is a key of ``renewed`` or a view of one: now of its new value."""
    for reference in list(all_tensors):
        tensor = reference()
        if tensor is not None:
            base = find_base(tensor.uop, renewed)
            if base is not None:
                tensor.uop = tensor.uop.substitute({base: renewed[base]}, walk=True)


def find_base(uop: UOp, bases: Mapping[UOp, UOp]) -> UOp | None:
    """The node of ``bases`` that ``uop`` is or is a view of."""
    while uop not in bases:
        if uop.op not in _VIEWS:
            return None
        uop = uop.src[0]
    return uop


def set_item(tensor: Tensor, indices: Any, value: Any) -> None:
    """``tensor[indices] = value``, whatever else was computed from ``tensor``."""
    if tensor.dtype in dtypes.weaks:
        raise RuntimeError("cannot set an item of a tensor whose dtype is open: give it a dtype")
    if isinstance(value, Tensor):
        if value.dtype in dtypes.weaks:
            value = value.cast(least_upper_dtype(tensor.dtype, value.dtype))
        if value.dtype != tensor.dtype:
            raise RuntimeError(f"setitem dtype mismatch: {tensor.dtype} != {value.dtype}")
    else:
        value = Tensor(value, device=tensor.device, dtype=tensor.dtype)
    if not _is_stored(tensor.uop):
        if _is_assignment(value.uop):  # x[i] += 1 assigns to a copy of the part first
            value = Tensor(value.uop.src[1].src[1])
        tensor.replace(tensor._getitem(indices, value))
    elif _has_tensors(indices):
        tensor.assign(tensor._getitem(indices, value))
    else:
        view = tensor[indices]
        if not (_is_assignment(value.uop) and value.uop in view.uop.base.src):  # x[i] += 1 is done
            view.assign(value)


def _is_stored(uop: UOp) -> bool:
    """Whether ``uop`` is a buffer, assigned to or not, or a view of one."""
    while uop.op in _VIEWS and not uop.has_buffer_identity():
        uop = uop.src[0]
    return bool(uop.has_buffer_identity(after_ok=True))


def _is_assignment(uop: UOp) -> bool:
    return uop.op is Ops.AFTER and any(source.op is Ops.STORE for source in uop.src[1:])


def _has_tensors(indices: Any) -> bool:
    if isinstance(indices, list) and all(isinstance(index, int) for index in indices):
        return True
    several = indices if isinstance(indices, (tuple, list)) else (indices,)
    return any(isinstance(index, (Tensor, list, tuple)) for index in several)
