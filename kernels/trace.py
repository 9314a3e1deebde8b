"""Tracing: a tinygrad program becomes a job of a few kilobytes.

One rule: **a lazy tensor travels as its graph, a realized one as a blob, an assigned one is
state.**

- Weights and optimizer state that were never realized are born from the seed where the job runs;
  their init graph travels, they do not. Realized ones travel as blobs.
- Random numbers are those of native tinygrad after ``Tensor.manual_seed(seed)``: the counter of
  draws is a state like any other, the seed a param.
- A phase sees the state as the phases before it in the same step left it.

A trap: a captured step has one moment of reading. ``opt.step(); return {"loss": loss}`` gives the
loss *before* the update here, as ``loss.realize(*opt.schedule_step())`` does everywhere; native
tinygrad would compute a still lazy loss after the update. Gradients start from what they were when
``trace`` was called, so zero them inside the step.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tinygrad import Device, Tensor
from tinygrad.dtype import dtypes, strong_dtype
from tinygrad.uop.ops import Ops, UOp

from p2pflop.errors import JobError
from p2pflop.ids import content_hash
from p2pflop.job.file import JobBody, Labels, open_job
from p2pflop.job.graph import Attr, Graph, GraphParam, Output, encode_graph
from p2pflop.job.spec import (
    MAX_STEPS,
    MODE_LAST,
    MODE_TRACE,
    ROLE_INPUT,
    ROLE_SEED,
    ROLE_STATE,
    ROLE_STEP,
    SPEC_VERSION,
    BlobSource,
    InitSource,
    Job,
    NoSource,
    Phase,
    Source,
    Stop,
    Work,
    WorkParam,
    work_id,
)
from p2pflop.job.validate import Refusal
from p2pflop.kernels.capture import (
    Held,
    Recording,
    Stage,
    is_host_copy,
    is_literal,
    is_realized,
    parameter_names,
    unwrap,
)
from p2pflop.kernels.dialect import OUR_DTYPES
from p2pflop.kernels.export import Exporter, purify
from p2pflop.kernels.names import name_tensors
from p2pflop.wire import encode

STEP_ARGUMENT: Final = "step"
MAX_SEED: Final = 2**32 - 1
MAX_NAME: Final = 200
_REALIZE_HINT: Final = "Call .realize() on it before trace, so that it starts from a blob."

Number = bool | int | float


@dataclass(frozen=True, slots=True)
class Traced:
    """A job, names for its parts, and the bytes of its blob inputs by slot."""

    body: JobBody
    labels: Labels
    inputs: dict[int, bytes]


def trace(
    fn: Callable[..., object],
    *,
    steps: int,
    every: Mapping[int, Callable[..., object]] | None = None,
    seed: int = 0,
    args: Mapping[str, Number] | None = None,
    stop: str | tuple[str, int] | None = None,
    address_of: Callable[[bytes], bytes],
    title: str = "",
) -> Traced:
    """The job of running ``fn`` ``steps`` times, and each function of ``every`` after every so
    many steps.

    Functions return a dict of names to tensors: a scalar becomes a value a step, anything else is
    kept as it was last. They may take parameters: ``step`` is the number of the step (int32), the
    others are looked up in ``args``, which can be changed later without tracing again. ``fn`` runs
    with ``TRAINING`` set, the others without. ``stop`` names a bool output at whose first true
    value the job ends; it is looked at whenever its function runs, or every so many steps.
    ``address_of`` names a blob.

    Each function is called once; no kernel is compiled, and the program's tensors are afterwards as
    they were before. Raises JobError for what cannot travel.
    """
    if not 1 <= steps < MAX_STEPS or not 0 <= seed <= MAX_SEED:
        raise JobError(f"steps={steps} or seed={seed} is out of range")
    functions = [unwrap(function) for function in (fn, *(every or {}).values())]
    periods = [1, *(every or {})]
    if any(period < 1 for period in periods):
        raise JobError("a phase cannot be due every 0 steps", hint="every={100: test}")
    with Stage() as stage:
        arguments = _stand_in_arguments(stage, functions, args or {})
        recordings = [
            stage.record(function, arguments, training=number == 0)
            for number, function in enumerate(functions)
        ]
        builder = _Builder(stage, recordings, args or {}, name_tensors(functions), address_of)
        graphs = [builder.phase(recording) for recording in recordings]
        return builder.finish(
            graphs, periods, steps, seed, _find_stop(graphs, periods, stop), title
        )


def _stand_in_arguments(
    stage: Stage, functions: Sequence[Callable[..., object]], args: Mapping[str, Number]
) -> dict[str, Tensor]:
    known = [parameter_names(function) for function in functions]
    names = set().union(*(every for every, _ in known))
    required = set().union(*(needed for _, needed in known)) - {STEP_ARGUMENT}
    if required - set(args) or set(args) - names:
        raise JobError(
            f"the functions take {', '.join(sorted(names)) or 'nothing'}, "
            f"args gives {', '.join(sorted(args)) or 'nothing'}",
            hint="Give every parameter (other than step) a number in args={...}, and no other.",
        )
    for name, value in args.items():
        _pack_argument(name, value)
    tensors = {}
    for name in sorted(names & (set(args) | {STEP_ARGUMENT})):
        dtype = dtypes.int32 if name == STEP_ARGUMENT else dtypes.from_py(args[name])
        buffer = UOp.new_buffer(Device.DEFAULT, 1, strong_dtype(dtype))
        stage.arguments[name] = buffer
        tensors[name] = Tensor(buffer.reshape(()))
    return tensors


@dataclass(frozen=True, slots=True)
class _Phase:
    """A phase's graph, and names and modes of its fresh outputs."""

    graph: Graph
    names: tuple[str, ...]
    modes: tuple[int, ...]


@dataclass(slots=True)
class _Slot:
    """A row of the param table in the making. ``origin`` is what an init graph is to compute;
    ``data`` is what travels as a blob."""

    number: int
    param: GraphParam
    role: int
    name: str
    origin: UOp | None = None
    data: Callable[[], bytes] | None = None


@dataclass(slots=True)
class _Builder:
    """Gathers the param table while the graphs are written; slots are numbered by first use."""

    stage: Stage
    recordings: list[Recording]
    args: Mapping[str, Number]
    names: dict[int, str]
    address_of: Callable[[bytes], bytes]
    _slots: dict[UOp, _Slot] = field(default_factory=dict)
    _states: dict[UOp, int] = field(default_factory=dict)
    _owner: dict[UOp, Held] = field(default_factory=dict)
    _replacements: dict[UOp, UOp] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, held in enumerate(self.stage.held):
            if held.buffer is not None:
                self._owner.setdefault(held.buffer, held)
            if is_host_copy(held.uop):
                self._owner.setdefault(_host_buffer(held.uop), held)
            if any(number in recording.changed for recording in self.recordings):
                self._add_state(number, held)
        for held in self.stage.held:
            if held.stand_in is None or held.buffer in self._states:
                continue
            if held.uop.device is None or is_host_copy(held.uop):
                self._replacements[held.stand_in] = held.uop

    def _add_state(self, number: int, held: Held) -> None:
        if held.buffer is not None:
            self._states.setdefault(held.buffer, number)
            return
        # Assigning to a part of a tensor also renews every lazy view of it: those are no state.
        bases = set(held.uop.toposort())
        changed = {n for recording in self.recordings for n in recording.changed}
        if any(self.stage.held[n].buffer in bases for n in changed):
            return
        raise JobError(
            f"{self._name(held, 'a tensor')} is assigned to but has no storage of its own: it is "
            "computed from data, or its dtype is open",
            hint=_REALIZE_HINT,
        )

    def phase(self, recording: Recording) -> _Phase:
        """What one phase leaves in the job."""
        fresh = [_stored(uop) for uop in recording.outputs.values()]
        written: dict[UOp, UOp] = {}
        for number, uop in recording.changed.items():
            buffer = self.stage.held[number].buffer
            if buffer in self._states:
                written.setdefault(buffer, uop)
        roots = purify([*fresh, *written.values()], self._replacements)
        exporter = Exporter(self._leaf, _no_literal)
        nodes = exporter.add(roots)
        slots = [self._leaf(buffer, self._shape(buffer))[0] for buffer in written]
        outputs = [Output(node) for node in nodes[: len(fresh)]]
        pairs = sorted(zip(slots, nodes[len(fresh) :], strict=True))
        outputs += [Output(node, slot) for slot, node in pairs]
        modes = tuple(MODE_LAST if uop.shape else MODE_TRACE for uop in fresh)
        return _Phase(self._graph(exporter, outputs), tuple(recording.outputs), modes)

    def finish(
        self,
        phases: list[_Phase],
        periods: Sequence[int],
        steps: int,
        seed: int,
        stop: Stop | None,
        title: str,
    ) -> Traced:
        """Put the job together. Raises JobError if a graph is not one that may travel."""
        init, init_outputs = self._init_graph()
        slots = list(self._slots.values())
        inputs = {slot.number: slot.data() for slot in slots if slot.data is not None}
        graphs = [encode_graph(phase.graph) for phase in phases]
        if init is not None:
            graphs.append(encode_graph(init))
        init_hash = content_hash(graphs[-1])
        params = []
        for slot in slots:
            source: Source = NoSource()
            if slot.number in inputs:
                data = inputs[slot.number]
                source = BlobSource(self.address_of(data), len(data))
            elif slot.origin is not None:
                source = InitSource(init_hash, init_outputs[slot.number])
            params.append(WorkParam(int(slot.param.dtype), slot.param.shape, slot.role, source))
        work = Work(
            SPEC_VERSION,
            tuple(
                Phase(content_hash(data), period, 0, phase.modes)
                for data, period, phase in zip(graphs, periods, phases, strict=False)
            ),
            tuple(params),
            seed,
            stop,
        )
        body = JobBody(Job(work_id(work), 0, steps), encode(work), tuple(dict.fromkeys(graphs)))
        opened = open_job(body)
        if isinstance(opened, Refusal):
            raise JobError(f"the traced job is not one that others accept: {opened.reason}")
        return Traced(body, self._labels(phases, slots, title), inputs)

    def _labels(self, phases: list[_Phase], slots: list[_Slot], title: str) -> Labels:
        return Labels(
            title=(title or self.recordings[0].name)[:MAX_NAME],
            params=tuple(slot.name[:MAX_NAME] for slot in slots),
            phases=tuple(recording.name[:MAX_NAME] for recording in self.recordings),
            outputs=tuple(tuple(name[:MAX_NAME] for name in phase.names) for phase in phases),
        )

    def _graph(self, exporter: Exporter, outputs: Sequence[Output]) -> Graph:
        used = {node.attrs[0] for node in exporter.nodes if node.op.name == "PARAM"}
        used |= {output.slot for output in outputs if output.slot is not None}
        params = [slot.param for slot in self._slots.values() if slot.number in used]
        return Graph(tuple(params), tuple(exporter.nodes), tuple(outputs))

    def _init_graph(self) -> tuple[Graph | None, dict[int, int]]:
        """One graph for all values that are born where the job runs, and which output each is."""
        born = [slot for slot in self._slots.values() if slot.origin is not None]
        if not born:
            return None, {}
        exporter = Exporter(self._seed_leaf, self._init_literal)
        nodes = exporter.add(purify([slot.origin for slot in born if slot.origin is not None], {}))
        order = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
        graph = self._graph(exporter, [Output(node) for node in order])
        return graph, {slot.number: order[node] for slot, node in zip(born, nodes, strict=True)}

    def _leaf(self, buffer: UOp, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        slot = self._slots.get(buffer)
        if slot is None:
            slot = self._slots[buffer] = self._new_slot(buffer, shape)
        return slot.number, slot.param.shape

    def _new_slot(self, buffer: UOp, shape: tuple[int, ...]) -> _Slot:
        number = len(self._slots)
        held = self._owner.get(buffer)
        if held is not None and held.uop.numel() == buffer.numel():
            shape = held.uop.shape
        if buffer.dtype not in OUR_DTYPES:
            raise JobError(f"{buffer.dtype} cannot be stored", hint="Cast to float16 or bfloat16.")
        param = GraphParam(number, OUR_DTYPES[buffer.dtype], shape)
        name = self._name(held, f"tensor{number}")
        if buffer in self.stage.seeds:
            return _Slot(number, param, ROLE_SEED, "seed")
        for argument, argument_buffer in self.stage.arguments.items():
            if argument_buffer is buffer:
                return self._argument_slot(number, param, argument)
        role = ROLE_STATE if buffer in self._states else ROLE_INPUT
        if held is not None and held.stand_in is not None and held.buffer is buffer:
            if is_host_copy(held.uop) and not is_literal(_host_buffer(held.uop)):
                source = _host_buffer(held.uop)
                return _Slot(number, param, role, name, data=lambda: _read(source))
            return _Slot(number, param, role, name, origin=held.uop)
        if is_literal(buffer):
            return _Slot(number, param, role, name, origin=buffer)
        if not is_realized(buffer):
            raise JobError(
                f"{self._name(held, 'a tensor')} {shape} is used but was never given a value",
                hint="Tensor.empty has no content: use Tensor.zeros, or assign before trace.",
            )
        return _Slot(number, param, role, name, data=lambda: _read(buffer))

    def _argument_slot(self, number: int, param: GraphParam, name: str) -> _Slot:
        if name == STEP_ARGUMENT:
            return _Slot(number, param, ROLE_STEP, name)
        value = self.args[name]
        return _Slot(number, param, ROLE_INPUT, name, data=lambda: _pack_argument(name, value))

    def _seed_leaf(self, buffer: UOp, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        if buffer in self.stage.seeds:
            return self._leaf(buffer, shape)
        raise JobError(
            "a value that is computed before the first step needs data",
            hint=_REALIZE_HINT,
        )

    def _init_literal(self, buffer: UOp) -> Sequence[Attr] | None:
        if buffer in self.stage.seeds:
            return None
        if not is_literal(buffer) and not (buffer in self.stage.counts and is_realized(buffer)):
            return None
        return struct.unpack(f"<{buffer.numel()}{buffer.dtype.fmt}", _read(buffer))

    def _shape(self, buffer: UOp) -> tuple[int, ...]:
        return tuple(self._owner[buffer].uop.shape)

    def _name(self, held: Held | None, otherwise: str) -> str:
        if held is None:
            return otherwise
        if held.tensor is self.stage.counter:
            return "random.counter"
        return self.names.get(id(held.tensor), otherwise)


def _find_stop(
    phases: Sequence[_Phase], periods: Sequence[int], stop: str | tuple[str, int] | None
) -> Stop | None:
    if stop is None:
        return None
    name, every = (stop, 0) if isinstance(stop, str) else stop
    for number, phase in enumerate(phases):
        if name in phase.names:
            return Stop(number, phase.names.index(name), every or periods[number])
    known = ", ".join(name for phase in phases for name in phase.names)
    raise JobError(f"stop={name!r} is not an output; there are {known or 'none'}")


def _pack_argument(name: str, value: Number) -> bytes:
    layout = {bool: "<?", int: "<i", float: "<f"}.get(type(value))
    try:
        if layout is not None:
            return struct.pack(layout, value)
    except (struct.error, OverflowError):
        pass
    raise JobError(
        f"args[{name!r}] is {value!r:.80}, not a number that fits",
        hint="Give a bool, an int of 32 bits or a float.",
    )


def _stored(uop: UOp) -> UOp:
    return uop.cast(strong_dtype(uop.dtype)) if uop.dtype in dtypes.weaks else uop


def _no_literal(_: UOp) -> None:
    return None


def _host_buffer(uop: UOp) -> UOp:
    """The buffer of Python's or numpy's data under a host copy."""
    while uop.op is not Ops.BUFFER:
        uop = uop.src[0]
    return uop


def _read(buffer: UOp) -> bytes:
    return bytes(buffer.buffer.as_memoryview())
