"""What a buyer checks of a delivery before it pays: the record's form, then its blobs by name.

Whether the values are right is for an audit; here, whether they are the ones that were bought: of
this work and stretch, in this class, each output there, each tensor of its right size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from p2pflop.errors import ProtocolError
from p2pflop.job.collection import Collection, numbered, numbered_bytes
from p2pflop.job.file import CheckedJob
from p2pflop.job.graph import Dtype
from p2pflop.job.limits import MAX_TRACE_BYTES
from p2pflop.job.results import decode_trace, due_step
from p2pflop.job.shapes import ITEM_BYTES, stored_bytes
from p2pflop.job.spec import (
    MODE_COLLECT,
    MODE_TRACE,
    NamedOutput,
    Result,
    Stop,
    source_addresses,
    state_root,
    state_slots,
    times_due,
)
from p2pflop.job.validate import Refusal
from p2pflop.wire import decode

TRACE_OVERHEAD_BYTES: Final = 16
COLUMN_OVERHEAD_BYTES: Final = 24


@dataclass(frozen=True, slots=True)
class WantedBlob:
    """A blob that a delivery names. ``exact`` is False where ``size_bytes`` is only a bound."""

    address: bytes
    size_bytes: int
    exact: bool = True


def wanted_state(checked: CheckedJob, addresses: tuple[bytes, ...]) -> list[WantedBlob]:
    """The blobs of a state root. Raises ProtocolError if there are too few or too many."""
    slots = state_slots(checked.work)
    if len(slots) != len(addresses):
        raise ProtocolError(f"{len(addresses)} addresses for {len(slots)} state slots")
    params = [checked.work.params[slot] for slot in slots]
    return [
        WantedBlob(address, stored_bytes(Dtype(param.dtype), param.shape))
        for param, address in zip(params, addresses, strict=True)
    ]


def wanted_result(checked: CheckedJob, result: Result) -> list[WantedBlob]:
    """Every blob that ``result`` names: outputs, trace, state. Raises ProtocolError."""
    outputs = [WantedBlob(output.address, output.size_bytes) for output in result.outputs]
    trace = WantedBlob(result.trace, _trace_bytes(checked, result.steps_done), exact=False)
    return [*outputs, trace, *wanted_state(checked, result.state)]


def check_result(checked: CheckedJob, class_id: bytes, result: Result) -> Refusal | None:
    """Whether ``result`` is a result of this job in this class."""
    work, job = checked.work, checked.job
    if result.work != checked.work_id or result.first_step != job.first_step:
        return Refusal("the result is of another work or stretch")
    if result.class_id != class_id:
        return Refusal("the result is of another class")
    if result.steps_done != job.steps and (work.stop is None or not result.steps_done):
        return Refusal(f"{result.steps_done} of {job.steps} steps were done")
    if result.steps_done > job.steps:
        return Refusal(f"{result.steps_done} steps were done, {job.steps} were bought")
    if result.sources != source_addresses(work):
        return Refusal("the result is of other inputs")
    if result.state_root != state_root(result.state):
        return Refusal("the state root is not that of the state")
    expected = [
        (number, output, numbered_bytes(times, size_bytes) if mode == MODE_COLLECT else size_bytes)
        for number, phase in enumerate(work.phases)
        if (times := times_due(phase, job.first_step, result.steps_done))
        for output, mode in enumerate(phase.modes)
        if mode != MODE_TRACE
        for size_bytes in (output_bytes(checked, number, output),)
    ]
    if [(o.phase, o.output, o.size_bytes) for o in result.outputs] != expected:
        return Refusal("the result does not name the outputs of the job")
    return None


def check_trace(
    checked: CheckedJob, steps_done: int, data: bytes, *, is_last: bool = True
) -> Refusal | None:
    """Whether a trace blob has one value of each traced output for each step that was due, and the
    work's stop output ended the run there or not at all; the run goes on unless it ``is_last``."""
    try:
        columns = decode_trace(data)
    except ProtocolError as error:
        return Refusal(error.message)
    found = [(c.phase, c.output, c.dtype, len(c.data)) for c in columns]
    expected = []
    for number, phase in enumerate(checked.work.phases):
        times = times_due(phase, checked.job.first_step, steps_done)
        for output, mode in enumerate(phase.modes):
            if mode == MODE_TRACE and times:
                dtype = output_dtype(checked, number, output)
                expected.append((number, output, int(dtype), times * ITEM_BYTES[dtype]))
    if found != expected:
        return Refusal("the trace does not fit the steps that were done")
    stop = checked.work.stop
    if stop is None:
        return None
    flags = {(c.phase, c.output): c.data for c in columns}.get((stop.phase, stop.output), b"")
    return _check_end(checked, stop, steps_done, flags, is_last)


def _check_end(
    checked: CheckedJob, stop: Stop, steps_done: int, flags: bytes, is_last: bool
) -> Refusal | None:
    """Whether a run ended where its stop output said so, and nowhere else. ``flags`` are the values
    of that output, one for each step at which its phase was due."""
    job, phase = checked.job, checked.work.phases[stop.phase]
    end = job.first_step + steps_done
    steps = (due_step(phase, job.first_step, place) for place, flag in enumerate(flags) if flag)
    stopped_by = next((step for step in steps if (step + 1) % stop.every == 0), None)
    if stopped_by is not None and (stopped_by + 1 != end or not is_last):
        return Refusal(f"it went on after step {stopped_by}, which ended it")
    if stopped_by is None and steps_done != job.steps:
        return Refusal("it ended early, and its own output does not say so")
    return None


def check_collected(
    checked: CheckedJob, steps_done: int, output: NamedOutput, data: bytes
) -> list[WantedBlob] | Refusal:
    """The blobs of a collected output, if ``data`` is the collection of one for each due step."""
    try:
        found = decode(Collection, data)
    except ProtocolError as error:
        return Refusal(error.message)
    phase, first_step = checked.work.phases[output.phase], checked.job.first_step
    times = times_due(phase, first_step, steps_done)
    steps = (due_step(phase, first_step, number) for number in range(times))
    size_bytes = output_bytes(checked, output.phase, output.output)
    addresses = [entry.address for entry in found.entries]
    if len(addresses) != times or numbered(steps, addresses, size_bytes) != found:
        return Refusal("the collection does not have one value for each step")
    return [WantedBlob(address, size_bytes) for address in addresses]


def output_dtype(checked: CheckedJob, phase: int, output: int) -> Dtype:
    """The dtype of a fresh output of a phase."""
    graph = checked.graphs[checked.work.phases[phase].graph]
    return graph.dtypes[graph.graph.outputs[output].node]


def _trace_bytes(checked: CheckedJob, steps_done: int) -> int:
    """A bound on the size of the trace blob."""
    size_bytes = TRACE_OVERHEAD_BYTES
    for number, phase in enumerate(checked.work.phases):
        times = times_due(phase, checked.job.first_step, min(steps_done, checked.job.steps))
        for output, mode in enumerate(phase.modes):
            if mode == MODE_TRACE:
                item_bytes = ITEM_BYTES[output_dtype(checked, number, output)]
                size_bytes += COLUMN_OVERHEAD_BYTES + times * item_bytes
    return min(size_bytes, MAX_TRACE_BYTES)


def output_bytes(checked: CheckedJob, phase: int, output: int) -> int:
    """The size of one value of a fresh output of a phase."""
    graph = checked.graphs[checked.work.phases[phase].graph]
    node = graph.graph.outputs[output].node
    return stored_bytes(graph.dtypes[node], graph.shapes[node])
