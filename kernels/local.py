"""Running a job on this machine without a node: one process, in the class's environment.

The child (``python -m p2pflop.kernels.local``) lowers and runs; it is not locked down, since the
job is the user's own. It reads one message with the job on stdin and answers on stdout with
messages, each a length in eight bytes and a msgpack array whose first item is its kind. It asks for
inputs and shards one by one, when it has room for them, so that this side holds one at a time. The
record that comes of it, and so its hash, is that of any honest provider of this machine's class.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import msgspec

from p2pflop.errors import JobError, P2PFlopError, ProviderError
from p2pflop.job.collection import Collection, numbered
from p2pflop.job.delivery import output_bytes
from p2pflop.job.file import CheckedJob, JobBody, JobFile, open_job
from p2pflop.job.graph import Dtype, graph_hash
from p2pflop.job.naming import output_names
from p2pflop.job.results import Scalar, TraceLog, build_result, scalar
from p2pflop.job.spec import (
    MODE_LAST,
    ROLE_STATE,
    NamedOutput,
    Result,
    Work,
    class_id,
    collected,
    is_fed,
    shard_at,
)
from p2pflop.job.validate import Refusal
from p2pflop.kernels.classes import CLASS_NAME, chosen_family, descriptor, environment
from p2pflop.kernels.faults import LOCAL_HINT, LOCAL_HINTS, signal_error
from p2pflop.units import MIB
from p2pflop.wire import decode, encode

if TYPE_CHECKING:
    from p2pflop.kernels.run import Session

OnRow = Callable[[int, Mapping[str, Scalar]], None]
OnLowering = Callable[[int, int], None]

PART_BYTES: Final = MIB
EXIT_SECONDS: Final = 10
ORPHANED_CODE: Final = 3

_LOWERING: Final = "lowering"
_ROW: Final = "row"
_OUTPUT: Final = "output"
_STATE: Final = "state"
_COLLECTED: Final = "collected"
_INPUT: Final = "input"
_FEED: Final = "feed"
_END: Final = "end"
_FAILED: Final = "failed"


def run_local(
    file: JobFile,
    blobs: Mapping[bytes, bytes],
    address_of: Callable[[bytes], bytes],
    on_row: OnRow | None = None,
    on_lowering: OnLowering | None = None,
    class_name: str = CLASS_NAME,
) -> tuple[Result, dict[bytes, bytes]]:
    """Run the job to its end; the record of its result, and the blobs it names by address.

    ``blobs`` has everything that the job names, by address. ``on_row(step, values by name)`` is
    called for each step that gave values, ``on_lowering(done, total)`` after each kernel.
    ``class_name`` is one of ``classes``. Raises JobError, ConfigError, and ProviderError if the
    process dies of something else than the job.
    """
    chosen_family(class_name)
    job = open_job(file.body)
    if isinstance(job, Refusal):
        raise JobError(f"the job is not valid: {job.reason}")
    if not job.starts:
        raise JobError(
            f"the state after step {job.job.first_step} is not at hand",
            hint="Give the result that it comes from: job.extend(steps, result).",
        )
    known = {address: blobs[address] for address in job.collections if address in blobs}
    resolved = job.resolve(known) if len(known) == len(job.collections) else job
    if isinstance(resolved, Refusal):
        raise JobError(f"the job is not valid: {resolved.reason}")
    job = resolved
    named = {slot: source.collection for slot, source in job.member_slots}
    named |= {slot: source.address for slot, source in job.inputs}
    named |= {slot: source.collection for slot, source in job.feeds}
    missing = [slot for slot, address in named.items() if address not in blobs]
    if missing:
        raise JobError(f"inputs of slots {missing} are not given")
    inputs = {slot: source.address for slot, source in job.inputs}
    feeds = {
        slot: decode(Collection, blobs[source.collection]).entries for slot, source in job.feeds
    }
    gathered = _Gathered(file, job, on_row, on_lowering)
    result_class = class_id(descriptor(class_name))
    # The command is this interpreter and a module of ours.
    process = subprocess.Popen(
        [sys.executable, "-m", "p2pflop.kernels.local"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment(class_name)},
    )
    requests, answers = process.stdin, process.stdout
    if requests is None or answers is None:
        raise ProviderError("the local process has no pipes")
    try:
        with suppress(BrokenPipeError):
            _send(requests, [encode(file.body)])
            for message in _messages(answers):
                if message[0] == _INPUT:
                    _send(requests, [blobs[inputs[message[1]]]])
                elif message[0] == _FEED:
                    slot, shard = message[1:]
                    _send(requests, [blobs[feeds[slot][shard].address]])
                else:
                    gathered.take(message)
        requests.close()
        process.wait(EXIT_SECONDS)
    finally:
        process.kill()
        process.wait()
        answers.close()
    return gathered.finish(address_of, result_class, process.returncode)


class _Gathered:
    """What the child has told so far."""

    def __init__(
        self,
        file: JobFile,
        job: CheckedJob,
        on_row: OnRow | None,
        on_lowering: OnLowering | None,
    ) -> None:
        self._names = output_names(file.labels)
        self._job = job
        self._on_row = on_row
        self._on_lowering = on_lowering
        self._trace = TraceLog()
        self._parts: dict[tuple[str, int, int], bytearray] = {}
        self._collected: dict[tuple[int, int], dict[int, bytearray]] = {}
        self._steps_done: int | None = None

    def take(self, message: list[Any]) -> None:
        kind, *rest = message
        if kind == _LOWERING and self._on_lowering is not None:
            self._on_lowering(*rest)
        elif kind == _ROW:
            self._row(*rest)
        elif kind in (_OUTPUT, _STATE):
            first, second, data = rest
            self._parts.setdefault((kind, first, second), bytearray()).extend(data)
        elif kind == _COLLECTED:
            step, phase, output, data = rest
            values = self._collected.setdefault((phase, output), {})
            values.setdefault(step, bytearray()).extend(data)
        elif kind == _END:
            self._steps_done = rest[0]
        elif kind == _FAILED:
            raise JobError(rest[0], hint=rest[1])

    def finish(
        self, address_of: Callable[[bytes], bytes], result_class: bytes, exit_code: int
    ) -> tuple[Result, dict[bytes, bytes]]:
        if self._steps_done is None:
            if exit_code < 0:
                raise signal_error("local process", -exit_code, LOCAL_HINTS, LOCAL_HINT)
            raise ProviderError(
                f"the local process ended with code {exit_code} before the job did",
                hint="What it wrote to standard error says why.",
            )
        blobs: dict[bytes, bytes] = {}

        def keep(data: bytes) -> bytes:
            address = address_of(data)
            blobs[address] = data
            return address

        outputs, states = [], []
        for (kind, first, second), part in self._parts.items():
            address = keep(bytes(part))
            if kind == _STATE:
                states.append((first, address))
            else:
                outputs.append(NamedOutput(first, second, address, len(part)))
        for (phase, output), values in self._collected.items():
            size_bytes = output_bytes(self._job, phase, output)
            addresses = [keep(bytes(value)) for value in values.values()]
            collection = encode(numbered(values, addresses, size_bytes))
            outputs.append(NamedOutput(phase, output, keep(collection), len(collection)))
        result = build_result(
            self._job.work,
            self._job.job,
            class_id=result_class,
            steps_done=self._steps_done,
            outputs=outputs,
            trace=keep(self._trace.encode()),
            state=[address for _, address in sorted(states)],
        )
        return result, blobs

    def _row(self, step: int, values: list[tuple[int, int, bytes]]) -> None:
        named: dict[str, Scalar] = {}
        for phase, output, value in values:
            dtype = self._dtype(phase, output)
            self._trace.append(phase, output, dtype, value)
            named[self._names[phase][output]] = scalar(dtype, value)
        if self._on_row is not None:
            self._on_row(step, named)

    def _dtype(self, phase: int, output: int) -> Dtype:
        checked = self._job.graphs[self._job.work.phases[phase].graph]
        fresh = [out.node for out in checked.graph.outputs if out.slot is None]
        return Dtype(checked.dtypes[fresh[output]])


def _send(stream: BinaryIO | Any, message: list[Any]) -> None:
    data = msgspec.msgpack.encode(message)
    stream.write(len(data).to_bytes(8, "little"))
    stream.write(data)
    stream.flush()


def _messages(stream: BinaryIO | Any) -> Iterator[list[Any]]:
    """The messages on a pipe until its end; a message cut short ends it too."""
    while len(head := stream.read(8)) == 8:
        size_bytes = int.from_bytes(head, "little")
        data = stream.read(size_bytes)
        if len(data) < size_bytes:
            return
        yield msgspec.msgpack.decode(data)


def _serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """The child: lower every graph, run every step, tell everything."""
    requests = _messages(stdin)
    try:
        _run(decode(JobBody, _answer(requests)), requests, stdout)
    except P2PFlopError as error:
        _send(stdout, [_FAILED, error.message, error.hint])


def _answer(requests: Iterator[list[Any]]) -> bytes:
    """The next bytes that the parent sends. Raises EOFError if it has gone."""
    for (data,) in requests:
        return bytes(data)
    raise EOFError


def _run(body: JobBody, requests: Iterator[list[Any]], stdout: BinaryIO) -> None:
    # Imported here so that the parent, which may have tinygrad in another class, needs neither.
    from p2pflop.kernels.compiler import OwnClang
    from p2pflop.kernels.tinygrad_engine import create

    job = open_job(body)
    if isinstance(job, Refusal):
        raise JobError(job.reason)

    def progress(done: int, total: int) -> None:
        _send(stdout, [_LOWERING, done, total])

    engine = create()
    if engine.lockable:
        engine.use_compiler(OwnClang())
    plans = {graph_hash(graph): engine.lower(graph, progress) for graph in body.graphs}
    session = engine.session(job.work, plans)
    session.initialise()
    for slot in job.input_slots:
        _send(stdout, [_INPUT, slot])
        session.write(slot, 0, _answer(requests))
    first, done = job.job.first_step, 0
    for step in range(first, first + job.job.steps):
        for slot, source in job.feeds:
            if step == first or is_fed(source, step):
                _send(stdout, [_FEED, slot, shard_at(source, step)])
                session.write(slot, 0, _answer(requests))
        session.step(step)
        done += 1
        _send_step(job.work, session, step, stdout)
        if session.should_stop(step):
            break
    _send_results(job.work, session, stdout)
    _send(stdout, [_END, done])


def _send_step(work: Work, session: Session, step: int, stdout: BinaryIO) -> None:
    values = session.scalars()
    if values:
        _send(stdout, [_ROW, step, values])
    for phase, output in collected(work, step):
        view = session.read_output(phase, output)
        if view is not None:
            _send_parts(stdout, [_COLLECTED, step, phase, output], view)


def _send_results(work: Work, session: Session, stdout: BinaryIO) -> None:
    for phase, record in enumerate(work.phases):
        for output, mode in enumerate(record.modes):
            view = session.read_output(phase, output) if mode == MODE_LAST else None
            if view is not None:
                _send_parts(stdout, [_OUTPUT, phase, output], view)
    for slot, param in enumerate(work.params):
        if param.role == ROLE_STATE:
            _send_parts(stdout, [_STATE, slot, 0], session.read(slot))


def _send_parts(stdout: BinaryIO, head: list[Any], view: memoryview) -> None:
    for offset in range(0, len(view), PART_BYTES):
        _send(stdout, [*head, bytes(view[offset : offset + PART_BYTES])])


def main() -> None:
    """The child's entry. What tinygrad or a user's library prints goes to stderr.

    A child whose parent has gone has nobody to tell, and Ctrl-C is the parent's to tell of.
    """
    stdout = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        _serve(sys.stdin.buffer, stdout)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(ORPHANED_CODE)


if __name__ == "__main__":
    main()
