"""The results of stretches joined: traces, collections, and the last values."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest

from p2pflop.errors import ProtocolError
from p2pflop.job.collection import numbered
from p2pflop.job.graph import Dtype
from p2pflop.job.joining import (
    follow_one_another,
    join_collections,
    join_traces,
    outputs_by_place,
)
from p2pflop.job.results import TraceLog
from p2pflop.job.spec import NamedOutput, Result, state_root
from p2pflop.wire import encode


def trace(first: int, end: int, *, dtype: Dtype = Dtype.FLOAT32) -> bytes:
    """A value a step of one output, and every tenth step one of another."""
    log = TraceLog()
    for step in range(first, end):
        log.append(0, 0, dtype, struct.pack("<f", step))
        if step % 10 == 9:
            log.append(1, 0, Dtype.INT32, struct.pack("<i", step))
    return log.encode()


def part(first_step: int, steps: int, *outputs: NamedOutput) -> Result:
    sources: tuple[bytes, ...] = ()
    state = (bytes([first_step]) * 32,)
    root = state_root(state)
    return Result(
        1, b"w" * 32, b"c" * 32, first_step, steps, sources, outputs, b"t" * 32, state, root
    )


@pytest.mark.parametrize("cuts", [[15], [5, 9, 10], [1, 2, 3]])
def test_joined_traces_are_those_of_one_run(cuts: list[int]) -> None:
    bounds = [0, *cuts, 30]
    parts = [trace(first, end) for first, end in pairwise(bounds)]
    assert join_traces(parts) == trace(0, 30)


def test_traces_of_two_dtypes_do_not_join() -> None:
    with pytest.raises(ProtocolError, match="goes on one of"):
        join_traces([trace(0, 5), trace(5, 9, dtype=Dtype.INT32)])


def test_joined_collections_are_those_of_one_run() -> None:
    def values(steps: range) -> bytes:
        return encode(numbered(steps, [bytes([step]) * 32 for step in steps], 8))

    assert join_collections([values(range(4)), values(range(4, 9))]) == values(range(9))
    with pytest.raises(ProtocolError, match="do not follow"):
        join_collections([values(range(4, 9)), values(range(4))])


def test_the_last_value_is_that_of_the_last_part_which_has_it() -> None:
    early, late = (NamedOutput(0, 0, name * 32, 4) for name in (b"e", b"l"))
    rare = NamedOutput(1, 0, b"r" * 32, 4)
    found = outputs_by_place([part(0, 5, early, rare), part(5, 5, late)])
    assert {place: outputs[-1] for place, outputs in found.items()} == {(0, 0): late, (1, 0): rare}


def test_parts_with_a_gap_or_an_overlap_are_told() -> None:
    assert follow_one_another([part(0, 5), part(5, 5)])
    assert not follow_one_another([part(0, 5), part(6, 5)])
    assert not follow_one_another([part(0, 5), part(4, 5)])
