"""Assignments in a graph from a stranger: what is well formed, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from p2pflop.errors import JobError
from p2pflop.job import assigns
from p2pflop.job.assigns import MAX_ASSIGNS
from p2pflop.job.graph import Dtype, Graph, GraphParam, Node, Op, Output, encode_graph
from p2pflop.job.meter import meter
from p2pflop.job.session import open_graph
from p2pflop.job.validate import Checked, Refusal, validate

F = Dtype.FLOAT32
TABLE = (GraphParam(0, F, (4, 3)), GraphParam(1, F, (4, 3)))
P, Q = Node(Op.PARAM, (0,)), Node(Op.PARAM, (1,))
"""Nodes 0 and 1 of each graph here."""
DOUBLE = Node(Op.ADD, (), (0, 0))
ROW = Node(Op.SHRINK, (1, 1, 0, 3), (0,))


def graph(nodes: Sequence[Node], *outputs: Output) -> Graph:
    return Graph(TABLE, (P, Q, *nodes), outputs or (Output(len(nodes) + 1, 0),))


def accept(made: Graph) -> Checked:
    checked = validate(made, assigns=True)
    assert isinstance(checked, Checked), checked
    assert open_graph(encode_graph(made)).cost == meter(checked)
    return checked


def refuse(made: Graph, why: str) -> None:
    checked = validate(made, assigns=True)
    assert isinstance(checked, Refusal)
    assert why in checked.reason


def assign(tensor: int, view: int, value: int) -> Node:
    return Node(Op.ASSIGN, (), (tensor, view, value))


def test_only_a_session_assigns() -> None:
    made = graph([DOUBLE, assign(0, 0, 2)])
    accept(made)
    checked = validate(made)
    assert isinstance(checked, Refusal)
    assert "only a session's graph assigns" in checked.reason


def test_views_are_movements_that_keep_every_element_apart() -> None:
    moves = [
        Node(Op.FLIP, (1, 0), (0,)),
        Node(Op.PERMUTE, (1, 0), (2,)),
        Node(Op.RESHAPE, (12,), (3,)),
        Node(Op.SHRINK, (2, 5), (4,)),
    ]
    value = [Node(Op.CONST, (F, 1.0)), Node(Op.EXPAND, (5,), (6,))]
    accept(graph([*moves, *value, assign(0, 5, 7)]))
    for wrong in (Node(Op.EXPAND, (2,), (0,)), Node(Op.PAD, (0, 5, 0, 3), (0,)), DOUBLE):
        refuse(graph([wrong, assign(0, 2, 2)]), "its view is not one of its tensor")
    bits = Node(Op.BITCAST, (Dtype.INT32,), (0,))
    refuse(graph([bits, assign(0, 2, 2)]), "its view is not one of its tensor")


def test_a_view_of_another_tensor_is_refused() -> None:
    refuse(graph([assign(0, 1, 1)]), "its view is not one of its tensor")
    refuse(graph([Node(Op.PARAM, (0,)), assign(0, 2, 1)]), "its view is not one of its tensor")
    first = assign(0, 0, 1)
    refuse(graph([first, assign(2, 0, 1)]), "its view is not one of its tensor")


def test_only_params_and_assignments_are_assigned_to() -> None:
    for wrong in (DOUBLE, Node(Op.CONTIGUOUS, (), (0,)), Node(Op.FLIP, (1, 0), (0,))):
        refuse(graph([wrong, assign(2, 2, 1)]), "neither to a param nor to an assignment")


def test_the_value_is_as_its_view() -> None:
    refuse(graph([ROW, assign(0, 2, 1)]), "FLOAT32 (4, 3) does not fit its view")
    halves = Node(Op.CAST, (Dtype.FLOAT16,), (1,))
    refuse(graph([halves, assign(0, 0, 2)]), "FLOAT16 (4, 3) does not fit its view")
    weak = Node(Op.CONST, (Dtype.WEAKFLOAT, 1.0)), Node(Op.EXPAND, (4, 3), (2,))
    refuse(graph([*weak, assign(0, 0, 3)]), "WEAKFLOAT (4, 3) does not fit its view")


def test_a_hidden_write_is_refused() -> None:
    write, read = assign(0, 0, 1), Node(Op.ADD, (), (2, 2))
    hidden = "(ASSIGN): to slot 0, and is not its output"
    refuse(graph([write, read, assign(1, 1, 3)], Output(4, 1)), hidden)
    refuse(graph([write, assign(1, 1, 1)], Output(3, 1)), hidden)
    refuse(graph([write], Output(0, 0)), hidden)
    refuse(graph([write, read], Output(3, 0)), hidden)
    refuse(graph([write, assign(2, 2, 1)], Output(2, 0)), "node 3 " + hidden)
    refuse(graph([write], Output(2, 1)), hidden)


def test_assignments_to_one_slot_have_one_order() -> None:
    again = [assign(0, 0, 1), Node(Op.ADD, (), (2, 2))]
    accept(graph([*again, assign(2, 2, 3)]))
    accept(graph([*again, assign(0, 0, 3)]))
    refuse(graph([*again, assign(0, 0, 1)]), "does not need the assignment to slot 0 before it")
    two = [assign(0, 0, 1), assign(2, 2, 1), Node(Op.ADD, (), (2, 1)), assign(0, 0, 4)]
    refuse(graph(two), "node 5 (ASSIGN): does not need the assignment to slot 0 before it")
    other = Node(Op.PARAM, (0,))
    refuse(graph([assign(0, 0, 1), other, assign(3, 3, 1)]), "does not need the assignment")


def test_params_are_numbered_by_place_and_nothing_is_fresh() -> None:
    with pytest.raises(JobError, match="has no fresh outputs"):
        open_graph(encode_graph(graph([DOUBLE], Output(2))))
    gap = Graph((GraphParam(1, F, (4, 3)),), (Q, assign(0, 0, 0)), (Output(1, 1),))
    with pytest.raises(JobError, match="not in slots 0, 1"):
        open_graph(encode_graph(gap))


def tower(height: int) -> Graph:
    """Each assignment to the one before it."""
    tensors = [0, *range(2, height + 1)]
    return graph([assign(tensor, tensor, 1) for tensor in tensors])


def test_the_number_of_assignments_has_its_limit() -> None:
    accept(tower(MAX_ASSIGNS))
    refuse(tower(MAX_ASSIGNS + 1), f"over {MAX_ASSIGNS} assignments")


def test_hostile_towers_are_looked_at_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assigns, "MAX_ASSIGNS", 10**6)
    start = time.perf_counter()
    validate(tower(19_000), assigns=True)
    # One long view, assigned to again and again.
    views = [Node(Op.FLIP, (1, 0), (0,))]
    views += [Node(Op.FLIP, (1, 0), (number + 2,)) for number in range(500)]
    wide = graph([*views, *(assign(0, 502, 1) for _ in range(20_000))])
    refuse(wide, "does not need the assignment")
    assert time.perf_counter() - start < 5


class TestCost:
    """A float32 of 4 x 3 has 48 bytes, a row of it 12."""

    def cost(self, *nodes: Node) -> tuple[int, int, int]:
        found = meter(accept(graph(nodes)))
        return found.flop, found.touched_bytes, found.peak_bytes

    def test_a_copy_reads_and_writes(self) -> None:
        assert self.cost(assign(0, 0, 1)) == (0, 96, 96 + 48)

    def test_a_part_is_written_as_a_part(self) -> None:
        values = [Node(Op.CONST, (F, 2.0)), Node(Op.EXPAND, (1, 3), (3,))]
        assert self.cost(ROW, *values, assign(0, 2, 4)) == (0, 12, 96 + 12)

    def test_what_is_computed_into_place_is_written_once(self) -> None:
        assert self.cost(DOUBLE, assign(0, 0, 2)) == (12, 96, 96 + 48)
        sums = [Node(Op.REDUCE, (0, 1), (1,)), Node(Op.RESHAPE, (1, 3), (2,))]
        whole = self.cost(*sums, ROW, assign(0, 4, 3))
        assert whole == (12, 48 + 12, 96 + 12 + 12)

    def test_what_was_assigned_is_read_by_whoever_uses_it(self) -> None:
        use = [Node(Op.ADD, (), (2, 2)), assign(2, 2, 3)]
        assert self.cost(assign(0, 0, 1), *use) == (12, 96 + 96, 96 + 96)

    def test_an_assignment_costs_what_the_output_did(self) -> None:
        plain = validate(graph([DOUBLE], Output(2, 0)))
        assert isinstance(plain, Checked)
        assigned = meter(accept(graph([DOUBLE, assign(0, 0, 2)])))
        assert assigned == meter(plain)
