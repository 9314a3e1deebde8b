"""Many small jobs as one: what a sweep of little jobs buys instead of a purchase each.

A **pack** is an ordinary job whose run goes through the runs of its variants, one after the
other. Its phases are those of the job, graph by graph the same, and after them, at the end of each
variant:

1. *keep*: the variant's last state and outputs go into a row of a table, which is state as well;
2. *next*: the arguments of the next variant come out of their tables, states that are filled from
   blobs are copied anew, the step is 0 again;
3. the init graphs: the other states are born again from the seed.

An argument is a state of the pack, not an input; nothing else in the job's graphs changes, so that
the same kernels compute the same bytes. From the result of the pack follow those of its variants,
each with the hash that it would have if it had been bought alone. So a pack needs no rule of its
own anywhere else: it is priced, lowered, checkpointed, resumed, billed and audited as what it is.

The tables have room for a power of two of variants; how many there are is the number of steps. So
packs of many sizes share their graphs, and their plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from p2pflop.errors import JobError, ProtocolError
from p2pflop.job.file import JobBody, JobFile, Labels, open_job
from p2pflop.job.graph import (
    Attr,
    Dtype,
    Graph,
    GraphParam,
    Node,
    Op,
    Output,
    encode_graph,
    graph_hash,
)
from p2pflop.job.meter import init_graphs
from p2pflop.job.results import TraceColumn, TraceLog, build_result, decode_trace
from p2pflop.job.shapes import FLOATS, ITEM_BYTES
from p2pflop.job.spec import (
    MODE_LAST,
    MODE_TRACE,
    ROLE_INPUT,
    ROLE_STATE,
    ROLE_STEP,
    BlobSource,
    InitSource,
    Job,
    NamedOutput,
    NoSource,
    Phase,
    Result,
    Work,
    WorkParam,
    state_slots,
    work_id,
)
from p2pflop.job.validate import Refusal
from p2pflop.job.variants import AddressOf, Variants, check_values, obstacle, variant
from p2pflop.wire import decode, encode

MAX_TITLE_CHARS: Final = 200

_BITS: Final = {1: Dtype.UINT8, 2: Dtype.UINT16, 4: Dtype.UINT32, 8: Dtype.UINT64}
"""Values are looked up as bits: a sum of floats, which a look-up is, knows no negative zero."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """One variant's own job and result, and the bytes of what its result names, by address."""

    file: JobFile
    result: Result
    blobs: dict[bytes, bytes]


class Packing:
    """How the variants of a job are packed.

    ``file`` is the pack, ``blobs`` has the inputs that it does not share with the job, by address.
    Raises JobError if the variants cannot be packed.
    """

    def __init__(self, variants: Variants, address_of: AddressOf) -> None:
        checked = open_job(variants.file.body)
        if isinstance(checked, Refusal):
            raise JobError(f"the job is not valid: {checked.reason}")
        reason = obstacle(checked)
        if reason:
            raise JobError(f"variants of this job cannot be packed: {reason}")
        if len(variants.values) > variants.room or variants.room.bit_count() != 1:
            raise JobError(f"{len(variants.values)} variants for a pack of {variants.room}")
        check_values(variants, checked.work)
        self.blobs: dict[bytes, bytes] = {}
        self._variants = variants
        self._checked = checked
        self._room = variants.room
        self._address_of = address_of
        self._params = list(checked.work.params)
        self._names = list(variants.file.labels.params)
        self._graphs = {graph_hash(data): data for data in variants.file.body.graphs}
        self._outputs: dict[tuple[int, int], int] = {}
        """The slots of outputs whose last value counts, by phase and output."""
        self._rows: dict[int, int] = {}
        """The table in which the variants' values of a slot are kept, by that slot."""
        self._born: list[int] = []
        """Slots that begin as zeros."""
        self.file = self._pack()

    def names(self, result: Result) -> list[bytes]:
        """The addresses of the blobs that ``unpack`` reads. Raises ProtocolError as it does."""
        return [result.trace, *self._tables(result).values()]

    def unpack(self, result: Result, read: Callable[[bytes], bytes]) -> Iterator[Unpacked]:
        """The variants' own results, in order, from the pack's. ``read`` gives a blob's bytes.

        Raises ProtocolError if ``result`` is not of this pack.
        """
        work, steps = self._checked.work, self._checked.job.steps
        rows = {slot: read(address) for slot, address in self._tables(result).items()}
        columns = decode_trace(read(result.trace))
        for place in range(len(self._variants.values)):
            file = variant(self._variants, place, self._address_of)
            blobs: dict[bytes, bytes] = {}

            def keep(data: bytes, blobs: dict[bytes, bytes] = blobs) -> bytes:
                address = self._address_of(data)
                blobs[address] = data
                return address

            def row(slot: int, place: int = place) -> bytes:
                size_bytes = len(rows[slot]) // self._room
                return rows[slot][place * size_bytes : (place + 1) * size_bytes]

            log = TraceLog()
            for column in columns:
                log.extend(self._own_column(column, place))
            own = build_result(
                decode(Work, file.body.work),
                file.body.job,
                class_id=result.class_id,
                steps_done=steps,
                outputs=[
                    NamedOutput(*at, keep(row(slot)), len(row(slot)))
                    for at, slot in self._outputs.items()
                ],
                trace=keep(log.encode()),
                state=[keep(row(slot)) for slot in state_slots(work)],
            )
            yield Unpacked(file, own, blobs)

    def _tables(self, result: Result) -> dict[int, bytes]:
        """The addresses of the tables in which the values of slots are kept, by slot."""
        wanted = self.file.body.job
        if (result.work, result.steps_done) != (wanted.work, wanted.steps):
            raise ProtocolError("the result is not of this pack")
        packed = decode(Work, self.file.body.work)
        state = dict(zip(state_slots(packed), result.state, strict=True))
        return {slot: state[table] for slot, table in self._rows.items()}

    def _own_column(self, column: TraceColumn, place: int) -> TraceColumn:
        """What a traced output gave in one variant."""
        phase = self._checked.work.phases[column.phase]
        traced = [number for number, mode in enumerate(phase.modes) if mode == MODE_TRACE]
        times = self._checked.job.steps // phase.every
        size_bytes = times * ITEM_BYTES[Dtype(column.dtype)]
        data = column.data[place * size_bytes : (place + 1) * size_bytes]
        return TraceColumn(column.phase, traced[column.output], column.dtype, data)

    # The pack's own parts

    def _pack(self) -> JobFile:
        work, steps = self._checked.work, self._checked.job.steps
        phases = [self._own_phase(number) for number in range(len(work.phases))]
        added = []
        step_slots = [slot for slot, param in enumerate(work.params) if param.role == ROLE_STEP]
        self._make_zeros(step_slots)
        if step_slots and steps > 1:
            added.append(("count", self._count(step_slots), 1))
        added.append(("keep", self._keep(), steps))
        added.append(("next", self._next(step_slots), steps))
        added += [("born again", graph, steps) for graph in self._born_again()]
        phases += [self._phase(graph, every) for _, graph, every in added]
        self._bear()
        packed = Work(work.version, tuple(phases), tuple(self._params), work.seed)
        named = dict.fromkeys((*(phase.graph for phase in phases), *init_graphs(packed)))
        job = Job(work_id(packed), 0, steps * len(self._variants.values))
        body = JobBody(job, encode(packed), tuple(self._graphs[name] for name in named))
        old = self._variants.file.labels
        labels = Labels(
            f"{len(self._variants.values)} of {old.title}"[:MAX_TITLE_CHARS],
            tuple(self._names),
            (*old.phases, *(f"pack: {name}" for name, _, _ in added)),
            (
                *(self._traced_names(number) for number in range(len(old.phases))),
                *[()] * len(added),
            ),
        )
        return JobFile(self._variants.file.version, body, labels)

    def _traced_names(self, number: int) -> tuple[str, ...]:
        modes = self._checked.work.phases[number].modes
        names = self._variants.file.labels.outputs[number]
        return tuple(n for n, mode in zip(names, modes, strict=True) if mode == MODE_TRACE)

    def _phase(self, graph: Graph, every: int) -> Phase:
        data = encode_graph(graph)
        self._graphs[graph_hash(data)] = data
        modes = [MODE_TRACE for output in graph.outputs if output.slot is None]
        return Phase(graph_hash(data), every, 0, tuple(modes))

    def _own_phase(self, number: int) -> Phase:
        """A phase of the job: outputs whose last value counts are written to slots instead."""
        phase = self._checked.work.phases[number]
        if MODE_LAST not in phase.modes:
            return phase
        checked = self._checked.graphs[phase.graph]
        graph, fresh = checked.graph, checked.graph.outputs[: len(phase.modes)]
        outputs = [o for o, mode in zip(fresh, phase.modes, strict=True) if mode == MODE_TRACE]
        outputs += graph.outputs[len(phase.modes) :]
        params = list(graph.params)
        for output, mode in enumerate(phase.modes):
            if mode == MODE_LAST:
                node = fresh[output].node
                slot = self._add_zeros(
                    f"output {number}.{output}", checked.dtypes[node], checked.shapes[node]
                )
                self._outputs[number, output] = slot
                params.append(self._seen(slot))
                outputs.append(Output(node, slot))
        return self._phase(Graph(tuple(params), graph.nodes, tuple(outputs)), phase.every)

    def _count(self, step_slots: Sequence[int]) -> Graph:
        """The step of the variant, which is not that of the pack."""
        draft = _Draft(self._params)
        for slot in step_slots:
            draft.write(draft.plus_one(slot), slot)
        return draft.graph()

    def _keep(self) -> Graph:
        """The last values of the variant under way go into its row of the tables."""
        draft, room = _Draft(self._params), self._room
        variant_slot = self._add_zeros("variant", Dtype.INT32, ())
        for slot in (*state_slots(self._checked.work), *self._outputs.values()):
            param = self._params[slot]
            size = math.prod(param.shape)
            table = self._add_zeros(f"kept {self._names[slot]}", Dtype(param.dtype), (room, size))
            self._rows[slot] = table
            rows = draft.add(Op.IOTA, attrs=(int(Dtype.INT32), room))
            others = draft.add(Op.CMPNE, rows, draft.param(variant_slot))
            others = draft.add(Op.RESHAPE, others, attrs=(room, 1))
            value = draft.add(Op.RESHAPE, draft.param(slot), attrs=(1, size))
            draft.write(draft.add(Op.WHERE, others, draft.param(table), value), table)
        return draft.graph()

    def _next(self, step_slots: Sequence[int]) -> Graph:
        """All that the next variant begins with, but what is born."""
        draft, work = _Draft(self._params), self._checked.work
        variant_slot = self._names.index("pack: variant")
        number = draft.plus_one(variant_slot)
        draft.write(number, variant_slot)
        for slot in step_slots:
            zero = draft.constant(Dtype(self._params[slot].dtype), 0, self._params[slot].shape)
            draft.write(zero, slot)
        for slot, column in zip(self._variants.slots, self._columns(), strict=True):
            dtype = Dtype(work.params[slot].dtype)
            bits = dtype if dtype is Dtype.BOOL else _BITS[ITEM_BYTES[dtype]]
            table = self._add_input(f"values of {self._names[slot]}", bits, (self._room,), column)
            looked_up = draft.add(Op.GATHER, draft.param(table), number)
            if bits is not dtype:
                looked_up = draft.add(Op.BITCAST, looked_up, attrs=(int(dtype),))
            draft.write(looked_up, slot)
            first = self._variants.values[0][self._variants.slots.index(slot)]
            self._add_blob(first)
            self._params[slot] = msgspec.structs.replace(
                self._params[slot],
                role=ROLE_STATE,
                source=BlobSource(self._address_of(first), len(first)),
            )
        for slot in state_slots(work):
            param = work.params[slot]
            if not isinstance(param.source, InitSource):
                copy = msgspec.structs.replace(param, role=ROLE_INPUT)
                origin = self._add(f"first {self._names[slot]}", copy)
                draft.write(draft.add(Op.CONTIGUOUS, draft.param(origin)), slot)
        return draft.graph()

    def _born_again(self) -> Iterator[Graph]:
        """The init graphs of the job, writing the slots that they are for."""
        work = self._checked.work
        for name in init_graphs(work):
            graph = self._checked.graphs[name].graph
            params, outputs = {param.slot: param for param in graph.params}, []
            for slot, param in enumerate(work.params):
                if isinstance(param.source, InitSource) and param.source.graph == name:
                    params[slot] = self._seen(slot)
                    outputs.append(Output(graph.outputs[param.source.output].node, slot))
            yield Graph(tuple(params[slot] for slot in sorted(params)), graph.nodes, tuple(outputs))

    # The param table

    def _columns(self) -> list[bytes]:
        """The values of each argument in all variants, as far as there are any."""
        values = self._variants.values
        return [
            b"".join(column).ljust(self._room * len(column[0]), b"\0")
            for column in zip(*values, strict=True)
        ]

    def _seen(self, slot: int) -> GraphParam:
        param = self._params[slot]
        return GraphParam(slot, Dtype(param.dtype), param.shape)

    def _add(self, name: str, param: WorkParam) -> int:
        self._params.append(param)
        self._names.append(f"pack: {name}"[:MAX_TITLE_CHARS])
        return len(self._params) - 1

    def _add_blob(self, data: bytes) -> BlobSource:
        address = self._address_of(data)
        self.blobs[address] = data
        return BlobSource(address, len(data))

    def _add_input(self, name: str, dtype: Dtype, shape: tuple[int, ...], data: bytes) -> int:
        return self._add(name, WorkParam(int(dtype), shape, ROLE_INPUT, self._add_blob(data)))

    def _add_zeros(self, name: str, dtype: Dtype, shape: tuple[int, ...]) -> int:
        slot = self._add(name, WorkParam(int(dtype), shape, ROLE_STATE, NoSource()))
        self._make_zeros([slot])
        return slot

    def _make_zeros(self, slots: Sequence[int]) -> None:
        self._born += slots

    def _bear(self) -> None:
        """Give the slots that begin as zeros the graph that they are born from."""
        draft = _Draft(self._params)
        for slot in self._born:
            param = self._params[slot]
            zeros = draft.constant(Dtype(param.dtype), 0, param.shape)
            draft.fresh(draft.add(Op.CONTIGUOUS, zeros))
        data = encode_graph(draft.graph())
        self._graphs[graph_hash(data)] = data
        for output, slot in enumerate(self._born):
            self._params[slot] = msgspec.structs.replace(
                self._params[slot], role=ROLE_STATE, source=InitSource(graph_hash(data), output)
            )


class _Draft:
    """A graph in the making. Nodes are named by their places."""

    def __init__(self, params: Sequence[WorkParam]) -> None:
        self._table = params
        self._params: dict[int, int] = {}
        self._nodes: list[Node] = []
        self._fresh: list[Output] = []
        self._written: dict[int, int] = {}

    def add(self, op: Op, *refs: int, attrs: tuple[Attr, ...] = ()) -> int:
        self._nodes.append(Node(op, attrs, refs))
        return len(self._nodes) - 1

    def param(self, slot: int) -> int:
        if slot not in self._params:
            self._params[slot] = self.add(Op.PARAM, attrs=(slot,))
        return self._params[slot]

    def constant(self, dtype: Dtype, value: int, shape: tuple[int, ...]) -> int:
        of_dtype = {Dtype.BOOL: bool(value), **dict.fromkeys(FLOATS, float(value))}
        node = self.add(Op.CONST, attrs=(int(dtype), of_dtype.get(dtype, value)))
        return self.add(Op.EXPAND, node, attrs=shape) if shape else node

    def plus_one(self, slot: int) -> int:
        param = self._table[slot]
        one = self.constant(Dtype(param.dtype), 1, param.shape)
        return self.add(Op.ADD, self.param(slot), one)

    def fresh(self, node: int) -> None:
        self._fresh.append(Output(node))

    def write(self, node: int, slot: int) -> None:
        self._written[slot] = node

    def graph(self) -> Graph:
        slots = sorted({*self._params, *self._written})
        params = [
            GraphParam(slot, Dtype(self._table[slot].dtype), self._table[slot].shape)
            for slot in slots
        ]
        written = [Output(node, slot) for slot, node in sorted(self._written.items())]
        return Graph(tuple(params), tuple(self._nodes), (*self._fresh, *written))
