"""Works, jobs, classes and results: the records that say what is computed and what came out.

A **work** is a deterministic sequence of states. At each step ``k`` its phases run in order on
the shared param table; a phase is due when ``k + 1 > offset`` and
``(k + 1 - offset) % every == 0``, so that ``every=100`` runs after steps 99, 199, ... A **job** is
a stretch of a work. Names (of tensors, outputs, args) are not part of a work: they live in the
job file beside it, so that renaming a variable does not change what is computed.

What a slot of the param table is depends on its role: ``input`` never changes, ``state`` is what
graphs write, ``step`` (one 32 or 64 bit integer, 0-d or of one element) holds the number of the
step, ``seed`` (two UINT32) holds a constant and the work's seed, as tinygrad's generator wants it;
``feed`` holds one shard of a data set after the other (``FeedSource``).

A run stands still between two steps where something comes or goes (``stands_still``): a shard that
is due, a value that is to be collected.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

import msgspec

from p2pflop.ids import content_hash
from p2pflop.job.collection import MAX_COLLECTION_ENTRIES, Collection
from p2pflop.wire import U32, U63, Hash, Record, Text, encode

SPEC_VERSION: Final = 1
MAX_PHASES: Final = 16
MAX_PARAMS: Final = 4096
MAX_RANK: Final = 16
MAX_PHASE_OUTPUTS: Final = 4096
MAX_STEPS: Final = 2**40
"""Of a job: less than that."""

ROLE_INPUT: Final = 0
ROLE_STATE: Final = 1
ROLE_FEED: Final = 2
ROLE_STEP: Final = 3
ROLE_SEED: Final = 4

MODE_LAST: Final = 0
MODE_TRACE: Final = 1
MODE_COLLECT: Final = 2

Version = Literal[1]
Dim = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Dims = Annotated[tuple[Dim, ...], msgspec.Meta(max_length=MAX_RANK)]


class BlobSource(Record, frozen=True, tag=0):
    """The bytes of a blob: the tensor in row-major order, little-endian, ``size_bytes`` of them."""

    address: Hash
    size_bytes: U63


class InitSource(Record, frozen=True, tag=1):
    """Fresh output number ``output`` of an init graph: weights born from the seed."""

    graph: Hash
    output: U32


class ResultSource(Record, frozen=True, tag=2):
    """An output of another job. A buyer's planner resolves it before anything is sold."""

    work: Hash
    first_step: U63
    steps: U63
    output: U32


class NoSource(Record, frozen=True, tag=3):
    """For the roles that the run itself supplies: ``step`` and ``seed``."""


class FeedSource(Record, frozen=True, tag=4):
    """Shards in turn, each for ``steps`` steps, over and over.

    ``collection`` is the address of a collection (``collection.numbered``) of ``shards`` blobs,
    each the bytes of a tensor of the param's dtype and shape.
    """

    collection: Hash
    shards: Annotated[int, msgspec.Meta(ge=1, le=MAX_COLLECTION_ENTRIES)]
    steps: Annotated[int, msgspec.Meta(ge=1, le=2**40)]


class MemberSource(Record, frozen=True, tag=5):
    """Entry number ``entry`` of a collection, whose blob has ``collection_bytes`` bytes.

    So a model of hundreds of tensors costs a work one address, not hundreds.
    """

    collection: Hash
    collection_bytes: Annotated[int, msgspec.Meta(ge=1, le=Collection.MAX_BYTES)]
    entry: Annotated[int, msgspec.Meta(ge=0, lt=MAX_COLLECTION_ENTRIES)]


Source = BlobSource | InitSource | ResultSource | NoSource | FeedSource | MemberSource


class WorkParam(Record, frozen=True):
    """One slot of the param table: storage dtype (``graph.Dtype``), shape, role and source."""

    dtype: Annotated[int, msgspec.Meta(ge=0, le=12)]
    shape: Dims
    role: Annotated[int, msgspec.Meta(ge=0, le=4)]
    source: Source


class Phase(Record, frozen=True):
    """A graph, when it is due, and for each of its fresh outputs the mode in which it is kept."""

    graph: Hash
    every: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    offset: Annotated[int, msgspec.Meta(ge=0, le=2**40)]
    modes: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, le=2)], ...],
        msgspec.Meta(max_length=MAX_PHASE_OUTPUTS),
    ]


class Stop(Record, frozen=True):
    """End when bool output ``output`` of ``phase`` is true at a step at which the phase is due and
    whose number, from 1, is a multiple of ``every``."""

    phase: U32
    output: U32
    every: Annotated[int, msgspec.Meta(ge=1, le=2**40)]


class Work(Record, frozen=True):
    """Everything that determines a computation. ``seed`` feeds every param of role ``seed``."""

    MAX_BYTES: ClassVar[int] = 1024 * 1024

    version: Version
    phases: Annotated[tuple[Phase, ...], msgspec.Meta(min_length=1, max_length=MAX_PHASES)]
    params: Annotated[tuple[WorkParam, ...], msgspec.Meta(max_length=MAX_PARAMS)]
    seed: U32
    stop: Stop | None = None


class Job(Record, frozen=True):
    """A stretch of a work: steps ``first_step`` to ``first_step + steps - 1``."""

    work: Hash
    first_step: U63
    steps: Annotated[int, msgspec.Meta(ge=1, le=2**40)]


class ClassDescriptor(Record, frozen=True):
    """A determinism class: two honest runs of one job in one class give equal bytes."""

    name: Text
    backend: Text
    arch: Text
    compiler: Text
    flags: Text
    tinygrad: Text
    opts: Text


class NamedOutput(Record, frozen=True):
    """Where a fresh output of a phase ended: blob address and size. For ``collect`` those of a
    collection (``collection.numbered``) of its values by step."""

    phase: U32
    output: U32
    address: Hash
    size_bytes: U63


class Result(Record, frozen=True):
    """What a job gave. Its hash is the single hash that a buyer gets.

    ``sources`` are the addresses of the blob inputs and feeds in slot order; ``outputs`` the last
    values, or collections of all of them; ``trace`` the address of the blob of traced scalars (see
    ``docs/formats.md``); ``state`` the addresses of the state slots in slot order, ``state_root``
    the hash of them.
    """

    MAX_BYTES: ClassVar[int] = 1024 * 1024

    version: Version
    work: Hash
    class_id: Hash
    first_step: U63
    steps_done: U63
    sources: Annotated[tuple[Hash, ...], msgspec.Meta(max_length=MAX_PARAMS)]
    outputs: Annotated[tuple[NamedOutput, ...], msgspec.Meta(max_length=MAX_PHASE_OUTPUTS)]
    trace: Hash
    state: Annotated[tuple[Hash, ...], msgspec.Meta(max_length=MAX_PARAMS)]
    state_root: Hash


def work_id(work: Work) -> bytes:
    """The hash that names ``work``."""
    return content_hash(encode(work))


def class_id(descriptor: ClassDescriptor) -> bytes:
    """The hash that names a determinism class."""
    return content_hash(encode(descriptor))


def state_root(addresses: tuple[bytes, ...]) -> bytes:
    """The hash of the ordered state addresses."""
    return content_hash(b"".join(addresses))


def source_addresses(work: Work) -> tuple[bytes, ...]:
    """The addresses of blob inputs, and of the collections behind feeds, in slot order."""
    addresses = []
    for param in work.params:
        if isinstance(param.source, BlobSource):
            addresses.append(param.source.address)
        elif isinstance(param.source, FeedSource):
            addresses.append(param.source.collection)
    return tuple(addresses)


def state_slots(work: Work) -> list[int]:
    """The slots whose values are state, ascending."""
    return [slot for slot, param in enumerate(work.params) if param.role == ROLE_STATE]


def shard_at(source: FeedSource, step: int) -> int:
    """The number of the shard that a feed holds at ``step``."""
    return step // source.steps % source.shards


def is_fed(source: FeedSource, step: int) -> bool:
    """Whether another shard is due before ``step`` than before the step before it."""
    return source.shards > 1 and step % source.steps == 0


def shards_of(source: FeedSource, first_step: int, steps: int) -> list[int]:
    """The numbers of the shards that a stretch needs, in the order of their first use."""
    first, last = first_step // source.steps, (first_step + steps - 1) // source.steps
    count = min(last - first + 1, source.shards)
    return [turn % source.shards for turn in range(first, first + count)]


def collected(work: Work, step: int) -> list[tuple[int, int]]:
    """``(phase, output)`` of every output that step ``step`` gives and that is collected."""
    return [
        (number, output)
        for number, phase in enumerate(work.phases)
        if MODE_COLLECT in phase.modes and is_due(phase, step)
        for output, mode in enumerate(phase.modes)
        if mode == MODE_COLLECT
    ]


def graphs_of(work: Work) -> frozenset[bytes]:
    """The hashes of all graphs that ``work`` runs, once or at each step."""
    sources = (param.source for param in work.params)
    born = {source.graph for source in sources if isinstance(source, InitSource)}
    return frozenset(born | {phase.graph for phase in work.phases})


def ever_stands_still(work: Work) -> bool:
    """Whether there is any step before which a run stands still."""
    collects = any(MODE_COLLECT in phase.modes for phase in work.phases)
    return collects or any(isinstance(param.source, FeedSource) for param in work.params)


def stands_still(work: Work, step: int) -> bool:
    """Whether a run stands still before ``step``, not being its first."""
    feeds = (p.source for p in work.params if isinstance(p.source, FeedSource))
    return any(is_fed(source, step) for source in feeds) or bool(collected(work, step - 1))


def is_due(phase: Phase, step: int) -> bool:
    """Whether ``phase`` runs at ``step``, counted from 0."""
    tick = step + 1 - phase.offset
    return tick > 0 and tick % phase.every == 0


def times_due(phase: Phase, first_step: int, steps: int) -> int:
    """How often ``phase`` runs in ``steps`` steps from ``first_step``."""

    def until(end: int) -> int:
        return max(0, end - phase.offset) // phase.every

    return until(first_step + steps) - until(first_step)
