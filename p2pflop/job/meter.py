"""What a graph costs, counted from its nodes alone: a pure function, so that both sides of a bid
agree on the bill before anything runs.

**FLOP.** An elementwise node costs its weight for every element of its result; the weights are
what tinygrad 0.14 emits for one float32 element on a CPU (``THREEFRY`` 127, ``SIN`` 142, ``EXP2``
36 ...), one for a plain instruction. REDUCE costs one for every element of its *input*, so that a
matrix product, being MUL and REDUCE over an M x K x N shape, costs 2MNK. PAD costs the three
comparisons that guard each element. Moving, viewing and materialising cost no FLOP. IOTA and
GATHER cost one an element: that is what they run as, however large the table is.

**Touched bytes.** What must cross the memory bus at least once: every materialised tensor (param,
REDUCE, CONTIGUOUS, GATHER) read by the largest view that anything takes of it, REDUCE, CONTIGUOUS,
GATHER and outputs written. A table that is only gathered from is read by the rows taken. An ASSIGN
writes its view, and is what it assigned to for whoever reads it.

**Peak bytes.** Params, outputs (a written slot twice: the new value may not replace the old one
before its last reader; of an assigned one the views) and the most bytes of intermediates that live
at once in node order, where an intermediate is anything a compiler may well keep: REDUCE,
CONTIGUOUS, GATHER and each elementwise result with several readers. It is meant to be compared with
a memory limit, so it errs upwards: 1.7 (MLP), 2.3 (transformer) and 5.0 times (convolutions) what
tinygrad's memory planner gave for a training step.

**Known under-count.** A compiler that fuses an elementwise result into several readers computes it
anew for each: an LSTM's step runs 3.3 times its count, a contrived chain of shifts 60 times.
Hence the rule that a provider may give a lease back when the lowered cost is over four times the
meter. A change of any number here is a new ``METER_ID``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from p2pflop.errors import JobError
from p2pflop.job.graph import ELEMENTWISE, MOVEMENT, Dtype, Op
from p2pflop.job.shapes import ITEM_BYTES, Shape, stored_bytes
from p2pflop.job.spec import InitSource, Job, Work, times_due
from p2pflop.job.validate import Checked

METER_ID: Final = "nodes-1"
MAX_LINE_VALUE: Final = 2**63 - 1

WEIGHTS: Final[dict[Op, int]] = {
    **dict.fromkeys(ELEMENTWISE, 1),
    Op.CAST: 1,
    Op.PAD: 3,
    Op.STACK: 1,
    Op.IOTA: 1,
    Op.GATHER: 1,
    Op.MULACC: 2,
    Op.FLOORDIV: 8,
    Op.FLOORMOD: 8,
    Op.EXP2: 36,
    Op.LOG2: 38,
    Op.POW: 93,
    Op.THREEFRY: 127,
    Op.SIN: 142,
}
_MATERIALISED: Final = frozenset({Op.REDUCE, Op.CONTIGUOUS, Op.GATHER})
_IN_MEMORY: Final = _MATERIALISED | {Op.PARAM, Op.ASSIGN}
_KEPT: Final = ELEMENTWISE | {Op.CAST, Op.BITCAST, Op.STACK}


@dataclass(frozen=True, slots=True)
class Cost:
    """One run of a graph."""

    flop: int
    touched_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class JobCostLine:
    """What one run of ``graph`` costs, and how often a job runs it."""

    graph: bytes
    flop: int
    touched_bytes: int
    times: int


@dataclass(frozen=True, slots=True)
class JobCost:
    """A job's cost by graph, and in all. ``flop`` may pass 64 bits."""

    lines: tuple[JobCostLine, ...]
    flop: int
    touched_bytes: int
    peak_bytes: int


def meter(checked: Checked) -> Cost:
    """The cost of one run of a graph."""
    return Cost(_count_flop(checked), _count_touched(checked), _estimate_peak(checked))


def meter_job(
    work: Work,
    job: Job,
    graphs: Mapping[bytes, Checked],
    known: Mapping[bytes, Cost] = MappingProxyType({}),
) -> JobCost:
    """The cost of ``job``, a stretch of ``work``.

    One line a distinct graph: those of the phases in their order, then the init graphs in slot
    order, which run once and only in a job that starts at step 0. ``graphs`` has every graph by its
    hash, and ``work`` passed ``validate_work`` with them; ``known`` has costs that were metered
    before. Raises JobError if a line's value does not fit 63 bits.
    """
    times: dict[bytes, int] = {}
    for phase in work.phases:
        due = times_due(phase, job.first_step, job.steps)
        times[phase.graph] = times.get(phase.graph, 0) + due
    if job.first_step == 0:
        for graph in init_graphs(work):
            times[graph] = times.get(graph, 0) + 1
    costs = {graph: known.get(graph) or meter(graphs[graph]) for graph in times}
    lines = tuple(
        JobCostLine(graph, costs[graph].flop, costs[graph].touched_bytes, count)
        for graph, count in times.items()
    )
    for line in lines:
        if max(line.flop, line.touched_bytes, line.times) > MAX_LINE_VALUE:
            raise JobError(
                f"graph {line.graph.hex()[:12]} costs {line.flop} FLOP and {line.touched_bytes} "
                f"bytes a run, over the {MAX_LINE_VALUE} that a bid can state"
            )
    return JobCost(
        lines,
        sum(line.flop * line.times for line in lines),
        sum(line.touched_bytes * line.times for line in lines),
        _job_peak(work, graphs, costs),
    )


def init_graphs(work: Work) -> tuple[bytes, ...]:
    """The graphs that give slots their first values, each once, in slot order."""
    sources = (param.source for param in work.params)
    return tuple(
        dict.fromkeys(source.graph for source in sources if isinstance(source, InitSource))
    )


def _count_flop(checked: Checked) -> int:
    flop = 0
    for node, shape in zip(checked.graph.nodes, checked.shapes, strict=True):
        if node.op is Op.REDUCE:
            flop += math.prod(checked.shapes[node.refs[0]])
        else:
            weight = WEIGHTS.get(node.op)
            if weight is not None:
                flop += weight * math.prod(shape)
    return flop


def _count_touched(checked: Checked) -> int:
    touched = _Touched(checked)
    for index, node in enumerate(checked.graph.nodes):
        if node.op in _MATERIALISED:
            touched.written += touched.size(index)
        if node.op is Op.GATHER:
            touched.written += touched.size(index)
            touched.take(node.refs[1])
        elif node.op is Op.ASSIGN:
            touched.put(node.refs[2])
        elif node.op not in MOVEMENT:
            for ref in node.refs:
                touched.take(ref)
    for output in checked.graph.outputs:
        if checked.graph.nodes[output.node].op is not Op.ASSIGN:
            touched.put(output.node)
    return touched.written + sum(touched.read.values())


class _Touched:
    """Bytes written, and read of each tensor in memory by the largest view taken of it."""

    def __init__(self, checked: Checked) -> None:
        self.written = 0
        self.read: dict[int, int] = {}
        self._checked = checked
        self._bases, self._sizes = _views(checked)

    def size(self, node: int) -> int:
        """The bytes of a node."""
        return stored_bytes(self._checked.dtypes[node], self._checked.shapes[node])

    def take(self, ref: int) -> None:
        """Node ``ref`` is read."""
        base = self._bases[ref]
        op = self._checked.graph.nodes[base].op
        if op in _IN_MEMORY:
            # two nodes of one slot are one tensor
            key = -1 - _slot(self._checked, base) if op is Op.PARAM else base
            size_bytes = self._sizes[ref] * ITEM_BYTES[self._checked.dtypes[base]]
            self.read[key] = max(self.read.get(key, 0), size_bytes)

    def put(self, ref: int) -> None:
        """Node ``ref`` is written somewhere."""
        base, size_bytes = self._bases[ref], self.size(ref)
        is_materialised = self._checked.graph.nodes[base].op in _MATERIALISED
        if not is_materialised or size_bytes != self.size(base):
            # else what was materialised is what is written, once
            self.take(ref)
            self.written += size_bytes


def _slot(checked: Checked, node: int) -> int:
    slot = checked.graph.nodes[node].attrs[0]
    return slot if isinstance(slot, int) else 0


def _views(checked: Checked) -> tuple[list[int], list[int]]:
    """What each node is a view of (itself, if of nothing), and the fewest elements on the way."""
    bases: list[int] = []
    sizes: list[int] = []
    for index, (node, shape) in enumerate(zip(checked.graph.nodes, checked.shapes, strict=True)):
        if node.op in MOVEMENT:
            source = node.refs[0]
            bases.append(bases[source])
            sizes.append(min(sizes[source], math.prod(shape)))
        else:
            bases.append(index)
            sizes.append(math.prod(shape))
    return bases, sizes


def _estimate_peak(checked: Checked) -> int:
    graph = checked.graph
    held = sum(stored_bytes(param.dtype, param.shape) for param in graph.params)
    put = [out.node for out in graph.outputs if graph.nodes[out.node].op is not Op.ASSIGN]
    put += [node.refs[1] for node in graph.nodes if node.op is Op.ASSIGN]
    held += sum(stored_bytes(checked.dtypes[ref], checked.shapes[ref]) for ref in put)
    return held + _intermediate_peak(checked)


def _intermediate_peak(checked: Checked) -> int:
    """The most bytes of kept intermediates that live at once, in node order."""
    nodes = checked.graph.nodes
    readers = _count_readers(checked)
    kept = [
        node.op in _MATERIALISED or (node.op in _KEPT and readers[index] > 1)
        for index, node in enumerate(nodes)
    ]
    last_use = list(range(len(nodes)))
    # a fused node reads its operands when its own reader runs, so uses travel down from the end
    for index in range(len(nodes) - 1, -1, -1):
        use = index if kept[index] else last_use[index]
        for ref in nodes[index].refs:
            last_use[ref] = max(last_use[ref], use)
    freed: dict[int, int] = {}
    live = peak = 0
    for index in range(len(nodes)):
        if kept[index]:
            size_bytes = stored_bytes(checked.dtypes[index], checked.shapes[index])
            live += size_bytes
            freed[last_use[index]] = freed.get(last_use[index], 0) + size_bytes
        peak = max(peak, live)
        live -= freed.pop(index, 0)
    return peak


def _count_readers(checked: Checked) -> list[int]:
    """How many nodes and outputs read each node, through views; EXPAND counts as one more."""
    bases, _ = _views(checked)
    readers = [0] * len(bases)
    for node in checked.graph.nodes:
        if node.op not in MOVEMENT:
            for base in {bases[ref] for ref in node.refs}:
                readers[base] += 1
        elif node.op is Op.EXPAND:
            readers[bases[node.refs[0]]] += 1
    for output in checked.graph.outputs:
        readers[bases[output.node]] += 1
    return readers


def _job_peak(work: Work, graphs: Mapping[bytes, Checked], costs: Mapping[bytes, Cost]) -> int:
    """The whole param table, every phase's fresh outputs, and the largest graph's working set."""
    table = sum(_param_bytes(param.dtype, param.shape) for param in work.params)
    fresh = {graph: _fresh_bytes(graphs[graph]) for graph in costs}
    working = max(
        (
            cost.peak_bytes
            - fresh[graph]
            - sum(stored_bytes(param.dtype, param.shape) for param in graphs[graph].graph.params)
            for graph, cost in costs.items()
        ),
        default=0,
    )
    return table + sum(fresh.values()) + working


def _param_bytes(dtype: int, shape: Shape) -> int:
    return stored_bytes(Dtype(dtype), shape)


def _fresh_bytes(checked: Checked) -> int:
    return sum(
        stored_bytes(checked.dtypes[output.node], checked.shapes[output.node])
        for output in checked.graph.outputs
        if output.slot is None
    )
