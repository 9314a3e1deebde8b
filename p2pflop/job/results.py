"""The trace of a job and the record of its result.

A trace is a blob: the msgpack array ``[1, [[phase, output, dtype, bytes], ...]]`` with one column
for each traced output that ran at all, sorted by phase and output, its values one after another in
the dtype's little-endian storage form. Steps are not written: value ``n`` of a phase's column
belongs to the ``n``-th step of the stretch at which the phase was due (``due_step``).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Final

import msgspec

from p2pflop.errors import ProtocolError
from p2pflop.ids import content_hash
from p2pflop.job.graph import Dtype
from p2pflop.job.limits import MAX_TRACE_BYTES
from p2pflop.job.shapes import ITEM_BYTES
from p2pflop.job.spec import (
    MAX_PHASE_OUTPUTS,
    MAX_PHASES,
    ROLE_STATE,
    SPEC_VERSION,
    Job,
    NamedOutput,
    Phase,
    Result,
    Version,
    Work,
    source_addresses,
    state_root,
)
from p2pflop.wire import Record, decode, encode

Scalar = bool | int | float

_FORMATS: Final = {
    Dtype.BOOL: "?",
    Dtype.INT8: "b",
    Dtype.UINT8: "B",
    Dtype.INT16: "h",
    Dtype.UINT16: "H",
    Dtype.INT32: "i",
    Dtype.UINT32: "I",
    Dtype.INT64: "q",
    Dtype.UINT64: "Q",
    Dtype.FLOAT16: "e",
    Dtype.FLOAT32: "f",
    Dtype.FLOAT64: "d",
}


class TraceColumn(Record, frozen=True):
    """The values that one traced output took, oldest first."""

    phase: Annotated[int, msgspec.Meta(ge=0, lt=MAX_PHASES)]
    output: Annotated[int, msgspec.Meta(ge=0, lt=MAX_PHASE_OUTPUTS)]
    dtype: Annotated[int, msgspec.Meta(ge=0, le=12)]
    data: bytes


class Trace(Record, frozen=True):
    """Every traced output of a job."""

    MAX_BYTES: ClassVar[int] = MAX_TRACE_BYTES

    version: Version
    columns: Annotated[
        tuple[TraceColumn, ...], msgspec.Meta(max_length=MAX_PHASES * MAX_PHASE_OUTPUTS)
    ]


class TraceLog:
    """Collects traced scalars as steps produce them, in any order of outputs within a step."""

    def __init__(self) -> None:
        self._columns: dict[tuple[int, int], tuple[Dtype, bytearray]] = {}

    def append(self, phase: int, output: int, dtype: Dtype, value: bytes) -> None:
        """Add the next value of an output in storage form.

        Raises ProtocolError if its size is not the dtype's or the dtype is not the column's.
        """
        known, data = self._columns.setdefault((phase, output), (dtype, bytearray()))
        if known is not dtype or len(value) != ITEM_BYTES[dtype]:
            raise ProtocolError(
                f"phase {phase} output {output}: {len(value)} bytes are not one {known.name}"
            )
        data += value

    def extend(self, column: TraceColumn) -> None:
        """Add all values of a column. Raises ProtocolError if its dtype is not the log's."""
        dtype = Dtype(column.dtype)
        known, data = self._columns.setdefault((column.phase, column.output), (dtype, bytearray()))
        if known is not dtype:
            raise ProtocolError(f"a trace of {dtype.name} goes on one of {known.name}")
        data += column.data

    def encode(self) -> bytes:
        """The one encoding of everything appended so far: the bytes of the trace blob."""
        columns = tuple(
            TraceColumn(phase, output, int(dtype), bytes(data))
            for (phase, output), (dtype, data) in sorted(self._columns.items())
        )
        return encode(Trace(SPEC_VERSION, columns))


def decode_trace(data: bytes) -> tuple[TraceColumn, ...]:
    """The columns of a trace blob. Raises ProtocolError if it is not in its one encoding."""
    columns = decode(Trace, data).columns
    places = [(column.phase, column.output) for column in columns]
    if any(later <= earlier for earlier, later in pairwise(places)):
        raise ProtocolError("trace columns do not rise")
    for column in columns:
        if not column.data or len(column.data) % ITEM_BYTES[Dtype(column.dtype)]:
            raise ProtocolError(f"trace column of {len(column.data)} bytes does not divide")
    return columns


def column_values(column: TraceColumn) -> list[Scalar]:
    """The values of a column as Python numbers."""
    dtype = Dtype(column.dtype)
    size = ITEM_BYTES[dtype]
    data = column.data
    return [scalar(dtype, data[at : at + size]) for at in range(0, len(data), size)]


def scalar(dtype: Dtype, value: bytes) -> Scalar:
    """One element in storage form as a Python number. Raises ProtocolError on a wrong size."""
    if len(value) != ITEM_BYTES.get(dtype):
        raise ProtocolError(f"{len(value)} bytes are not one {dtype.name}")
    if dtype is Dtype.BFLOAT16:  # the upper half of a float32
        number: Scalar = struct.unpack("<f", b"\0\0" + value)[0]
    else:
        number = struct.unpack("<" + _FORMATS[dtype], value)[0]
    return number


def due_step(phase: Phase, first_step: int, number: int) -> int:
    """The ``number``-th step, from 0, at or after ``first_step`` at which ``phase`` is due."""
    before = max(0, first_step - phase.offset) // phase.every
    return (before + number + 1) * phase.every + phase.offset - 1


def build_result(
    work: Work,
    job: Job,
    *,
    class_id: bytes,
    steps_done: int,
    outputs: Sequence[NamedOutput],
    trace: bytes,
    state: Sequence[bytes],
) -> Result:
    """The record of what ``job`` gave.

    ``outputs`` in any order, ``trace`` the address of the trace blob, ``state`` the addresses of
    the state slots in slot order. Raises ProtocolError if there are too few, too many or twice.
    """
    places = [(output.phase, output.output) for output in outputs]
    if len(set(places)) != len(places):
        raise ProtocolError("an output is given twice")
    slots = sum(param.role == ROLE_STATE for param in work.params)
    if len(state) != slots:
        raise ProtocolError(f"{len(state)} addresses for {slots} state slots")
    if not 0 <= steps_done <= job.steps:
        raise ProtocolError(f"{steps_done} steps done of {job.steps}")
    return Result(
        version=SPEC_VERSION,
        work=job.work,
        class_id=class_id,
        first_step=job.first_step,
        steps_done=steps_done,
        sources=source_addresses(work),
        outputs=tuple(sorted(outputs, key=lambda output: (output.phase, output.output))),
        trace=trace,
        state=tuple(state),
        state_root=state_root(tuple(state)),
    )


def result_hash(result: Result) -> bytes:
    """The single hash that a buyer gets."""
    return content_hash(encode(result))
