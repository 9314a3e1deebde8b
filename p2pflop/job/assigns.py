"""Assignments inside the graph of a session: which are well formed.

``ASSIGN(tensor, view, value)`` is ``tensor`` once ``value`` is written to ``view``, a part of it
by movements alone. ``tensor`` is a param, or an assignment to one. Each assignment to a slot needs
the one before it, as its tensor or in its value, so that there is one order of them; the last one
leaves the graph, so that whoever keeps the books knows every slot that changes. When what reads an
earlier one is computed is for tinygrad to say, as it is natively; where it finds no order, lowering
refuses the graph.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Final

from p2pflop.job.graph import Dtype, Graph, Op
from p2pflop.job.rules import require
from p2pflop.job.shapes import Shape

MAX_ASSIGNS: Final = 4096
"""In a graph: each is a kernel, at least."""
VIEWS: Final = frozenset({Op.RESHAPE, Op.PERMUTE, Op.SHRINK, Op.FLIP})
"""The movements by which every element of the result is another one of the source."""


def check_assigns(
    graph: Graph, shapes: Sequence[Shape], dtypes: Sequence[Dtype], *, allowed: bool
) -> None:
    """Raises Refused for an assignment that is not ``allowed`` at all, or is not well formed."""
    slots: dict[int, int] = {}  # of each param node and assignment
    last: dict[int, int] = {}  # slot: the last assignment to it
    bits: dict[int, int] = {}  # assignment: its bit
    needs: list[int] = []  # of each node: the bits of all assignments that it needs
    for number, node in enumerate(graph.nodes):
        needs.append(functools.reduce(operator.or_, [needs[ref] for ref in node.refs], 0))
        if node.op is Op.PARAM and type(node.attrs[0]) is int:
            slots[number] = node.attrs[0]
        if node.op is not Op.ASSIGN:
            continue
        where = f"node {number} (ASSIGN)"
        require(allowed, f"{where}: only a session's graph assigns")
        require(len(bits) < MAX_ASSIGNS, f"{where}: over {MAX_ASSIGNS} assignments")
        tensor, view, value = node.refs
        require(tensor in slots, f"{where}: neither to a param nor to an assignment")
        slot = slots[number] = slots[tensor]
        follows = slot not in last or needs[number] & bits[last[slot]]
        require(bool(follows), f"{where}: does not need the assignment to slot {slot} before it")
        last[slot] = number
        bits[number] = 1 << len(bits)
        needs[number] |= bits[number]
        while view != tensor:
            require(graph.nodes[view].op in VIEWS, f"{where}: its view is not one of its tensor")
            (view,) = graph.nodes[view].refs
        same = (shapes[node.refs[1]], dtypes[tensor]) == (shapes[value], dtypes[value])
        require(same, f"{where}: {dtypes[value].name} {shapes[value]} does not fit its view")
    written = {output.slot: output.node for output in graph.outputs}
    for slot, number in last.items():
        leaves = written.get(slot) == number
        require(leaves, f"node {number} (ASSIGN): to slot {slot}, and is not its output")
