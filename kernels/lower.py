"""Lowering: a checked graph becomes a plan for this process's class.

The graph is built node by node as tinygrad tensors over unallocated buffers, with tinygrad's shape
and dtype compared to ours at every node, scheduled once, split where a product would repeat costly
work (``factors``), compiled kernel by kernel, and written down flat. No kernel runs and no input
data is seen. All of it is Python work of seconds, which is why plans are cached.

Of a symbolic graph the sizes are expressions of Variables, as in a script of tinygrad, so that the
kernels, and so the bytes, are those of a native run; tinygrad's shapes are compared with ours where
all Variables are at their highest.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tinygrad import Device, Tensor
from tinygrad.codegen import to_program
from tinygrad.device import Buffer
from tinygrad.dtype import DType
from tinygrad.engine.realize import compile_linear, estimate_uop, get_call_arg_uops
from tinygrad.helpers import SPLIT_REDUCEOP, Context
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.schedule.rangeify import split_reduceop
from tinygrad.uop.ops import Ops, UOp, shape_to_shape_arg

from p2pflop.errors import JobError, P2PFlopError
from p2pflop.job.graph import MOVEMENT, Dtype, Graph, Node, Op
from p2pflop.job.symbolic import CheckedSymbolic, Range
from p2pflop.job.validate import Checked
from p2pflop.kernels.dialect import DTYPES, OPS, REDUCTIONS, gather_rows, iota
from p2pflop.kernels.factors import Splitter
from p2pflop.kernels.plan import (
    FRESH,
    MAX_ARGUMENTS,
    PLAN_VERSION,
    SCRATCH,
    THREAD,
    Call,
    Kernel,
    Plan,
    PlanBuffer,
    Region,
    encode_plan,
)
from p2pflop.kernels.symbols import Symbol, Symbols, at_most, scalar_of, symbols_of

CPU: Final = "CPU"
LONG_SUM: Final = 32_768
"""Terms of a sum from which tinygrad splits it."""
# How tinygrad begins to tell that it cannot order reads and writes of buffers.
_CYCLE: Final = "cycle detected"
_LEAVES: Final = frozenset({Op.PARAM, Op.CONST, Op.IOTA})
_UNSUPPORTED_HINT: Final = "Split the step into smaller phases, or file the graph as a bug."


def lower(
    given: Checked | CheckedSymbolic,
    progress: Callable[[int, int], None] | None = None,
    device: str = CPU,
) -> bytes:
    """The encoded plan of ``given`` for this process's class, whose device is ``device``.

    ``progress(done, total)`` is called after every kernel. Raises JobError if tinygrad cannot
    schedule or compile the graph, or sees another shape or dtype in it than we do.
    """
    is_symbolic = isinstance(given, CheckedSymbolic)
    if is_symbolic and device != CPU:
        raise JobError("only a CPU runs a graph with Variables", hint=_UNSUPPORTED_HINT)
    checked = given.high if isinstance(given, CheckedSymbolic) else given
    symbols = symbols_of(given.symbolic if isinstance(given, CheckedSymbolic) else None)
    collecting = gc.isenabled()
    # Lowering makes millions of small objects that live to its end: a quarter of the time.
    gc.disable()
    try:
        built, linear = _schedule(checked, symbols, device)
        compiled = _compile(linear, device, progress)
        flattener = _Flattener(built, symbols.ranges, on_cpu=device == CPU)
        return encode_plan(flattener.flatten(compiled))
    except P2PFlopError:
        raise
    except RecursionError as error:
        raise JobError("graph is nested too deep to lower", hint=_UNSUPPORTED_HINT) from error
    # Whatever tinygrad or the compiler trips over is a property of this graph in this version.
    except Exception as error:
        raise JobError(
            f"graph cannot be lowered: {type(error).__name__}: {str(error)[:300]}",
            hint=_UNSUPPORTED_HINT,
        ) from error
    finally:
        if collecting:
            gc.enable()


@dataclass(frozen=True, slots=True)
class _Built:
    """A graph as tinygrad tensors: buffers by slot, tensors to realize, which of them are fresh."""

    slots: dict[int, UOp]
    tensors: list[Tensor]
    fresh: list[Tensor]


def _schedule(checked: Checked, symbols: Symbols, device: str) -> tuple[_Built, UOp]:
    """The graph built, and the kernels that compute it in their order."""
    # Else as tinygrad does by itself: where there is a wide table, ``_build`` has split the sums.
    split = int(SPLIT_REDUCEOP and not _has_wide_table(checked))
    with Context(SPLIT_REDUCEOP=split):
        built = _build(checked, symbols, device, in_place=True)
        try:
            linear, variables = Tensor.linear_with_vars(*built.tensors)
        except RuntimeError as error:
            if not str(error).startswith(_CYCLE):
                raise
            if _assigns(checked.graph):
                raise JobError(
                    f"tensors are assigned and read in no order that works: {error}",
                    hint="Realize one of the tensors before the next is assigned.",
                ) from error
            built = _build(checked, symbols, device, in_place=False)
            linear, variables = Tensor.linear_with_vars(*built.tensors)
    if len(variables) > len(symbols.ranges):
        raise JobError("graph has variables, which no graph of ours can have")
    return built, linear


def _build(checked: Checked, symbols: Symbols, device: str, *, in_place: bool) -> _Built:
    """The graph as tensors to realize.

    With ``in_place`` a new value of a slot is computed into the slot and a fresh output into its
    buffer, and what uses that value reads it there: the kernels, and so the bytes, are those of a
    native run that realizes them together. Two states that each need the other's old value cannot
    be ordered like that (tinygrad finds a cycle); without it every new value gets a buffer of its
    own and is copied when nobody needs the old ones any more. A graph that assigns says itself what
    is computed into place, and has no other form.
    """
    graph = checked.graph
    slots, params = _param_buffers(graph, device)
    targets = {out.node: out.slot for out in reversed(graph.outputs) if out.slot is not None}
    kept = _bases(graph) - set(targets) if in_place else set()
    is_wide = _has_wide_table(checked)
    nodes: list[UOp] = []
    for number, node in enumerate(graph.nodes):
        built = _build_node(node, symbols.attrs(number, node), nodes, params)
        if is_wide and node.op is Op.REDUCE:
            built = _split_sum(built)
        shape, dtype = tuple(checked.shapes[number]), DTYPES[Dtype(checked.dtypes[number])]
        if at_most(built.shape) != shape or built.dtype != dtype:
            raise JobError(
                f"node {number} ({node.op.name}) is {built.dtype} {built.shape} to tinygrad, "
                f"{dtype} {shape} by the rules"
            )
        if number in kept:
            built = built.clone(device)
        elif in_place and number in targets and node.op is not Op.ASSIGN:
            built = _stored(params[targets[number]], built)
        nodes.append(built)
    tensors: list[Tensor] = []
    fresh: list[Tensor] = []
    for output in graph.outputs:
        value = nodes[output.node]
        if output.slot is None:
            # A buffer of its own even for a param or for a value that is also state.
            alone = output.node in kept
            kept.discard(output.node)
            tensor = Tensor(value if alone else value.clone(device))
            fresh.append(tensor)
        elif in_place and targets[output.node] == output.slot:
            tensor = Tensor(value)
        else:
            tensor = Tensor(
                _stored(params[output.slot], value if in_place else value.clone(device))
            )
        tensors.append(tensor)
    return _Built(slots, tensors, fresh)


def _has_wide_table(checked: Checked) -> bool:
    """Whether tinygrad would take a gather for a long sum, to be split into two kernels: then it
    is no longer a load, but a look at each row of the table."""
    tables = (node.refs[0] for node in checked.graph.nodes if node.op is Op.GATHER)
    return any(checked.shapes[table][0] >= LONG_SUM for table in tables)


def _split_sum(node: UOp) -> UOp:
    """What tinygrad makes of a sum, or another reduction, if it is long and there are few."""
    with Context(SPLIT_REDUCEOP=1):
        split: UOp | None = split_reduceop(node, node.src[0])
    return node if split is None else split


def _bases(graph: Graph) -> set[int]:
    """The nodes that fresh outputs are, or are views of: realized whole in a native run."""
    found = set()
    for output in graph.outputs:
        number = output.node
        while output.slot is None and graph.nodes[number].op in MOVEMENT:
            number = graph.nodes[number].refs[0]
        if output.slot is None and graph.nodes[number].op not in _LEAVES:
            found.add(number)
    return found


def _assigns(graph: Graph) -> bool:
    return any(node.op is Op.ASSIGN for node in graph.nodes)


def _stored(target: UOp, value: UOp) -> UOp:
    """``target`` once ``value`` is written to it."""
    return target.after(target.store(value))


def _param_buffers(graph: Graph, device: str) -> tuple[dict[int, UOp], dict[int, UOp]]:
    """For each slot its flat buffer, and the buffer in the shape of the param."""
    slots, shaped = {}, {}
    for param in graph.params:
        count = 1
        for dim in param.shape:
            count *= dim
        slots[param.slot] = UOp.new_buffer(device, count, DTYPES[param.dtype])
        shaped[param.slot] = slots[param.slot].reshape(param.shape)
    return slots, shaped


def _build_node(
    node: Node, attrs: tuple[Symbol, ...], nodes: list[UOp], params: dict[int, UOp]
) -> UOp:
    sources = tuple(nodes[ref] for ref in node.refs)
    match node.op:
        case Op.PARAM:
            return params[_integer(attrs[0])]
        case Op.CONST:
            return _constant(DTYPES[Dtype(_integer(attrs[0]))], attrs[1])
        case Op.IOTA:
            return iota(DTYPES[Dtype(_integer(attrs[0]))], _integer(attrs[1]))
        case Op.GATHER:
            return gather_rows(*sources)
        case Op.ASSIGN:
            tensor, view, value = sources
            return tensor.after(view.store(value))
        case Op.RESHAPE | Op.EXPAND:
            return UOp(OPS[node.op], src=(*sources, shape_to_shape_arg(attrs)))
        case Op.PAD | Op.SHRINK:
            starts, sizes = shape_to_shape_arg(attrs[0::2]), shape_to_shape_arg(attrs[1::2])
            return UOp(OPS[node.op], src=(*sources, starts, sizes))
        case _:
            return UOp(OPS[node.op], src=sources, arg=_argument(node))


def _constant(dtype: DType, value: Symbol) -> UOp:
    if value is None:
        return UOp.invalid()
    return value.cast(dtype) if isinstance(value, UOp) else UOp.const(value, dtype)


def _argument(node: Node) -> object:
    """What tinygrad keeps beside the sources of such a node."""
    match node.op:
        case Op.CAST | Op.BITCAST:
            return DTYPES[Dtype(_integer(node.attrs[0]))]
        case Op.PERMUTE:
            return _integers(node)
        case Op.FLIP:
            return tuple(bool(axis) for axis in node.attrs)
        case Op.REDUCE:
            alu, axes = _integers(node)
            return REDUCTIONS[alu], axes
        case _:
            return None


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise JobError(f"{value!r} stands where a graph has an integer")
    return value


def _integers(node: Node) -> tuple[int, ...]:
    return tuple(_integer(value) for value in node.attrs)


def _compile(linear: UOp, device: str, progress: Callable[[int, int], None] | None) -> UOp:
    """``linear`` split and with every kernel compiled. Equal kernels are compiled once."""
    renderer = Device[device].renderer
    if isinstance(renderer, ClangRenderer):  # others contract sums over what would be cut apart
        linear = Splitter(device, renderer).split(linear)
    kernels = {call.src[0].key: call.src[0] for call in linear.src if call.src[0].op is Ops.SINK}
    for done, kernel in enumerate(kernels.values(), start=1):
        to_program(kernel, renderer)
        if progress is not None:
            progress(done, len(kernels))
    return compile_linear(linear)


class _Flattener:
    """Numbers kernels and buffers in the order in which the calls first use them."""

    def __init__(self, built: _Built, ranges: tuple[Range, ...], *, on_cpu: bool) -> None:
        self._on_cpu = on_cpu
        self._ranges = ranges
        self._slot_of = {id(uop.buffer): slot for slot, uop in built.slots.items()}
        self._fresh = [tensor.uop.base.buffer for tensor in built.fresh]
        self._fresh_ids = {id(buffer.base) for buffer in self._fresh}
        self._built = built  # holds the buffers whose ids are keys here
        self._buffers: dict[int, tuple[int, PlanBuffer]] = {}
        self._kernels: dict[bytes, tuple[int, Kernel]] = {}

    def flatten(self, linear: UOp) -> Plan:
        calls = tuple(self._call(call) for call in linear.src)
        outputs = tuple(self._region(buffer) for buffer in self._fresh)
        estimates = [estimate_uop(call) for call in linear.src]
        return Plan(
            version=PLAN_VERSION,
            kernels=tuple(kernel for _, kernel in self._kernels.values()),
            buffers=tuple(buffer for _, buffer in self._buffers.values()),
            calls=calls,
            outputs=outputs,
            flop=sum(at_most((estimate.ops,))[0] for estimate in estimates),
            touched_bytes=sum(at_most((estimate.mem,))[0] for estimate in estimates),
            ranges=self._ranges,
        )

    def _call(self, call: UOp) -> Call:
        program = call.src[0]
        if program.op is not Ops.PROGRAM:
            raise JobError(f"graph needs a {program.op.name}, which a plan cannot hold")
        scalars = tuple(map(scalar_of, program.arg.vars))
        arguments = get_call_arg_uops(call)
        regions = tuple(self._region(arguments[i].buffer) for i in program.arg.globals)
        kernel = self._kernel(program, len(regions), scalars)
        if self._on_cpu:
            return Call(kernel, regions, _threads(program) if THREAD in scalars else 1)
        grid, block = program.arg.launch_dims({})
        return Call(kernel, regions, 1, _three(grid), _three(block or ()))

    def _kernel(self, program: UOp, arguments: int, scalars: tuple[int, ...]) -> int:
        found = self._kernels.get(program.key)
        if found is not None:
            return found[0]
        if arguments > MAX_ARGUMENTS:
            raise JobError(
                f"one kernel of the graph reads {arguments} buffers, {MAX_ARGUMENTS} are possible",
                hint="Call .contiguous() on part of the sum that needs them all.",
            )
        elf = program.to_elf()
        number = len(self._kernels)
        self._kernels[program.key] = number, Kernel(elf.name, elf.lib, arguments, scalars)
        return number

    def _region(self, buffer: Buffer) -> Region:
        base = buffer.base
        found = self._buffers.get(id(base))
        if found is None:
            kind = self._slot_of.get(id(base), FRESH if id(base) in self._fresh_ids else SCRATCH)
            found = len(self._buffers), PlanBuffer(kind, base.nbytes)
            self._buffers[id(base)] = found
        return Region(found[0], buffer.offset, buffer.nbytes)


def _threads(program: UOp) -> int:
    """How often a kernel is called that takes the number of its thread."""
    threads = program.arg.global_size[0]
    if not isinstance(threads, int):
        raise JobError("a kernel's threads depend on a Variable", hint=_UNSUPPORTED_HINT)
    return threads


def _three(dims: tuple[int, ...]) -> tuple[int, ...]:
    """``dims`` as a plan has them: none, or three."""
    return (*dims, 1, 1)[:3] if dims else ()
