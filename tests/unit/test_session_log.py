"""The log of a session: what its snapshots read, keep and build anew."""

from __future__ import annotations

import pytest

from p2pflop.job.commands import AnyCommand, Define, Load, Run, Write
from p2pflop.job.session import SessionTable, open_graph
from p2pflop.node import session_log
from p2pflop.node.session_log import Kept, SessionLog
from p2pflop.units import MIB
from tests.session_scripts import FLOATS, beginning, sample_graph, steps

ADDRESS = bytes(range(32))
SIZE = 4 * FLOATS


class Bench:
    """A log, and a lease that has obeyed all of it from its beginning."""

    def __init__(self, *commands: AnyCommand) -> None:
        self.log = SessionLog()
        self.table = SessionTable(MIB)
        self.since = 0
        self.feed(*commands)

    def feed(self, *commands: AnyCommand) -> None:
        for command in commands:
            graph = open_graph(command.graph) if isinstance(command, Define) else None
            self.table.apply(command, graph)
            self.log.add(command)

    def snapshot(self, **read: Kept) -> set[bytes]:
        taken = self.log.begin(self.table, self.since, self.table.count, self.log.command)
        for buffer in taken.missing:
            taken.kept[buffer] = read[f"b{buffer}"]
        taken.missing = {}
        self.since = self.table.count
        return self.log.finish(taken)

    def missing(self) -> set[int]:
        return set(
            self.log.begin(self.table, self.since, self.table.count, self.log.command).missing
        )


def test_only_what_was_computed_is_read() -> None:
    bench = Bench(*beginning())
    assert bench.missing() == set()
    bench.feed(Run(0))
    assert bench.missing() == {0}
    bench.snapshot(b0=Kept(SIZE, data=b"x" * SIZE))
    assert bench.missing() == set()
    bench.feed(Write(1, 4, b"four"))
    assert bench.missing() == {1}


def test_a_snapshot_builds_what_there_was() -> None:
    bench = Bench(*beginning(), Run(0))
    bench.snapshot(b0=Kept(SIZE, data=b"x" * SIZE))
    anew = SessionTable(MIB)
    anew.apply(Define(sample_graph()), open_graph(sample_graph()))
    for command in bench.log.snapshot.commands():
        anew.apply(command)
    assert anew.buffers == bench.table.buffers
    assert anew.bindings == bench.table.bindings
    assert bench.log.size_bytes == 0
    assert bench.log.first == bench.table.count


def test_a_blob_that_the_script_loaded_is_not_read_back() -> None:
    bench = Bench(*beginning()[:2], Load(0, 0, ADDRESS, SIZE))
    assert bench.log.needs(ADDRESS)
    assert bench.missing() == set()
    bench.snapshot()
    assert bench.log.snapshot.kept[0] == Kept(SIZE, address=ADDRESS)
    assert bench.log.needs(ADDRESS)
    assert bench.log.snapshot.loaded_bytes == SIZE


def test_blobs_of_old_snapshots_are_given_up_and_those_of_scripts_are_not() -> None:
    bench = Bench(*beginning()[:2], Load(1, 0, ADDRESS, SIZE), *beginning()[4:], Run(0))
    assert bench.snapshot(b0=Kept(SIZE, address=b"1" * 32, ours=True)) == set()
    bench.feed(Run(0))
    assert bench.snapshot(b0=Kept(SIZE, address=b"2" * 32, ours=True)) == {b"1" * 32}
    bench.feed(Write(0, 0, b"y" * SIZE), Write(1, 0, b"z" * SIZE))
    assert bench.snapshot() == {b"2" * 32}
    assert not bench.log.needs(ADDRESS)


@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_LOG_COMMANDS", 9), ("MAX_LOG_BYTES", 1000), ("MAX_REPLAY_NS", 50)]
)
def test_a_log_at_a_limit_wants_a_snapshot(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    bench = Bench(*beginning())
    assert not bench.log.is_long
    monkeypatch.setattr(session_log, limit, value)
    bench.feed(*steps(3))
    bench.log.busy_ns = 50
    assert bench.log.is_long
    bench.snapshot(b0=Kept(SIZE, data=b"x" * SIZE))
    assert not bench.log.is_long
