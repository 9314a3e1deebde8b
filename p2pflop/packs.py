"""What a sweep sends to the node to buy many small jobs as one; see ``p2pflop.job.packing``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from p2pflop.client import Client
from p2pflop.job.spec import ROLE_INPUT, BlobSource, Work
from p2pflop.job.variants import Variants, capacity
from p2pflop.sdk import Job, Number
from p2pflop.wire import decode


def room_for(job: Job, args: Sequence[Mapping[str, Number]]) -> int:
    """How many of the jobs with these arguments are worth one pack: 1 if none are."""
    return capacity(job.checked) if len(args) > 1 and any(args) else 1


def variants_of(
    job: Job,
    args: Sequence[Mapping[str, Number]],
    run_ids: Sequence[str],
    room: int,
    client: Client,
) -> Variants:
    """The variants of a job, for a pack. ``client`` has what of the job's inputs is not at hand."""
    names = {name for each in args for name in each}
    labels, params = job.file.labels.params, decode(Work, job.file.body.work).params
    slots = [
        slot
        for slot, param in enumerate(params)
        if labels[slot] in names and param.role == ROLE_INPUT and param.shape == ()
    ]

    def values(each: Mapping[str, Number]) -> tuple[bytes, ...]:
        changed = job.with_args(**each)
        sources = decode(Work, changed.file.body.work).params
        found = []
        for slot in slots:
            source = sources[slot].source
            if isinstance(source, BlobSource):
                data = changed.inputs.get(source.address)
                found.append(client.get(source.address) if data is None else data)
        return tuple(found)

    rows = tuple(values(each) for each in args)
    return Variants(1, job.file, room, tuple(slots), tuple(run_ids), rows)
