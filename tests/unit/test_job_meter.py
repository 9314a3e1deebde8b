"""The meter: vectors that fix its numbers, and the properties that a bill must have."""

from __future__ import annotations

from itertools import pairwise

import pytest

from p2pflop.errors import JobError
from p2pflop.job.graph import (
    BINARY,
    TERNARY,
    UNARY,
    Dtype,
    Graph,
    GraphParam,
    Node,
    Op,
    Output,
)
from p2pflop.job.limits import Limits
from p2pflop.job.meter import (
    MAX_LINE_VALUE,
    METER_ID,
    WEIGHTS,
    Cost,
    JobCostLine,
    init_graphs,
    meter,
    meter_job,
)
from p2pflop.job.spec import (
    MODE_LAST,
    ROLE_SEED,
    ROLE_STATE,
    InitSource,
    Job,
    NoSource,
    Phase,
    Work,
    WorkParam,
    work_id,
)
from p2pflop.job.validate import Checked, validate

FLOAT32 = Dtype.FLOAT32


def check(params: list[tuple[int, ...]], nodes: list[Node], dtype: Dtype = FLOAT32) -> Checked:
    """A graph over params of one dtype, in nodes 0, 1, ..., whose last node is its output."""
    reads = [Node(Op.PARAM, (slot,)) for slot in range(len(params))]
    table = tuple(GraphParam(slot, dtype, shape) for slot, shape in enumerate(params))
    everything = (*reads, *nodes)
    checked = validate(Graph(table, everything, (Output(len(everything) - 1),)))
    assert isinstance(checked, Checked), checked
    return checked


def matmul(rows: int, inner: int, columns: int) -> Checked:
    """As tinygrad writes it: broadcast MUL over rows x columns x inner, then REDUCE."""
    return check(
        [(rows, inner), (inner, columns)],
        [
            Node(Op.RESHAPE, (rows, 1, inner), (0,)),
            Node(Op.PERMUTE, (1, 0), (1,)),
            Node(Op.RESHAPE, (1, columns, inner), (3,)),
            Node(Op.MUL, (), (2, 4)),
            Node(Op.PERMUTE, (2, 0, 1), (5,)),
            Node(Op.REDUCE, (0, 1), (6,)),
        ],
    )


def test_the_weights_are_frozen() -> None:
    assert METER_ID == "nodes-1"
    heavy = {op.name: weight for op, weight in WEIGHTS.items() if weight != 1}
    assert heavy == {
        "PAD": 3,
        "MULACC": 2,
        "FLOORDIV": 8,
        "FLOORMOD": 8,
        "EXP2": 36,
        "LOG2": 38,
        "POW": 93,
        "THREEFRY": 127,
        "SIN": 142,
    }
    assert set(WEIGHTS) >= UNARY | BINARY | TERNARY


def test_a_matrix_product_is_two_mnk() -> None:
    rows, inner, columns = 32, 64, 48
    cost = meter(matmul(rows, inner, columns))
    matrices = 4 * (rows * inner + inner * columns + rows * columns)
    assert cost.flop == 2 * rows * inner * columns
    assert cost.touched_bytes == matrices
    assert cost.peak_bytes == matrices + 4 * rows * columns


def test_an_elementwise_step() -> None:
    checked = check([(100,)], [Node(Op.EXP2, (), (0,)), Node(Op.ADD, (), (1, 0))])
    assert meter(checked) == Cost(37 * 100, 2 * 400, 2 * 400)


@pytest.mark.parametrize(("dtype", "flop"), [(Dtype.UINT64, 127), (Dtype.INT32, 0)])
def test_threefry_costs_what_it_runs(dtype: Dtype, flop: int) -> None:
    node = Node(Op.THREEFRY, (), (0, 0)) if flop else Node(Op.CONTIGUOUS, (), (0,))
    assert meter(check([(8,)], [node], dtype)).flop == 8 * flop


def test_a_gather_costs_its_rows_not_its_table() -> None:
    table = GraphParam(0, FLOAT32, (60_000, 784))
    index = GraphParam(1, Dtype.INT32, (512,))
    nodes = (Node(Op.PARAM, (0,)), Node(Op.PARAM, (1,)), Node(Op.GATHER, (), (0, 1)))
    checked = validate(Graph((table, index), nodes, (Output(2),)))
    assert isinstance(checked, Checked)
    rows_bytes = 512 * 784 * 4
    cost = meter(checked)
    assert cost.flop == 512 * 784
    assert cost.touched_bytes == 2 * rows_bytes + 512 * 4
    assert cost.peak_bytes == 60_000 * 784 * 4 + 512 * 4 + 2 * rows_bytes


def test_a_count_costs_its_length() -> None:
    checked = check([], [Node(Op.IOTA, (int(Dtype.INT32), 30_522))])
    assert meter(checked) == Cost(30_522, 4 * 30_522, 4 * 30_522)


def test_moving_memory_is_touching_it() -> None:
    moved = check([(64, 32)], [Node(Op.PERMUTE, (1, 0), (0,)), Node(Op.CONTIGUOUS, (), (1,))])
    assert meter(moved).flop == 0
    assert meter(moved).touched_bytes == 2 * 64 * 32 * 4


def test_a_param_is_touched_by_its_largest_view() -> None:
    part = [Node(Op.SHRINK, (0, 10), (0,)), Node(Op.NEG, (), (1,))]
    assert meter(check([(100,)], part)).touched_bytes == 40 + 40
    both = [*part, Node(Op.SHRINK, (5, 10), (0,)), Node(Op.ADD, (), (2, 3))]
    assert meter(check([(100,)], both)).touched_bytes == 40 + 40
    spread = [Node(Op.EXPAND, (50,), (0,)), Node(Op.NEG, (), (1,))]
    assert meter(check([(100,)], spread)).touched_bytes == 400 + 50 * 400


def test_reading_a_slot_twice_touches_it_once() -> None:
    twice = check([(100,)], [Node(Op.PARAM, (0,)), Node(Op.ADD, (), (0, 1))])
    assert meter(twice).touched_bytes == 400 + 400


def test_padding_costs_its_guards() -> None:
    assert meter(check([(4,)], [Node(Op.PAD, (2, 8), (0,))])).flop == 3 * 8


@pytest.mark.parametrize("levels", [2, 3, 9])
def test_peak_counts_what_lives_at_once(levels: int) -> None:
    """Each level's result is read by the next one's only: two of them live at once, never more."""
    nodes: list[Node] = []
    top = 0
    for _ in range(levels):
        nodes += [
            Node(Op.NEG, (), (top,)),
            Node(Op.REDUCE, (0, 1), (top + 1,)),
            Node(Op.ADD, (), (top + 1, top + 2)),
        ]
        top += 3
    peak = meter(check([(1000,)], nodes)).peak_bytes
    held = 4000 + 4000  # the param and the output
    assert peak == held + 2 * 4000 + 4


def test_a_fused_reader_keeps_its_operand_alive() -> None:
    """The NEGs are fused into the last node, so both REDUCEs live until it runs."""
    nodes = [
        Node(Op.REDUCE, (0, 1), (0,)),
        Node(Op.NEG, (), (1,)),
        Node(Op.REDUCE, (2, 1), (0,)),
        Node(Op.NEG, (), (3,)),
        Node(Op.ADD, (), (2, 4)),
    ]
    peak = meter(check([(10, 1000)], nodes)).peak_bytes
    assert peak == 40_000 + 4000 + 2 * 4000


def test_a_larger_graph_never_costs_less() -> None:
    costs = [meter(matmul(size, size, size)) for size in (1, 2, 8, 31, 64)]
    for smaller, larger in pairwise(costs):
        assert smaller.flop < larger.flop
        assert smaller.touched_bytes < larger.touched_bytes
        assert smaller.peak_bytes < larger.peak_bytes


STEP, TEST, INIT = b"s" * 32, b"t" * 32, b"i" * 32


def training() -> tuple[Work, dict[bytes, Checked]]:
    """A step each time, a test every 10, one state slot born from the seed."""
    step = validate(
        Graph(
            (GraphParam(1, FLOAT32, (4,)),),
            (Node(Op.PARAM, (1,)), Node(Op.NEG, (), (0,))),
            (Output(1, 1),),
        )
    )
    test = validate(
        Graph(
            (GraphParam(1, FLOAT32, (4,)),),
            (Node(Op.PARAM, (1,)), Node(Op.REDUCE, (0, 1), (0,))),
            (Output(1),),
        )
    )
    init = validate(
        Graph(
            (GraphParam(0, Dtype.UINT32, (2,)),),
            (
                Node(Op.PARAM, (0,)),
                Node(Op.CAST, (int(FLOAT32),), (0,)),
                Node(Op.STACK, (), (1, 1)),
                Node(Op.RESHAPE, (4,), (2,)),
            ),
            (Output(3),),
        )
    )
    assert isinstance(step, Checked)
    assert isinstance(test, Checked)
    assert isinstance(init, Checked)
    work = Work(
        version=1,
        phases=(Phase(STEP, 1, 0, ()), Phase(TEST, 10, 0, (MODE_LAST,)), Phase(STEP, 5, 0, ())),
        params=(
            WorkParam(int(Dtype.UINT32), (2,), ROLE_SEED, NoSource()),
            WorkParam(int(FLOAT32), (4,), ROLE_STATE, InitSource(INIT, 0)),
        ),
        seed=1,
    )
    return work, {STEP: step, TEST: test, INIT: init}


def test_a_job_costs_its_runs_and_its_births_once() -> None:
    work, graphs = training()
    assert init_graphs(work) == (INIT,)
    cost = meter_job(work, Job(work_id(work), 0, 100), graphs)
    assert [(line.graph, line.times) for line in cost.lines] == [(STEP, 120), (TEST, 10), (INIT, 1)]
    assert cost.lines[0] == JobCostLine(STEP, 4, 32, 120)
    assert cost.flop == sum(line.flop * line.times for line in cost.lines)
    assert cost.touched_bytes == sum(line.touched_bytes * line.times for line in cost.lines)
    table_bytes, fresh_bytes = 8 + 16, 4 + 16
    assert cost.peak_bytes >= table_bytes + fresh_bytes


def test_a_job_that_resumes_is_not_born_again() -> None:
    work, graphs = training()
    parts = [meter_job(work, Job(work_id(work), first, 50), graphs) for first in (0, 50)]
    whole = meter_job(work, Job(work_id(work), 0, 100), graphs)
    assert [line.graph for line in parts[1].lines] == [STEP, TEST]
    assert sum(part.flop for part in parts) == whole.flop


def test_totals_pass_64_bits() -> None:
    work, graphs = training()
    graphs[STEP] = validated_negation(2**38)
    cost = meter_job(work, Job(work_id(work), 2**62, 2**40), graphs)
    assert cost.flop > 2**64


def validated_negation(elements: int) -> Checked:
    checked = validate(
        Graph(
            (GraphParam(1, FLOAT32, (elements,)),),
            (Node(Op.PARAM, (1,)), Node(Op.NEG, (), (0,))),
            (Output(1, 1),),
        )
    )
    assert isinstance(checked, Checked)
    return checked


def test_a_line_that_no_bid_can_state_is_refused() -> None:
    work, graphs = training()
    nodes = [Node(Op.PARAM, (1,)), Node(Op.EXPAND, (2**18,), (0,))]
    nodes += [Node(Op.SIN, (), (index,)) for index in range(1, 1400)]
    huge = validate(
        Graph((GraphParam(1, FLOAT32, (2**22,)),), tuple(nodes), (Output(0),)), Limits(chain=1500)
    )
    assert isinstance(huge, Checked)
    graphs[STEP] = huge
    assert meter(huge).flop < MAX_LINE_VALUE
    meter_job(work, Job(work_id(work), 0, 1), graphs)
    many = [*nodes, *(Node(Op.SIN, (), (1,)) for _ in range(70_000))]
    graphs[STEP] = Checked(
        Graph(huge.graph.params, tuple(many), (Output(0),)),
        (*huge.shapes, *(huge.shapes[1] for _ in range(70_000))),
        (*huge.dtypes, *(FLOAT32 for _ in range(70_000))),
    )
    with pytest.raises(JobError, match="over the"):
        meter_job(work, Job(work_id(work), 0, 1), graphs)
