"""What a traced function cannot do, told with the line where it does it and what to write instead.

No value exists while a function is traced, so everything that asks a tensor for one is replaced by
a refusal. What tinygrad can express and a graph cannot, such as custom kernels, is found among the
nodes afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NoReturn

from tinygrad.dtype import dtypes
from tinygrad.uop.ops import Ops, UOp

from p2pflop.errors import JobError
from p2pflop.kernels.dialect import OUR_DTYPES, OUR_OPS
from p2pflop.kernels.places import Places, at, find_place, warn
from p2pflop.kernels.weights import is_disk

HOST_DEVICES: Final = ("PYTHON", "NPY")

_READ_HINT: Final = (
    "Return the tensor in the function's dict instead, {'loss': loss}: its value comes as a row."
)
_BRANCH_HINT: Final = (
    "Compute both and choose: condition.where(a, b). To end the job at a condition, return it and "
    "give trace(stop=...) its name."
)
_SIZE_HINT: Final = (
    "A shape cannot depend on values: keep all elements and mask them, mask.where(x, 0), or give "
    "size=."
)
_MASKED_WRITE_HINT: Final = "Write all of it: x.assign(mask.where(value, x))."
_INDEX_HINT: Final = (
    "A tensor can index a tensor, X[i], but not a Python list, and cannot be the count of a loop."
)
_STEP_HINT: Final = "Use pf.step, or a parameter named step, or pass the number in args."
_KERNEL_HINT: Final = "Write it with ordinary tensor operations: they are fused where it runs."
_HINTS: Final = {"nonzero": _SIZE_HINT, "masked_select": _SIZE_HINT}

_SHOWN: Final = (
    "a tensor is printed while it is traced: once, and without a value. Return it in the "
    "function's dict, {'loss': loss}, to see it at every step"
)
_HANDLED: Final = frozenset(
    {Ops.AFTER, Ops.STORE, Ops.DETACH, Ops.CONTIGUOUS_BACKWARD, Ops.COPY, Ops.BUFFER, Ops.SINK}
)
_DEVICES: Final = frozenset({Ops.UNSHARD, Ops.MSELECT, Ops.MSTACK, Ops.ALLREDUCE, Ops.RANGE})
_KERNELS: Final = frozenset(
    {
        Ops.CALL,
        Ops.FUNCTION,
        Ops.TUPLE,
        Ops.GETTUPLE,
        Ops.CUSTOM,
        Ops.CUSTOMI,
        Ops.CUSTOM_FUNCTION,
        Ops.PROGRAM,
    }
)


def refuse_reading(*_: object, **__: object) -> NoReturn:
    """Stands for what gives a tensor's bytes. Raises JobError."""
    place = find_place()
    called = place.called if place is not None else ""
    raise _needs_value(f".{called}()" if called else "this", _HINTS.get(called, _READ_HINT))


def _needs_value(what: str, hint: str) -> JobError:
    message = f"{what} needs a tensor's value, and no value exists until the job runs"
    return JobError(at(find_place(), message), hint=hint)


def _refusal(what: str, hint: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise _needs_value(what, hint)

    return refuse


def _format(tensor: object, spec: str) -> str:
    if spec:
        raise _needs_value(f"formatting with {spec!r}", _READ_HINT)
    return repr(tensor)


def _shown(represent: Callable[[Any], str]) -> Callable[[Any], str]:
    def show(tensor: Any) -> str:
        warn(None, _SHOWN)
        return represent(tensor)

    return show


def _indexed(get_item: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor._getitem``, which reads and, with a third argument, writes."""

    def get(tensor: Any, indices: Any, *value: Any) -> Any:
        each = indices if isinstance(indices, tuple) else (indices,)
        if any(getattr(index, "dtype", None) == dtypes.bool for index in each):
            hint = _MASKED_WRITE_HINT if value and value[0] is not None else _SIZE_HINT
            raise JobError(at(find_place(), "a bool tensor cannot be an index"), hint=hint)
        return get_item(tensor, indices, *value)

    return get


def replacements(tensor_class: Any) -> dict[str, Any]:
    """Attributes of Tensor to replace while a function is traced."""
    return {
        "_buffer": refuse_reading,
        "linear_with_vars": refuse_reading,
        "__bool__": _refusal("if, while, and, or, not, min, max or in", _BRANCH_HINT),
        "__float__": _refusal("float(tensor)", _READ_HINT),
        "__int__": _refusal("int(tensor)", _READ_HINT),
        "__complex__": _refusal("complex(tensor)", _READ_HINT),
        "__index__": _refusal("a Python index or count", _INDEX_HINT),
        "__array__": _refusal("a numpy array", _READ_HINT),
        "__format__": _format,
        "__repr__": _shown(tensor_class.__repr__),
        "_getitem": _indexed(tensor_class._getitem),
    }


def check_nodes(roots: Iterable[UOp], places: Places, is_known: Callable[[UOp], bool]) -> None:
    """Refuse the first node under ``roots`` that cannot travel, at the line that made or used it.

    ``is_known`` tells whether a BUFFER without memory is one that tracing itself put there.
    """
    order = read_order(roots)
    faults = [(node, fault) for node in order if (fault := node_fault(node))]
    faults = faults or [(node, fault) for node in order if (fault := _buffer_fault(node, is_known))]
    for node, (message, hint) in faults:
        place = places.of(node, _users(node, order)) or find_place()
        raise JobError(at(place, message), hint=hint)


def read_order(roots: Iterable[UOp]) -> list[UOp]:
    """All nodes whose values ``roots`` need, sources first: what is overwritten whole is not."""
    order: dict[UOp, None] = {}
    stack = [(root, False) for root in roots]
    while stack:
        node, ready = stack.pop()
        if node in order:
            continue
        if ready:
            order[node] = None
        else:
            stack.append((node, True))
            stack.extend((source, False) for source in reversed(read_by(node)))
    return list(order)


def read_by(node: UOp) -> tuple[UOp, ...]:
    """The sources whose values ``node`` needs."""
    effect = node.src[1] if node.op is Ops.AFTER and len(node.src) == 2 else None
    if effect is not None and effect.op is Ops.STORE and effect.src[0] is node.src[0]:
        return (effect.src[1],)
    return tuple(node.src)


def _users(node: UOp, order: Iterable[UOp]) -> Iterable[UOp]:
    """What needs ``node``, nearest first."""
    above = {node}
    for user in order:
        if any(source in above for source in user.src):
            above.add(user)
            yield user


def node_fault(node: UOp) -> tuple[str, str] | None:
    """What is wrong with one node, and what to write instead."""
    if node.op in _KERNELS:
        return "a custom kernel or a precompiled function cannot travel in a graph", _KERNEL_HINT
    if node.op in _DEVICES or isinstance(node.device, tuple):
        return "a tensor on several devices cannot travel: a job runs on one", "Leave out shard()."
    if node.op is Ops.AFTER and node.is_bound_var:
        return "a bound Variable cannot travel", _STEP_HINT
    if node.op not in OUR_OPS and node.op not in _HANDLED:
        return f"{node.op.name} cannot travel in a graph", _KERNEL_HINT
    if node.op in (Ops.CAST, Ops.BITCAST) and node.dtype not in OUR_DTYPES:
        return f"{node.dtype} cannot travel", "Cast to float16 or bfloat16."
    return None


def _buffer_fault(node: UOp, is_known: Callable[[UOp], bool]) -> tuple[str, str] | None:
    if node.op is not Ops.BUFFER:
        return None
    if node.is_variable:
        return "a Variable cannot travel", _STEP_HINT
    if str(node.device).startswith("TINYFS"):
        return (
            f"a tensor on {str(node.device)[:80]} is not in memory",
            "Load it before trace: tensor.to('CPU').realize().",
        )
    if is_disk(node):
        return None  # its slices travel as blobs
    if node.realized is None and not is_known(node):
        return (
            f"a tensor of {node.numel()} elements is used but was never given a value",
            "Tensor.empty has no content: use Tensor.zeros, or assign before trace.",
        )
    return None
