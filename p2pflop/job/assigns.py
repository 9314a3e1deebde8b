"""Assignments inside the graph of a session: which are well formed.

``ASSIGN(tensor, view, value)`` is ``tensor`` once ``value`` is written to ``view``, a part of it
by movements alone. ``tensor`` is a param, or the assignment to it before this one: those to one
slot follow each other, the last one leaves the graph, and so whoever keeps the books knows every
slot that changes. What reads an earlier one of them, or the param, reads it before the next write;
where no order does that, lowering refuses the graph.
"""

from __future__ import annotations

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
    count = 0
    for number, node in enumerate(graph.nodes):
        if node.op is Op.PARAM and type(node.attrs[0]) is int:
            slots[number] = node.attrs[0]
        if node.op is not Op.ASSIGN:
            continue
        count += 1
        where = f"node {number} (ASSIGN)"
        require(allowed, f"{where}: only a session's graph assigns")
        require(count <= MAX_ASSIGNS, f"{where}: over {MAX_ASSIGNS} assignments")
        tensor, view, value = node.refs
        require(tensor in slots, f"{where}: neither to a param nor to an assignment")
        slot = slots[number] = slots[tensor]
        follows = last[slot] == tensor if slot in last else graph.nodes[tensor].op is Op.PARAM
        require(follows, f"{where}: does not follow the assignment to slot {slot} before it")
        last[slot] = number
        while view != tensor:
            require(graph.nodes[view].op in VIEWS, f"{where}: its view is not one of its tensor")
            (view,) = graph.nodes[view].refs
        same = (shapes[node.refs[1]], dtypes[tensor]) == (shapes[value], dtypes[value])
        require(same, f"{where}: {dtypes[value].name} {shapes[value]} does not fit its view")
    written = {output.slot: output.node for output in graph.outputs}
    for slot, number in last.items():
        leaves = written.get(slot) == number
        require(leaves, f"node {number} (ASSIGN): to slot {slot}, and is not its output")
