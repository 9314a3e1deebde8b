"""The rows of a run: as they are told, and all of them, whatever its node has lost."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from p2pflop.dht.manifest import address_of
from p2pflop.errors import BlobNotFoundError, P2PFlopError
from p2pflop.ids import content_hash
from p2pflop.job.file import JobBody, JobFile, Labels, encode_file, open_job
from p2pflop.job.graph import Dtype, Graph, GraphParam, Node, Op, Output, encode_graph
from p2pflop.job.results import TraceLog, build_result, result_hash
from p2pflop.job.spec import (
    MODE_TRACE,
    ROLE_STATE,
    BlobSource,
    Job,
    Phase,
    Result,
    Work,
    WorkParam,
    work_id,
)
from p2pflop.job.validate import Refusal
from p2pflop.runs import Run
from p2pflop.wire import encode

START = struct.pack("<2f", 1, 2)
FIRST, STEPS = 3, 7
LOOKED = (4, 7)
"""Of these steps the second phase is due: every third one from 2 on, counted from 1."""
STATE = bytes(8)


def two_phases() -> JobFile:
    """A traced scalar at each step, and another one at every third."""
    params = (GraphParam(0, Dtype.FLOAT32, (2,)),)
    nodes = (Node(Op.PARAM, (0,)), Node(Op.ADD, (), (0, 0)), Node(Op.REDUCE, (0, 1), (1,)))
    train = encode_graph(Graph(params, nodes, (Output(2), Output(1, 0))))
    look = encode_graph(Graph(params, (nodes[0], Node(Op.REDUCE, (0, 1), (0,))), (Output(1),)))
    work = Work(
        1,
        (
            Phase(content_hash(train), 1, 0, (MODE_TRACE,)),
            Phase(content_hash(look), 3, 2, (MODE_TRACE,)),
        ),
        (WorkParam(int(Dtype.FLOAT32), (2,), ROLE_STATE, BlobSource(address_of(START), 8)),),
        0,
    )
    body = JobBody(Job(work_id(work), FIRST, STEPS), encode(work), (train, look))
    return JobFile(1, body, Labels("two", ("w",), ("train", "look"), (("sum",), ("top",))))


class Told:
    """A client whose node has told ``events`` of a run, and has its result."""

    def __init__(self, *events: dict[str, Any], steps: int = STEPS) -> None:
        self._file = two_phases()
        opened = open_job(self._file.body)
        assert not isinstance(opened, Refusal)
        log = TraceLog()
        for step in range(FIRST, FIRST + steps):
            log.append(0, 0, Dtype.FLOAT32, struct.pack("<f", step / 2))
            if step in LOOKED:
                log.append(1, 0, Dtype.FLOAT32, struct.pack("<f", -step))
        self.trace = log.encode()
        self.record: Result = build_result(
            opened.work,
            opened.job,
            class_id=bytes(32),
            steps_done=steps,
            outputs=[],
            trace=address_of(self.trace),
            state=[address_of(STATE)],
        )
        end = {"kind": "result", "hash": result_hash(self.record).hex(), "cost_nusd": 0}
        self._events = [*events, end]
        self.fetched: list[bytes] = []
        self.asked = 0
        self.has_trace = True

    def events(self, _run_id: str, after: int = 0, **_options: Any) -> Iterator[dict[str, Any]]:
        assert after == 0
        yield from self._events

    def result_record(self, _run_id: str) -> bytes:
        self.asked += 1
        return encode(self.record)

    def job_file(self, _run_id: str) -> bytes:
        return encode_file(self._file)

    def get(self, address: bytes) -> bytes:
        self.fetched.append(address)
        if address != self.record.trace or not self.has_trace:
            raise BlobNotFoundError("no such blob")
        return self.trace


def told_rows(*steps: int, wrong: float = 0.0) -> dict[str, Any]:
    """The event about these steps; ``wrong`` is added to what is right."""
    rows = [
        {"step": s, "values": {"sum": s / 2 + wrong, **({"top": -s} if s in LOOKED else {})}}
        for s in steps
    ]
    return {"kind": "rows", "rows": rows}


def filled(first_step: int) -> dict[str, Any]:
    return {"kind": "filled", "first_step": first_step}


def rows_of(client: Told) -> list[dict[str, float]]:
    return [dict(row) for row in Run("r-1", client)]  # type: ignore[arg-type]


def right(*steps: int) -> list[dict[str, float]]:
    return [{"step": s, "sum": s / 2, **({"top": -s} if s in LOOKED else {})} for s in steps]


def test_where_all_were_told_nothing_is_fetched() -> None:
    client = Told(filled(FIRST), told_rows(3, 4, 5), told_rows(6, 7, 8, 9))
    assert rows_of(client) == right(*range(3, 10))
    assert client.fetched == []


@pytest.mark.parametrize("lost", [(), (3,), (4, 5), (8, 9), (3, 6, 9), tuple(range(3, 10))])
def test_what_was_not_told_comes_last_from_the_trace(lost: tuple[int, ...]) -> None:
    here = [step for step in range(3, 10) if step not in lost]
    client = Told(filled(FIRST), *(told_rows(step) for step in here))
    assert rows_of(client) == right(*here, *lost)
    assert client.fetched == ([client.record.trace] if lost else [])


def test_an_earlier_result_that_answers_has_all_rows() -> None:
    assert rows_of(Told()) == right(*range(3, 10))


def test_steps_that_a_stream_tells_twice_come_once() -> None:
    client = Told(filled(3), told_rows(3, 4), told_rows(3, 4, 5), told_rows(6, 7, 8, 9))
    assert [row["step"] for row in rows_of(client)] == list(range(3, 10))


def test_what_a_lost_provider_told_beyond_its_checkpoint_is_told_anew() -> None:
    """By the next one, and where that was lost too, by the trace."""
    client = Told(filled(3), told_rows(3, 4), told_rows(5, 6, 7, wrong=1), filled(5), told_rows(7))
    rows = rows_of(client)
    assert [row["step"] for row in rows] == [3, 4, 5, 6, 7, 7, 5, 6, 8, 9]
    last = {row["step"]: row for row in rows}
    assert [last[step] for step in range(3, 10)] == right(*range(3, 10))


def test_a_job_that_stopped_early_has_no_rows_beyond() -> None:
    assert rows_of(Told(filled(3), told_rows(3), steps=4)) == right(3, 4, 5, 6)


def test_a_run_that_failed_raises_after_what_was_told() -> None:
    client = Told(told_rows(3), {"kind": "cancelled", "hint": ""})
    rows = iter(Run("r-1", client))  # type: ignore[arg-type]
    assert next(rows).step == 3
    with pytest.raises(P2PFlopError, match="was cancelled"):
        next(rows)


def test_a_trace_that_is_gone_is_told_where_it_is_needed() -> None:
    client = Told(told_rows(3, 4, 5, 6, 7, 8))
    client.has_trace = False
    with pytest.raises(BlobNotFoundError):
        rows_of(client)


def test_the_result_that_the_rows_needed_is_not_asked_for_again() -> None:
    client = Told(told_rows(*range(3, 10)))
    run = Run("r-1", client)  # type: ignore[arg-type]
    assert len(list(run)) == STEPS
    assert run.result().steps == STEPS
    assert client.asked == 1
