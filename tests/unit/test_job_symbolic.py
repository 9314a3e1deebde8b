"""Graphs whose sizes depend on Variables: what is well formed, what a run costs, who is refused."""

from __future__ import annotations

import re

import msgspec
import pytest

from p2pflop.errors import JobError, ProtocolError
from p2pflop.job import symbolic
from p2pflop.job.commands import Allocate, Bind, Define, Run
from p2pflop.job.graph import Dtype, Graph, GraphParam, Node, Op, Output, encode_graph
from p2pflop.job.limits import MAX_VARIABLES
from p2pflop.job.meter import meter
from p2pflop.job.session import SessionTable, open_graph
from p2pflop.job.symbolic import (
    MAX_CHANGES,
    MAX_FACTOR,
    MAX_VALUE,
    Change,
    CheckedSymbolic,
    Range,
    SymbolicGraph,
    decode_symbolic,
    encode_symbolic,
    is_symbolic,
    validate_symbolic,
)
from p2pflop.job.validate import Checked, Refusal, validate
from p2pflop.wire import encode

F = Dtype.FLOAT32
ROWS = 8
PLACE = Range(1, ROWS)

# The sum of the first v rows of a table, into the other param.
NODES = (
    Node(Op.PARAM, (0,)),
    Node(Op.PARAM, (1,)),
    Node(Op.SHRINK, (0, ROWS, 0, 3), (0,)),
    Node(Op.SIN, (), (2,)),
    Node(Op.REDUCE, (0, 1), (3,)),
    Node(Op.ASSIGN, (), (1, 1, 4)),
)
PARAMS = (GraphParam(0, F, (ROWS, 3)), GraphParam(1, F, (3,)))
SUMS = SymbolicGraph(Graph(PARAMS, NODES, (Output(5, 1),)), (PLACE,), (Change(2, 1, 0, 1),))


def with_nodes(**nodes: Node) -> Graph:
    """The graph with other nodes: ``n2=...`` is number 2."""
    changed = [nodes.get(f"n{number}", node) for number, node in enumerate(NODES)]
    return Graph(PARAMS, tuple(changed), (Output(5, 1),))


def symbolic_of(*changes: Change, graph: Graph = SUMS.graph, ranges: object = None) -> bytes:
    """The wire form of what may be wrong."""
    pairs = [(PLACE.low, PLACE.high)] if ranges is None else ranges
    rows = [(each.node, each.place, each.variable, each.factor) for each in changes]
    return msgspec.msgpack.encode([2, encode_graph(graph), pairs, rows])


def test_one_encoding_comes_back() -> None:
    data = encode_symbolic(SUMS)
    assert is_symbolic(data)
    assert not is_symbolic(encode_graph(SUMS.graph))
    assert decode_symbolic(data) == SUMS
    assert data == symbolic_of(*SUMS.changes)


def test_a_graph_for_some_values_is_a_graph_as_any_other() -> None:
    for value in range(PLACE.low, PLACE.high + 1):
        at = SUMS.at((value,))
        assert at.nodes[2].attrs == (0, value, 0, 3)
        assert isinstance(validate(at, assigns=True), Checked)
    assert SUMS.at((PLACE.high,)) == SUMS.graph


def test_a_run_costs_what_its_values_make_it() -> None:
    opened = open_graph(encode_symbolic(SUMS))
    for value in range(PLACE.low, PLACE.high + 1):
        checked = validate(SUMS.at((value,)), assigns=True)
        assert isinstance(checked, Checked)
        exact = meter(checked)
        cost = opened.cost_of((value,))
        assert (cost.flop, cost.touched_bytes) == (exact.flop, exact.touched_bytes)
        assert cost.peak_bytes == opened.cost.peak_bytes >= exact.peak_bytes


def test_what_grows_faster_than_a_line_is_never_too_cheap() -> None:
    nodes = (
        *NODES[:2],
        Node(Op.CONST, (F, 2.0)),
        Node(Op.EXPAND, (ROWS, ROWS, 3), (2,)),
        Node(Op.REDUCE, (0, 2), (3,)),
        Node(Op.ASSIGN, (), (1, 1, 4)),
    )
    graph = Graph(PARAMS, nodes, (Output(5, 1),))
    square = SymbolicGraph(graph, (PLACE,), (Change(3, 0, 0, 1), Change(3, 1, 0, 1)))
    opened = open_graph(encode_symbolic(square))
    for value in range(PLACE.low, PLACE.high + 1):
        checked = validate(square.at((value,)), assigns=True)
        assert isinstance(checked, Checked)
        assert opened.cost_of((value,)).flop >= meter(checked).flop
    assert opened.cost_of((ROWS,)) == opened.cost


def test_of_two_variables_the_one_nearer_to_its_highest_value_counts() -> None:
    ranges = (PLACE, Range(0, 100))
    two = SymbolicGraph(SUMS.graph, ranges, SUMS.changes)
    opened = open_graph(encode_symbolic(two))
    assert opened.cost_of((1, 0)) == opened.cost_of((1, 0))
    assert opened.cost_of((1, 0)).flop < opened.cost_of((5, 0)).flop
    assert opened.cost_of((1, 100)) == opened.cost == opened.cost_of((8, 0))


@pytest.mark.parametrize(
    ("hostile", "why"),
    [
        (symbolic_of(), "length"),
        (symbolic_of(*SUMS.changes, ranges=[]), "length"),
        (symbolic_of(*SUMS.changes, ranges=[(0, 1)] * (MAX_VARIABLES + 1)), "length"),
        (symbolic_of(*SUMS.changes, ranges=[(-1, 8)]), ">= 0"),
        (symbolic_of(*SUMS.changes, ranges=[(0, MAX_VALUE + 1)]), "<="),
        (symbolic_of(Change(2, 1, 0, 0)), "changes nothing"),
        (symbolic_of(Change(2, 1, 1, 1)), "changes nothing"),
        (symbolic_of(Change(6, 1, 0, 1)), "changes nothing"),
        (symbolic_of(Change(2, 4, 0, 1)), "no integer in place 4"),
        (symbolic_of(Change(2, 1, 0, MAX_FACTOR + 1)), "<="),
        (symbolic_of(Change(2, 1, 0, -MAX_FACTOR - 1)), ">="),
        (symbolic_of(Change(2, 1, 0, 1), Change(2, 1, 0, 1)), "do not rise"),
        (symbolic_of(Change(2, 1, 0, 1), Change(2, 0, 0, 1)), "do not rise"),
        (encode_symbolic(SUMS) + b"\0", "valid"),
        (encode_symbolic(SUMS)[:-1], "valid"),
        (encode_symbolic(SUMS).replace(b"\x02", b"\xcc\x02", 1), "encoding"),
        (b"\x94\x02", "valid"),
    ],
)
def test_what_is_not_well_formed(hostile: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        decode_symbolic(hostile)


def test_changes_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = msgspec.msgpack.decode(encode_symbolic(SUMS))
    wire[3] = wire[3] * (MAX_CHANGES + 1)
    with pytest.raises(ProtocolError, match=f"<= {MAX_CHANGES}"):
        decode_symbolic(msgspec.msgpack.encode(wire))
    data = encode_symbolic(SUMS)
    monkeypatch.setattr(symbolic, "MAX_GRAPH_BYTES", len(data) - 1)
    with pytest.raises(ProtocolError, match="over the limit"):
        decode_symbolic(data)


CONST = Node(Op.CONST, (int(F), 2.0))


@pytest.mark.parametrize(
    ("changes", "graph", "ranges", "why"),
    [
        ([Change(2, 1, 0, 1)], SUMS.graph, (Range(3, 3),), "never but 3"),
        ([Change(2, 1, 0, 1)], SUMS.graph, (Range(4, 3),), "never but 4"),
        ([Change(2, 1, 0, -1)], SUMS.graph, (PLACE,), "shrinks as a Variable grows"),
        ([Change(2, 0, 0, 1)], SUMS.graph, (PLACE,), r"values 1 .*SHRINK"),
        ([Change(2, 1, 0, 2)], SUMS.graph, (PLACE,), r"values 1 .*SHRINK"),
        ([Change(4, 1, 0, 1)], SUMS.graph, (PLACE,), "nothing of it can depend"),
        ([Change(0, 0, 0, 1)], SUMS.graph, (PLACE,), "nothing of it can depend"),
        (
            [Change(2, 1, 0, 1)],
            with_nodes(n3=Node(Op.RESHAPE, (ROWS, 3), (2,))),
            (PLACE,),
            r"values 1 .*RESHAPE",
        ),
        ([Change(2, 0, 0, 1)], with_nodes(n2=CONST), (PLACE,), "only an integer's value"),
    ],
)
def test_what_no_graph_may_do(
    changes: list[Change], graph: Graph, ranges: tuple[Range, ...], why: str
) -> None:
    found = validate_symbolic(SymbolicGraph(graph, ranges, tuple(changes)))
    assert isinstance(found, Refusal)
    assert re.search(why, found.reason), found.reason


def test_a_shape_that_fits_at_both_ends_alone_is_refused() -> None:
    """v * v elements and 9 v - 8 elements are as many for 1 and 8, and for nothing in between."""
    nodes = (
        *NODES[:2],
        Node(Op.CONST, (int(F), 2.0)),
        Node(Op.EXPAND, (8, 8), (2,)),
        Node(Op.RESHAPE, (64,), (3,)),
        Node(Op.REDUCE, (0, 1), (4,)),
        Node(Op.EXPAND, (3,), (5,)),
        Node(Op.ASSIGN, (), (1, 1, 6)),
    )
    graph = Graph(PARAMS, nodes, (Output(7, 1),))
    changes = (Change(3, 0, 0, 1), Change(3, 1, 0, 1), Change(4, 0, 0, 9))
    found = validate_symbolic(SymbolicGraph(graph, (PLACE,), changes))
    assert isinstance(found, Refusal)
    assert "for values 4" in found.reason


def test_a_place_that_is_compared_with() -> None:
    """An integer constant may be a Variable's value; what depends on it is checked at both ends."""
    nodes = (
        *NODES[:2],
        Node(Op.IOTA, (int(Dtype.INT32), 3)),
        Node(Op.CONST, (int(Dtype.INT32), 8)),
        Node(Op.CMPLT, (), (2, 3)),
        Node(Op.CAST, (int(F),), (4,)),
        Node(Op.ASSIGN, (), (1, 1, 5)),
    )
    graph = Graph(PARAMS, nodes, (Output(6, 1),))
    made = SymbolicGraph(graph, (PLACE,), (Change(3, 1, 0, 1),))
    found = validate_symbolic(made)
    assert isinstance(found, CheckedSymbolic)
    assert found.low.graph.nodes[3].attrs[1] == 1
    by_zero = Graph(
        PARAMS, (*nodes[:4], Node(Op.FLOORDIV, (), (2, 3)), *nodes[5:]), (Output(6, 1),)
    )
    refused = validate_symbolic(
        SymbolicGraph(by_zero, (Range(0, 8),), (Change(3, 1, 0, 1),)),
    )
    assert isinstance(refused, Refusal)
    assert "by zero" in refused.reason


def table() -> SessionTable:
    made = SessionTable(memory_bytes=1024)
    opened = open_graph(encode_symbolic(SUMS))
    made.apply(Define(opened.encoded), opened)
    made.apply(Allocate(0, 4 * ROWS * 3))
    made.apply(Allocate(1, 12))
    made.apply(Bind(0, opened.hash, ((0, 0), (1, 0))))
    return made


def test_both_sides_bill_a_run_by_its_values_and_chain_them() -> None:
    one, other = table(), table()
    for value in (1, 5, 8):
        foreseen = one.foresee(Run(0, (value,)))
        one.apply(Run(0, (value,)))
        other.apply(Run(0, (value,)))
        assert one.mark() == other.mark()
        assert (one.flop, one.touched_bytes) == (foreseen.flop, foreseen.touched_bytes)
    last = one.flop
    one.apply(Run(0, (2,)))
    other.apply(Run(0, (3,)))
    assert one.chain != other.chain
    assert last < one.flop < other.flop


@pytest.mark.parametrize("values", [(), (0,), (9,), (1, 1), (MAX_VALUE,)])
def test_a_run_with_other_values_changes_nothing(values: tuple[int, ...]) -> None:
    made = table()
    before = made.mark()
    with pytest.raises(JobError, match="Variable"):
        made.apply(Run(0, values))
    assert made.mark() == before


def test_a_graph_without_variables_takes_no_values() -> None:
    made = SessionTable(memory_bytes=1024)
    opened = open_graph(encode_graph(SUMS.graph))
    made.apply(Define(opened.encoded), opened)
    made.apply(Allocate(0, 4 * ROWS * 3))
    made.apply(Allocate(1, 12))
    made.apply(Bind(0, opened.hash, ((0, 0), (1, 0))))
    with pytest.raises(JobError, match="1 values for 0 Variables"):
        made.apply(Run(0, (1,)))
    made.apply(Run(0))


def test_a_run_without_values_says_so_in_a_byte() -> None:
    assert encode(Run(7)) == bytes([0x93, 6, 7, 0x90])
    assert encode(Run(7, (300,))) == bytes([0x93, 6, 7, 0x91, 0xCD, 1, 44])
