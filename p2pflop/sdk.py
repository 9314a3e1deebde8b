"""The functions that a user calls: trace, submit, attach, load, put, get.

All of them speak to the node of ``P2PFLOP_HOME`` (or the user's data folder), and start an embedded
one where none runs.
"""

from __future__ import annotations

import functools
import math
import struct
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from decimal import ROUND_DOWN, Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from p2pflop.client import Client
from p2pflop.dht.manifest import address_of
from p2pflop.drafts import cannot_write, whole_file
from p2pflop.errors import (
    BlobNotFoundError,
    ConfigError,
    JobError,
    P2PFlopError,
    ProtocolError,
    VerificationError,
)
from p2pflop.ids import HASH_BYTES, blob_url, parse_hash
from p2pflop.job.blobs import LazyBlobs
from p2pflop.job.collection import Collection
from p2pflop.job.counts import shown, whole_number
from p2pflop.job.file import (
    FILE_MAGIC,
    MAX_COMPRESSED_BYTES,
    CheckedJob,
    JobBody,
    JobFile,
    decode_file,
    encode_body,
    encode_file,
    open_job,
)
from p2pflop.job.graph import Dtype
from p2pflop.job.meter import JobCost
from p2pflop.job.spec import (
    MAX_STEPS,
    ROLE_INPUT,
    SPEC_VERSION,
    BlobSource,
    Work,
    work_id,
)
from p2pflop.job.spec import Job as JobRecord
from p2pflop.job.submission import go_along
from p2pflop.job.validate import Refusal
from p2pflop.kernels.classes import CLASS_NAME
from p2pflop.node.service import MAX_DEADLINE_S, Json, SubmitOptions
from p2pflop.runs import Row, Run
from p2pflop.units import (
    MAX_NUSD,
    NS_PER_S,
    counted,
    format_bytes,
    format_flop,
    parse_duration,
    parse_usd,
)
from p2pflop.wire import decode, encode

if TYPE_CHECKING:
    from p2pflop.results import Result

MAX_FILE_BYTES: Final = MAX_COMPRESSED_BYTES + len(FILE_MAGIC)
SWEEP_ID_DIGITS: Final = 2 * HASH_BYTES
"""A sweep's is the address of a blob; that of a run is shorter."""
INPUTS_SUFFIX: Final = ".inputs"
FIRST_S: Final = 1.0
"""How long a submission's own connection brings the run's events: one that nobody reads ends."""

_ARGUMENTS: Final = {Dtype.BOOL: "<?", Dtype.INT32: "<i", Dtype.FLOAT32: "<f"}

Number = bool | int | float
Usd = str | int | float


@dataclass(frozen=True)
class Job:
    """A traced job: a few kilobytes that say what to compute, and the inputs it needs as blobs.

    ``inputs`` has the bytes of input blobs by address, as far as they are at hand; ``folder`` is
    where they lie, of a job that was loaded from a file.
    """

    file: JobFile
    inputs: Mapping[bytes, bytes] = field(default_factory=dict, repr=False)
    folder: Path | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        cost = self.cost
        return (
            f"Job({self.file.labels.title!r}, {counted(self.steps, 'step')}, "
            f"{format_bytes(self.size_bytes)}, {format_flop(cost.flop)})"
        )

    @functools.cached_property
    def bytes(self) -> bytes:
        """What travels to a provider, inputs apart."""
        return encode_body(self.file.body)

    @property
    def size_bytes(self) -> int:
        """How much travels to a provider, inputs apart."""
        return len(self.bytes)

    @property
    def steps(self) -> int:
        """How many steps it is long."""
        return self.file.body.job.steps

    @functools.cached_property
    def checked(self) -> CheckedJob:
        """The job as a provider would open it. Raises JobError if it would be refused."""
        opened = open_job(self.file.body)
        if isinstance(opened, CheckedJob) and all(a in self.inputs for a in opened.collections):
            opened = opened.resolve({a: self.inputs[a] for a in opened.collections})
        if isinstance(opened, Refusal):
            raise JobError(f"the job is not valid: {opened.reason}")
        return opened

    @property
    def cost(self) -> JobCost:
        """FLOP, touched bytes and peak bytes, metered: the bill depends on nothing else."""
        return self.checked.cost

    def quote(
        self,
        *,
        max_usd: Usd | None = None,
        deadline: str | float | None = None,
        classes: Sequence[str] = (),
    ) -> Json:
        """``deals`` (best first) and ``misses`` (with reasons) that a submission would see now."""
        options = submit_options(max_usd, deadline, classes=classes)
        with Client(start=True) as client:
            return client.quote(encode_file(self.file), options)

    def with_args(self, **args: Number) -> Job:
        """The same job with other values for ``trace``'s ``args``: same graphs, same plans."""
        if self.file.body.job.first_step:
            raise JobError(
                "a job that goes on from a state has the arguments that led to it",
                hint="Change them in the job that begins at step 0.",
            )
        work = decode(Work, self.file.body.work)
        params, changes = list(work.params), {}
        for name, value in args.items():
            slots = [
                slot
                for slot, label in enumerate(self.file.labels.params)
                if label == name and params[slot].role == ROLE_INPUT and params[slot].shape == ()
            ]
            if len(slots) != 1:
                raise ConfigError(
                    f"the job has no argument {name!r}", hint="Give it to trace: args=."
                )
            param = params[slots[0]]
            try:
                data = struct.pack(_ARGUMENTS[Dtype(param.dtype)], value)
            except (KeyError, struct.error, OverflowError) as error:
                message = (
                    f"{shown(value)} does not fit argument {name!r} ({Dtype(param.dtype).name})"
                )
                raise ConfigError(message) from error
            changes[address_of(data)] = data
            source = BlobSource(address_of(data), len(data))
            params[slots[0]] = type(param)(param.dtype, param.shape, param.role, source)
        changed = Work(work.version, work.phases, tuple(params), work.seed, work.stop)
        old = self.file.body
        job = JobRecord(work_id(changed), old.job.first_step, old.job.steps)
        body = JobBody(job, encode(changed), old.graphs)
        inputs = ChainMap(changes, self.inputs)  # type: ignore[arg-type]
        return replace(self, file=JobFile(self.file.version, body, self.file.labels), inputs=inputs)

    def extend(self, steps: int, result: Result | None = None) -> Job:
        """The next ``steps`` steps of the same work: what was run already is not paid for again.

        They go on where ``result``, of this job, ended; without it where this job ends, whose last
        state the node must have. Raises JobError if ``steps`` is out of range or ``result`` is of
        another job.
        """
        old = self.file.body
        first_step = old.job.first_step + old.job.steps
        state: tuple[bytes, ...] = ()
        inputs = self.inputs
        if result is not None:
            if (result.record.work, result.record.first_step) != (old.job.work, old.job.first_step):
                raise JobError("this result is not of this job")
            first_step = result.record.first_step + result.steps
            state = result.record.state
            readers = {address: functools.partial(result.blob, address) for address in state}
            inputs = ChainMap(LazyBlobs(readers), self.inputs)  # type: ignore[arg-type]
        steps = whole_number("steps", steps, MAX_STEPS - 1)
        job = JobRecord(old.job.work, first_step, steps)
        body = JobBody(job, old.work, old.graphs, state)
        return replace(self, file=JobFile(self.file.version, body, self.file.labels), inputs=inputs)

    def resume(self, step: int) -> Job:
        """The rest of this job from ``step`` on, a checkpoint that the node has of a run of it.

        A run that fails names its last one. Raises ConfigError for a step that is not inside the
        job.
        """
        old = self.file.body
        end = old.job.first_step + old.job.steps
        lowest = old.job.first_step + 1
        step = whole_number("step", step, end - 1, lowest, fault=ConfigError)
        body = JobBody(JobRecord(old.job.work, step, end - step), old.work, old.graphs)
        return replace(self, file=JobFile(self.file.version, body, self.file.labels))

    def run_local(
        self,
        on_row: Callable[[Row], None] | None = None,
        on_lowering: Callable[[int, int], None] | None = None,
        class_name: str = CLASS_NAME,
    ) -> Result:
        """Run it in a process of its own on this machine, without a node.

        The result has the same hash as that of any honest provider of the class, which is this
        machine's own in ``class_name`` (``p2pflop doctor`` lists them; a device such as ``CUDA``).
        ``on_lowering`` is told how many kernels of how many are compiled, before the first row.
        """
        from p2pflop.kernels.local import run_local
        from p2pflop.results import Result

        def tell(step: int, values: Mapping[str, Any]) -> None:
            if on_row is not None:
                on_row(Row(step, values))

        _check_inputs(self)
        record, blobs = run_local(self.file, self.inputs, address_of, tell, on_lowering, class_name)
        return Result(record, self.file, blobs.__getitem__, 0)

    def save(self, path: str | Path) -> Path:
        """Write the job to ``path``, and its inputs into the folder ``<path>.inputs``.

        The inputs come first: where the job is, they are. Raises ConfigError if they cannot be
        written, StoreFullError if the disk is full.
        """
        target = Path(path)
        folder = target.with_name(target.name + INPUTS_SUFFIX)
        for address in self.inputs:
            try:
                folder.mkdir(exist_ok=True)
            except OSError as error:
                raise cannot_write(folder, error) from error
            with whole_file(folder / address.hex()) as file:
                file.write(self.inputs[address])
        with whole_file(target) as file:
            file.write(encode_file(self.file))
        return target


def trace(
    fn: Callable[..., object],
    *,
    steps: int,
    every: Mapping[int, Callable[..., object]] | None = None,
    seed: int = 0,
    args: Mapping[str, Number] | None = None,
    stop: str | tuple[str, int] | None = None,
    collect: Sequence[str] = (),
    title: str = "",
) -> Job:
    """The job of ``steps`` calls of ``fn``, and of each function of ``every`` every so many steps.

    A lazy tensor travels as its graph, a realized one as a blob, an assigned one is state. The
    functions return dicts of names to tensors: a scalar becomes a value a step, anything else is
    kept as it was last. ``args`` are numbers that they take and that ``with_args`` can change.
    ``stop`` names a bool output that ends the job when it is true: ``"done"``, or ``("done", 10)``
    to look at it every 10 steps only. ``collect`` names outputs of which every value is kept.
    Raises JobError for what cannot travel.
    """
    from p2pflop.kernels.trace import trace as trace_graphs

    traced = trace_graphs(
        fn,
        steps=steps,
        every=every,
        seed=seed,
        args=args,
        stop=stop,
        collect=collect,
        address_of=address_of,
        title=title,
    )
    return Job(JobFile(SPEC_VERSION, traced.body, traced.labels), traced.blobs)


def feed(data: Any, *, batch: int | None = None, steps: int = 1, drop_last: bool = False) -> Any:
    """A tensor that is another shard of ``data`` every ``steps`` steps of a job, over and over.

    ``data`` is a numpy array, the path of a ``.npy`` file or a pattern (``"data/*.npy"``, sorted),
    or a sequence of those. With ``batch`` their rows, one array after the other, are cut into
    shards of that many; else each array is a shard. Shards are read when they are sent, so that
    data may be larger than memory. Raises ConfigError for what does not fit together, and for rows
    left over unless ``drop_last``.
    """
    from p2pflop.kernels.feeds import feed as make_feed

    return make_feed(data, batch=batch, steps=steps, drop_last=drop_last)


def submit(
    job: Job,
    *,
    max_usd: Usd | None = None,
    deadline: str | float | None = None,
    checkpoint_steps: int | None = None,
    checkpoint_every: str | float | None = None,
    classes: Sequence[str] = (),
    fresh: bool = False,
    rest: bool = False,
    client: Client | None = None,
) -> Run:
    """Buy the run of a job on the best deal; returns as soon as the node has it in its journal.

    ``max_usd`` is the most it may cost (by default four times what the first provider quotes, or
    a cent), ``deadline`` how long it may take: seconds, or ``"90s"``, ``"2h"``. Its state comes
    every ``checkpoint_steps`` steps (0: only at the end; by default four times), and whenever it
    has not come for ``checkpoint_every`` (10 minutes; 0: for however long).
    ``classes`` are the determinism classes that it may be computed in: names, ids, or
    ``["any"]``; the first provider fixes it. By default it is that of this machine, so that
    ``run_local`` gives the same hash. What this node has bought before, and still has, is
    not bought again: the run ends at once, at no cost; ``fresh`` buys it all the same. Inputs that
    the node lacks are put into its store first, privately. Where no ask fits, the run fails; one
    that may ``rest`` waits until its deadline instead, as a wish in the order book that providers
    answer.

    Raises ConfigError for what is no job, BlobNotFoundError or VerificationError for an input that
    neither the job nor the node has whole.
    """
    if not isinstance(job, Job):
        raise ConfigError(
            f"submit takes a Job, not {job!r:.80}", hint="Make one with pf.trace or pf.load."
        )
    options = submit_options(
        max_usd, deadline, checkpoint_steps, checkpoint_every, classes, fresh, rest
    )
    client = client or Client(start=True)
    small = go_along(job.checked) & job.inputs.keys()
    put_inputs(job, client, but=small)
    run_id, events = client.submit_and_follow(
        encode_file(job.file),
        options,
        inputs=[job.inputs[address] for address in sorted(small)],
        wait_s=FIRST_S,
    )
    return Run(run_id, client, events)


def put_inputs(job: Job, client: Client, *, but: Set[bytes] = frozenset()) -> None:
    """Put what a job needs and the node lacks into its store, ``but`` some, by address.

    Raises BlobNotFoundError or VerificationError for what neither has whole.
    """
    _check_inputs(job, client.has)
    for address in job.inputs.keys() - but:
        if not client.has(address) and client.put(job.inputs[address]).address != address:
            raise VerificationError(f"input {blob_url(address)} has changed since it was loaded")


def attach(run_or_sweep_id: str) -> Any:
    """The ``Run`` or the ``Sweep`` of that id, from this process or any before it.

    A sweep goes on where it was: see ``attach_sweep``. Raises ConfigError if the node has no such
    run, BlobNotFoundError or ConfigError if it has no such sweep.
    """
    client = Client(start=True)
    if len(run_or_sweep_id) == SWEEP_ID_DIGITS:
        from p2pflop.sweeps import attach_sweep

        return attach_sweep(run_or_sweep_id, client=client)
    client.job(run_or_sweep_id)
    return Run(run_or_sweep_id, client)


def load(path: str | Path) -> Job:
    """The job in a ``.p2pj`` file, with what lies in ``<path>.inputs``."""
    source = Path(path)
    try:
        with source.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        folder = source.with_name(source.name + INPUTS_SUFFIX)
        blobs = list(folder.iterdir()) if folder.is_dir() else []
        addresses = {address_of(blob.read_bytes()): blob for blob in blobs}
    except OSError as error:
        hint = "Make one with 'p2pflop trace SCRIPT'." if not source.exists() else ""
        raise ConfigError(f"cannot read {source}: {error.strerror}", hint=hint) from error
    readers = {a: functools.partial(_read_input, blob, a) for a, blob in addresses.items()}
    try:
        return Job(decode_file(data), LazyBlobs(readers), folder)
    except ProtocolError as error:
        raise JobError(
            f"{source}: {error.message}", hint=error.hint or "Write it anew: p2pflop trace."
        ) from error


def _read_input(path: Path, address: bytes) -> bytes:
    """An input once more. Raises VerificationError, ConfigError if it is not there any more."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if address_of(data) != address:
        raise VerificationError(
            f"{path} has changed since the job was loaded",
            hint="Leave the inputs of a job alone until it was submitted; load it again.",
        )
    return data


def put(source: str | Path | bytes, *, public: bool = False) -> str:
    """Keep a file (a path) or bytes as a blob; its address, 64 hex digits.

    Without ``public`` only this node's own user can read it.
    """
    data = source if isinstance(source, bytes) else Path(source)
    if isinstance(data, Path) and not data.is_file():
        raise ConfigError(f"{data} is not a file")
    with Client(start=True) as client:
        return client.put(data, public=public).address.hex()


def get(address: str, out: str | Path | None = None) -> bytes | Path:
    """The bytes of a blob, verified; or, with ``out``, the path they were written to."""
    wanted = parse_hash(address)
    with Client(start=True) as client:
        if out is None:
            return client.get(wanted)
        client.download(wanted, Path(out))
        return Path(out)


def submit_options(
    max_usd: Usd | None,
    deadline: str | float | None,
    checkpoint_steps: int | None = None,
    checkpoint_every: str | float | None = None,
    classes: Sequence[str] = (),
    fresh: bool = False,
    rest: bool = False,
) -> SubmitOptions:
    """Options in the node's units. Raises ConfigError."""
    seconds = None
    if deadline is not None:
        seconds = _seconds(deadline)
        if seconds < 1:
            raise ConfigError(
                f"a deadline of {str(deadline)[:40]} leaves no time",
                hint="Write it like 90s, 5m or 2h; without one it is a day.",
            )
        if seconds > MAX_DEADLINE_S:
            raise ConfigError(
                f"a deadline of {str(deadline)[:40]} is too long",
                hint=f"Use {MAX_DEADLINE_S // 86400} days or less.",
            )
    return SubmitOptions(
        max_nusd=None if max_usd is None else _nusd(max_usd),
        deadline_s=seconds,
        checkpoint_steps=checkpoint_steps,
        checkpoint_s=None if checkpoint_every is None else _seconds(checkpoint_every),
        classes=tuple(classes),
        fresh=fresh,
        rest=rest,
    )


def _nusd(amount: Usd) -> int:
    """Nano-dollars; a float is rounded down to them, because it comes from a computation."""
    if isinstance(amount, float) and abs(amount) < MAX_NUSD:
        amount = str(Decimal(repr(amount)).quantize(Decimal("1e-9"), ROUND_DOWN))
    return parse_usd(str(amount))


def _seconds(duration: str | float) -> int:
    return math.ceil(parse_duration(str(duration)) / NS_PER_S)


def _check_inputs(job: Job, is_elsewhere: Callable[[bytes], bool] = lambda _: False) -> None:
    """See that every input is at hand, or ``is_elsewhere`` by address.

    Raises BlobNotFoundError; VerificationError if a file of the job's folder is damaged.
    """
    named = [(slot, source.collection) for slot, source in job.checked.member_slots]
    named += [(slot, source.address) for slot, source in job.checked.inputs]
    for slot, feed in job.checked.feeds:
        named.append((slot, feed.collection))
        if feed.collection in job.inputs:
            entries = decode(Collection, job.inputs[feed.collection]).entries
            named += [(slot, entry.address) for entry in entries]
    for slot, address in named:
        if address not in job.inputs and not is_elsewhere(address):
            raise _missing(job, job.file.labels.params[slot], address)


def _missing(job: Job, name: str, address: bytes) -> P2PFlopError:
    path = job.folder / address.hex() if job.folder is not None else None
    if path is not None and path.exists():
        return VerificationError(
            f"input {name!r} is damaged: the bytes of {path} are not those that its name says",
            hint="Bring the file anew, or trace the job again: p2pflop trace.",
        )
    folder = job.folder or f"*{INPUTS_SUFFIX}"
    return BlobNotFoundError(
        f"input {name!r} ({blob_url(address)}) is not at hand",
        hint=f"Keep the folder {folder} beside the job file, or put the blob into the node.",
    )
