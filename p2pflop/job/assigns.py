"""Assignments inside the graph of a session: which are well formed.

``ASSIGN(tensor, view, value)`` is ``tensor`` once ``value`` is written to ``view``, a part of it
by movements alone. ``tensor`` is a param, or an earlier assignment to one; what is written to a
slot leaves the graph, so that whoever keeps the books knows every slot that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from p2pflop.job.graph import Dtype, Graph, Op
from p2pflop.job.rules import require
from p2pflop.job.shapes import Shape

VIEWS: Final = frozenset({Op.RESHAPE, Op.PERMUTE, Op.SHRINK, Op.FLIP})
"""The movements by which every element of the result is another one of the source."""


def check_assigns(
    graph: Graph, shapes: Sequence[Shape], dtypes: Sequence[Dtype], *, allowed: bool
) -> None:
    """Raises Refused for an assignment that is not ``allowed`` at all, or is none to a param."""
    written = {output.slot for output in graph.outputs}
    for number, node in enumerate(graph.nodes):
        if node.op is not Op.ASSIGN:
            continue
        where = f"node {number} (ASSIGN)"
        require(allowed, f"{where}: only a session's graph assigns")
        tensor, view, value = node.refs
        require(
            graph.nodes[tensor].op in (Op.PARAM, Op.ASSIGN),
            f"{where}: neither to a param nor to an assignment",
        )
        while view != tensor:
            require(graph.nodes[view].op in VIEWS, f"{where}: its view is not one of its tensor")
            (view,) = graph.nodes[view].refs
        same = (shapes[node.refs[1]], dtypes[tensor]) == (shapes[value], dtypes[value])
        require(same, f"{where}: {dtypes[value].name} {shapes[value]} does not fit its view")
        require(assigned_slot(graph, number) in written, f"{where}: to a slot that is no output")


def assigned_slot(graph: Graph, number: int) -> int | None:
    """The slot that node ``number`` is an assignment to; None if it is none."""
    if graph.nodes[number].op is not Op.ASSIGN:
        return None
    while graph.nodes[number].op is Op.ASSIGN:
        number = graph.nodes[number].refs[0]
    slot = graph.nodes[number].attrs[0]
    return slot if isinstance(slot, int) else None
