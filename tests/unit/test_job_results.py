"""Traces and results: what is kept of a run, and the hash that names it."""

from __future__ import annotations

import struct

import pytest

from p2pflop.errors import ProtocolError
from p2pflop.job.graph import Dtype
from p2pflop.job.results import (
    Trace,
    TraceColumn,
    TraceLog,
    build_result,
    column_values,
    decode_trace,
    due_step,
    result_hash,
    scalar,
)
from p2pflop.job.shapes import ITEM_BYTES
from p2pflop.job.spec import (
    ROLE_INPUT,
    ROLE_STATE,
    BlobSource,
    InitSource,
    Job,
    NamedOutput,
    Phase,
    Result,
    Work,
    WorkParam,
    is_due,
    state_root,
    times_due,
    work_id,
)
from p2pflop.wire import encode

FLOAT32 = int(Dtype.FLOAT32)
WORK = Work(
    version=1,
    phases=(Phase(b"g" * 32, 1, 0, (1,)),),
    params=(
        WorkParam(FLOAT32, (4,), ROLE_STATE, BlobSource(b"a" * 32, 16)),
        WorkParam(FLOAT32, (4,), ROLE_INPUT, InitSource(b"i" * 32, 0)),
        WorkParam(FLOAT32, (4,), ROLE_INPUT, BlobSource(b"b" * 32, 16)),
        WorkParam(FLOAT32, (4,), ROLE_STATE, InitSource(b"i" * 32, 0)),
    ),
    seed=0,
)
JOB = Job(work_id(WORK), 10, 100)
STATE = (b"s" * 32, b"t" * 32)


def result(**changes: object) -> Result:
    arguments: dict[str, object] = {
        "class_id": b"c" * 32,
        "steps_done": 100,
        "outputs": (),
        "trace": b"r" * 32,
        "state": STATE,
    }
    return build_result(WORK, JOB, **{**arguments, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "data", "value"),
    [
        (Dtype.BOOL, "01", True),
        (Dtype.INT8, "ff", -1),
        (Dtype.UINT16, "0201", 258),
        (Dtype.INT64, "feffffffffffffff", -2),
        (Dtype.UINT64, "ffffffffffffffff", 2**64 - 1),
        (Dtype.FLOAT16, "003c", 1.0),
        (Dtype.BFLOAT16, "803f", 1.0),
        (Dtype.BFLOAT16, "40c0", -3.0),
        (Dtype.FLOAT32, "0000c03f", 1.5),
        (Dtype.FLOAT64, "000000000000f8bf", -1.5),
    ],
)
def test_scalars_are_little_endian(dtype: Dtype, data: str, value: float) -> None:
    found = scalar(dtype, bytes.fromhex(data))
    assert found == value
    assert type(found) is type(value)
    with pytest.raises(ProtocolError):
        scalar(dtype, bytes.fromhex(data) + b"\0")


@pytest.mark.parametrize("dtype", [dtype for dtype in Dtype if dtype < Dtype.WEAKINT])
def test_every_stored_dtype_can_be_traced(dtype: Dtype) -> None:
    log = TraceLog()
    log.append(0, 0, dtype, bytes(ITEM_BYTES[dtype]))
    (column,) = decode_trace(log.encode())
    assert column_values(column) == [0]


def test_a_trace_is_the_same_whatever_the_order_within_a_step() -> None:
    one, other = TraceLog(), TraceLog()
    for step in range(3):
        value = struct.pack("<f", step)
        one.append(0, 0, Dtype.FLOAT32, value)
        one.append(1, 2, Dtype.INT8, b"\x05")
        other.append(1, 2, Dtype.INT8, b"\x05")
        other.append(0, 0, Dtype.FLOAT32, value)
    assert one.encode() == other.encode()
    columns = decode_trace(one.encode())
    assert [(column.phase, column.output) for column in columns] == [(0, 0), (1, 2)]
    assert [column_values(column) for column in columns] == [[0.0, 1.0, 2.0], [5, 5, 5]]


def test_an_empty_trace_has_an_encoding() -> None:
    assert TraceLog().encode() == b"\x92\x01\x90"
    assert decode_trace(TraceLog().encode()) == ()


def test_a_log_takes_only_its_columns_dtype() -> None:
    log = TraceLog()
    log.append(0, 0, Dtype.FLOAT32, bytes(4))
    for dtype, data in ((Dtype.FLOAT32, bytes(3)), (Dtype.INT32, bytes(4)), (Dtype.INT8, bytes(1))):
        with pytest.raises(ProtocolError, match="phase 0 output 0"):
            log.append(0, 0, dtype, data)
    assert decode_trace(log.encode()) == (TraceColumn(0, 0, FLOAT32, bytes(4)),)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ((TraceColumn(1, 0, FLOAT32, bytes(4)), TraceColumn(0, 1, FLOAT32, bytes(4))), "rise"),
        ((TraceColumn(0, 0, FLOAT32, bytes(4)), TraceColumn(0, 0, FLOAT32, bytes(4))), "rise"),
        ((TraceColumn(0, 0, FLOAT32, bytes(6)),), "does not divide"),
        ((TraceColumn(0, 0, FLOAT32, b""),), "does not divide"),
        ((TraceColumn(0, 0, 13, bytes(8)),), "not a valid Trace"),
        ((TraceColumn(16, 0, FLOAT32, bytes(4)),), "not a valid Trace"),
        ((TraceColumn(0, 4096, FLOAT32, bytes(4)),), "not a valid Trace"),
    ],
)
def test_other_columns_are_refused(columns: tuple[TraceColumn, ...], match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        decode_trace(encode(Trace(1, columns)))


@pytest.mark.parametrize("every", [1, 4, 100])
@pytest.mark.parametrize("offset", [0, 3, 250])
@pytest.mark.parametrize("first_step", [0, 1, 99, 100, 1000])
def test_values_belong_to_the_steps_that_were_due(every: int, offset: int, first_step: int) -> None:
    phase = Phase(b"g" * 32, every, offset, ())
    due = [step for step in range(first_step, first_step + 500) if is_due(phase, step)]
    assert [due_step(phase, first_step, number) for number in range(len(due))] == due
    assert times_due(phase, first_step, 500) == len(due)


def test_a_result_names_what_was_used_and_what_came_out() -> None:
    outputs = (NamedOutput(0, 1, b"y" * 32, 4), NamedOutput(0, 0, b"x" * 32, 4))
    found = result(outputs=outputs)
    assert found.sources == (b"a" * 32, b"b" * 32)
    assert found.outputs == outputs[::-1]
    assert (found.first_step, found.steps_done) == (10, 100)
    assert found.state_root == state_root(STATE)
    assert result_hash(found) == result_hash(result(outputs=outputs[::-1]))
    assert result_hash(found) != result_hash(result())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"state": STATE[:1]}, "1 addresses for 2"),
        ({"outputs": (NamedOutput(0, 0, b"x" * 32, 4),) * 2}, "twice"),
        ({"steps_done": 101}, "101 steps done of 100"),
        ({"steps_done": -1}, "-1 steps done"),
    ],
)
def test_a_result_that_does_not_fit_its_job(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        result(**changes)
