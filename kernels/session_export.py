"""The graphs of a session, written down: what one ``realize`` of a script computes, and where to.

tinygrad gives a realize as a CALL of a SINK over PARAMs: every value that is to be kept is
``AFTER(x, STORE(view of x, value))``, and stays so here (``Op.ASSIGN``), since what is computed
into place and what is read from there again decides which kernels there are, and so the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tinygrad.dtype import AddrSpace, dtypes
from tinygrad.uop.ops import GroupOp, Ops, PatternMatcher, UOp, UPat, graph_rewrite

from p2pflop.errors import JobError
from p2pflop.job.graph import Dtype, Graph, GraphParam, Op, Output, encode_graph
from p2pflop.job.limits import MAX_GRAPH_PARAMS, MAX_VARIABLES
from p2pflop.job.session import OpenGraph, open_graph
from p2pflop.job.symbolic import Range, SymbolicGraph, encode_symbolic
from p2pflop.kernels.dialect import OUR_DTYPES
from p2pflop.kernels.export import GATHERS, Exporter
from p2pflop.kernels.refusals import node_fault
from p2pflop.kernels.symbols import changes_of, is_symbolic_shape, linear

_MANY_HINT: Final = "Realize the model in parts."
_ORDER_HINT: Final = "Realize one of the assignments before the other."
_REFUSED_HINT: Final = "Realize it in parts, or write it in another way."


@dataclass(frozen=True, slots=True)
class RealizeGraph:
    """A graph, and which slot of the CALL stands for each of its params."""

    open: OpenGraph
    slots: tuple[int, ...]


def export_realize(sink: UOp, variables: Sequence[UOp] = ()) -> RealizeGraph:
    """The graph of ``sink``, for all values of ``variables``. Raises JobError for what cannot
    travel, or not for all values."""
    sink = graph_rewrite(sink, _PLAIN + GATHERS, name="session graph")
    bound = set(variables)
    found = (node for node in sink.toposort() if node.op is Ops.PARAM and node not in bound)
    params = sorted({node.arg.slot for node in found})
    if len(params) > MAX_GRAPH_PARAMS:
        raise JobError(
            f"one realize takes {len(params)} buffers, {MAX_GRAPH_PARAMS} are possible",
            hint=_MANY_HINT,
        )
    exporter = SessionExporter({slot: number for number, slot in enumerate(params)}, variables)
    exporter.add(sink.src)
    graph = exporter.graph(sink.src)
    data = _encode_symbolic(graph, variables) if variables else encode_graph(graph)
    try:
        return RealizeGraph(open_graph(data), tuple(params))
    except JobError as error:
        raise JobError(error.message, hint=error.hint or _REFUSED_HINT) from None


def _encode_symbolic(graph: Graph, variables: Sequence[UOp]) -> bytes:
    if len(variables) > MAX_VARIABLES:
        raise JobError(f"{len(variables)} Variables, {MAX_VARIABLES} are possible")
    if any(each.dtype != dtypes.weakint or each.arg.multiple_of != 1 for each in variables):
        raise JobError("a Variable that is not of any integer")
    ranges = tuple(Range(int(each.vmin), int(each.vmax)) for each in variables)
    nodes, changes = changes_of(graph.nodes)
    return encode_symbolic(SymbolicGraph(replace(graph, nodes=nodes), ranges, changes))


def _plain_store(store: UOp) -> UOp | None:
    """A STORE of a value that is of its target's shape and dtype."""
    target, value = store.src[:2]
    if value.dtype != target.dtype:
        value = value.cast(target.dtype)
    if not _is_same(value.shape, target.shape):
        value = value._broadcast_to(target.shape)
    return None if value is store.src[1] else store.replace(src=(target, value))


def _is_same(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether shapes are equal; a size that depends on a Variable is equal to itself alone."""
    return len(one) == len(other) and all(
        a is b or (isinstance(a, int) and isinstance(b, int) and a == b)
        for a, b in zip(one, other, strict=True)
    )


def _plain_reduce(reduce: UOp) -> UOp | None:
    """A REDUCE without axes of one element, of which tinygrad makes none by itself: a Variable's
    value may have left them."""
    alu, count = reduce.arg
    sizes = [size for size in reduce.src[0].shape[:count] if isinstance(size, UOp) or size != 1]
    if len(sizes) == count:
        return None
    source = reduce.src[0].reshape((*sizes, *reduce.shape))
    return UOp(Ops.REDUCE, src=(source,), arg=(alu, len(sizes))) if sizes else source


def _plain_shift(shift: UOp) -> UOp | None:
    """A shift by an amount that is certainly less than the width, as it must be to mean anything:
    others are undefined in C, and no graph may hold one."""
    value, amount = shift.src
    bits = 8 * value.dtype.itemsize
    if amount.vmin >= 0 and amount.vmax < bits:
        return None
    return shift.replace(src=(value, amount & (bits - 1)))


_PLAIN: Final = PatternMatcher(
    [
        (UPat((Ops.SHL, Ops.SHR), name="shift"), _plain_shift),
        (UPat(Ops.REDUCE, name="reduce"), _plain_reduce),
        (UPat((Ops.DETACH, Ops.CONTIGUOUS_BACKWARD, Ops.COPY), name="x"), lambda x: x.src[0]),
        (UPat(Ops.STORE, name="store"), _plain_store),
    ]
)


class SessionExporter(Exporter):
    """Writes a graph that assigns. ``numbers`` gives the param of each slot of the CALL. What
    depends on ``variables`` is ``Linear`` in the attributes of its nodes."""

    def __init__(self, numbers: dict[int, int], variables: Sequence[UOp] = ()) -> None:
        super().__init__(self._session_leaf, lambda _: None)
        self._numbers = numbers
        self._variables = {variable: number for number, variable in enumerate(variables)}
        self._params: dict[int, GraphParam] = {}
        self._param_nodes: dict[int, int] = {}
        self._assigned: dict[UOp, int] = {}
        self._assigns: dict[tuple[int, ...], int] = {}

    def graph(self, roots: Sequence[UOp]) -> Graph:
        """All that was written, with the last assignment to each slot as an output."""
        last: dict[int, UOp] = {}
        for root in roots:
            slot = self._numbers[root_buffer(root).arg.slot]
            before = last.get(slot)
            if before is None or before in root.backward_slice:
                last[slot] = root
            elif root not in before.backward_slice and root is not before:
                raise JobError(
                    "two assignments to one tensor that do not follow each other",
                    hint=_ORDER_HINT,
                )
        outputs = tuple(Output(self._assigned[root], slot) for slot, root in sorted(last.items()))
        params = tuple(self._params[number] for number in sorted(self._params))
        return Graph(params, tuple(self.nodes), outputs)

    def _session_leaf(self, buffer: UOp, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        number = self._numbers[buffer.arg.slot]
        if is_symbolic_shape(shape):
            raise JobError("a buffer whose size depends on a Variable")
        if number not in self._params:
            if buffer.dtype not in OUR_DTYPES:
                raise JobError(f"{buffer.dtype} cannot travel", hint="Cast to float16 or bfloat16.")
            self._params[number] = GraphParam(number, Dtype(OUR_DTYPES[buffer.dtype]), shape)
        return number, self._params[number].shape

    def _write_param(self, slot: int) -> int:
        # One node a slot: a view of it must lead to what is assigned.
        if slot not in self._param_nodes:
            self._param_nodes[slot] = super()._write_param(slot)
        return self._param_nodes[slot]

    def _sources(self, uop: UOp) -> tuple[UOp, ...]:
        if self._is_of_variables(uop):
            return ()
        if uop.op is not Ops.AFTER:
            return super()._sources(uop)
        view, value = _effect(uop).src
        return (uop.src[0], view, value)

    def _write(self, uop: UOp, sources: tuple[UOp, ...]) -> int:
        if uop.op is Ops.AFTER:
            return self._write_assign(uop, *sources)
        if self._is_of_variables(uop):
            code = int(OUR_DTYPES[dtypes.weakint])
            return self._emit(Op.CONST, (code, linear(uop, self._variables)))
        fault = node_fault(uop)
        if fault is not None and uop.op is not Ops.PARAM:
            raise JobError(fault[0], hint=fault[1])
        return super()._write(uop, sources)

    def _is_of_variables(self, uop: UOp) -> bool:
        """Whether it is a number that Variables make, such as a place that is compared with."""
        if not self._variables or uop.dtype != dtypes.weakint or uop.shape != ():
            return False
        return any(variable in self._variables for variable in uop.variables())

    def _dims(self, dims: Iterable[object]) -> tuple[int, ...]:
        plain: list[int] = []
        for dim in dims:
            is_symbol = isinstance(dim, UOp) and self._variables
            plain += [linear(dim, self._variables)] if is_symbol else super()._dims([dim])
        return tuple(plain)

    def _write_assign(self, after: UOp, whole: UOp, view: UOp, value: UOp) -> int:
        base = _base(whole)
        tensor = self._assigned.get(base, -1)
        if tensor < 0:
            tensor = self._param_nodes[self._numbers[base.arg.slot]]
        if root_buffer(view) is not root_buffer(after):
            raise JobError(
                "an assignment that waits for one to another tensor cannot travel in a graph",
                hint="Realize one before the other.",
            )
        refs = (tensor, self._index[view], self._index[value])
        if refs not in self._assigns:  # tinygrad has a view wait for a STORE, and its base again
            self._assigns[refs] = self._emit(Op.ASSIGN, (), refs)
        index = self._assigned[after] = self._assigns[refs]
        return self._again(after, tensor, index)

    def _again(self, after: UOp, tensor: int, index: int) -> int:
        """What ``after`` is a view of was ``tensor``; the same view of node ``index``."""
        views = []
        at = self._index[after.src[0]]
        while at != tensor:
            node = self.nodes[at]
            views.append(node)
            (at,) = node.refs
        for node in reversed(views):
            index = self._emit(node.op, node.attrs, (index,))
        return index


def _effect(after: UOp) -> UOp:
    """The STORE of an AFTER. Raises JobError."""
    effect = after.src[1]
    while effect.op is Ops.AFTER and len(effect.src) == 2:
        effect = effect.src[1]
    if len(after.src) != 2 or effect.op is not Ops.STORE or len(effect.src) != 2:
        fault = next(filter(None, (node_fault(source) for source in after.src[1:])), None)
        message, hint = fault or ("a tensor that waits for several others cannot travel", "")
        raise JobError(message, hint=hint)
    return effect


def _base(uop: UOp) -> UOp:
    """The buffer or assignment that ``uop`` is a view of."""
    while uop.op in GroupOp.Movement:
        uop = uop.src[0]
    return uop


def root_buffer(uop: UOp) -> UOp:
    """The PARAM that is assigned to, in part or in whole. Raises JobError if it is none."""
    while uop.op in (*GroupOp.Movement, Ops.AFTER):
        uop = uop.src[0]
    if uop.op is not Ops.PARAM or uop.arg.addrspace is AddrSpace.ALU:
        raise JobError(f"an assignment to {uop.op.name} cannot travel in a graph")
    return uop
