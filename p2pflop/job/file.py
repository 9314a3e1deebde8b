"""A job as bytes: what travels to a provider, and the ``.p2pj`` file that a user keeps.

Both are one canonical record, compressed by zlib. The compressed form is not canonical (zlib's
versions differ), so nothing is ever named by its hash: works and graphs inside it are. Inflating
stops at a limit before anything is decoded.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import Annotated, ClassVar, Final, Literal

import msgspec

from p2pflop.errors import JobError, ProtocolError
from p2pflop.ids import HASH_BYTES
from p2pflop.job.collection import Collection
from p2pflop.job.graph import Dtype, decode_graph, graph_hash
from p2pflop.job.limits import DEFAULT_LIMITS, Limits
from p2pflop.job.meter import Cost, JobCost, init_graphs, meter, meter_job
from p2pflop.job.shapes import stored_bytes
from p2pflop.job.spec import (
    MAX_PARAMS,
    MAX_PHASE_OUTPUTS,
    MAX_PHASES,
    BlobSource,
    FeedSource,
    Job,
    MemberSource,
    Work,
    state_root,
    state_slots,
    work_id,
)
from p2pflop.job.validate import Checked, Refusal, validate, validate_job, validate_work
from p2pflop.wire import Hash, Record, Text, decode, encode

MAX_INFLATED_BYTES: Final = 16 * 1024 * 1024
MAX_COMPRESSED_BYTES: Final = 4 * 1024 * 1024
MAX_BODY_GRAPHS: Final = 64
KNOWN_GRAPHS: Final = 32
MAX_KNOWN_GRAPH_BYTES: Final = 8 * 1024
"""Graphs up to here are remembered as they were checked; in memory one is a hundred times that."""

FILE_MAGIC: Final = b"p2pj\x01"
_LEVEL: Final = 9


class JobBody(Record, frozen=True):
    """A job with everything that determines it but its inputs: what travels to a provider.

    ``work`` is an encoded ``Work``; ``graphs`` are encoded, each distinct graph of the work once:
    the phases' in their order, then the init graphs in slot order. ``state`` has the addresses of
    the state slots, in slot order, that a stretch starts from which does not start at step 0; a
    node that has run the steps before it finds them itself if there are none.
    """

    MAX_BYTES: ClassVar[int] = MAX_INFLATED_BYTES

    job: Job
    work: Annotated[bytes, msgspec.Meta(max_length=Work.MAX_BYTES)]
    graphs: Annotated[tuple[bytes, ...], msgspec.Meta(max_length=MAX_BODY_GRAPHS)]
    state: Annotated[tuple[Hash, ...], msgspec.Meta(max_length=MAX_PARAMS)] = ()


class Labels(Record, frozen=True):
    """Names for people; no part of what is computed.

    ``params`` has a name a slot, ``phases`` a name a phase, ``outputs`` a tuple of names a phase,
    one for each of its fresh outputs.
    """

    title: Text
    params: Annotated[tuple[Text, ...], msgspec.Meta(max_length=MAX_PARAMS)]
    phases: Annotated[tuple[Text, ...], msgspec.Meta(max_length=MAX_PHASES)]
    outputs: Annotated[
        tuple[Annotated[tuple[Text, ...], msgspec.Meta(max_length=MAX_PHASE_OUTPUTS)], ...],
        msgspec.Meta(max_length=MAX_PHASES),
    ]


class JobFile(Record, frozen=True):
    """A job and its labels."""

    MAX_BYTES: ClassVar[int] = MAX_INFLATED_BYTES

    version: Literal[1]
    body: JobBody
    labels: Labels


@dataclass(frozen=True)
class CheckedJob:
    """A job that may be run: decoded, validated and metered. ``graphs`` are keyed by hash,
    ``state`` is what it starts from: empty at step 0, or if it is not known yet. ``members`` are
    the blobs of ``member_slots``, once their collections are at hand (``resolve``)."""

    job: Job
    work: Work
    work_id: bytes
    graphs: dict[bytes, Checked]
    cost: JobCost
    state: tuple[bytes, ...] = ()
    members: tuple[BlobSource, ...] = ()

    @property
    def nodes(self) -> int:
        """Those of all its graphs: what is lowered before anything is paid."""
        return sum(len(checked.graph.nodes) for checked in self.graphs.values())

    @property
    def starts(self) -> bool:
        """Whether it is known what it starts from."""
        return self.job.first_step == 0 or bool(self.state) or not state_slots(self.work)

    @property
    def root_from(self) -> bytes:
        """The state root that it starts from; zeros at step 0."""
        return state_root(self.state) if self.job.first_step else bytes(HASH_BYTES)

    @cached_property
    def named_inputs(self) -> tuple[tuple[int, BlobSource], ...]:
        """The slots that are filled from blobs that the job itself names, the state that it starts
        from included."""
        start = self._start
        found = []
        for slot, param in enumerate(self.work.params):
            if slot in start:
                found.append((slot, BlobSource(start[slot], self.slot_bytes(slot))))
            elif isinstance(param.source, BlobSource):
                found.append((slot, param.source))
        return tuple(found)

    @cached_property
    def member_slots(self) -> tuple[tuple[int, MemberSource], ...]:
        """The slots that are filled from entries of collections."""
        start, params = self._start, enumerate(self.work.params)
        return tuple(
            (slot, param.source)
            for slot, param in params
            if isinstance(param.source, MemberSource) and slot not in start
        )

    @property
    def collections(self) -> dict[bytes, int]:
        """The sizes in bytes of the collections that it needs, by address."""
        return {source.collection: source.collection_bytes for _, source in self.member_slots}

    @property
    def is_resolved(self) -> bool:
        """Whether the blob of every input is known."""
        return len(self.members) == len(self.member_slots)

    @cached_property
    def inputs(self) -> tuple[tuple[int, BlobSource], ...]:
        """All slots that are filled from blobs, as far as these are known."""
        slots = [slot for slot, _ in self.member_slots]
        return tuple(
            sorted([*self.named_inputs, *zip(slots, self.members, strict=False)], key=itemgetter(0))
        )

    @property
    def input_slots(self) -> tuple[int, ...]:
        """The slots of ``inputs``, whether their blobs are known or not."""
        return tuple(sorted(slot for slot, _ in (*self.named_inputs, *self.member_slots)))

    @property
    def input_bytes(self) -> int:
        """Bytes of all inputs, and of the collections that tell of them."""
        return sum(map(self.slot_bytes, self.input_slots)) + sum(self.collections.values())

    def resolve(self, collections: Mapping[bytes, bytes]) -> CheckedJob | Refusal:
        """The job with its members known, by the encoded collections, by address."""
        members = []
        try:
            opened = {
                address: decode(Collection, collections[address]).entries
                for address in self.collections
            }
        except ProtocolError as error:
            return Refusal(f"a collection of inputs: {error.message}")
        for slot, source in self.member_slots:
            entries = opened[source.collection]
            if source.entry >= len(entries):
                return Refusal(f"slot {slot}: its collection has no entry {source.entry}")
            entry = entries[source.entry]
            if entry.size_bytes != self.slot_bytes(slot):
                return Refusal(
                    f"slot {slot}: entry {source.entry} of its collection is of "
                    f"{entry.size_bytes} bytes, not of {self.slot_bytes(slot)}"
                )
            members.append(BlobSource(entry.address, entry.size_bytes))
        return replace(self, members=tuple(members))

    @property
    def _start(self) -> dict[int, bytes]:
        return dict(zip(state_slots(self.work), self.state, strict=False))

    @property
    def feeds(self) -> tuple[tuple[int, FeedSource], ...]:
        """The slots that hold one shard after the other."""
        params = enumerate(self.work.params)
        return tuple((slot, p.source) for slot, p in params if isinstance(p.source, FeedSource))

    def slot_bytes(self, slot: int) -> int:
        """The size of the tensor in a slot."""
        param = self.work.params[slot]
        return stored_bytes(Dtype(param.dtype), param.shape)


def encode_body(body: JobBody) -> bytes:
    """``body``, compressed. Raises JobError if it is over the limits of a receiver."""
    return deflate("job", encode(body))


def decode_body(data: bytes) -> JobBody:
    """The body in ``data``; its work and graphs are still bytes. Raises ProtocolError."""
    return decode(JobBody, inflate("job", data))


def encode_file(file: JobFile) -> bytes:
    """The bytes of a ``.p2pj`` file. Raises JobError if it is over the limits of a reader."""
    return FILE_MAGIC + deflate("job file", encode(file))


def decode_file(data: bytes) -> JobFile:
    """The job in a ``.p2pj`` file, whose labels fit its work. Raises ProtocolError."""
    if data[: len(FILE_MAGIC)] != FILE_MAGIC:
        raise ProtocolError("not a job file", hint="Write one with 'p2pflop trace'.")
    file = decode(JobFile, inflate("job file", data[len(FILE_MAGIC) :]))
    work = decode(Work, file.body.work)
    labels = file.labels
    counts = [len(names) for names in labels.outputs]
    if len(labels.params) != len(work.params) or len(labels.phases) != len(work.phases):
        raise ProtocolError("the labels of the job file do not fit its work")
    if counts != [len(phase.modes) for phase in work.phases]:
        raise ProtocolError("the output names of the job file do not fit its work")
    return file


def open_job(body: JobBody, limits: Limits = DEFAULT_LIMITS) -> CheckedJob | Refusal:
    """Decode, validate and meter ``body``: after this it may be priced, lowered and run.

    A small graph that many jobs share, as those of a sweep do, is looked at once for all of them.
    """
    try:
        work = decode(Work, body.work)
        if len(body.graphs) > limits.graphs:
            return Refusal(f"{len(body.graphs)} graphs are over the limit of {limits.graphs}")
        names = [graph_hash(data) for data in body.graphs]
        if names != list(dict.fromkeys((*(p.graph for p in work.phases), *init_graphs(work)))):
            return Refusal("the graphs of the job are not those of its work, in their order")
        graphs: dict[bytes, Checked] = {}
        costs: dict[bytes, Cost] = {}
        nodes = 0
        for name, data in zip(names, body.graphs, strict=True):
            small = len(data) <= MAX_KNOWN_GRAPH_BYTES
            opened = _known_graph(data, limits) if small else _open_graph(data, limits)
            if isinstance(opened, Refusal):
                return Refusal(f"graph {name.hex()[:12]}: {opened.reason}")
            graphs[name], costs[name] = opened
            nodes += len(graphs[name].graph.nodes)
            if nodes > limits.job_nodes:
                return Refusal(f"over {limits.job_nodes} nodes in all graphs")
    except ProtocolError as error:
        return Refusal(error.message)
    return _finish(body, work, graphs, costs, limits)


def _open_graph(data: bytes, limits: Limits) -> tuple[Checked, Cost] | Refusal:
    checked = validate(decode_graph(data, limits), limits)
    return checked if isinstance(checked, Refusal) else (checked, meter(checked))


_known_graph = lru_cache(KNOWN_GRAPHS)(_open_graph)


def _finish(
    body: JobBody,
    work: Work,
    graphs: dict[bytes, Checked],
    costs: Mapping[bytes, Cost],
    limits: Limits,
) -> CheckedJob | Refusal:
    job = body.job
    refusal = validate_work(work, graphs, limits) or validate_job(work, job, graphs, limits)
    slots = len(state_slots(work)) if job.first_step else 0
    if refusal is None and len(body.state) not in (0, slots):
        return Refusal(f"{len(body.state)} tensors to start from, the job has {slots}")
    if refusal is not None:
        return refusal
    try:
        cost = meter_job(work, job, graphs, costs)
    except JobError as error:
        return Refusal(error.message)
    return CheckedJob(job, work, work_id(work), graphs, cost, body.state)


def deflate(what: str, data: bytes) -> bytes:
    """``data``, compressed. Raises JobError if it is over the limits of a receiver."""
    compressed = zlib.compress(data, _LEVEL)
    if len(data) > MAX_INFLATED_BYTES or len(compressed) > MAX_COMPRESSED_BYTES:
        raise JobError(f"{what} of {len(data)} bytes ({len(compressed)} compressed) is too large")
    return compressed


def inflate(what: str, data: bytes) -> bytes:
    """What was compressed, within the limits. Raises ProtocolError; ``what`` it is called there."""
    if len(data) > MAX_COMPRESSED_BYTES:
        raise ProtocolError(f"{what} of {len(data)} bytes is over {MAX_COMPRESSED_BYTES}")
    stream = zlib.decompressobj()
    try:
        inflated = stream.decompress(data, MAX_INFLATED_BYTES + 1)
    except zlib.error as error:
        raise ProtocolError(f"{what} is not a zlib stream: {error}") from error
    if len(inflated) > MAX_INFLATED_BYTES:
        raise ProtocolError(f"{what} is over {MAX_INFLATED_BYTES} bytes inflated")
    if not stream.eof or stream.unused_data:
        raise ProtocolError(f"{what} is cut short or has bytes after its end")
    return inflated
