"""Numbered buffers and bindings, checked against the table that buyer and provider keep."""

from __future__ import annotations

import random

import pytest

from p2pflop.cloud import memory as module
from p2pflop.cloud.memory import Region, SessionMemory
from p2pflop.cloud.settings import CloudSettings, is_wanted, read_settings
from p2pflop.errors import ConfigError
from p2pflop.ids import content_hash
from p2pflop.job.commands import AnyCommand, Bind, Define, Free, Run
from p2pflop.job.graph import Dtype, Graph, GraphParam, Node, Op, Output, encode_graph
from p2pflop.job.session import SessionTable, open_graph

GRAPH = encode_graph(
    Graph(
        (GraphParam(0, Dtype.INT32, (2,)), GraphParam(1, Dtype.INT32, (2,))),
        (
            Node(Op.PARAM, (0,)),
            Node(Op.PARAM, (1,)),
            Node(Op.ADD, (), (0, 1)),
            Node(Op.ASSIGN, (), (0, 0, 2)),
        ),
        (Output(3, 0),),
    )
)
HASH = content_hash(GRAPH)


class Taker:
    """Applies commands to a table, which refuses what a node would."""

    def __init__(self) -> None:
        self.table = SessionTable(1000)
        self.given: list[AnyCommand] = []

    def give(self, command: AnyCommand) -> None:
        self.given.append(command)
        self.table.apply(command, open_graph(GRAPH) if isinstance(command, Define) else None)


def places(*regions: Region) -> tuple[tuple[int, int], ...]:
    return tuple((region.buffer, region.offset_bytes) for region in regions)


def test_what_is_known_is_not_said_again() -> None:
    taker = Taker()
    memory = SessionMemory(taker, 1000)
    one, two = memory.allocate(8), memory.allocate(8)
    for _ in range(3):
        memory.define(HASH, GRAPH)
        assert memory.bind(HASH, places(one, two)) == 0
        assert memory.bind(HASH, places(two, one)) == 1
    assert [type(command).__name__ for command in taker.given] == [
        *("Allocate", "Allocate", "Define", "Bind", "Bind")
    ]


def test_a_freed_buffer_takes_its_bindings_along_and_gives_its_number() -> None:
    taker = Taker()
    memory = SessionMemory(taker, 1000)
    one, two = memory.allocate(8), memory.allocate(8)
    memory.define(HASH, GRAPH)
    first, epoch = memory.bind(HASH, places(one, two)), memory.epoch
    memory.free(one)
    assert memory.epoch > epoch
    assert memory.allocate(16).buffer == one.buffer
    assert memory.bind(HASH, places(one, two)) == first
    assert [type(c) for c in taker.given[-3:-1]] == [Free, type(taker.given[-2])]
    memory.free(Region(99, 0, 1))  # not there: nothing to say


def test_it_says_when_there_is_no_memory_left() -> None:
    memory = SessionMemory(Taker(), 1000)
    memory.allocate(900)
    with pytest.raises(MemoryError, match="set CLOUD_MEMORY to more"):
        memory.allocate(101)
    assert memory.held_bytes == 900


def test_it_stops_at_the_limit_of_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BUFFERS", 2)
    memory = SessionMemory(Taker(), 1000)
    memory.allocate(1), memory.allocate(1)
    with pytest.raises(MemoryError, match="2 buffers"):
        memory.allocate(1)


@pytest.mark.parametrize("limit", ["MAX_HELD_BINDINGS", "MAX_HELD_PLACES"])
def test_bindings_are_forgotten_oldest_first(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, limit, 2 if limit == "MAX_HELD_BINDINGS" else 4)
    taker = Taker()
    memory = SessionMemory(taker, 1000)
    memory.define(HASH, GRAPH)
    a, b, c = (memory.allocate(8) for _ in range(3))
    kept = memory.bind(HASH, places(a, b))
    gone = memory.bind(HASH, places(b, c))
    memory.bind(HASH, places(a, b))
    epoch = memory.epoch
    assert memory.bind(HASH, places(c, a)) == gone
    assert memory.epoch > epoch
    assert memory.bind(HASH, places(a, b)) == kept
    assert sum(isinstance(command, Bind) for command in taker.given) == 3


def test_any_order_of_use_is_one_that_a_node_takes() -> None:
    rng = random.Random(3)  # noqa: S311
    taker = Taker()
    memory = SessionMemory(taker, 200)
    memory.define(HASH, GRAPH)
    held: list[Region] = []
    for _ in range(500):
        if held and rng.random() < 0.3:
            memory.free(held.pop(rng.randrange(len(held))))
        elif memory.held_bytes <= 184:
            held.append(memory.allocate(8 + rng.choice((0, 8))))
        if len(held) >= 2:
            taker.give(Run(memory.bind(HASH, places(*rng.sample(held, 2)))))
    assert memory.held_bytes == taker.table.held_bytes


def test_settings_have_safe_defaults() -> None:
    assert read_settings({}) == CloudSettings(10**8, "", 2 * 2**30, 60)


def test_settings_are_read() -> None:
    environ = {
        "CLOUD_MAX_USD": "$2.5",
        "CLOUD_CLASS": "any",
        "CLOUD_MEMORY": "8GiB",
        "CLOUD_WAIT": "5m",
        "CLOUD_FALLBACK": "local",
        "CLOUD_SYNC": "1",
        "CLOUD_QUIET": "1",
        "CLOUD_DEBUG": "0",
        "DEBUG": "2",
    }
    expected = CloudSettings(2_500_000_000, "any", 8 * 2**30, 300, True, True, True, True)
    assert read_settings(environ) == expected


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("CLOUD_MAX_USD", "much", "not an amount of dollars"),
        ("CLOUD_MAX_USD", "-1", "negative"),
        ("CLOUD_CLASS", "x" * 101, "not a class"),
        ("CLOUD_MEMORY", "0", "out of range"),
        ("CLOUD_MEMORY", "lots", "not a size"),
        ("CLOUD_WAIT", "soon", "not a duration"),
        ("CLOUD_WAIT", "31d", "longer than 30 days"),
        ("CLOUD_FALLBACK", "remote", "nothing to fall back on"),
        ("CLOUD_SYNC", "yes", "neither 0 nor 1"),
        ("CLOUD_QUIET", "2", "neither 0 nor 1"),
    ],
)
def test_a_bad_setting_is_named(name: str, value: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: .*{told}"):
        read_settings({name: value})


def test_cloud_is_wanted_unless_it_is_off() -> None:
    assert [is_wanted({"CLOUD": value}) for value in ("", "0", "1", "yes")] == [
        *(False, False, True, True)
    ]
    assert not is_wanted({})
