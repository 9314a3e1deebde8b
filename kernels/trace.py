"""Tracing: a tinygrad program becomes a job of a few kilobytes.

One rule: **a lazy tensor travels as its graph, a realized one as a blob, an assigned one is
state.**

- Weights and optimizer state that were never realized are born from the seed where the job runs;
  their init graph travels, they do not. Realized ones travel as blobs, and so do lazy weights and
  views of files (``weights``), whose bytes are read one tensor at a time and not kept.
- Random numbers are those of native tinygrad after ``Tensor.manual_seed(seed)``: the counter of
  draws is a state like any other, the seed a param.
- A phase sees the state as the phases before it in the same step left it.

A trap: a captured step has one moment of reading. ``opt.step(); return {"loss": loss}`` gives the
loss *before* the update here, as ``loss.realize(*opt.schedule_step())`` does everywhere; native
tinygrad would compute a still lazy loss after the update. Gradients start from what they were when
``trace`` was called, so zero them inside the step. Both are warned of (``suspicions``); what cannot
be traced is told with its line (``refusals``).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from tinygrad import Device, Tensor
from tinygrad.dtype import dtypes, strong_dtype
from tinygrad.uop.ops import UOp

from p2pflop.errors import JobError
from p2pflop.ids import content_hash
from p2pflop.job.blobs import LazyBlobs, Read
from p2pflop.job.collection import collection_of, number_name, numbered
from p2pflop.job.counts import shown, whole_number
from p2pflop.job.file import JobBody, Labels, open_job
from p2pflop.job.graph import Attr, Graph, GraphParam, Output, encode_graph
from p2pflop.job.shapes import stored_bytes
from p2pflop.job.spec import (
    MAX_STEPS,
    MODE_COLLECT,
    MODE_LAST,
    MODE_TRACE,
    SPEC_VERSION,
    BlobSource,
    FeedSource,
    InitSource,
    Job,
    MemberSource,
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
    Recording,
    Stage,
    is_literal,
    is_realized,
    parameter_names,
    unwrap,
)
from p2pflop.kernels.export import Exporter, purify
from p2pflop.kernels.feeds import Feed
from p2pflop.kernels.gradients import drop_unread_gradients
from p2pflop.kernels.names import find_tensors, first_names, mentions
from p2pflop.kernels.places import Place, Places, at
from p2pflop.kernels.refusals import check_nodes, read_order
from p2pflop.kernels.slots import (
    REALIZE_HINT,
    STEP_ARGUMENT,
    Number,
    Slot,
    Slots,
    pack_argument,
    read_buffer,
)
from p2pflop.kernels.steps import step_tensor
from p2pflop.kernels.suspicions import warn_of, warn_of_new_tensors
from p2pflop.kernels.weights import Stored
from p2pflop.wire import encode

MAX_SEED: Final = 2**32 - 1
MAX_NAME: Final = 200
MIN_MEMBERS: Final = 16
"""So many blobs and more are entries of a collection."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A job, names for its parts, and what goes into it: the bytes of the blob inputs that were in
    memory by slot, and all blobs, stored weights and shards of feeds included, by address."""

    body: JobBody
    labels: Labels
    inputs: dict[int, bytes]
    blobs: LazyBlobs


def trace(
    fn: Callable[..., object],
    *,
    steps: int,
    every: Mapping[int, Callable[..., object]] | None = None,
    seed: int = 0,
    args: Mapping[str, Number] | None = None,
    stop: str | tuple[str, int] | None = None,
    collect: Sequence[str] = (),
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
    ``collect`` names outputs of which every value is kept, not the last alone.
    ``address_of`` names a blob.

    Each function is called once; no kernel is compiled, and the program's tensors are afterwards as
    they were before. Raises JobError for what cannot travel.
    """
    _check_types(fn, every, args, title)
    every = {} if every is None else every
    steps = whole_number("steps", steps, MAX_STEPS - 1)
    seed = whole_number("seed", seed, MAX_SEED, lowest=0)
    functions = [unwrap(function) for function in (fn, *every.values())]
    periods = [1, *(whole_number("every", period, MAX_STEPS - 1) for period in every)]
    with Stage() as stage:
        arguments = _stand_in_arguments(stage, functions, args or {})
        tensors = find_tensors(functions)
        recordings = [
            _record(stage, function, arguments, training=number == 0)
            for number, function in enumerate(functions)
        ]
        _check_collect(recordings, collect)
        stop_at = _find_stop(recordings, periods, stop, stage.places)
        recordings = drop_unread_gradients(recordings, stage.held)
        names = first_names(tensors)
        warn_of(recordings, stage.held, names, stage.places)
        warn_of_new_tensors(tensors, find_tensors(functions), stage.places)
        slots = Slots(stage, recordings, args or {}, names)
        builder = _Builder(stage, recordings, slots, address_of, frozenset(collect))
        graphs = [builder.phase(recording) for recording in recordings]
        return builder.finish(graphs, periods, steps, seed, stop_at, title)


def _check_types(fn: object, every: object, args: object, title: object) -> None:
    if every is not None and not isinstance(every, Mapping):
        raise JobError(
            "every is not a dict of a number of steps to a function",
            hint="Write every={100: evaluate} to run evaluate after every 100 steps.",
        )
    for function in (fn, *(every or {}).values()):
        if not callable(function):
            raise JobError(
                f"{shown(function)} is not a function",
                hint="Give the function itself, without calling it: pf.trace(step, steps=100).",
            )
    if args is not None and not isinstance(args, Mapping):
        raise JobError(
            "args is not a dict of names to numbers",
            hint="Write args={'rate': 0.1} for a function that takes a parameter named rate.",
        )
    if not isinstance(title, str):
        raise JobError(f"title={shown(title)} is not a text", hint="Write it like title='digits'.")


def _record(
    stage: Stage,
    function: Callable[..., object],
    arguments: Mapping[str, Tensor],
    *,
    training: bool,
) -> Recording:
    recording = stage.record(function, arguments, training=training)
    roots = [*recording.outputs.values(), *recording.changed.values()]
    if not roots:
        raise JobError(
            at(recording.place, f"{recording.name} returns nothing and assigns to nothing"),
            hint="Return a dict of names to tensors, such as {'loss': loss}.",
        )
    check_nodes(roots, stage.places, stage.is_known)
    for name, output in recording.outputs.items():
        if any(isinstance(dim, int) and dim == 0 for dim in output.shape):
            raise JobError(
                at(
                    _place_of(output, recording, stage.places),
                    f"the output {name!r} of shape {output.shape} has no elements",
                ),
                hint="Leave it out of the function's dict.",
            )
    # Who writes p.grad = None looks after gradients without zero_grad().
    return replace(recording, gradients=[]) if mentions(function, "grad") else recording


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
        pack_argument(name, value)
    tensors = {}
    for name in sorted(names & (set(args) | {STEP_ARGUMENT})):
        if name == STEP_ARGUMENT:
            tensors[name] = step_tensor()
            continue
        buffer = UOp.new_buffer(Device.DEFAULT, 1, strong_dtype(dtypes.from_py(args[name])))
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
class _Builder:
    """Writes the graphs, and with them the param table."""

    stage: Stage
    recordings: list[Recording]
    slots: Slots
    address_of: Callable[[bytes], bytes]
    collect: frozenset[str]

    def phase(self, recording: Recording) -> _Phase:
        """What one phase leaves in the job."""
        fresh = [_stored(uop) for uop in recording.outputs.values()]
        written = self.slots.written(recording)
        pure = purify([*fresh, *written.values()], self.slots.replacements)
        roots = self.slots.disk.lift(pure)
        exporter = Exporter(self.slots.leaf, _no_literal)
        nodes = exporter.add(roots)
        slots = [self.slots.state_slot(buffer) for buffer in written]
        outputs = [Output(node) for node in nodes[: len(fresh)]]
        pairs = sorted(zip(slots, nodes[len(fresh) :], strict=True))
        outputs += [Output(node, slot) for slot, node in pairs]
        modes = tuple(
            MODE_COLLECT if name in self.collect else MODE_LAST if uop.shape else MODE_TRACE
            for name, uop in zip(recording.outputs, fresh, strict=True)
        )
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
        slots = self.slots.rows
        inputs = {slot.number: slot.data() for slot in slots if slot.data is not None}
        graphs = [encode_graph(phase.graph) for phase in phases]
        if init is not None:
            graphs.append(encode_graph(init))
        init_hash = content_hash(graphs[-1])
        params = []
        feeds, weights = _Feeds(self.address_of), _Weights(self.address_of)
        for slot in slots:
            source: Source = NoSource()
            if slot.number in inputs:
                data = inputs[slot.number]
                source = BlobSource(self.address_of(data), len(data))
            elif slot.stored is not None:
                source = weights.add(slot.stored)
            elif slot.feed is not None:
                source = feeds.add(slot.name, slot.param, slot.feed)
            elif slot.origin is not None:
                source = InitSource(init_hash, init_outputs[slot.number])
            params.append(WorkParam(int(slot.param.dtype), slot.param.shape, slot.role, source))
        members = _gather(params, self.address_of)
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
        labels = self._labels(phases, slots, title)
        held = {self.address_of(data): partial(bytes, data) for data in inputs.values()}
        blobs = LazyBlobs(held | feeds.readers | weights.readers | members)
        return Traced(body, labels, inputs, blobs)

    def _labels(self, phases: list[_Phase], slots: list[Slot], title: str) -> Labels:
        return Labels(
            title=_label(title or self.recordings[0].name),
            params=tuple(_label(slot.name) for slot in slots),
            phases=tuple(_label(recording.name) for recording in self.recordings),
            outputs=tuple(tuple(map(_label, phase.names)) for phase in phases),
        )

    def _graph(self, exporter: Exporter, outputs: Sequence[Output]) -> Graph:
        used = {node.attrs[0] for node in exporter.nodes if node.op.name == "PARAM"}
        used |= {output.slot for output in outputs if output.slot is not None}
        params = [slot.param for slot in self.slots.rows if slot.number in used]
        return Graph(tuple(params), tuple(exporter.nodes), tuple(outputs))

    def _init_graph(self) -> tuple[Graph | None, dict[int, int]]:
        """One graph for all values that are born where the job runs, and which output each is."""
        born = [slot for slot in self.slots.rows if slot.origin is not None]
        if not born:
            return None, {}
        exporter = Exporter(self._seed_leaf, self._init_literal)
        nodes = exporter.add(purify([slot.origin for slot in born if slot.origin is not None], {}))
        order = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
        graph = self._graph(exporter, [Output(node) for node in order])
        return graph, {slot.number: order[node] for slot, node in zip(born, nodes, strict=True)}

    def _seed_leaf(self, buffer: UOp, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        if buffer in self.stage.seeds:
            return self.slots.leaf(buffer, shape)
        raise JobError(
            "a value that is computed before the first step needs data",
            hint=REALIZE_HINT,
        )

    def _init_literal(self, buffer: UOp) -> Sequence[Attr] | None:
        if buffer in self.stage.seeds:
            return None
        if not is_literal(buffer) and not (buffer in self.stage.counts and is_realized(buffer)):
            return None
        return struct.unpack(f"<{buffer.numel()}{buffer.dtype.fmt}", read_buffer(buffer))


@dataclass(slots=True)
class _Feeds:
    """The shards of all feeds of a job, named."""

    address_of: Callable[[bytes], bytes]
    readers: dict[bytes, Read] = field(default_factory=dict)

    def add(self, name: str, param: GraphParam, feed: Feed) -> FeedSource:
        """Read every shard once, for its address."""
        size_bytes = stored_bytes(param.dtype, param.shape)
        addresses = []
        for number in range(feed.shards):
            data = feed.read(number)
            if len(data) != size_bytes:
                raise JobError(f"shard {number} of {name} has {len(data)} bytes, not {size_bytes}")
            addresses.append(self.address_of(data))
            shard = Stored(partial(feed.read, number), size_bytes, files=feed.files(number))
            self.readers[addresses[-1]] = partial(shard.read_as, addresses[-1], self.address_of)
        collection = encode(numbered(range(feed.shards), addresses, size_bytes))
        address = self.address_of(collection)
        self.readers[address] = partial(bytes, collection)
        return FeedSource(address, feed.shards, feed.steps)


@dataclass(slots=True)
class _Weights:
    """What lies elsewhere, named."""

    address_of: Callable[[bytes], bytes]
    readers: dict[bytes, Read] = field(default_factory=dict)

    def add(self, stored: Stored) -> BlobSource:
        """Read it once for its address, unless that is known."""
        address = stored.address or self.address_of(stored.read())
        self.readers[address] = partial(stored.read_as, address, self.address_of)
        return BlobSource(address, stored.size_bytes)


def _gather(params: list[WorkParam], address_of: Callable[[bytes], bytes]) -> dict[bytes, Read]:
    """Put many blobs into a collection: a job then names one address, not one for each of them.

    Changes ``params``; gives the collection. What is 0-d stays: ``with_args`` changes it.
    """
    found = [
        (slot, param.source)
        for slot, param in enumerate(params)
        if isinstance(param.source, BlobSource) and param.shape != ()
    ]
    if len(found) < MIN_MEMBERS:
        return {}
    blobs = {
        number_name(entry): (source.address, source.size_bytes)
        for entry, (_, source) in enumerate(found)
    }
    collection = encode(collection_of(blobs))
    address = address_of(collection)
    for entry, (slot, _) in enumerate(found):
        param, member = params[slot], MemberSource(address, len(collection), entry)
        params[slot] = WorkParam(param.dtype, param.shape, param.role, member)
    return {address: partial(bytes, collection)}


def _check_collect(recordings: Sequence[Recording], collect: Sequence[str]) -> None:
    if isinstance(collect, str) or not isinstance(collect, Iterable):
        name = collect if isinstance(collect, str) else "loss"
        raise JobError(f"collect={collect!r:.80} is no list", hint=f"collect=[{name!r:.80}]")
    known = [name for recording in recordings for name in recording.outputs]
    for name in collect:
        if name not in known:
            raise JobError(f"collect={name!r:.80} is not an output; there are {_listed(known)}")


def _find_stop(
    recordings: Sequence[Recording], periods: Sequence[int], stop: object, places: Places
) -> Stop | None:
    if stop is None:
        return None
    match stop:
        case str(name):
            every = 0
        case (str(name), number):
            every = whole_number("stop", number, MAX_STEPS - 1)
        case _:
            raise JobError(
                f"stop={stop!r:.80} is neither a name nor a name and a number of steps",
                hint="Write stop='done', or stop=('done', 10) to look every 10 steps.",
            )
    for number, recording in enumerate(recordings):
        if name in recording.outputs:
            _check_condition(recording, name, places)
            return Stop(number, list(recording.outputs).index(name), every or periods[number])
    known = [name for recording in recordings for name in recording.outputs]
    raise JobError(f"stop={name!r:.80} is not an output; there are {_listed(known)}")


def _check_condition(recording: Recording, name: str, places: Places) -> None:
    output = recording.outputs[name]
    if output.dtype != dtypes.bool or output.shape != ():
        raise JobError(
            at(
                _place_of(output, recording, places),
                f"a job ends at one bool, and the output {name!r} is of dtype {output.dtype.name} "
                f"and shape {output.shape}",
            ),
            hint="Return a comparison of single numbers, loss < 0.1, or .any() or .all() of many.",
        )


def _place_of(output: UOp, recording: Recording, places: Places) -> Place | None:
    return places.of(output, reversed(read_order([output]))) or recording.place


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _label(name: object) -> str:
    """A name as it is in a file: half of a surrogate pair has no encoding."""
    return str(name)[:MAX_NAME].encode("utf-8", "replace").decode()


def _stored(uop: UOp) -> UOp:
    return uop.cast(strong_dtype(uop.dtype)) if uop.dtype in dtypes.weaks else uop


def _no_literal(_: UOp) -> None:
    return None
