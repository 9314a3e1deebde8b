"""Variants of a job: the same graphs with other arguments, and whether they are worth packing.

See ``packing`` for what a pack is.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, ClassVar, Final, Literal

import msgspec

from p2pflop.errors import JobError
from p2pflop.job.delivery import output_bytes
from p2pflop.job.file import MAX_INFLATED_BYTES, CheckedJob, JobBody, JobFile, deflate, inflate
from p2pflop.job.graph import Dtype
from p2pflop.job.meter import init_graphs
from p2pflop.job.shapes import ITEM_BYTES, stored_bytes
from p2pflop.job.spec import (
    MAX_PARAMS,
    MAX_PHASES,
    MODE_COLLECT,
    MODE_LAST,
    ROLE_FEED,
    ROLE_INPUT,
    BlobSource,
    Job,
    Work,
    state_slots,
    work_id,
)
from p2pflop.wire import U32, Record, Text, decode, encode

MAX_VARIANTS: Final = 256
"""In one pack."""
MAX_VALUE_BYTES: Final = 8
"""An argument is 0-d."""
SMALL_WORK: Final = 10**8
"""FLOP and touched bytes of a job that is worth packing: more takes longer than a purchase."""
PACK_WORK: Final = 10**9
ADDED_PHASES: Final = 3
"""By packing, and one for each init graph."""
KEPT_BYTES: Final = 64 * 1024
"""The tables that a pack writes: each variant writes all of their rows."""

AddressOf = Callable[[bytes], bytes]


class Variants(Record, frozen=True):
    """A job and the values of its arguments in each of its variants.

    ``slots`` are those of the arguments, rising; ``values`` has for each variant the storage form
    of each of them, ``run_ids`` the id of its run. ``room`` is for how many variants the pack has
    tables, a power of two.
    """

    MAX_BYTES: ClassVar[int] = MAX_INFLATED_BYTES

    version: Literal[1]
    file: JobFile
    room: Annotated[int, msgspec.Meta(ge=1, le=MAX_VARIANTS)]
    slots: Annotated[tuple[U32, ...], msgspec.Meta(min_length=1, max_length=MAX_PARAMS)]
    run_ids: Annotated[tuple[Text, ...], msgspec.Meta(min_length=1, max_length=MAX_VARIANTS)]
    values: Annotated[
        tuple[tuple[Annotated[bytes, msgspec.Meta(max_length=MAX_VALUE_BYTES)], ...], ...],
        msgspec.Meta(min_length=1, max_length=MAX_VARIANTS),
    ]


def encode_variants(variants: Variants) -> bytes:
    """``variants``, compressed. Raises JobError if they are over the limits of a receiver."""
    return deflate("pack", encode(variants))


def decode_variants(data: bytes) -> Variants:
    """The variants in ``data``; what they are of is still to be checked. Raises ProtocolError."""
    return decode(Variants, inflate("pack", data))


def capacity(checked: CheckedJob) -> int:
    """How many variants of a job are worth one pack: a power of two, 1 for none."""
    cost = checked.cost
    work = max(cost.flop, cost.touched_bytes, 1)
    kept_bytes = max(_kept_bytes(checked), 1)
    if obstacle(checked) or work > SMALL_WORK or kept_bytes > KEPT_BYTES:
        return 1
    most = min(MAX_VARIANTS, PACK_WORK // work, KEPT_BYTES // kept_bytes)
    return 1 << (most.bit_length() - 1) if most else 1


def obstacle(checked: CheckedJob) -> str:
    """Why variants of a job cannot be packed, or nothing."""
    work, job = checked.work, checked.job
    if job.first_step:
        return "it goes on from a state"
    if work.stop is not None:
        return "it ends by an output of its own"
    if any(MODE_COLLECT in phase.modes for phase in work.phases):
        return "it collects values"
    if any(param.role == ROLE_FEED for param in work.params):
        return "it is fed"
    if any(phase.offset or job.steps % phase.every for phase in work.phases):
        return "its last step is not one of all its phases"
    if len(work.phases) + ADDED_PHASES + len(init_graphs(work)) > MAX_PHASES:
        return "it has too many phases"
    return ""


def variant(variants: Variants, place: int, address_of: AddressOf) -> JobFile:
    """The job of one of the variants, as ``Job.with_args`` makes it."""
    file = variants.file
    work = decode(Work, file.body.work)
    params = list(work.params)
    for slot, value in zip(variants.slots, variants.values[place], strict=True):
        source = BlobSource(address_of(value), len(value))
        params[slot] = msgspec.structs.replace(params[slot], source=source)
    changed = msgspec.structs.replace(work, params=tuple(params))
    job = Job(work_id(changed), 0, file.body.job.steps)
    return JobFile(file.version, JobBody(job, encode(changed), file.body.graphs), file.labels)


def check_values(variants: Variants, work: Work) -> None:
    """Raises JobError unless there is a value of its size for each argument in each variant."""
    if not len(variants.values) == len(set(variants.run_ids)) == len(variants.run_ids):
        raise JobError("each variant needs an id of its own")
    if any(later <= earlier for earlier, later in pairwise(variants.slots)):
        raise JobError("the slots of the arguments do not rise")
    if variants.slots[-1] >= len(work.params):
        raise JobError(f"the job has no slot {variants.slots[-1]}")
    params = [work.params[slot] for slot in variants.slots]
    if any(param.role != ROLE_INPUT or param.shape for param in params):
        raise JobError("what varies is not an argument")
    sizes = [ITEM_BYTES[Dtype(param.dtype)] for param in params]
    for place, values in enumerate(variants.values):
        if [len(value) for value in values] != sizes:
            raise JobError(f"the values of variant {place} are not those of the arguments")


def _kept_bytes(checked: CheckedJob) -> int:
    """What a pack keeps of each variant."""
    params = [checked.work.params[slot] for slot in state_slots(checked.work)]
    state = sum(stored_bytes(Dtype(param.dtype), param.shape) for param in params)
    return state + sum(
        output_bytes(checked, number, output)
        for number, phase in enumerate(checked.work.phases)
        for output, mode in enumerate(phase.modes)
        if mode == MODE_LAST
    )
