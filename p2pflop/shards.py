"""Jobs of a sweep that differ in their data: one for each shard of a feed.

What is another shard every step for one long job is the one input of each of many jobs here. Shards
are read one at a time and put into the node, so that a sweep that is attached again needs no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace as changed

from p2pflop.errors import ConfigError
from p2pflop.job.counts import whole_number
from p2pflop.job.file import JobBody, JobFile
from p2pflop.job.graph import Dtype
from p2pflop.job.shapes import stored_bytes
from p2pflop.job.spec import ROLE_FEED, ROLE_INPUT, BlobSource, Work, WorkParam, work_id
from p2pflop.job.spec import Job as JobRecord
from p2pflop.sdk import Job, Number
from p2pflop.wire import decode, encode

if TYPE_CHECKING:
    from p2pflop.client import Client
    from p2pflop.kernels.feeds import Feed

HINT: Final = 'Name it: feed={"x": pf.feed(...)}. `p2pflop show` lists the inputs of a job.'


def jobs_of(
    job: Job,
    args: Sequence[Mapping[str, Number]] | None,
    feed: object,
    most: int,
    client: Client,
) -> tuple[list[dict[str, Number]], list[dict[str, str]]]:
    """The arguments of each job of a sweep, and the addresses of its data by the names of inputs.

    ``feed`` is a mapping of names to what ``pf.feed`` gives or takes, all of as many shards; or one
    of those, for the only feed of the job. Every shard is put into the node. Raises ConfigError for
    what the job does not have, and for over ``most`` jobs.
    """
    if args is None and feed is None:
        raise ConfigError("which jobs?", hint='Give args=[{"lr": 0.1}, ...] or feed=.')
    if args is not None and not _are_arguments(args):
        raise ConfigError(
            "args= is not a list of arguments by name", hint='Give args=[{"lr": 0.1}, ...].'
        )
    if args is not None and not len(args):
        raise ConfigError(
            "a sweep of no jobs: the list of arguments is empty",
            hint='Give at least one: args=[{"lr": 0.1}], or [{}] for the job as it is.',
        )
    feeds = {} if feed is None else _feeds(job, feed)
    shards = min((each.shards for each in feeds.values()), default=0)
    variants = [{name: _plain(value) for name, value in each.items()} for each in args or ()]
    for each in variants:
        job.with_args(**each)
    if args is not None and feeds and len(args) != shards:
        raise ConfigError(
            f"{len(args)} arguments for {shards} shards",
            hint="Give as many of both: job n takes args[n] and shard n.",
        )
    jobs = shards if args is None else len(args)
    whole_number("jobs in a sweep", jobs, most, fault=ConfigError)
    data = [
        {name: client.put(each.read(number)).address.hex() for name, each in feeds.items()}
        for number in range(shards)
    ]
    return variants or [{} for _ in data], data


def with_data(job: Job, addresses: Mapping[str, str]) -> Job:
    """The same job on other data, by the names of its inputs and feeds: same graphs, same plans.

    The blobs must be of the sizes that the job says, and be in the node. Raises ConfigError.
    """
    old = job.file.body
    if old.job.first_step:
        raise ConfigError("a job that goes on from a state has the data that led to it")
    work = decode(Work, old.work)
    params = list(work.params)
    for name, address in addresses.items():
        slot = _slot(job, name)
        size_bytes = stored_bytes(Dtype(params[slot].dtype), params[slot].shape)
        source = BlobSource(bytes.fromhex(address), size_bytes)
        params[slot] = changed(params[slot], role=ROLE_INPUT, source=source)
    fed = changed(work, params=tuple(params))
    body = JobBody(JobRecord(work_id(fed), 0, old.job.steps), encode(fed), old.graphs)
    return replace(job, file=JobFile(job.file.version, body, job.file.labels))


def _params(job: Job) -> tuple[WorkParam, ...]:
    return decode(Work, job.file.body.work).params


def _slot(job: Job, name: str) -> int:
    slots = [
        slot
        for slot, (label, param) in enumerate(
            zip(job.file.labels.params, _params(job), strict=True)
        )
        if label == name and param.role in (ROLE_INPUT, ROLE_FEED) and param.shape
    ]
    if len(slots) != 1:
        raise ConfigError(f"the job has no input {name[:80]!r} to feed", hint=HINT)
    return slots[0]


def _only_feed(job: Job) -> str:
    labels, params = job.file.labels.params, _params(job)
    names = [label for label, p in zip(labels, params, strict=True) if p.role == ROLE_FEED]
    if len(names) != 1:
        raise ConfigError(f"the job has {len(names)} feeds, so which is meant?", hint=HINT)
    return names[0]


def _are_arguments(args: object) -> bool:
    return isinstance(args, Sequence) and all(isinstance(each, Mapping) for each in args)


def _feeds(job: Job, feed: object) -> dict[str, Feed]:
    named = feed if isinstance(feed, Mapping) else {_only_feed(job): feed}
    feeds = {str(name): _open(job, str(name), data) for name, data in named.items()}
    if len({each.shards for each in feeds.values()}) != 1:
        told = ", ".join(f"{name} has {each.shards}" for name, each in feeds.items()) or "none"
        raise ConfigError(
            f"feeds of a sweep have as many shards as each other, not: {told}",
            hint="Each job takes one shard of each.",
        )
    return feeds


def _plain(value: Any) -> Number:
    """A number of Python's own; numpy's scalars are none."""
    number: Number = value.item() if hasattr(value, "item") else value
    return number


def _open(job: Job, name: str, data: Any) -> Feed:
    from tinygrad import Tensor

    from p2pflop.kernels.dialect import OUR_DTYPES
    from p2pflop.kernels.feeds import feed as make_feed
    from p2pflop.kernels.feeds import feed_of

    param = _params(job)[_slot(job, name)]
    tensor = data if isinstance(data, Tensor) else make_feed(data)
    found = feed_of(tensor)
    if found is None:
        raise ConfigError(f"what feeds {name!r} is a tensor that pf.feed did not make", hint=HINT)
    shape = tuple(map(int, tensor.shape))
    dtype = OUR_DTYPES.get(tensor.dtype)
    if (shape, dtype) != (param.shape, Dtype(param.dtype)):
        raise ConfigError(
            f"a shard of {name!r} is {tensor.dtype.name} {shape}, and the job takes "
            f"{Dtype(param.dtype).name.lower()} {param.shape}",
            hint="Trace the job with a tensor of that shape, or cut other shards: batch=.",
        )
    return found
