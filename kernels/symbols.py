"""The Variables of a symbolic graph as tinygrad's, and back.

Their names are ours, from their numbers: tinygrad executes names of variables as code in places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from tinygrad.uop.ops import Ops, UOp

from p2pflop.errors import JobError
from p2pflop.job.graph import Attr, Node
from p2pflop.job.symbolic import Change, Range, SymbolicGraph
from p2pflop.kernels.plan import THREAD

Symbol: TypeAlias = "Attr | UOp"
"""An attribute of a node: a value, or an expression of Variables."""

_PREFIX: Final = "v"
_CORE: Final = "core_id"


@dataclass(frozen=True, slots=True)
class Symbols:
    """The attributes that depend on Variables, by node and place, as expressions."""

    ranges: tuple[Range, ...] = ()
    expressions: dict[int, dict[int, UOp]] = field(default_factory=dict)

    def attrs(self, number: int, node: Node) -> tuple[Symbol, ...]:
        """The attributes of node ``number``."""
        changed = self.expressions.get(number)
        if changed is None:
            return node.attrs
        return tuple(changed.get(place, value) for place, value in enumerate(node.attrs))


def symbols_of(symbolic: SymbolicGraph | None) -> Symbols:
    """Those of a graph; there are none in a graph without Variables."""
    if symbolic is None:
        return Symbols()
    # Bound, as in a script: tinygrad counts them among the buffers that a kernel reads.
    variables = [
        UOp.variable(f"{_PREFIX}{number}", each.low, each.high).bind(each.high)
        for number, each in enumerate(symbolic.ranges)
    ]
    terms: dict[tuple[int, int], list[UOp]] = {}
    rest: dict[tuple[int, int], int] = {}
    for change in symbolic.changes:
        where = change.node, change.place
        highest = int(symbolic.graph.nodes[change.node].attrs[change.place] or 0)
        terms.setdefault(where, []).append(variables[change.variable] * change.factor)
        before = rest.get(where, highest)
        rest[where] = before - change.factor * symbolic.ranges[change.variable].high
    expressions: dict[int, dict[int, UOp]] = {}
    for (node, place), added in terms.items():
        total = UOp.usum(*added) + rest[node, place]
        expressions.setdefault(node, {})[place] = total.simplify()
    return Symbols(symbolic.ranges, expressions)


def scalar_of(variable: UOp) -> int:
    """What a kernel takes where it takes ``variable``: see ``plan.Kernel``. Raises JobError."""
    name = variable.expr
    if name == _CORE:
        return THREAD
    if not (name.startswith(_PREFIX) and name[len(_PREFIX) :].isdecimal()):
        raise JobError(f"kernel takes {name}, which a plan cannot bind")
    return int(name[len(_PREFIX) :])


def at_most(sizes: Iterable[Any]) -> tuple[int, ...]:
    """``sizes`` with all Variables at their highest: no size of ours shrinks as one grows."""
    return tuple(int(size.vmax) if isinstance(size, UOp) else int(size) for size in sizes)


class Linear(int):
    """An integer that depends on Variables: its value with all of them at their highest, and by
    how much it grows with each: ``terms``, by the Variable's number."""

    terms: dict[int, int]

    def __new__(cls, value: int, terms: dict[int, int]) -> Linear:
        made = super().__new__(cls, value)
        made.terms = terms
        return made


def linear(expression: UOp, numbers: dict[UOp, int]) -> Linear:
    """An expression over Variables, which have these numbers. Raises JobError if not linear."""
    match expression.op:
        case Ops.CONST if isinstance(expression.val, int):
            return Linear(expression.val, {})
        case Ops.PARAM if expression in numbers:
            return Linear(int(expression.vmax), {numbers[expression]: 1})
        case Ops.ADD:
            left, right = (linear(source, numbers) for source in expression.src)
            terms = {
                number: left.terms.get(number, 0) + right.terms.get(number, 0)
                for number in left.terms | right.terms
            }
            return Linear(int(left) + int(right), terms)
        case Ops.MUL:
            left, right = (linear(source, numbers) for source in expression.src)
            if not (left.terms and right.terms):
                grown = {number: each * right for number, each in left.terms.items()}
                grown |= {number: each * left for number, each in right.terms.items()}
                return Linear(int(left) * int(right), grown)
    raise JobError(f"a size that is no linear expression of Variables: {expression.op.name}")


def changes_of(nodes: Sequence[Node]) -> tuple[tuple[Node, ...], tuple[Change, ...]]:
    """``nodes`` with all Variables at their highest, and what is linear in them."""
    plain: list[Node] = []
    changes: list[Change] = []
    for number, node in enumerate(nodes):
        for place, value in enumerate(node.attrs):
            if isinstance(value, Linear):
                changes += [
                    Change(number, place, variable, factor)
                    for variable, factor in sorted(value.terms.items())
                    if factor
                ]
        attrs = tuple(int(each) if isinstance(each, Linear) else each for each in node.attrs)
        plain.append(Node(node.op, attrs, node.refs))
    return tuple(plain), tuple(changes)


def is_symbolic_shape(shape: Sequence[object]) -> bool:
    """Whether a size in it depends on a Variable."""
    return any(isinstance(size, UOp) for size in shape)
