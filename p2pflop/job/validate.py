"""Whether a graph from a stranger may be built at all, and whether a work fits its graphs.

tinygrad's own checks are not made for hostile input: graphs that passed them read files, jumped to
chosen addresses or hung the compiler. So everything a graph may contain is said here: operations
of our own table with fixed arity, references that point back, operands of fitting dtypes, shapes
that work out, values in range, and a named limit on everything that grows.

What is refused although tinygrad would take it, and why:

- a constant without a value (tinygrad's Invalid): what it leaves in memory is not determined;
- POW, SHL and MULACC of weak integers, weak integers outside 64 bits, integers whose folded bounds
  grow past ``Limits.interval_bits``: they hang the compiler (``intervals``);
- shifts by amounts that are not provably less than the width: undefined in C. ``amount & 31``
  makes them provable;
- BITCAST from or to a bool or weak dtype, or of a 0-d tensor to another width; THREEFRY on
  anything but uint64; REDUCE, GATHER, CONTIGUOUS and storage of weak dtypes;
- a divisor that is always zero, and a weak one that could be. A concrete divisor that depends on
  data is let through: it cannot be decided here, and dividing by zero ends only the worker, which
  is a process of its own, as the job's fault.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from p2pflop.job.assigns import check_assigns
from p2pflop.job.collection import MAX_COLLECTION_ENTRIES
from p2pflop.job.graph import ELEMENTWISE, Dtype, Graph, GraphParam, Node, Op
from p2pflop.job.intervals import Bounds, dtype_bounds
from p2pflop.job.limits import DEFAULT_LIMITS, Limits
from p2pflop.job.rules import Refused, check_bounds, check_dtypes, require
from p2pflop.job.shapes import (
    ITEM_BYTES,
    WEAK,
    Shape,
    ShapeError,
    infer_dtype,
    infer_shape,
    stored_bytes,
)
from p2pflop.job.spec import (
    MODE_COLLECT,
    MODE_TRACE,
    ROLE_FEED,
    ROLE_INPUT,
    ROLE_SEED,
    ROLE_STATE,
    ROLE_STEP,
    BlobSource,
    FeedSource,
    InitSource,
    Job,
    MemberSource,
    NoSource,
    ResultSource,
    Work,
    WorkParam,
    times_due,
    work_id,
)

__all__ = [
    "DEFAULT_LIMITS",
    "Checked",
    "Limits",
    "Refusal",
    "validate",
    "validate_job",
    "validate_work",
]

SEED_SHAPE: Final = (2,)
STEP_DTYPES: Final = frozenset({Dtype.INT32, Dtype.UINT32, Dtype.INT64, Dtype.UINT64})
_BREAKS: Final = frozenset({Op.PARAM, Op.REDUCE, Op.CONTIGUOUS, Op.GATHER, Op.ASSIGN})


@dataclass(frozen=True, slots=True)
class Checked:
    """A graph that passed ``validate``, with the shape and dtype of every node."""

    graph: Graph
    shapes: tuple[Shape, ...]
    dtypes: tuple[Dtype, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something is not accepted, in words for its author."""

    reason: str


def validate(
    graph: Graph, limits: Limits = DEFAULT_LIMITS, *, assigns: bool = False
) -> Checked | Refusal:
    """Check ``graph`` against every rule and limit. ``assigns``: it is a session's, and may assign.

    Never raises for a graph that came from ``decode_graph`` or that ``encode_graph`` takes.
    """
    try:
        params = _check_params(graph, limits)
        checked = _check_nodes(graph, params, limits)
        _check_outputs(checked, params, limits)
        check_assigns(checked.graph, checked.shapes, checked.dtypes, allowed=assigns)
    except (Refused, ShapeError) as error:
        return Refusal(str(error))
    return checked


def _check_params(graph: Graph, limits: Limits) -> dict[int, GraphParam]:
    require(len(graph.params) <= limits.params, f"{len(graph.params)} params are too many")
    last = -1
    for param in graph.params:
        where = f"param in slot {param.slot}"
        require(param.slot > last, f"{where}: slots do not rise")
        require(param.dtype not in WEAK, f"{where}: {param.dtype.name} cannot be stored")
        _check_stored(where, param.dtype, param.shape, limits)
        last = param.slot
    return {param.slot: param for param in graph.params}


def _check_stored(where: str, dtype: Dtype, shape: Shape, limits: Limits) -> None:
    require(len(shape) <= limits.rank, f"{where}: rank {len(shape)} is over {limits.rank}")
    require(all(0 < dim <= limits.dim for dim in shape), f"{where}: shape {shape} is out of range")
    size_bytes = stored_bytes(dtype, shape)
    require(size_bytes <= limits.stored_bytes, f"{where}: {size_bytes} bytes are too many")


def _check_nodes(graph: Graph, params: dict[int, GraphParam], limits: Limits) -> Checked:
    """The part that grows with the graph: messages are made only when something is refused."""
    require(len(graph.nodes) <= limits.nodes, f"{len(graph.nodes)} nodes are too many")
    shapes: list[Shape] = []
    dtypes: list[Dtype] = []
    bounds: list[Bounds | None] = []
    paths: list[tuple[int, int]] = []
    flop = 0
    for index, node in enumerate(graph.nodes):
        refs = node.refs
        try:
            if refs and not (min(refs) >= 0 and max(refs) < index):
                raise Refused("a reference does not point back")
            operands = [dtypes[ref] for ref in refs]
            around = [shapes[ref] for ref in refs]
            dtype, shape = _infer(node, operands, around, params, limits)
            numel = _count_elements(shape, limits)
            check_dtypes(node, dtype, operands, around)
            found = check_bounds(node, dtype, [bounds[ref] for ref in refs], limits)
            path = _lengthen(node, [paths[ref] for ref in refs], limits)
            if node.op in ELEMENTWISE:
                flop += numel
            elif node.op is Op.REDUCE:
                flop += math.prod(around[0])
            if flop > limits.flop:
                raise Refused(f"more than {limits.flop} FLOP")
        except (Refused, ShapeError) as error:
            raise Refused(f"node {index} ({node.op.name}): {error}") from error
        shapes.append(shape)
        dtypes.append(dtype)
        bounds.append(found)
        paths.append(path)
    return Checked(graph, tuple(shapes), tuple(dtypes))


def _infer(
    node: Node,
    operands: Sequence[Dtype],
    shapes: Sequence[Shape],
    params: dict[int, GraphParam],
    limits: Limits,
) -> tuple[Dtype, Shape]:
    if len(node.attrs) > 2 * limits.rank:
        raise Refused(f"{len(node.attrs)} attributes are too many")
    if len(operands) > limits.stack:
        raise Refused(f"{len(operands)} operands are too many")
    if node.op is Op.PARAM:
        param = params.get(node.attrs[0]) if type(node.attrs[0]) is int else None
        if param is None:
            raise Refused(f"the graph has no param in slot {node.attrs[0]}")
        return param.dtype, param.shape
    dtype = infer_dtype(node, operands)
    return dtype, infer_shape(node, dtype, operands, shapes)


def _count_elements(shape: Shape, limits: Limits) -> int:
    if len(shape) > limits.rank:
        raise Refused(f"rank {len(shape)} is over the limit of {limits.rank}")
    if shape and max(shape) > limits.dim:
        raise Refused(f"shape {shape} is over the limit of a dimension")
    numel = math.prod(shape)
    if numel > limits.numel:
        raise Refused(f"shape {shape} has too many elements")
    return numel


def _lengthen(node: Node, paths: Sequence[tuple[int, int]], limits: Limits) -> tuple[int, int]:
    """Depth and fused chain at ``node``, from those of its operands."""
    depth, chain = 0, 0
    for operand_depth, operand_chain in paths:
        depth = max(depth, operand_depth)
        chain = max(chain, operand_chain)
    if depth >= limits.depth:
        raise Refused(f"deeper than {limits.depth} nodes")
    if node.op in _BREAKS:
        return depth + 1, 0
    if chain >= limits.chain:
        raise Refused(f"a chain of more than {limits.chain} nodes")
    return depth + 1, chain + 1


def _check_outputs(checked: Checked, params: dict[int, GraphParam], limits: Limits) -> None:
    outputs = checked.graph.outputs
    require(0 < len(outputs) <= limits.outputs, f"{len(outputs)} outputs")
    last = -1
    for number, output in enumerate(outputs):
        where = f"output {number}"
        require(0 <= output.node < len(checked.dtypes), f"{where}: no node {output.node}")
        dtype, shape = checked.dtypes[output.node], checked.shapes[output.node]
        require(dtype not in WEAK, f"{where}: {dtype.name} cannot be stored; cast it")
        _check_stored(where, dtype, shape, limits)
        if output.slot is None:
            require(last < 0, f"{where}: fresh outputs stand before written slots")
            continue
        require(output.slot > last, f"{where}: written slots do not rise")
        last = output.slot
        param = params.get(output.slot)
        if param is None:
            raise Refused(f"{where}: the graph has no param in slot {output.slot}")
        same = (param.dtype, param.shape) == (dtype, shape)
        require(
            same, f"{where}: {dtype.name} {shape} for a slot of {param.dtype.name} {param.shape}"
        )


def validate_work(
    work: Work, graphs: Mapping[bytes, Checked], limits: Limits = DEFAULT_LIMITS
) -> Refusal | None:
    """Check that ``work`` fits its graphs, given by their hashes; None if it does."""
    try:
        for slot, param in enumerate(work.params):
            _check_param(f"slot {slot}", param, limits)
        for number, phase in enumerate(work.phases):
            where = f"phase {number}"
            checked = _find(where, phase.graph, graphs)
            _check_table(where, checked, work)
            _check_modes(where, checked, phase.modes)
            for output in checked.graph.outputs:
                if output.slot is not None:
                    is_state = work.params[output.slot].role == ROLE_STATE
                    require(is_state, f"{where} writes slot {output.slot}, which is not state")
        for slot, param in enumerate(work.params):
            if isinstance(param.source, InitSource):
                _check_init(f"slot {slot}", param, param.source, graphs, work)
        _check_stop(work, graphs)
    except Refused as error:
        return Refusal(str(error))
    return None


def validate_job(
    work: Work,
    job: Job,
    graphs: Mapping[bytes, Checked],
    limits: Limits = DEFAULT_LIMITS,
) -> Refusal | None:
    """Check that ``job`` is a stretch that ``work``, which passed ``validate_work``, can run."""
    try:
        require(job.work == work_id(work), "the job is for another work")
        last = job.first_step + job.steps - 1
        for slot, param in enumerate(work.params):
            if param.role == ROLE_STEP:
                whole = dtype_bounds(Dtype(param.dtype))
                fits = whole is not None and last <= whole.high
                require(fits, f"slot {slot}: {Dtype(param.dtype).name} cannot hold step {last}")
        traced = 0
        for phase in work.phases:
            checked = graphs[phase.graph]
            fresh = zip(phase.modes, checked.graph.outputs, strict=False)
            row = sum(ITEM_BYTES[checked.dtypes[o.node]] for m, o in fresh if m == MODE_TRACE)
            times = times_due(phase, job.first_step, job.steps)
            traced += row * times
            few = MODE_COLLECT not in phase.modes or times <= MAX_COLLECTION_ENTRIES
            require(few, f"over {MAX_COLLECTION_ENTRIES} values of an output are collected")
        require(traced <= limits.trace_bytes, f"a trace of {traced} bytes is too large")
    except Refused as error:
        return Refusal(str(error))
    return None


def _find(where: str, name: bytes, graphs: Mapping[bytes, Checked]) -> Checked:
    checked = graphs.get(name)
    if checked is None:
        raise Refused(f"{where}: graph {name.hex()[:12]} is missing")
    return checked


def _check_param(where: str, param: WorkParam, limits: Limits) -> None:
    dtype, source = Dtype(param.dtype), param.source
    _check_stored(where, dtype, param.shape, limits)
    is_feed = isinstance(source, FeedSource)
    require(is_feed == (param.role == ROLE_FEED), f"{where}: a feed and its shards go together")
    if param.role in (ROLE_STEP, ROLE_SEED):
        require(isinstance(source, NoSource), f"{where}: the run itself supplies it")
    if param.role == ROLE_STEP:
        fits = dtype in STEP_DTYPES and math.prod(param.shape) == 1
        require(fits, f"{where}: a step is one 32 or 64 bit integer")
    elif param.role == ROLE_SEED:
        fits = dtype is Dtype.UINT32 and param.shape == SEED_SHAPE
        require(fits, f"{where}: a seed is two UINT32")
    else:
        require(not isinstance(source, NoSource), f"{where}: nothing gives it a value")
        require(not isinstance(source, ResultSource), f"{where}: another job's output, unresolved")
    is_member = isinstance(source, MemberSource)
    is_data = param.role in (ROLE_INPUT, ROLE_STATE)
    require(is_data or not is_member, f"{where}: no entry of a collection can give it")
    if isinstance(source, BlobSource):
        size_bytes = stored_bytes(dtype, param.shape)
        require(source.size_bytes == size_bytes, f"{where}: a blob of another size")


def _check_table(where: str, checked: Checked, work: Work) -> None:
    for param in checked.graph.params:
        require(param.slot < len(work.params), f"{where}: the work has no slot {param.slot}")
        entry = work.params[param.slot]
        same = (entry.dtype, entry.shape) == (param.dtype, param.shape)
        require(same, f"{where}: the graph sees slot {param.slot} otherwise than the work")


def _check_modes(where: str, checked: Checked, modes: Sequence[int]) -> None:
    fresh = [output for output in checked.graph.outputs if output.slot is None]
    require(len(modes) == len(fresh), f"{where}: {len(modes)} modes for {len(fresh)} outputs")
    for number, (mode, output) in enumerate(zip(modes, fresh, strict=True)):
        is_scalar = checked.shapes[output.node] == ()
        require(mode != MODE_TRACE or is_scalar, f"{where}: traced output {number} is not 0-d")


def _check_init(
    where: str, param: WorkParam, source: InitSource, graphs: Mapping[bytes, Checked], work: Work
) -> None:
    checked = _find(where, source.graph, graphs)
    _check_table(where, checked, work)
    for seen in checked.graph.params:
        is_seed = work.params[seen.slot].role == ROLE_SEED
        require(is_seed, f"{where}: its init graph reads slot {seen.slot}, which is no seed")
    outputs = checked.graph.outputs
    all_fresh = all(output.slot is None for output in outputs)
    require(all_fresh, f"{where}: its init graph writes a slot")
    require(source.output < len(outputs), f"{where}: its init graph has no such output")
    node = outputs[source.output].node
    same = (param.dtype, param.shape) == (checked.dtypes[node], checked.shapes[node])
    require(same, f"{where}: its init graph gives another dtype or shape")


def _check_stop(work: Work, graphs: Mapping[bytes, Checked]) -> None:
    stop = work.stop
    if stop is None:
        return
    require(stop.phase < len(work.phases), f"stop: the work has no phase {stop.phase}")
    phase = work.phases[stop.phase]
    require(stop.output < len(phase.modes), f"stop: the phase has no output {stop.output}")
    checked = graphs[phase.graph]
    node = checked.graph.outputs[stop.output].node
    is_flag = checked.dtypes[node] is Dtype.BOOL and checked.shapes[node] == ()
    require(is_flag, "stop: the output is not a 0-d bool")
    is_traced = phase.modes[stop.output] == MODE_TRACE
    require(
        is_traced, "stop: the output is not traced, so nobody could check that it ended the job"
    )
