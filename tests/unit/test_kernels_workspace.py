"""A session's commands against the machine itself: places, memory, and what is outside of both."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from p2pflop.errors import JobError, ProtocolError
from p2pflop.ids import content_hash
from p2pflop.job.commands import (
    Allocate,
    AnyCommand,
    Bind,
    Copy,
    Data,
    Define,
    Free,
    Load,
    Ran,
    Read,
    Run,
    Write,
)
from p2pflop.job.graph import Dtype, Graph, GraphParam, Node, Op, Output, encode_graph, graph_hash
from p2pflop.job.symbolic import (
    Change,
    CheckedSymbolic,
    Range,
    SymbolicGraph,
    decode_symbolic,
    encode_symbolic,
    validate_symbolic,
)
from p2pflop.kernels import workspace
from p2pflop.kernels.engine import Workspace
from p2pflop.kernels.frames import PART_BYTES
from p2pflop.kernels.lower import lower
from p2pflop.kernels.plan import decode_plan, scratch_bytes
from p2pflop.kernels.session_local import LocalSession
from p2pflop.kernels.tinygrad_engine import TinygradEngine
from p2pflop.units import MIB

ENGINE = TinygradEngine()
F = Dtype.FLOAT32


def graph_of(shapes: list[tuple[int, ...]], nodes: list[Node], *outputs: Output) -> bytes:
    """Params 0, 1, ... of float32 are nodes 0, 1, ..."""
    params = tuple(GraphParam(slot, F, shape) for slot, shape in enumerate(shapes))
    reads = [Node(Op.PARAM, (slot,)) for slot in range(len(shapes))]
    return encode_graph(Graph(params, (*reads, *nodes), outputs))


ADD = graph_of(
    [(4,), (4,)], [Node(Op.ADD, (), (0, 1)), Node(Op.ASSIGN, (), (0, 0, 2))], Output(3, 0)
)
"""The first place gets the sum of both."""
ONLY_WRITTEN = encode_graph(
    Graph(
        (GraphParam(0, F, (2, 3)),),
        (
            Node(Op.PARAM, (0,)),
            Node(Op.PERMUTE, (1, 0), (0,)),
            Node(Op.SHRINK, (1, 2, 0, 2), (1,)),
            Node(Op.CONST, (F, 5.0)),
            Node(Op.EXPAND, (2, 2), (3,)),
            Node(Op.ASSIGN, (), (0, 2, 4)),
        ),
        (Output(5, 0),),
    )
)
"""Two columns of three become fives."""


def centred(size: int) -> bytes:
    """All less their mean and twice as far, which takes scratch: a sum, used by every element."""
    nodes = [
        Node(Op.MUL, (), (0, 0)),
        Node(Op.CONTIGUOUS, (), (1,)),
        Node(Op.REDUCE, (0, 1), (2,)),
        Node(Op.ADD, (), (2, 3)),
        Node(Op.ASSIGN, (), (0, 0, 4)),
    ]
    return graph_of([(size,)], nodes, Output(5, 0))


def plan_of(graph: bytes) -> bytes:
    return ENGINE.lower(graph, lambda _done, _total: None)


def floats(*values: float) -> bytes:
    return np.array(values, np.float32).tobytes()


def obey(session: LocalSession, commands: Iterable[AnyCommand]) -> tuple[dict[int, bytes], Ran]:
    """The answers by number, and the end."""
    found: dict[int, bytes] = {}
    for report in session.obey(commands):
        if isinstance(report, Data):
            found[report.number] = found.get(report.number, b"") + report.data
    assert isinstance(report, Ran)
    return found, report


def local(memory_bytes: int = 64 * MIB) -> LocalSession:
    return LocalSession(ENGINE, memory_bytes)


def test_a_binding_is_a_graph_at_places_and_can_be_bound_anew() -> None:
    session = local()
    found, ran = obey(
        session,
        [
            Allocate(0, 64),
            Allocate(9, 16),
            Write(0, 16, floats(1, 2, 3, 4)),
            Write(9, 0, floats(10, 20, 30, 40)),
            Define(ADD),
            Bind(3, graph_hash(ADD), ((0, 16), (9, 0))),
            Run(3),
            Run(3),
            Read(0, 16, 16),
            Bind(3, graph_hash(ADD), ((0, 32), (0, 16))),
            Run(3),
            Read(0, 0, 64),
            Read(9, 0, 16),
        ],
    )
    assert found[8] == floats(21, 42, 63, 84)
    assert found[11] == bytes(16) + floats(21, 42, 63, 84) * 2 + bytes(16)
    assert found[12] == floats(10, 20, 30, 40)
    assert (ran.upto, ran.kernels, ran.flop) == (13, 3, 12)


def test_one_place_may_serve_several_params() -> None:
    commands: list[AnyCommand] = [Allocate(0, 16), Write(0, 0, floats(1, 2, 3, 4)), Define(ADD)]
    found, _ = obey(
        local(),
        [*commands, Bind(0, graph_hash(ADD), ((0, 0), (0, 0))), Run(0), Read(0, 0, 16)],
    )
    assert found[5] == floats(2, 4, 6, 8)


def test_a_param_that_is_only_written_keeps_what_is_beside_its_view() -> None:
    commands: list[AnyCommand] = [
        Allocate(0, 24),
        Write(0, 0, floats(1, 2, 3, 4, 5, 6)),
        Define(ONLY_WRITTEN),
    ]
    found, _ = obey(
        local(), [*commands, Bind(0, graph_hash(ONLY_WRITTEN), ((0, 0),)), Run(0), Read(0, 0, 24)]
    )
    assert found[5] == floats(1, 5, 5, 4, 5, 5)


def test_memory_is_zero_when_it_is_new_and_kept_when_it_is_copied() -> None:
    commands: list[AnyCommand] = [
        Allocate(0, 8),
        Write(0, 0, b"abcdefgh"),
        Copy((0, 0), (0, 4), 4),
        Read(0, 0, 8),
    ]
    found, _ = obey(local(), [*commands, Free(0), Allocate(0, 8), Read(0, 0, 8), Read(0, 8, 0)])
    assert found == {3: b"efghefgh", 6: bytes(8), 7: b""}


def test_scratch_is_shared_and_grows_under_what_is_bound() -> None:
    small, large = centred(64), centred(100_000)
    needs = [scratch_bytes(decode_plan(plan_of(graph))) for graph in (small, large)]
    assert 0 < needs[0] < needs[1]
    values = np.linspace(0, 1, 64, dtype=np.float32)
    commands: list[AnyCommand] = [Allocate(0, 256), Allocate(1, 400_000), Define(small)]
    commands += [Bind(0, graph_hash(small), ((0, 0),)), Run(0), Define(large)]
    commands += [Bind(1, graph_hash(large), ((1, 0),)), Run(1)]
    commands += [Write(0, 0, values.tobytes()), Run(0), Read(0, 0, 256)]
    found, _ = obey(local(), commands)
    alone, _ = obey(
        local(),
        [
            *commands[:1],
            Define(small),
            commands[3],
            Write(0, 0, values.tobytes()),
            Run(0),
            Read(0, 0, 256),
        ],
    )
    assert found[10] == alone[5]
    assert np.allclose(np.frombuffer(found[10], np.float32), values**2 + (values**2).sum())


def test_blobs_are_loaded_and_must_be_as_long_as_said() -> None:
    data = b"0123456789"
    session = LocalSession(ENGINE, MIB, {content_hash(data): data}.__getitem__)
    found, _ = obey(session, [Allocate(0, 12), Load(0, 1, content_hash(data), 10), Read(0, 0, 12)])
    assert found[2] == b"\x000123456789\0"
    with pytest.raises(JobError, match="a blob of 10 bytes, where 9 are loaded"):
        obey(session, [Load(0, 0, content_hash(data), 9)])
    with pytest.raises(JobError, match="not at hand"):
        obey(local(), [Allocate(0, 1), Load(0, 0, bytes(32), 1)])


def test_a_refused_command_is_the_one_that_the_table_counts_up_to() -> None:
    session = local(memory_bytes=16)
    with pytest.raises(JobError, match="over the session's 16"):
        obey(session, [Allocate(0, 8), Allocate(1, 8), Allocate(2, 1)])
    assert session.table.count == 2


def test_a_large_answer_comes_in_pieces() -> None:
    session = local()
    size = 2 * MIB + 1
    reports = list(session.obey([Allocate(0, size), Read(0, 0, size)]))
    pieces = [(len(each.data), each.last) for each in reports if isinstance(each, Data)]
    assert pieces == [(MIB, False), (MIB, False), (1, True)]


class TestOutside:
    """What a table would have refused: nothing outside of the session's memory is reached."""

    @pytest.fixture
    def space(self) -> Workspace:
        made = ENGINE.workspace()
        made.define(graph_hash(ADD), plan_of(ADD))
        made.obey(Allocate(0, 16))
        made.obey(Allocate(1, 8))
        return made

    @pytest.mark.parametrize(
        ("command", "why"),
        [
            (Read(0, 9, 8), "do not fit buffer 0"),
            (Read(5, 0, 0), "no buffer 5"),
            (Write(0, 17, b""), "do not fit buffer 0"),
            (Write(0, 2**62, b"1"), "do not fit buffer 0"),
            (Copy((0, 0), (0, 8), 9), "do not fit buffer 0"),
            (Copy((1, 0), (0, 0), 16), "do not fit buffer 1"),
            (Allocate(0, 1), "buffer 0 exists"),
            (Free(5), "no buffer 5"),
            (Bind(0, bytes(32), ()), "no plan of graph"),
            (Run(0), "no binding 0"),
            (Define(ADD), "does not obey Define"),
            (Load(0, 0, bytes(32), 1), "does not obey Load"),
        ],
    )
    def test_is_refused(self, space: Workspace, command: AnyCommand, why: str) -> None:
        with pytest.raises(ProtocolError, match=why):
            space.obey(command)

    @pytest.mark.parametrize(
        ("places", "why"),
        [
            (((0, 0), (1, 0)), "slot 1 for 16 bytes, there are 8"),
            (((0, 1), (0, 0)), "slot 0 for 16 bytes, there are 15"),
            (((0, 0),), "names slot 1, there are 1"),
            (((0, 0), (7, 0)), "no buffer 7"),
        ],
    )
    def test_places_are_looked_at_before_the_first_run(
        self, space: Workspace, places: tuple[tuple[int, int], ...], why: str
    ) -> None:
        space.obey(Bind(0, graph_hash(ADD), places))
        with pytest.raises(ProtocolError, match=why):
            space.obey(Run(0))

    def test_a_binding_goes_with_its_buffers(self, space: Workspace) -> None:
        space.obey(Allocate(2, 16))
        space.obey(Bind(0, graph_hash(ADD), ((0, 0), (2, 0))))
        space.obey(Run(0))
        space.obey(Free(2))
        with pytest.raises(ProtocolError, match="no binding 0"):
            space.obey(Run(0))
        space.obey(Allocate(2, 16))
        space.obey(Bind(0, graph_hash(ADD), ((0, 0), (2, 0))))
        space.obey(Run(0))

    def test_memory_that_is_not_there_is_the_programs_fault(self, space: Workspace) -> None:
        with pytest.raises(JobError, match="no memory"):
            space.obey(Allocate(3, 2**60))

    def test_plans_have_their_limit(
        self, space: Workspace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = plan_of(ONLY_WRITTEN)
        monkeypatch.setattr(workspace, "MAX_PLANS_BYTES", len(plan_of(ADD)) + len(plan) - 1)
        space.define(graph_hash(ADD), plan_of(ADD))  # has it
        with pytest.raises(JobError, match="plans of over"):
            space.define(graph_hash(ONLY_WRITTEN), plan)


def symbolic(changes: tuple[Change, ...], size: Node, *, high: int = 4) -> bytes:
    """The first place gets twice its first v numbers, where ``size`` is what takes them."""
    nodes = (
        Node(Op.PARAM, (0,)),
        size,
        Node(Op.ADD, (), (1, 1)),
        Node(Op.ASSIGN, (), (0, 1, 2)),
    )
    graph = Graph((GraphParam(0, F, (4,)),), nodes, (Output(3, 0),))
    return encode_symbolic(SymbolicGraph(graph, (Range(1, high),), changes))


FIRST = symbolic((Change(1, 1, 0, 1),), Node(Op.SHRINK, (0, 4), (0,)))
PLACE = symbolic((Change(1, 0, 0, 1),), Node(Op.SHRINK, (3, 1), (0,)), high=3)


class TestVariables:
    @pytest.fixture
    def space(self) -> Workspace:
        made = ENGINE.workspace()
        made.obey(Allocate(0, 16))
        for number, graph in enumerate((FIRST, PLACE)):
            made.define(graph_hash(graph), plan_of(graph))
            made.obey(Bind(number, graph_hash(graph), ((0, 0),)))
        return made

    def test_one_plan_is_run_by_values(self, space: Workspace) -> None:
        expected = np.arange(1, 5, dtype=np.float32)
        space.obey(Write(0, 0, expected.tobytes()))
        for value in (1, 4, 2, 3, 1):
            space.obey(Run(0, (value,)))
            expected[:value] *= 2
            assert read_of(space) == expected.tobytes()
        for value in (1, 3, 2):
            space.obey(Run(1, (value,)))
            expected[value] *= 2
            assert read_of(space) == expected.tobytes()

    @pytest.mark.parametrize("values", [(), (0,), (5,), (2**32 - 1,), (1, 1)])
    def test_other_values_reach_no_kernel(self, space: Workspace, values: tuple[int, ...]) -> None:
        with pytest.raises(ProtocolError, match="Variable"):
            space.obey(Run(0, values))
        assert space.kernels == 0

    def test_a_plan_tells_its_cost_at_the_highest_values(self) -> None:
        plan = decode_plan(plan_of(FIRST))
        assert plan.ranges == (Range(1, 4),)
        assert plan.flop == 4

    def test_only_a_processor_runs_them(self) -> None:
        checked = validate_symbolic(decode_symbolic(FIRST))
        assert isinstance(checked, CheckedSymbolic)
        with pytest.raises(JobError, match="only a CPU"):
            lower(checked, device="PYTHON")


def read_of(space: Workspace) -> bytes:
    answer = space.obey(Read(0, 0, 16))
    assert answer is not None
    return bytes(answer)


def test_a_graph_without_an_order_says_what_to_do() -> None:
    # Each of two tensors is to have the other's old value, half of it in place already.
    halves = [
        Node(Op.SHRINK, (0, 2), (0,)),
        Node(Op.SHRINK, (2, 2), (1,)),
        Node(Op.ASSIGN, (), (0, 2, 3)),
        Node(Op.SHRINK, (2, 2), (0,)),
        Node(Op.SHRINK, (0, 2), (1,)),
        Node(Op.ASSIGN, (), (1, 6, 5)),
    ]
    crossed = graph_of([(4,), (4,)], halves, Output(4, 0), Output(7, 1))
    with pytest.raises(JobError, match="in no order that works") as caught:
        plan_of(crossed)
    assert "Realize one of the tensors" in caught.value.hint


@pytest.mark.parametrize("at", [0, PART_BYTES - 1, PART_BYTES])
def test_a_bool_that_is_neither_0_nor_1_is_refused_where_it_would_be_read(at: int) -> None:
    size = PART_BYTES + 1
    nodes = [Node(Op.PARAM, (0,)), Node(Op.PARAM, (1,)), Node(Op.CAST, (F,), (1,))]
    nodes.append(Node(Op.ASSIGN, (), (0, 0, 2)))
    params = (GraphParam(0, F, (size,)), GraphParam(1, Dtype.BOOL, (size,)))
    graph = encode_graph(Graph(params, tuple(nodes), (Output(3, 0),)))
    session = local()
    obey(session, [Allocate(0, 4 * size), Allocate(1, size), Define(graph), Write(1, at, b"\1")])
    obey(session, [Bind(0, graph_hash(graph), ((0, 0), (1, 0))), Run(0)])
    found, _ = obey(session, [Read(0, 4 * at, 4)])
    assert list(found.values()) == [floats(1)]
    with pytest.raises(JobError, match="bools has bytes other than 0 and 1"):
        obey(session, [Write(1, at, b"\2"), Run(0)])
