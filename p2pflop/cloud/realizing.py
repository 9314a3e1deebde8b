"""The hooks in tinygrad: what is realized on ``CLOUD`` is sent as a graph, and run by its number.

tinygrad turns what is realized into kernels in ``create_linear_with_vars`` and calls them one by
one by the rules of ``pm_exec``. Here, what is on our device becomes a single call of a "custom
function" whose name is the key of its graph, and one more rule executes it. Under ``TinyJit`` the
call is captured like any kernel. ``get_call_kernels`` and ``get_call_outs_ins`` are asked about
calls, and know of ours. ``Tensor._buffer`` takes a tensor that is on no device, such as an
``arange``, to the host's: here to ours, which has the class's bytes and needs no compiler. All five
are private to tinygrad: its version is pinned, and a test says which of them has changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import tinygrad.engine.jit
import tinygrad.engine.realize as engine
import tinygrad.tensor
from tinygrad.device import Buffer, Device
from tinygrad.dtype import AddrSpace
from tinygrad.helpers import CAPTURING
from tinygrad.tensor import Tensor
from tinygrad.uop.ops import Ops, PatternMatcher, UOp, UPat

from p2pflop.cloud.device import cloud, is_cloud
from p2pflop.cloud.inlining import inline
from p2pflop.cloud.process import LOCK
from p2pflop.cloud.stages import CopyStage, GraphStage, cut
from p2pflop.errors import JobError
from p2pflop.job.commands import Place, Run
from p2pflop.kernels.session_export import RealizeGraph, export_realize, root_buffer

PREFIX: Final = "cloud:"
_CPU: Final = "CPU"
Linear = tuple[UOp, dict[str, int]]

_create: Final = tinygrad.tensor.create_linear_with_vars
_kernels: Final = engine.get_call_kernels
_outs_ins: Final = engine.get_call_outs_ins
_buffer: Final = Tensor._buffer


@dataclass(slots=True)
class Program:
    """A SINK, and its graph for all values of its Variables; where there is none, its graphs: one
    for each choice of values.

    ``slots`` are those of its buffers and ``variables`` those of its Variables, in the order in
    which the call has them as arguments; ``outs`` and ``ins`` number the buffers that are written,
    and that are read by what writes to themselves.
    """

    sink: UOp
    slots: tuple[int, ...]
    variables: tuple[UOp, ...]
    outs: tuple[int, ...]
    ins: tuple[int, ...]
    graphs: dict[tuple[int, ...], RealizeGraph | None] = field(default_factory=dict)

    def graph(self, values: tuple[int, ...]) -> RealizeGraph:
        """The graph for these values. Raises JobError."""
        if self.variables and () not in self.graphs:
            self.graphs[()] = _symbolic(self)
        found = self.graphs.get(()) or self.graphs.get(values)
        if found is None:
            pairs = zip(self.variables, values, strict=True)
            given = {variable: UOp.const(value, variable.dtype) for variable, value in pairs}
            found = self.graphs[values] = export_realize(self.sink.substitute(given))
        return found


def _symbolic(program: Program) -> RealizeGraph | None:
    """One graph for all values. There is none in a class that is no CPU's, or if it is not linear
    in them."""
    leased = cloud().session.leased
    if leased is None or not leased.dev.startswith(_CPU):
        return None
    try:
        return export_realize(program.sink, program.variables)
    # Where tinygrad compares a size that depends on a Variable it raises whatever it likes.
    except Exception:  # noqa: BLE001
        return None


@dataclass(slots=True)
class _Ready:
    """A call whose buffers are always the same: where they were when it was last bound."""

    buffers: list[Buffer]
    regions: list[Any]
    binding: int
    values: tuple[int, ...]
    epoch: int

    def holds(self, epoch: int) -> bool:
        """Whether the buffers are where they were, and the binding is there."""
        return self.epoch == epoch and self.regions == [
            buffer._bufs.get(buffer.device) for buffer in self.buffers
        ]


_programs: dict[str, Program] = {}
_ready: weakref.WeakKeyDictionary[UOp, _Ready] = weakref.WeakKeyDictionary()


def install() -> None:
    """Put the hooks in."""
    if tinygrad.tensor.create_linear_with_vars is create_linear:
        return
    tinygrad.tensor.create_linear_with_vars = create_linear
    custom = UPat(Ops.CUSTOM_FUNCTION, name="ast")
    rule = (UPat(Ops.CALL, src=(custom,), name="call", allow_any_len=True), _execute)
    engine.pm_exec = PatternMatcher([rule]) + engine.pm_exec
    engine.get_call_kernels = _call_kernels
    engine.get_call_outs_ins = _call_outs_ins
    tinygrad.engine.jit.get_call_outs_ins = _call_outs_ins
    Tensor._buffer = _buffer_of


def _buffer_of(tensor: Tensor) -> Buffer:
    nowhere = tensor.uop.device is None and is_cloud(Device.DEFAULT)
    return _buffer(tensor.clone(Device.DEFAULT) if nowhere else tensor)


def create_linear(call: UOp) -> Linear:
    """``create_linear_with_vars`` with what is on ``CLOUD`` as calls of ours. Raises JobError."""
    buffers = call.src[1:]
    if call.op is not Ops.CALL or not any(_touches_cloud(buffer.device) for buffer in buffers):
        linear: Linear = _create(call)
        return linear
    if any(isinstance(buffer.device, tuple) for buffer in buffers):
        raise JobError(
            "a tensor that is sharded over several devices cannot be in the cloud",
            hint="Leave out shard(): CLOUD:1 and so on are one machine's anyway.",
        )
    staged = cut(inline(call.src[0]), buffers)
    variables = dict(_bound(buffer) for buffer in buffers if buffer.is_bound_var)
    calls: list[UOp] = []
    for stage in staged.stages:
        match stage:
            case CopyStage(target, source):
                copy = source.param_like(1).copy_to_device(target.device)
                calls += _captured([copy.call(target, source)])
            case GraphStage(sink, True):
                calls += _captured([_call(sink, staged.buffers)])
            case GraphStage(sink, False):
                made, more = _create(sink.call(*staged.buffers))
                calls += made.src
                variables |= more
    return UOp(Ops.LINEAR, src=tuple(calls)), variables


def _captured(calls: list[UOp]) -> list[UOp]:
    """``calls``, or none if a TinyJit has them now."""
    if not engine.capturing or not CAPTURING:
        return calls
    engine.capturing[0].add_linear(UOp(Ops.LINEAR, src=tuple(calls)), {})
    return []


def _touches_cloud(device: object) -> bool:
    return any(map(is_cloud, device)) if isinstance(device, tuple) else is_cloud(device)


def _bound(variable: UOp) -> tuple[str, int]:
    name, value = variable.unbind()
    return name.expr, value


def _call(sink: UOp, buffers: Sequence[UOp]) -> UOp:
    """The call of a graph in the cloud. Raises JobError for what cannot travel, here and now."""
    name = PREFIX + sink.key.hex()
    with LOCK:
        program = _programs.get(name)
        if program is None:
            program = _programs[name] = _program(sink)
        bound = [buffers[variable.arg.slot] for variable in program.variables]
        program.graph(tuple(value.unbind()[1] for value in bound))
    arguments = [buffers[slot] for slot in program.slots]
    return UOp.custom_function(name).call(*arguments, *bound)


def _program(sink: UOp) -> Program:
    params = [node for node in sink.toposort() if node.op is Ops.PARAM]
    slots = tuple(sorted({p.arg.slot for p in params if p.addrspace is not AddrSpace.ALU}))
    variables = {p.arg.slot: p for p in params if p.addrspace is AddrSpace.ALU}
    outs, ins = set(), set()
    for root in sink.src:
        slot = root_buffer(root).arg.slot
        outs.add(slot)
        values = [source.src[1] for source in root.src[1:] if source.op is Ops.STORE]
        read = UOp.sink(*values).toposort(gate=lambda node: node.op is not Ops.AFTER)
        if any(node.op is Ops.PARAM and node.arg.slot == slot for node in read):
            ins.add(slot)
    return Program(
        sink,
        slots,
        tuple(variables[slot] for slot in sorted(variables)),
        tuple(slots.index(slot) for slot in sorted(outs)),
        tuple(slots.index(slot) for slot in sorted(ins)),
    )


def _program_of(call: UOp) -> Program | None:
    ast = call.src[0]
    is_ours = ast.op is Ops.CUSTOM_FUNCTION and str(ast.arg).startswith(PREFIX)
    return _programs[ast.arg] if is_ours else None


def _call_kernels(call: UOp) -> list[tuple[str, UOp]]:
    # None that tinygrad could count or print: ``counters`` does when the provider tells.
    return [] if _program_of(call) is not None else _kernels(call)


def _call_outs_ins(call: UOp) -> tuple[tuple[int, ...], tuple[int, ...]]:
    program = _program_of(call)
    return (program.outs, program.ins) if program is not None else _outs_ins(call)


def _execute(ctx: Any, call: UOp, ast: UOp) -> list[float | None] | None:
    """The rule of ``pm_exec``."""
    if not str(ast.arg).startswith(PREFIX):
        return None
    place = cloud()
    with LOCK:
        ready = _ready.get(call)
        if ready is None or not ready.holds(place.memory.epoch):
            ready = _bind(ctx, call, _programs[ast.arg])
        place.session.run(Run(ready.binding, ready.values), wait=ctx.wait)
    return []


def _bind(ctx: Any, call: UOp, program: Program) -> _Ready:
    arguments = call.src[1:]
    values = tuple(
        ctx.var_vals.get(bound.src[0].expr, bound.unbind()[1])
        for bound in arguments[len(program.slots) :]
    )
    graph = program.graph(values)
    resolved = [_resolve(uop, ctx.input_uops) for uop in arguments[: len(program.slots)]]
    buffers = [uop.buffer.ensure_allocated() for uop in resolved]
    regions = [buffer.get_buf(buffer.device) for buffer in buffers]
    where = dict(zip(program.slots, regions, strict=True))
    places: tuple[Place, ...] = tuple(
        (where[slot].buffer, where[slot].offset_bytes) for slot in graph.slots
    )
    memory = cloud().memory
    memory.define(graph.open.hash, graph.open.encoded)
    binding = memory.bind(graph.open.hash, places)
    given = values if graph.open.ranges else ()
    ready = _Ready(buffers, regions, binding, given, memory.epoch)
    if not values and all(a is b for a, b in zip(resolved, arguments, strict=False)):
        _ready[call] = ready
    return ready


def _resolve(uop: UOp, inputs: Sequence[UOp]) -> UOp:
    """An argument of a call, with the inputs of a TinyJit in their places."""
    if uop.op is Ops.BUFFER:
        return uop
    if uop.op is Ops.PARAM:
        return inputs[uop.arg.slot]
    given = {node: inputs[node.arg.slot] for node in uop.toposort() if node.op is Ops.PARAM}
    return uop.substitute(given)
