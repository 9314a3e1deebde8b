"""Costly factors of a product, computed once instead of for every row or column of the other.

tinygrad fuses every elementwise value into its readers. A product reads each factor once for every
row or column of the other one, and computes it as often if it is fused. For a bias and a ReLU that
is as good as a load; the gradient of a logistic loss, a GELU or normal random numbers are 50 to 400
operations an element. A product of 64 rows and 32 columns ran 20 times what it counts; in a
recurrent network, where such factors are nested, one kernel took half of all compiling.

So a kernel is split after tinygrad has scheduled it and has chosen its loops: what is costly and
repeated becomes a kernel of its own that stores it, and is loaded instead. The bytes stay those of
tinygrad's own kernel:

- the loops, and so the order of every sum, are those that tinygrad chose for the whole kernel;
- elementwise operations give the same bytes wherever they run;
- tinygrad simplifies and renders across operations (``a * (b * c)`` becomes ``a * b * c``), so a
  cut is made only at an operation that no such rule looks through, and that none takes away where
  a loop is unrolled and a padded place becomes a zero.

CONTIGUOUS in the graph would be simpler. It changes what tinygrad fuses elsewhere, and with it the
last bits: of the examples, the VAE, the LSTM and the GPT differed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import replace
from typing import Final

from tinygrad.codegen import (
    multi_pm,
    pm_flatten_range,
    pm_load_collapse,
    pm_mops,
    pm_simplify_ranges,
    pm_split_ranges,
    sym,
)
from tinygrad.codegen.opt.postrange import apply_opts
from tinygrad.dtype import dtypes
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp, graph_rewrite

from p2pflop.kernels.plan import MAX_ARGUMENTS

MIN_SAVED_FLOP: Final = 16_384
MAX_WEIGHT: Final = 10_000
MAX_LANES: Final = 64

_WEIGHTS: Final = {Ops.EXP2: 36, Ops.LOG2: 38, Ops.SIN: 142, Ops.THREEFRY: 127, Ops.POW: 93}
_OPAQUE: Final = frozenset({Ops.EXP2, Ops.LOG2, Ops.SIN})
# Numbers that no loop or argument has yet: substitute() would take a new one for an old one.
_APART: Final = 1_000_000
# What a kernel keeps to itself: a value that depends on it cannot be computed by another.
_INNER: Final = frozenset({Ops.REDUCE, Ops.AFTER, Ops.STAGE, Ops.BUFFER})
_LANES: Final = (AxisType.UPCAST, AxisType.UNROLL)


class Splitter:
    """Splits the kernels of one schedule. ``device`` and ``renderer`` are those of the class."""

    def __init__(self, device: str, renderer: Renderer) -> None:
        self._device, self._renderer = device, renderer
        self._cuts: dict[bytes, tuple[UOp, list[tuple[UOp, UOp]]]] = {}
        self._buffers: dict[tuple[object, ...], UOp] = {}

    def split(self, linear: UOp) -> UOp:
        """``linear`` with a call for each factor before the call that reads it."""
        return linear.replace(src=tuple(part for call in linear.src for part in self._split(call)))

    def _split(self, call: UOp) -> list[UOp]:
        kernel, *arguments = call.src
        if kernel.op is not Ops.SINK or not _may_repeat(kernel):
            return [call]
        if kernel.key not in self._cuts:
            try:
                self._cuts[kernel.key] = _cut(_optimise(kernel, self._renderer), len(arguments))
            # Whatever these passes trip over is for compiling the whole to tell.
            except Exception:  # noqa: BLE001
                self._cuts[kernel.key] = kernel, []
        rest, factors = self._cuts[kernel.key]
        if not factors:
            return [call]
        parts, stored = [], []
        for number, (value, factor) in enumerate(factors):
            buffer = self._buffer(value, number)
            slots = _slots(value)
            parts.append(call.replace(src=(factor, buffer, *(arguments[slot] for slot in slots))))
            stored.append(buffer)
        return [*parts, call.replace(src=(rest, *arguments, *stored))]

    def _buffer(self, value: UOp, number: int) -> UOp:
        """A buffer for ``value``; the next call reads it and nobody after that."""
        size = _size(_loops(value))
        key = (number, value.dtype, size)
        if key not in self._buffers:
            self._buffers[key] = UOp.new_buffer(self._device, size, value.dtype)
        return self._buffers[key]


def _may_repeat(kernel: UOp) -> bool:
    ops = {node.op for node in kernel.toposort()}
    return Ops.REDUCE in ops and not ops.isdisjoint(_WEIGHTS)


def _optimise(kernel: UOp, renderer: Renderer) -> UOp:
    """``kernel`` with its loops as ``tinygrad.codegen`` chooses them: its own first passes."""
    sink = graph_rewrite(kernel, multi_pm)
    sink = graph_rewrite(sink, pm_mops, bottom_up=True)
    sink = graph_rewrite(sink, pm_load_collapse)
    sink = graph_rewrite(sink, pm_split_ranges + pm_flatten_range, ctx={})
    sink = graph_rewrite(sink, sym + pm_flatten_range)
    sink = graph_rewrite(sink, pm_flatten_range + pm_simplify_ranges, ctx={})
    return apply_opts(sink, renderer)


def _cut(kernel: UOp, arguments: int) -> tuple[UOp, list[tuple[UOp, UOp]]]:
    """``kernel`` with its factors loaded, and for each factor its value and the kernel for it."""
    values = _Search(kernel).run()[: max(0, MAX_ARGUMENTS - arguments)]
    loads = {}
    for number, value in enumerate(values):
        loops = _loops(value)
        buffer = UOp.param(arguments + number, value.dtype, (_size(loops),), _device(kernel))
        loads[value] = buffer.index(_place(loops))
    rest = kernel.substitute(loads) if loads else kernel
    return rest, [(value, _store(value, _device(kernel))) for value in values]


class _Search:
    """Looks for factors from the stored value down."""

    def __init__(self, kernel: UOp) -> None:
        self._kernel = kernel
        self._weights: dict[UOp, int] = {}
        self._bound: set[UOp] = set()  # what depends on one of _INNER
        self._loading: set[UOp] = set()  # what depends on memory
        self._users: dict[UOp, list[UOp]] = {}
        for node in kernel.toposort():
            weight = _WEIGHTS.get(node.op, 0) + sum(self._weights[each] for each in node.src)
            self._weights[node] = min(weight, MAX_WEIGHT)
            if node.op in _INNER or any(each in self._bound for each in node.src):
                self._bound.add(node)
            if node.op is Ops.INDEX or any(each in self._loading for each in node.src):
                self._loading.add(node)
            for each in node.src:
                self._users.setdefault(each, []).append(node)

    def run(self) -> list[UOp]:
        """The factors, in the order in which they are found."""
        found: list[UOp] = []
        seen: set[UOp] = set()
        waiting = [(self._kernel, frozenset[UOp]())]
        while waiting:
            node, around = waiting.pop()
            if node in seen or not self._weights[node]:
                continue
            seen.add(node)
            if node.op in (Ops.STORE, Ops.REDUCE):
                around = frozenset(node.src[1 if node.op is Ops.STORE else 0].ranges)
            if node not in self._bound and self._is_worth(node, around) and self._is_safe(node):
                found.append(node)
            else:
                waiting += [(each, around) for each in reversed(node.src)]
        return found

    def _is_worth(self, node: UOp, around: frozenset[UOp]) -> bool:
        if node.dtype in dtypes.weaks or node.op in (Ops.END, Ops.SINK, Ops.STORE):
            return False
        own = [_depth(loop) for loop in node.ranges if loop.arg[1] not in _LANES]
        repeats = 1
        for loop in around:
            outside = loop not in node.ranges and loop.arg[1] not in _LANES
            if outside and own and _depth(loop) < max(own):
                repeats *= int(loop.src[0].val)
        return self._weights[node] * _size(_loops(node)) * (repeats - 1) >= MIN_SAVED_FLOP

    def _is_safe(self, node: UOp) -> bool:
        """Whether nothing that is done to ``node`` and a reader of it together changes bytes."""
        inside = node.backward_slice_with_self
        if any(self._folds(each) or self._is_shared(each, node, inside) for each in inside):
            return False
        if node.op in _OPAQUE:
            return True
        return node.op in (Ops.ADD, Ops.WHERE) and all(
            user.op is Ops.MUL and self._is_foreign(user, node) for user in self._users[node]
        )

    def _is_shared(self, node: UOp, factor: UOp, inside: Collection[UOp]) -> bool:
        """Whether a sum or product inside the factor is used outside of it as well, and once in a
        sum or product of its own kind on one of the two sides.

        What is used twice is a variable; what is used once is rendered where it is used, in a chain
        of its own kind without parentheses. A cut between its users would change the order.
        """
        if node is factor or node.op not in (Ops.ADD, Ops.MUL) or node.dtype not in dtypes.floats:
            return False
        within = [user for user in self._users[node] if user in inside]
        beyond = [user for user in self._users[node] if user not in inside]
        return bool(beyond) and any(
            len(users) == 1 and users[0].op is node.op for users in (within, beyond)
        )

    def _folds(self, node: UOp) -> bool:
        """Whether ``node`` becomes a constant in some lane: unrolled, a padded place is a zero that
        vanishes from a sum, and ``a * (0 + b * c)`` is ``a * b * c`` again."""
        lanes = [loop for loop in node.ranges if loop.arg[1] in _LANES]
        if not lanes or node.dtype == dtypes.weakint or node in self._loading:
            return False
        if node.dtype != dtypes.bool or _size(lanes) > MAX_LANES:
            return True
        sizes = [range(int(loop.src[0].val)) for loop in lanes]
        return any(
            node.substitute(dict(zip(lanes, map(UOp.const, places), strict=True))).simplify().op
            is Ops.CONST
            for places in itertools.product(*sizes)
        )

    @staticmethod
    def _is_foreign(product: UOp, factor: UOp) -> bool:
        """Whether the other factor is no constant and no part of this one: ``x / (1 + x)`` is
        simplified, and so is what constants multiply."""
        inside = factor.backward_slice_with_self
        return all(
            each is factor or (each.op is not Ops.CONST and each not in inside)
            for each in product.src
        )


def _depth(loop: UOp) -> tuple[bool, int]:
    return loop.arg[1] is AxisType.REDUCE, loop.arg[0]


def _loops(value: UOp) -> list[UOp]:
    """The ranges of ``value``, in the order in which its elements are stored: lanes last."""
    return sorted(value.ranges, key=lambda loop: (loop.arg[1] in _LANES, loop.arg[0]))


def _size(loops: list[UOp]) -> int:
    return math.prod(int(loop.src[0].val) for loop in loops)


def _place(loops: list[UOp]) -> UOp:
    place = UOp.const(0)
    for loop in loops:
        place = place * int(loop.src[0].val) + loop
    return place


def _slots(value: UOp) -> list[int]:
    """The numbers of the arguments that ``value`` reads, in order."""
    return sorted({node.arg.slot for node in value.toposort() if node.op is Ops.PARAM})


def _device(kernel: UOp) -> str:
    device: str = next(node.arg.device for node in kernel.toposort() if node.op is Ops.PARAM)
    return device


def _store(value: UOp, device: str) -> UOp:
    """A kernel that stores ``value`` in its first argument."""
    loops, slots = _loops(value), _slots(value)
    own = [UOp.range(int(loop.src[0].val), _APART + number) for number, loop in enumerate(loops)]
    changes = dict(zip(loops, own, strict=True))
    arguments = [node for node in value.toposort() if node.op is Ops.PARAM]
    apart = {node: _renumbered(node, _APART + slots.index(node.arg.slot)) for node in arguments}
    body = value.substitute(changes | apart)
    body = body.substitute(
        {node: _renumbered(node, 1 + node.arg.slot - _APART) for node in apart.values()}
    )
    target = UOp.param(0, value.dtype, (_size(loops),), device).index(_place(own))
    return target.store(body).end(*own).sink(arg=KernelInfo())


def _renumbered(argument: UOp, slot: int) -> UOp:
    return argument.replace(arg=replace(argument.arg, slot=slot))
