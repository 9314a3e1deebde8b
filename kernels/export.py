"""tinygrad nodes to our nodes: what a traced step holds becomes a graph that can travel.

First the graph is made pure: ``AFTER(x, STORE(x, v))``, an assignment, is its value ``v``; an
assignment to a part of ``x`` is a choice between ``v`` and ``x``; hints to autograd and moves
between devices vanish. Then it is written down in the order of a depth-first walk from the
outputs, which depends on nothing but the program, so that one program has one work id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from tinygrad.dtype import DType, dtypes
from tinygrad.uop.ops import Ops, PatternMatcher, UOp, UPat, graph_rewrite

from p2pflop.errors import JobError
from p2pflop.job.graph import Attr, Node, Op
from p2pflop.kernels.dialect import (
    OUR_DTYPES,
    OUR_OPS,
    REDUCTIONS,
    flat_gather,
    match_gather,
    match_iota,
)

Leaf = Callable[[UOp, tuple[int, ...]], tuple[int, tuple[int, ...]]]
_SHAPED: Final = (Ops.RESHAPE, Ops.EXPAND, Ops.PAD, Ops.SHRINK)
_LEAVES: Final = (Ops.BUFFER, Ops.PARAM)
_WORD: Final = 2**32


def purify(uops: Sequence[UOp], replacements: dict[UOp, UOp]) -> list[UOp]:
    """``uops`` without effects, ``replacements`` made first. Raises JobError."""
    sink = UOp.sink(*uops)
    if replacements:
        sink = sink.substitute(replacements)
    sink = graph_rewrite(sink, _ASSIGNMENTS, bottom_up=True, name="assignments")
    sink = graph_rewrite(sink, _HINTS, name="hints")
    return list(graph_rewrite(sink, GATHERS, name="gathers").src)


def _purify_after(after: UOp) -> UOp | None:
    if after.is_bound_var:
        raise JobError(
            "a bound Variable cannot travel",
            hint="Give the function a parameter named step, or pass the number in args.",
        )
    if len(after.src) != 2:
        return None
    target, effect = after.src
    if effect.op is Ops.AFTER:
        effect = effect.src[1]
    if effect.op is not Ops.STORE or len(effect.src) != 2:
        return None
    value = effect.src[1] if effect.src[1].dtype == after.dtype else effect.src[1].cast(after.dtype)
    if effect.src[0] is target:
        return value if value.shape == after.shape else value._broadcast_to(after.shape)
    return _assign_part(target, effect.src[0], value)


def _assign_part(target: UOp, part: UOp, value: UOp) -> UOp | None:
    """``target`` with ``value`` in place of ``part``, a view of it."""
    views = []
    while part is not target:
        if part.op not in (Ops.SHRINK, Ops.RESHAPE, Ops.PERMUTE, Ops.FLIP):
            return None
        views.append(part)
        part = part.src[0]
    value = value if not views or value.shape == views[0].shape else value.expand(views[0].shape)
    mask = UOp.const(True).reshape((1,) * len(value.shape)).expand(value.shape)
    for view in views:
        value, mask = _undo_view(view, value), _undo_view(view, mask)
    return mask.where(value, target)


def _undo_view(view: UOp, value: UOp) -> UOp:
    """``value`` put where ``view`` took it from; zeros elsewhere."""
    match view.op:
        case Ops.SHRINK:
            return value.pad(
                tuple(
                    (offset, full - offset - size)
                    for (offset, size), full in zip(view.marg, view.src[0].shape, strict=True)
                )
            )
        case Ops.PERMUTE:
            return value.permute(tuple(view.arg.index(axis) for axis in range(len(view.arg))))
        case Ops.FLIP:
            return value.flip(tuple(axis for axis, flipped in enumerate(view.arg) if flipped))
        case _:
            return value.reshape(view.src[0].shape)


# Top down: an assignment to a part is told by the effect inside, which is an AFTER as well.
_ASSIGNMENTS: Final = PatternMatcher([(UPat(Ops.AFTER, name="after"), _purify_after)])
_HINTS: Final = PatternMatcher(
    [
        (UPat((Ops.DETACH, Ops.CONTIGUOUS_BACKWARD, Ops.COPY), name="x"), lambda x: x.src[0]),
        (
            UPat(
                Ops.CONTIGUOUS,
                src=(UPat((Ops.CONTIGUOUS, Ops.BUFFER, Ops.PARAM), name="x"),),
            ),
            lambda x: x,
        ),
    ]
)
# A row gather is what it becomes, and stays.
GATHERS: Final = PatternMatcher(
    [
        (
            UPat(Ops.REDUCE, name="node"),
            lambda node: None if match_gather(node) is not None else flat_gather(node),
        )
    ]
)


class Exporter:
    """Writes one graph. ``leaf`` gives the slot and the shape of a buffer, told the shape in which
    it is first used; ``literal`` the numbers of a buffer that is to be written into the graph."""

    def __init__(self, leaf: Leaf, literal: Callable[[UOp], Sequence[Attr] | None]) -> None:
        self.nodes: list[Node] = []
        self._leaf = leaf
        self._literal = literal
        self._index: dict[UOp, int] = {}
        self._words: dict[UOp, tuple[int, ...] | None] = {}

    def add(self, roots: Iterable[UOp]) -> list[int]:
        """The node numbers of ``roots``, written with all they need. Raises JobError."""
        return [self._add(root) for root in roots]

    def _add(self, root: UOp) -> int:
        stack = [(root, False)]
        while stack:
            uop, ready = stack.pop()
            if uop in self._index:
                continue
            sources = self._sources(uop)
            if ready or not sources:
                self._index[uop] = self._write(uop, sources)
            else:
                stack.append((uop, True))
                stack.extend((source, False) for source in reversed(sources))
        return self._index[root]

    def _sources(self, uop: UOp) -> tuple[UOp, ...]:
        """The nodes that ours refers to; none for leaves and for what is recognised whole."""
        if uop.op is Ops.CONST or self._is_leaf(uop):
            return ()
        if match_iota(uop) is not None or self._fold(uop) is not None:
            return ()
        gather = match_gather(uop)
        if gather is not None:
            return gather
        sources: tuple[UOp, ...] = uop.src[:1] if uop.op in _SHAPED else uop.src
        return sources

    @staticmethod
    def _is_leaf(uop: UOp) -> bool:
        """Whether it is a buffer, or one in another shape."""
        return uop.op in _LEAVES or (uop.op is Ops.RESHAPE and uop.src[0].op in _LEAVES)

    def _write(self, uop: UOp, sources: tuple[UOp, ...]) -> int:
        refs = tuple(self._index[source] for source in sources)
        if uop.op is Ops.CONST:
            return self._emit(Op.CONST, _constant(uop))
        if self._is_leaf(uop):
            return self._write_buffer(uop)
        arange = match_iota(uop)
        if arange is not None:
            return self._write_iota(*arange)
        words = self._fold(uop)
        if words is not None:
            return self._write_literal(dtypes.uint32, words, uop.shape)
        if match_gather(uop) is not None:
            return self._emit(Op.GATHER, (), refs)
        if uop.op not in OUR_OPS:
            raise JobError(
                f"{uop.op.name} cannot travel in a graph",
                hint="Custom kernels, disk tensors, symbolic sizes and several devices cannot.",
            )
        return self._emit(OUR_OPS[uop.op], self._attrs(uop), refs)

    def _emit(self, op: Op, attrs: tuple[Attr, ...] = (), refs: tuple[int, ...] = ()) -> int:
        self.nodes.append(Node(op, attrs, refs))
        return len(self.nodes) - 1

    def _write_buffer(self, uop: UOp) -> int:
        buffer = uop if uop.op in _LEAVES else uop.src[0]
        if buffer.is_variable:
            raise JobError(
                "a Variable cannot travel",
                hint="Give the function a parameter named step, or pass the number in args.",
            )
        numbers = self._literal(buffer)
        if numbers is not None:
            return self._write_literal(buffer.dtype, numbers, uop.shape)
        slot, shape = self._leaf(buffer, uop.shape)
        index = self._write_param(slot)
        return index if shape == uop.shape else self._emit(Op.RESHAPE, uop.shape, (index,))

    def _write_param(self, slot: int) -> int:
        return self._emit(Op.PARAM, (slot,))

    def _write_iota(self, dtype: DType, length: int, start: int) -> int:
        index = self._emit(Op.IOTA, (int(OUR_DTYPES[dtype]), length))
        if start == 0:
            return index
        one = self._emit(Op.CONST, (int(OUR_DTYPES[dtypes.weakint]), start))
        return self._emit(Op.ADD, (), (index, one))

    def _write_literal(self, dtype: DType, numbers: Sequence[Attr], shape: tuple[int, ...]) -> int:
        code = int(OUR_DTYPES[dtype])
        refs = tuple(self._emit(Op.CONST, (code, number)) for number in numbers)
        index = self._emit(Op.STACK, (), refs)
        return index if shape == (len(refs),) else self._emit(Op.RESHAPE, shape, (index,))

    def _attrs(self, uop: UOp) -> tuple[Attr, ...]:
        match uop.op:
            case Ops.CAST | Ops.BITCAST:
                if uop.arg not in OUR_DTYPES:
                    raise JobError(f"{uop.arg} cannot travel", hint="Cast to float16 or bfloat16.")
                return (int(OUR_DTYPES[uop.arg]),)
            case Ops.RESHAPE | Ops.EXPAND:
                return self._dims(uop.marg)
            case Ops.PAD | Ops.SHRINK:
                return self._dims([dim for pair in uop.marg for dim in pair])
            case Ops.PERMUTE:
                return tuple(uop.arg)
            case Ops.FLIP:
                return tuple(int(axis) for axis in uop.arg)
            case Ops.REDUCE:
                return REDUCTIONS.index(uop.arg[0]), uop.arg[1]
            case _:
                if uop.arg is not None:
                    raise JobError(
                        f"{uop.op.name} with {str(uop.arg)[:80]} cannot travel in a graph"
                    )
                return ()

    def _dims(self, dims: Iterable[object]) -> tuple[int, ...]:
        """Sizes and offsets as they stand in a node. Raises JobError."""
        plain = []
        for dim in dims:
            if not isinstance(dim, int):
                raise JobError(
                    "a tensor's size depends on a Variable",
                    hint="Use a fixed size, and a parameter named step to pick a row.",
                )
            plain.append(dim)
        return tuple(plain)

    def _fold(self, uop: UOp) -> tuple[int, ...] | None:
        """The two words of ``uop`` if it is a pair of uint32 that depends on constants only.

        That is what the counter of random draws is before a step: each draw adds to it in 64-bit
        arithmetic of some fifteen nodes, all known by now.
        """
        is_pair = uop.dtype == dtypes.uint32 and uop.shape == (2,)
        if not is_pair or uop.op not in (Ops.RESHAPE, Ops.STACK):
            return None
        words: tuple[int, ...] | None = uop.topovisit(self._evaluate, self._words)
        return words

    def _evaluate(self, uop: UOp) -> tuple[int, ...] | None:
        """The few integers that ``uop`` is, or None if they are not known or not few."""
        if uop.op is Ops.CONST:
            return (int(uop.val),) if isinstance(uop.val, (int, bool)) else None
        if uop.op is Ops.BUFFER:
            numbers = self._literal(uop)
            return None if numbers is None else tuple(int(number or 0) for number in numbers)
        sources = [self._words.get(source) for source in uop.src]
        if uop.op in _SHAPED:
            sources = sources[:1]
        if any(source is None for source in sources):
            return None
        return _compute(uop, [source for source in sources if source is not None])


def _compute(uop: UOp, sources: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    if uop.dtype not in (dtypes.uint32, dtypes.bool, dtypes.weakint):
        return None
    match uop.op:
        case Ops.RESHAPE | Ops.CAST:
            values = sources[0]
        case Ops.STACK:
            values = tuple(value for source in sources for value in source)
        case Ops.SHRINK if len(uop.shape) == 1:
            ((offset, size),) = uop.marg
            values = sources[0][offset : offset + size]
        case Ops.ADD | Ops.MUL | Ops.CMPLT:
            values = _pairwise(uop.op, *sources)
        case _:
            return None
    return tuple(value % _WORD for value in values) if uop.dtype == dtypes.uint32 else values


def _pairwise(op: Ops, left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    size = max(len(left), len(right))
    pairs = zip(left * (size // len(left)), right * (size // len(right)), strict=True)
    if op is Ops.ADD:
        return tuple(a + b for a, b in pairs)
    return tuple(a * b if op is Ops.MUL else int(a < b) for a, b in pairs)


def _constant(uop: UOp) -> tuple[Attr, ...]:
    value = uop.val
    if isinstance(value, bool):
        plain: Attr = value
    elif isinstance(value, int):
        plain = int(value)
    else:
        plain = float(value) if isinstance(value, float) else None
    return int(OUR_DTYPES[uop.dtype]), plain
