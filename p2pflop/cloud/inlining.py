"""Functions of tinygrad (``@function``, ``callify``) put in where they are called.

A FUNCTION gives values; a CALL of a SINK, which a precompiled function and ``callify`` leave, says
what is stored into its arguments. The PARAMs of either are numbered by its own arguments, so this
comes before anything that looks at PARAMs.
"""

from __future__ import annotations

from typing import Final

from tinygrad.uop.ops import Ops, PatternMatcher, UOp, UPat, graph_rewrite


def inline(body: UOp) -> UOp:
    """``body`` without functions; calls of kernels stay."""
    if not any(node.op in (Ops.FUNCTION, Ops.CALL) for node in body.toposort(enter_calls=False)):
        return body
    return graph_rewrite(body, _FUNCTIONS, name="inline functions")


def _given(body: UOp, arguments: tuple[UOp, ...]) -> UOp:
    params = [node for node in body.toposort(enter_calls=False) if node.op is Ops.PARAM]
    given = {param: arguments[param.arg.slot] for param in params if param.arg.slot >= 0}
    return body.substitute(given, walk=True)


def _stored(after: UOp, call: UOp) -> UOp | None:
    """What a called SINK stores into the tensor that waits for it."""
    sink, *arguments = call.src
    if sink.op is not Ops.SINK or sink.arg is not None:
        return None
    wanted = _flat(after.src[0])
    for item in reversed(_given(sink, tuple(arguments)).src):
        if item.op is Ops.AFTER and _flat(item) is wanted and item.numel() == after.numel():
            return item.reshape(after.shape)
    return None


def _flat(uop: UOp) -> UOp:
    while uop.op in (Ops.RESHAPE, Ops.AFTER):
        uop = uop.src[0]
    return uop


_FUNCTIONS: Final = PatternMatcher(
    [
        (UPat(Ops.FUNCTION, name="call"), lambda call: _given(call.src[0], call.src[1:])),
        (
            UPat(Ops.GETTUPLE, src=(UPat(Ops.TUPLE, name="values"),), name="get"),
            lambda values, get: values.src[get.arg],
        ),
        (UPat(Ops.AFTER, src=(UPat(), UPat(Ops.CALL, name="call")), name="after"), _stored),
    ]
)
