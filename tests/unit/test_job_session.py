"""The books of a session: what its commands count, and what they may not do."""

from __future__ import annotations

import pytest
import trio

from p2pflop.job.commands import Allocate, AnyCommand, Bind, Copy, Define, Hold, Read, Run, Write
from p2pflop.job.graph import graph_hash
from p2pflop.job.session import Mark, SessionTable, open_graph
from p2pflop.node.idle_clock import IdleClock
from tests.session_scripts import FLOATS, sample_graph

GRAPH = sample_graph(times=3)
OPENED = open_graph(GRAPH)
SIZE = 4 * FLOATS
BOUND = Bind(0, graph_hash(GRAPH), ((0, 0), (1, 0)))


@pytest.mark.parametrize(
    ("command", "counts"),
    [
        (Run(0), {"flop": 3 * FLOATS, "touched_bytes": OPENED.cost.touched_bytes}),
        (Write(0, 0, b"abc"), {"moved_bytes": 3}),
        (Read(0, 0, SIZE), {"moved_bytes": SIZE}),
        (Copy((0, 0), (1, 0), 8), {"touched_bytes": 16}),
        (Hold(7), {"held_seconds": 7}),
        (BOUND, {}),
        (Define(GRAPH), {}),
    ],
)
def test_what_a_command_counts_is_known_before(command: AnyCommand, counts: dict[str, int]) -> None:
    table = SessionTable(2 * SIZE)
    for each in (Allocate(0, SIZE), Allocate(1, SIZE)):
        table.apply(each)
    table.apply(Define(GRAPH), OPENED)
    table.apply(BOUND)
    before = table.mark()
    assert before.lowered_nodes == OPENED.nodes == 2 + 3 + 1
    expected = table.foresee(command, OPENED)
    table.apply(command, OPENED if isinstance(command, Define) else None)
    after = table.mark()
    names = ("flop", "touched_bytes", "moved_bytes", "lowered_nodes", "held_seconds")
    for name in names:
        counted = getattr(after, name) - getattr(before, name)
        assert counted == counts.get(name, 0), name
        assert getattr(expected, name) == getattr(after, name)
    assert after.chain != before.chain, "it is in the chain that receipts name"


def test_a_graph_is_lowered_once_and_counted_before_it_is() -> None:
    table = SessionTable(0)
    assert table.foresee(Define(GRAPH), OPENED) == Mark(1, lowered_nodes=OPENED.nodes)
    for _ in range(2):
        table.apply(Define(GRAPH), OPENED)
    assert table.lowered_nodes == OPENED.nodes


async def test_an_idle_clock_counts_what_nobody_works(autojump_clock: object) -> None:
    clock = IdleClock()
    await trio.sleep(3)
    clock.begin()
    clock.begin()
    await trio.sleep(10)
    clock.end()
    await trio.sleep(10)
    assert clock.idle_s == 3
    clock.end()
    await trio.sleep(2)
    assert (clock.idle_s, clock.busy_s) == (5, 20)
    with pytest.raises(ValueError, match="nothing is at work"):
        clock.end()
