"""A run ends where its stop output says so, and a buyer sees from the trace whether it did."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as replace_fields

from p2pflop.dht.manifest import address_of
from p2pflop.job.delivery import check_trace
from p2pflop.job.file import CheckedJob, JobBody, open_job
from p2pflop.job.graph import Dtype, Graph, GraphParam, Node, Op, Output, encode_graph, graph_hash
from p2pflop.job.results import TraceLog
from p2pflop.job.spec import (
    MODE_LAST,
    MODE_TRACE,
    ROLE_STATE,
    BlobSource,
    Job,
    Phase,
    Stop,
    Work,
    WorkParam,
    is_due,
    work_id,
)
from p2pflop.job.validate import Refusal
from p2pflop.wire import encode

FALSE = b"\0"


def checked_job(
    phase_every: int, offset: int, stop_every: int, steps: int, mode: int = MODE_TRACE
) -> CheckedJob | Refusal:
    graph = Graph((GraphParam(0, Dtype.BOOL, ()),), (Node(Op.PARAM, (0,)),), (Output(0),))
    data = encode_graph(graph)
    param = WorkParam(int(Dtype.BOOL), (), ROLE_STATE, BlobSource(address_of(FALSE), 1))
    phase = Phase(graph_hash(data), phase_every, offset, (mode,))
    work = Work(1, (phase,), (param,), 0, Stop(0, 0, stop_every))
    return open_job(JobBody(Job(work_id(work), 0, steps), encode(work), (data,)))


def run(checked: CheckedJob, flags: list[bool]) -> tuple[int, list[bool]]:
    """How many steps a provider does whose stop output gives ``flags`` in turn, and those told."""
    job, stop, [phase] = checked.job, checked.work.stop, checked.work.phases
    assert stop is not None
    told: list[bool] = []
    for step in range(job.first_step, job.first_step + job.steps):
        if is_due(phase, step):
            told.append(flags[len(told)])
        if is_due(phase, step) and told[-1] and (step + 1) % stop.every == 0:
            return step + 1 - job.first_step, told
    return job.steps, told


def trace(told: list[bool]) -> bytes:
    log = TraceLog()
    for flag in told:
        log.append(0, 0, Dtype.BOOL, bytes([flag]))
    return log.encode()


JOBS = st.builds(
    checked_job,
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 5),
    st.integers(1, 30),
)


@given(JOBS, st.lists(st.booleans(), min_size=40, max_size=40), st.integers(0, 12))
def test_who_ends_as_it_should_is_believed_and_nobody_else(
    checked: CheckedJob, flags: list[bool], first_step: int
) -> None:
    job = replace_fields(checked.job, first_step=first_step)
    checked = replace(checked, job=job)
    done, told = run(checked, flags)
    assert check_trace(checked, done, trace(told)) is None
    [phase] = checked.work.phases
    ended_itself = bool(told) and told[-1] and is_due(phase, first_step + done - 1)
    assert checked.work.stop is not None
    ended_itself = ended_itself and (first_step + done) % checked.work.stop.every == 0
    goes_on = check_trace(checked, done, trace(told), is_last=False)
    assert (goes_on is not None) == (ended_itself or done < job.steps)
    for claimed in range(1, job.steps + 1):
        due = sum(is_due(phase, first_step + step) for step in range(claimed))
        refusal = check_trace(checked, claimed, trace(flags[:due]))
        assert (refusal is None) == (claimed == done)


def test_a_stop_output_has_to_be_traced() -> None:
    refusal = checked_job(1, 0, 1, 5, MODE_LAST)
    assert isinstance(refusal, Refusal)
    assert "is not traced" in refusal.reason
