"""What a graph may not contain, and every limit at its edge."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from p2pflop.job.graph import (
    BINARY,
    TERNARY,
    UNARY,
    Attr,
    Dtype,
    Graph,
    GraphParam,
    Node,
    Op,
    Output,
    decode_graph,
    encode_graph,
)
from p2pflop.job.limits import Limits
from p2pflop.job.rules import MAX_POWER
from p2pflop.job.validate import Checked, Refusal, validate

WEAKINT, WEAKFLOAT = int(Dtype.WEAKINT), int(Dtype.WEAKFLOAT)


class Draft:
    """Writes a graph node by node; each method gives the new node's index."""

    def __init__(self) -> None:
        self.params: list[GraphParam] = []
        self.nodes: list[Node] = []

    def add(self, op: Op, *refs: int, attrs: tuple[Attr, ...] = ()) -> int:
        self.nodes.append(Node(op, attrs, refs))
        return len(self.nodes) - 1

    def param(self, dtype: Dtype = Dtype.FLOAT32, shape: tuple[int, ...] = (4,)) -> int:
        self.params.append(GraphParam(len(self.params), dtype, shape))
        return self.add(Op.PARAM, attrs=(len(self.params) - 1,))

    def const(self, dtype: Dtype, value: Attr) -> int:
        return self.add(Op.CONST, attrs=(int(dtype), value))

    def cast(self, dtype: Dtype, ref: int) -> int:
        return self.add(Op.CAST, ref, attrs=(int(dtype),))

    def graph(self, *outputs: int) -> Graph:
        marks = tuple(Output(node) for node in outputs or (len(self.nodes) - 1,))
        return Graph(tuple(self.params), tuple(self.nodes), marks)


def accept(graph: Graph, limits: Limits | None = None) -> Checked:
    assert decode_graph(encode_graph(graph)) == graph
    checked = validate(graph, limits or Limits())
    assert isinstance(checked, Checked), checked
    return checked


def refuse(graph: Graph, match: str, limits: Limits | None = None) -> None:
    refusal = validate(graph, limits or Limits())
    assert isinstance(refusal, Refusal)
    assert match in refusal.reason


def last(draft: Draft) -> tuple[Dtype, tuple[int, ...]]:
    checked = accept(draft.graph())
    return checked.dtypes[-1], checked.shapes[-1]


@pytest.mark.parametrize("op", sorted(UNARY | BINARY | TERNARY | {Op.CONTIGUOUS, Op.STACK}))
def test_every_operation_has_a_valid_form(op: Op) -> None:
    draft = Draft()
    integers = {Op.CDIV, Op.CMOD, Op.FLOORDIV, Op.FLOORMOD, Op.SHL, Op.SHR, Op.AND, Op.OR, Op.XOR}
    dtype = Dtype.UINT64 if op is Op.THREEFRY else Dtype.INT32 if op in integers else Dtype.FLOAT32
    one = draft.param(dtype)
    shifts = op in (Op.SHL, Op.SHR)
    other = draft.const(Dtype.WEAKINT, 3) if shifts else draft.param(dtype)
    if op is Op.WHERE:
        draft.add(op, draft.param(Dtype.BOOL), one, other)
    elif op is Op.MULACC:
        draft.add(op, one, other, one)
    elif op in BINARY or op is Op.STACK:
        draft.add(op, one, other)
    else:
        draft.add(op, one)
    assert last(draft)[1] == ((2, 4) if op is Op.STACK else (4,))


@pytest.mark.parametrize(
    ("op", "attrs", "shape"),
    [
        (Op.RESHAPE, (4, 6), (4, 6)),
        (Op.RESHAPE, (5, 5), None),
        (Op.RESHAPE, (-2, -12), None),
        (Op.EXPAND, (5, 1), (5, 1, 2, 3, 4)),
        (Op.EXPAND, (-1,), None),
        (Op.EXPAND, (), None),
        (Op.PERMUTE, (2, 0, 1), (4, 2, 3)),
        (Op.PERMUTE, (2, 0, 0), None),
        (Op.PERMUTE, (0, 1), None),
        (Op.PAD, (0, 2, 1, 5, 0, 4), (2, 5, 4)),
        (Op.PAD, (0, 2, 3, 5, 0, 4), None),
        (Op.PAD, (-1, 2, 0, 3, 0, 4), None),
        (Op.PAD, (0, 2), None),
        (Op.SHRINK, (1, 1, 0, 3, 2, 2), (1, 3, 2)),
        (Op.SHRINK, (1, 2, 0, 3, 0, 4), None),
        (Op.SHRINK, (0, 2, 0, 3, -1, 2), None),
        (Op.SHRINK, (0, 2, 0, 3, 0, -1), None),
        (Op.FLIP, (1, 0, 1), (2, 3, 4)),
        (Op.FLIP, (1, 0, 2), None),
        (Op.FLIP, (1, 0), None),
        (Op.REDUCE, (0, 2), (4,)),
        (Op.REDUCE, (2, 3), ()),
        (Op.REDUCE, (0, 0), None),
        (Op.REDUCE, (0, 4), None),
        (Op.REDUCE, (3, 1), None),
        (Op.CAST, (int(Dtype.INT8),), (2, 3, 4)),
        (Op.CAST, (15,), None),
        (Op.BITCAST, (int(Dtype.UINT8),), (2, 3, 16)),
        (Op.BITCAST, (int(Dtype.FLOAT64),), (2, 3, 2)),
        (Op.BITCAST, (int(Dtype.BOOL),), None),
        (Op.BITCAST, (WEAKINT,), None),
    ],
)
def test_attributes_must_fit(op: Op, attrs: tuple[int, ...], shape: tuple[int, ...] | None) -> None:
    draft = Draft()
    draft.add(op, draft.param(shape=(2, 3, 4)), attrs=attrs)
    if shape is None:
        refuse(draft.graph(), op.name)
    else:
        assert last(draft)[1] == shape


def test_bitcast_of_a_scalar_keeps_its_width() -> None:
    for dtype, refused in ((Dtype.INT32, False), (Dtype.INT16, True), (Dtype.INT64, True)):
        draft = Draft()
        draft.add(Op.BITCAST, draft.param(shape=()), attrs=(int(dtype),))
        found = validate(draft.graph())
        assert isinstance(found, Refusal) is refused


def test_bitcast_must_divide_the_last_axis() -> None:
    draft = Draft()
    draft.add(Op.BITCAST, draft.param(shape=(3,)), attrs=(int(Dtype.FLOAT64),))
    refuse(draft.graph(), "does not divide")


@pytest.mark.parametrize(
    ("op", "dtypes"),
    [
        (Op.ADD, (Dtype.INT32, Dtype.FLOAT32)),
        (Op.ADD, (Dtype.BOOL, Dtype.INT8)),
        (Op.CMPLT, (Dtype.INT32, Dtype.INT64)),
        (Op.WHERE, (Dtype.INT32, Dtype.FLOAT32, Dtype.FLOAT32)),
        (Op.WHERE, (Dtype.BOOL, Dtype.FLOAT32, Dtype.INT32)),
        (Op.XOR, (Dtype.FLOAT32, Dtype.FLOAT32)),
        (Op.SHL, (Dtype.FLOAT32, Dtype.FLOAT32)),
        (Op.SHR, (Dtype.BOOL, Dtype.BOOL)),
        (Op.CDIV, (Dtype.FLOAT32, Dtype.FLOAT32)),
        (Op.FLOORMOD, (Dtype.BOOL, Dtype.BOOL)),
        (Op.FDIV, (Dtype.INT32, Dtype.INT32)),
        (Op.THREEFRY, (Dtype.UINT32, Dtype.UINT32)),
        (Op.THREEFRY, (Dtype.INT64, Dtype.INT64)),
        (Op.NEG, (Dtype.BOOL,)),
        (Op.STACK, (Dtype.INT32, Dtype.FLOAT32)),
        (Op.GATHER, (Dtype.FLOAT32, Dtype.FLOAT32)),
        (Op.GATHER, (Dtype.FLOAT32, Dtype.BOOL)),
    ],
)
def test_operand_dtypes_must_fit(op: Op, dtypes: tuple[Dtype, ...]) -> None:
    draft = Draft()
    draft.add(op, *[draft.param(dtype) for dtype in dtypes])
    refuse(draft.graph(), op.name)


def test_shapes_must_broadcast() -> None:
    draft = Draft()
    draft.add(Op.ADD, draft.param(shape=(2, 3)), draft.param(shape=(2,)))
    refuse(draft.graph(), "do not broadcast")
    draft = Draft()
    draft.add(Op.ADD, draft.param(shape=(2, 1, 3)), draft.param(shape=(5, 1)))
    assert last(draft)[1] == (2, 5, 3)


def test_weak_operands_take_the_concrete_dtype() -> None:
    draft = Draft()
    half = draft.param(Dtype.FLOAT16)
    draft.add(Op.MUL, half, draft.const(Dtype.WEAKFLOAT, 2.0))
    assert last(draft) == (Dtype.FLOAT16, (4,))


@pytest.mark.parametrize(
    ("dtype", "value", "accepted"),
    [
        (Dtype.FLOAT32, math.nan, True),
        (Dtype.FLOAT32, -math.inf, True),
        (Dtype.FLOAT32, -0.0, True),
        (Dtype.FLOAT32, 0.1, False),
        (Dtype.FLOAT32, 1e39, False),
        (Dtype.FLOAT32, 1, False),
        (Dtype.FLOAT64, 0.1, True),
        (Dtype.FLOAT16, 65504.0, True),
        (Dtype.FLOAT16, 65536.0, False),
        (Dtype.BFLOAT16, 1.0078125, True),
        (Dtype.BFLOAT16, 1.00390625, False),
        (Dtype.WEAKFLOAT, 0.1, True),
        (Dtype.BOOL, True, True),
        (Dtype.BOOL, 1, False),
        (Dtype.BOOL, None, False),
        (Dtype.INT8, 127, True),
        (Dtype.INT8, 128, False),
        (Dtype.UINT8, -1, False),
        (Dtype.INT32, True, False),
        (Dtype.INT32, 1.0, False),
        (Dtype.UINT64, 2**64 - 1, True),
        (Dtype.WEAKINT, 2**64 - 1, True),
        (Dtype.WEAKINT, -(2**63), True),
    ],
)
def test_constants_are_what_their_dtype_holds(dtype: Dtype, value: Attr, accepted: bool) -> None:
    draft = Draft()
    draft.cast(Dtype.FLOAT64, draft.const(dtype, value))
    assert isinstance(validate(draft.graph()), Checked) is accepted


@pytest.mark.parametrize(
    ("dtype", "length", "accepted"),
    [
        (Dtype.INT32, 1, True),
        (Dtype.INT32, 0, False),
        (Dtype.INT32, -1, False),
        (Dtype.INT8, 128, True),
        (Dtype.INT8, 129, False),
        (Dtype.FLOAT16, 2049, True),
        (Dtype.FLOAT16, 2050, False),
        (Dtype.BOOL, 1, False),
        (Dtype.WEAKINT, 1, False),
    ],
)
def test_a_count_is_exact_in_its_dtype(dtype: Dtype, length: int, accepted: bool) -> None:
    draft = Draft()
    draft.cast(Dtype.INT32, draft.add(Op.IOTA, attrs=(int(dtype), length)))
    assert isinstance(validate(draft.graph()), Checked) is accepted


def test_gather_takes_rows() -> None:
    draft = Draft()
    table, index = draft.param(shape=(10, 3)), draft.param(Dtype.INT32, (2, 5))
    draft.add(Op.GATHER, table, index)
    assert last(draft) == (Dtype.FLOAT32, (2, 5, 3))
    draft.add(Op.GATHER, draft.param(shape=()), index)
    refuse(draft.graph(), "GATHER from a 0-d tensor")


@pytest.mark.parametrize("op", [Op.REDUCE, Op.CONTIGUOUS])
def test_weak_tensors_have_no_storage(op: Op) -> None:
    draft = Draft()
    one = draft.add(Op.EXPAND, draft.const(Dtype.WEAKINT, 1), attrs=(4,))
    draft.cast(Dtype.INT32, draft.add(op, one, attrs=(0, 1) if op is Op.REDUCE else ()))
    refuse(draft.graph(), "WEAKINT")


def test_weak_params_and_outputs_are_refused() -> None:
    draft = Draft()
    draft.param(Dtype.WEAKINT)
    refuse(draft.graph(), "WEAKINT cannot be stored")
    draft = Draft()
    draft.const(Dtype.WEAKFLOAT, 1.0)
    refuse(draft.graph(), "WEAKFLOAT cannot be stored")


@pytest.mark.parametrize(("amount", "accepted"), [(0, True), (31, True), (32, False), (-1, False)])
@pytest.mark.parametrize("op", [Op.SHL, Op.SHR])
def test_shift_amounts_are_below_the_width(op: Op, amount: int, accepted: bool) -> None:
    draft = Draft()
    draft.add(op, draft.param(Dtype.INT32), draft.const(Dtype.WEAKINT, amount))
    assert isinstance(validate(draft.graph()), Checked) is accepted


def test_a_masked_shift_amount_is_provable() -> None:
    draft = Draft()
    value, amount = draft.param(Dtype.UINT32), draft.param(Dtype.UINT32)
    masked = draft.add(Op.AND, amount, draft.const(Dtype.WEAKINT, 31))
    draft.add(Op.SHL, value, masked)
    assert last(draft) == (Dtype.UINT32, (4,))
    draft.add(Op.SHL, value, amount)
    refuse(draft.graph(), "outside 0 to 31")


@pytest.mark.parametrize("op", [Op.POW, Op.SHL])
def test_weak_integers_have_no_powers_and_shifts(op: Op) -> None:
    draft = Draft()
    one = draft.const(Dtype.WEAKINT, 3)
    draft.cast(Dtype.INT64, draft.add(op, one, one))
    refuse(draft.graph(), "on weak integers")


@pytest.mark.parametrize(("power", "accepted"), [(MAX_POWER, True), (MAX_POWER + 1, False)])
def test_integer_powers_are_small(power: int, accepted: bool) -> None:
    draft = Draft()
    draft.add(Op.POW, draft.param(Dtype.INT32), draft.const(Dtype.WEAKINT, power))
    assert isinstance(validate(draft.graph()), Checked) is accepted


@pytest.mark.parametrize("op", [Op.CDIV, Op.CMOD, Op.FLOORDIV, Op.FLOORMOD])
def test_divisors(op: Op) -> None:
    draft = Draft()
    one = draft.param(Dtype.INT32)
    draft.add(op, one, draft.param(Dtype.INT32))
    accept(draft.graph())  # depends on data: the worker's to survive
    draft.add(op, one, draft.const(Dtype.WEAKINT, 0))
    refuse(draft.graph(), "by zero")
    draft = Draft()
    weak = draft.cast(Dtype.WEAKINT, draft.param(Dtype.INT32))
    draft.cast(Dtype.INT32, draft.add(op, weak, draft.const(Dtype.WEAKINT, 7)))
    accept(draft.graph())
    draft.cast(Dtype.INT32, draft.add(op, weak, weak))
    refuse(draft.graph(), "by what may be zero")


def test_weak_integers_stay_in_64_bits() -> None:
    draft = Draft()
    top = draft.const(Dtype.WEAKINT, 2**64 - 2)
    one = draft.const(Dtype.WEAKINT, 1)
    draft.cast(Dtype.UINT64, draft.add(Op.ADD, top, one))
    accept(draft.graph())
    draft.cast(Dtype.UINT64, draft.add(Op.ADD, draft.add(Op.ADD, top, one), one))
    refuse(draft.graph(), "outside 64 bits")
    draft = Draft()
    draft.cast(Dtype.INT32, draft.cast(Dtype.WEAKINT, draft.param(Dtype.FLOAT32)))
    refuse(draft.graph(), "outside 64 bits")


@pytest.mark.parametrize("dtype", [Dtype.INT32, Dtype.BOOL, Dtype.UINT64])
def test_towers_of_products_are_refused(dtype: Dtype) -> None:
    """``x = x * x`` forty times over keeps tinygrad busy for ever."""
    draft = Draft()
    top = draft.param(dtype)
    if dtype is Dtype.BOOL:
        top = draft.add(Op.ADD, top, top)
    for _ in range(40):
        top = draft.add(Op.MUL, top, top)
    refuse(draft.graph(), "bounds of more than")


def test_interval_bits_at_their_edge() -> None:
    draft = Draft()
    top = draft.param(Dtype.INT32)
    draft.add(Op.MUL, top, top)
    accept(draft.graph(), Limits(interval_bits=64))
    refuse(draft.graph(), "bounds of more than 63", Limits(interval_bits=63))


def _wide(size: int) -> Graph:
    draft = Draft()
    draft.add(Op.STACK, *[draft.param()] * size)
    return draft.graph()


def _chain(length: int) -> Graph:
    draft = Draft()
    top = draft.param()
    for _ in range(length):
        top = draft.add(Op.NEG, top)
    return draft.graph()


def _broken_chain(length: int) -> Graph:
    draft = Draft()
    top = draft.param()
    for _ in range(length - 1):
        top = draft.add(Op.CONTIGUOUS, top)
    return draft.graph()


def _params(count: int) -> Graph:
    draft = Draft()
    for _ in range(count):
        draft.param()
    return draft.graph()


def _outputs(count: int) -> Graph:
    draft = Draft()
    draft.param()
    return draft.graph(*[0] * count)


def _numel(numel: int) -> Graph:
    draft = Draft()
    draft.add(Op.REDUCE, draft.add(Op.EXPAND, draft.param(), attrs=(numel // 4,)), attrs=(0, 2))
    return draft.graph()


def _flop(flop: int) -> Graph:
    draft = Draft()
    draft.add(Op.NEG, draft.param(shape=(flop,)))
    return draft.graph()


@pytest.mark.parametrize(
    ("build", "field", "value", "match"),
    [
        (_wide, "stack", 256, "operands are too many"),
        (_chain, "chain", 1500, "a chain of more than"),
        (_broken_chain, "depth", 50, "deeper than"),
        (_broken_chain, "nodes", 50, "nodes are too many"),
        (_params, "params", 7, "params are too many"),
        (_outputs, "outputs", 7, "outputs"),
        (_numel, "numel", 4096, "too many elements"),
        (_flop, "flop", 1000, "FLOP"),
        (lambda value: _flop(value // 4), "stored_bytes", 4096, "bytes are too many"),
        (_flop, "dim", 1000, "out of range"),
    ],
)
def test_limits_hold_at_their_edge(
    build: Callable[[int], Graph], field: str, value: int, match: str
) -> None:
    limits = Limits(**{field: value})
    accept(build(value), limits)
    refuse(build(value + 4), match, limits)


def test_the_rank_limit_at_its_edge() -> None:
    draft = Draft()
    top = draft.param(shape=(1,) * 4)
    draft.add(Op.REDUCE, draft.add(Op.EXPAND, top, attrs=(1,) * 4), attrs=(0, 8))
    accept(draft.graph(), Limits(rank=8))
    refuse(draft.graph(), "rank 8 is over", Limits(rank=7))
    refuse(draft.graph(), "rank 4 is over", Limits(rank=3))
    draft.add(Op.RESHAPE, top, attrs=(1,) * 40)
    refuse(draft.graph(), "40 attributes are too many")


def test_a_dimension_limit_inside_a_graph() -> None:
    draft = Draft()
    wide = draft.add(Op.EXPAND, draft.param(shape=(1,)), attrs=(2**40,))
    draft.add(Op.REDUCE, wide, attrs=(0, 1))
    accept(draft.graph())
    draft = Draft()
    wide = draft.add(Op.EXPAND, draft.param(shape=(1,)), attrs=(2**40 + 1,))
    draft.add(Op.REDUCE, wide, attrs=(0, 1))
    refuse(draft.graph(), "limit of a dimension")


def test_nothing_stored_is_empty() -> None:
    draft = Draft()
    draft.add(Op.SHRINK, draft.param(), attrs=(0, 0))
    refuse(draft.graph(), "out of range")
    draft = Draft()
    draft.param(shape=(0,))
    refuse(draft.graph(), "out of range")


def test_outputs_and_written_slots() -> None:
    params = (GraphParam(0, Dtype.FLOAT32, (4,)), GraphParam(3, Dtype.FLOAT32, (2,)))
    nodes = (Node(Op.PARAM, (0,)), Node(Op.NEG, (), (0,)))
    accept(Graph(params, nodes, (Output(1), Output(1, 0))))
    for outputs, match in (
        ((), "0 outputs"),
        ((Output(1, 0), Output(1)), "fresh outputs stand"),
        ((Output(1, 0), Output(0, 0)), "do not rise"),
        ((Output(1, 1),), "no param in slot 1"),
        ((Output(1, 3),), "for a slot of"),
        ((Output(2),), "no node 2"),
    ):
        refuse(Graph(params, nodes, outputs), match)
    refuse(Graph(params, (Node(Op.PARAM, (1,)),), (Output(0),)), "no param in slot 1")
    refuse(Graph(params[::-1], nodes, (Output(1),)), "slots do not rise")
    refuse(Graph(params, (nodes[0], Node(Op.NEG, (), (1,))), (Output(1),)), "does not point back")


def test_what_a_refusal_says_names_the_node() -> None:
    draft = Draft()
    draft.add(Op.XOR, draft.param(), draft.param())
    refuse(draft.graph(), "node 2 (XOR): on FLOAT32: no floats")
