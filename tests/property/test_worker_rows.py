"""An honest worker's rows pass in any batches; the smallest lie among them does not."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pflop.errors import ProtocolError
from p2pflop.job.graph import Dtype
from p2pflop.job.spec import (
    MODE_LAST,
    MODE_TRACE,
    ROLE_STATE,
    NoSource,
    Phase,
    Stop,
    Work,
    WorkParam,
    is_due,
)
from p2pflop.kernels.frames import MAX_ROW_VALUES, Paused, Progressed, Scalar
from p2pflop.node.row_check import RowCheck

STATE = WorkParam(int(Dtype.UINT8), (1,), ROLE_STATE, NoSource())
MODES = st.lists(st.sampled_from([MODE_LAST, MODE_TRACE]), max_size=4).map(tuple)
PHASES = st.builds(Phase, st.just(bytes(32)), st.integers(1, 5), st.integers(0, 5), MODES)
WORKS = st.lists(PHASES, min_size=1, max_size=3).map(
    lambda phases: Work(1, tuple(phases), (STATE,), 0)
)


def scalars(work: Work, step: int) -> list[Scalar]:
    return [
        (step, number, output, b"1234")
        for number, phase in enumerate(work.phases)
        if is_due(phase, step)
        for output, mode in enumerate(phase.modes)
        if mode == MODE_TRACE
    ]


@st.composite
def honest_runs(draw: st.DrawFn) -> tuple[Work, int, int, list[Progressed]]:
    work, first, steps = draw(WORKS), draw(st.integers(0, 20)), draw(st.integers(1, 20))
    cuts = draw(st.sets(st.integers(first + 1, first + steps - 1))) if steps > 1 else set()
    edges = [first, *sorted(cuts), first + steps]
    reports = [
        Progressed(
            low, high - 1, tuple(v for step in range(low, high) for v in scalars(work, step))
        )
        for low, high in itertools.pairwise(edges)
    ]
    return work, first, steps, reports


@given(honest_runs())
def test_honest_rows_pass_in_any_batches(run: tuple[Work, int, int, list[Progressed]]) -> None:
    work, first, steps, reports = run
    check = RowCheck(work, first, steps)
    told = [check.rows(report) for report in reports]
    assert [step for rows in told for step in range(rows.first_step, rows.last_step + 1)] == list(
        range(first, first + steps)
    )
    assert check.pause(Paused(first + steps, True, False), 0, False).ended


@given(honest_runs(), st.data())
def test_one_value_more_less_or_elsewhere_is_refused(
    run: tuple[Work, int, int, list[Progressed]], data: st.DataObject
) -> None:
    work, first, steps, reports = run
    honest = data.draw(st.sampled_from(reports))
    values = list(honest.values)
    place = data.draw(st.integers(0, len(values)))
    if data.draw(st.booleans()) and place < len(values):
        del values[place]
    else:
        step, phase, output = data.draw(
            st.tuples(st.integers(0, 45), st.integers(0, 3), st.integers(0, 4))
        )
        values.insert(place, (step, phase, output, b"1234"))
    check = RowCheck(work, first, steps)
    for report in itertools.takewhile(lambda each: each is not honest, reports):
        check.rows(report)
    with pytest.raises(ProtocolError):
        check.rows(Progressed(honest.first_step, honest.last_step, tuple(values)))


@given(honest_runs(), st.integers(0, 45), st.booleans(), st.booleans())
def test_a_pause_stands_only_where_one_is_due(
    run: tuple[Work, int, int, list[Progressed]], step: int, ended: bool, condition: bool
) -> None:
    work, first, steps, reports = run
    check = RowCheck(work, first, steps)
    for report in reports[:-1]:
        check.rows(report)
    standing = reports[-1].first_step
    with pytest.raises(ProtocolError):
        check.pause(Paused(step, ended, condition), 0, False)
    if standing % 3 == 0:
        assert check.pause(Paused(standing, False, False), 3, False).step == standing
    assert check.pause(Paused(standing, True, False), 0, True).ended


def test_a_claim_of_very_many_steps_costs_nothing() -> None:
    rare = Work(1, (Phase(bytes(32), 2**40, 0, (MODE_TRACE,)),), (STATE,), 0)
    assert RowCheck(rare, 0, 2**39).rows(Progressed(0, 2**39 - 1, ())).last_step == 2**39 - 1
    often = Work(1, (Phase(bytes(32), 1, 0, (MODE_TRACE,)),), (STATE,), 0)
    with pytest.raises(ProtocolError, match="rows are missing"):
        RowCheck(often, 0, 2**40).rows(Progressed(0, 2**40 - 1, ()))


def test_a_step_of_very_many_values_comes_in_several_reports() -> None:
    count = 2 * MAX_ROW_VALUES + 1
    work = Work(1, (Phase(bytes(32), 1, 0, (MODE_TRACE,) * count),), (STATE,), 0)
    values = scalars(work, 0)
    check = RowCheck(work, 0, 2)
    for start in range(0, 2 * MAX_ROW_VALUES, MAX_ROW_VALUES):
        check.rows(Progressed(0, 0, tuple(values[start : start + MAX_ROW_VALUES])))
        with pytest.raises(ProtocolError):
            check.pause(Paused(0, True, False), 0, True)
    check.rows(Progressed(0, 0, tuple(values[-1:])))
    with pytest.raises(ProtocolError):
        check.rows(Progressed(0, 0, ()))


def test_a_works_own_stop_is_believed_only_where_it_looks() -> None:
    phase = Phase(bytes(32), 1, 0, (MODE_LAST,))
    work = Work(1, (phase,), (STATE,), 0, Stop(0, 0, 4))
    check = RowCheck(work, 0, 100)
    check.rows(Progressed(0, 2, ()))
    with pytest.raises(ProtocolError):
        check.pause(Paused(3, True, True), 0, False)
    check.rows(Progressed(3, 3, ()))
    assert check.pause(Paused(4, True, True), 0, False).condition
