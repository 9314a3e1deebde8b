"""Bools in a session: what is looked at before it runs, when it is again, and what that counts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from p2pflop.errors import JobError
from p2pflop.job import bools
from p2pflop.job.bools import check_bools
from p2pflop.job.commands import (
    Allocate,
    AnyCommand,
    Bind,
    Check,
    Copy,
    Define,
    Free,
    Load,
    Place,
    Run,
    Write,
)
from p2pflop.job.graph import Dtype, Graph, GraphParam, Node, Op, Output, encode_graph, graph_hash
from p2pflop.job.session import SessionTable, open_graph

SIZE = 8


def copying(source: Dtype, target: Dtype) -> bytes:
    """A graph: the first place gets what the second has."""
    nodes = [Node(Op.PARAM, (0,)), Node(Op.PARAM, (1,))]
    value = 1
    if source != target:
        nodes.append(Node(Op.BITCAST, (target,), (1,)))
        value = 2
    nodes.append(Node(Op.ASSIGN, (), (0, 0, value)))
    params = (GraphParam(0, target, (SIZE,)), GraphParam(1, source, (SIZE,)))
    return encode_graph(Graph(params, tuple(nodes), (Output(len(nodes) - 1, 0),)))


BOOLS, BYTES = copying(Dtype.BOOL, Dtype.BOOL), copying(Dtype.UINT8, Dtype.UINT8)
LOOKED = [Check(1, 0, SIZE)]


def bound(number: int, graph: bytes, *places: Place) -> Bind:
    return Bind(number, graph_hash(graph), places)


class Book:
    """A table that has two buffers of 16 bytes; binding 0 copies bools, binding 1 bytes."""

    def __init__(self) -> None:
        self.table = SessionTable(64)
        for graph in (BOOLS, BYTES):
            self.table.apply(Define(graph), open_graph(graph))
        self.take([Allocate(0, 2 * SIZE), Allocate(1, 2 * SIZE)])
        self.take([bound(0, BOOLS, (0, 0), (1, 0)), bound(1, BYTES, (0, SIZE), (1, SIZE))])

    def take(self, commands: Sequence[AnyCommand]) -> list[Check]:
        """What is looked at; what it counts is foreseen."""
        looked: list[Check] = []
        for command in commands:
            expected = self.table.foresee(command)
            looked += self.table.checks(command)
            self.table.apply(command)
            assert expected.touched_bytes == self.table.touched_bytes
        return looked


@pytest.fixture
def book() -> Book:
    made = Book()
    before = made.table.touched_bytes
    assert made.take([Run(0)]) == LOOKED
    assert made.table.touched_bytes - before == open_graph(BOOLS).cost.touched_bytes + SIZE
    return made


@pytest.mark.parametrize(
    ("commands", "looked"),
    [
        ([], []),
        ([Run(0)], []),
        ([Write(1, 15, b"\1")], LOOKED),
        ([Load(1, 0, bytes(32), 4)], LOOKED),
        ([Copy((1, 0), (0, 0), 4)], LOOKED),
        ([bound(1, BYTES, (1, SIZE), (0, SIZE)), Run(1)], LOOKED),
        ([bound(0, BOOLS, (0, 0), (1, 4))], [Check(1, 4, SIZE)]),
        ([Free(1), Allocate(1, SIZE), bound(0, BOOLS, (0, 0), (1, 0))], LOOKED),
        # What is but assigned to, in whole, may have been anything.
        ([Write(0, 0, b"\2")], []),
        ([Free(0), Allocate(0, SIZE), bound(0, BOOLS, (0, 0), (1, 0))], []),
    ],
)
def test_what_may_have_changed_is_looked_at_again(
    book: Book, commands: list[AnyCommand], looked: list[Check]
) -> None:
    assert book.take(commands) == []
    assert book.take([Run(0)]) == looked
    assert book.take([Run(0)]) == []


def test_what_a_graph_of_bools_has_assigned_needs_no_look(book: Book) -> None:
    back: list[AnyCommand] = [bound(0, BOOLS, (1, 0), (0, 0)), Run(0)]
    assert book.take(back) == []
    assert book.take([Write(0, 0, b"\2"), *back]) == [Check(0, 0, SIZE)]


def test_a_part_that_is_assigned_to_leaves_the_rest(book: Book) -> None:
    nodes = (
        Node(Op.PARAM, (0,)),
        Node(Op.SHRINK, (0, 4), (0,)),
        Node(Op.CONST, (Dtype.BOOL, True)),
        Node(Op.EXPAND, (4,), (2,)),
        Node(Op.ASSIGN, (), (0, 1, 3)),
    )
    part = encode_graph(Graph((GraphParam(0, Dtype.BOOL, (SIZE,)),), nodes, (Output(4, 0),)))
    book.table.apply(Define(part), open_graph(part))
    assert book.take([bound(2, part, (0, SIZE)), Run(2), Run(2)]) == [Check(0, SIZE, SIZE)]


def test_places_that_are_bools_and_bytes_at_once_are_looked_at(book: Book) -> None:
    """A graph that assigns to both, one over the other: nobody knows which is left."""
    nodes = (
        Node(Op.PARAM, (0,)),
        Node(Op.PARAM, (1,)),
        Node(Op.PARAM, (2,)),
        Node(Op.ASSIGN, (), (0, 0, 2)),
        Node(Op.CAST, (Dtype.UINT8,), (2,)),
        Node(Op.NEG, (), (4,)),
        Node(Op.ASSIGN, (), (1, 1, 5)),
    )
    dtypes = (Dtype.BOOL, Dtype.UINT8, Dtype.BOOL)
    params = tuple(GraphParam(slot, dtype, (SIZE,)) for slot, dtype in enumerate(dtypes))
    both = encode_graph(Graph(params, nodes, (Output(3, 0), Output(6, 1))))
    book.table.apply(Define(both), open_graph(both))
    assert book.take([bound(2, both, (0, 0), (0, 0), (1, 0)), Run(2)]) == []
    assert book.take([bound(0, BOOLS, (1, 0), (0, 0)), Run(0)]) == [Check(0, 0, SIZE)]


def test_graphs_without_bools_cost_no_look() -> None:
    assert Book().take([Run(1), Write(0, 0, b"\2"), Run(1)]) == []


def test_of_one_buffer_so_many_places_are_known(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bools, "MAX_KNOWN_PLACES", 2)
    for at in (1, 2):
        assert book.take([bound(0, BOOLS, (0, 0), (1, at)), Run(0)]) == [Check(1, at, SIZE)]
    assert book.take([bound(0, BOOLS, (0, 0), (1, 0)), Run(0)]) == LOOKED, "forgotten"


@pytest.mark.parametrize("data", [b"\2", b"\0\1\xff", bytes(1000) + b"\x80"])
def test_other_bytes_are_refused(data: bytes) -> None:
    check_bools(b"\0\1" * 9)
    with pytest.raises(JobError, match="other than 0 and 1"):
        check_bools(data)
