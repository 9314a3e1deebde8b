"""How long a provider may be alive and get no further: by the job, between two bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2pflop.job.file import CheckedJob, decode_file, open_job
from p2pflop.job.meter import JobCostLine
from p2pflop.job.patience import (
    LEAST_BYTES_PER_S,
    LEAST_NODES_PER_S,
    LEAST_WORK_PER_S,
    MAX_SESSION_STALL_NS,
    MAX_STALL_NS,
    MIN_SESSION_STALL_NS,
    MIN_STALL_NS,
    session_stall_ns,
    stall_ns,
)
from p2pflop.job.session import Mark
from p2pflop.node.memory_market import sample_file
from p2pflop.units import NS_PER_S

OPENED = open_job(decode_file(sample_file()).body)
assert isinstance(OPENED, CheckedJob)
SAMPLE = OPENED
NODES = 6


def costing(*lines: tuple[int, int]) -> CheckedJob:
    """The sample with graphs that cost so many FLOP and touched bytes each."""
    made = tuple(JobCostLine(b"", flop, touched, 1) for flop, touched in lines)
    return replace(SAMPLE, cost=replace(SAMPLE.cost, lines=made))


def test_a_small_job_is_waited_for_a_little_longer_than_the_least() -> None:
    assert stall_ns(costing((0, 0))) == MIN_STALL_NS + NODES * NS_PER_S // LEAST_NODES_PER_S
    assert stall_ns(SAMPLE) - MIN_STALL_NS < NS_PER_S


@pytest.mark.parametrize("cost", [(9, 1), (1, 9)])
def test_a_long_step_is_waited_for_with_every_phase_due(cost: tuple[int, int]) -> None:
    flop, touched_bytes = (10 * LEAST_WORK_PER_S * part for part in cost)
    made = costing((flop, touched_bytes), (flop, touched_bytes))
    assert stall_ns(made) - stall_ns(costing((0, 0))) == 2 * 90 * NS_PER_S


def test_nobody_is_waited_for_longer_than_the_longest_step() -> None:
    assert stall_ns(costing((10**18, 0))) == MAX_STALL_NS == 900 * NS_PER_S


@pytest.mark.parametrize(
    ("asked", "sent_bytes", "seconds"),
    [
        (Mark(9, moved_bytes=0), 0, 0),
        (Mark(9, lowered_nodes=20 * LEAST_NODES_PER_S), 0, 20),
        (Mark(9, flop=20 * LEAST_WORK_PER_S, touched_bytes=LEAST_WORK_PER_S), 0, 20),
        (Mark(9, touched_bytes=20 * LEAST_WORK_PER_S), 0, 20),
        (Mark(9, moved_bytes=15 * LEAST_BYTES_PER_S), 5 * LEAST_BYTES_PER_S, 20),
        (Mark(9, flop=10**18), 0, (MAX_SESSION_STALL_NS - MIN_SESSION_STALL_NS) // NS_PER_S),
    ],
)
def test_a_session_is_waited_for_by_what_is_asked(
    asked: Mark, sent_bytes: int, seconds: int
) -> None:
    waits_ns = session_stall_ns(Mark(), asked, sent_bytes)
    assert waits_ns == MIN_SESSION_STALL_NS + seconds * NS_PER_S
    assert session_stall_ns(asked, asked, 0) == MIN_SESSION_STALL_NS
