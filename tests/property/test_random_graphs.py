"""Any graph with assignments is refused, or lowers and runs within its places, or says why not."""

from __future__ import annotations

import random

import numpy as np
import pytest

from p2pflop.errors import JobError
from p2pflop.job.commands import Allocate, AnyCommand, Bind, Data, Define, Read, Run, Write
from p2pflop.job.graph import (
    BINARY,
    Attr,
    Dtype,
    Graph,
    GraphParam,
    Node,
    Op,
    Output,
    encode_graph,
    graph_hash,
)
from p2pflop.job.session import open_graph
from p2pflop.job.validate import Checked, validate
from p2pflop.kernels.session_local import LocalSession
from p2pflop.kernels.tinygrad_engine import TinygradEngine

SHORT, LONG = range(40), range(40, 1500)
ENGINE = TinygradEngine()
SIDE = 4
SIZE_BYTES = SIDE * SIDE * 4
ALU = sorted(BINARY & {Op.ADD, Op.MUL, Op.SUB, Op.MAX})


def random_graph(choose: random.Random) -> Graph:
    """Squares of float32, viewed, added up, and assigned to each other, mostly well."""
    slots = range(choose.randint(1, 3))
    nodes = [Node(Op.PARAM, (slot,)) for slot in slots]
    shapes: list[tuple[int, ...]] = [(SIDE, SIDE) for _ in slots]
    last = {slot: slot for slot in slots}

    def add(op: Op, attrs: tuple[Attr, ...], refs: tuple[int, ...], shape: tuple[int, ...]) -> int:
        nodes.append(Node(op, attrs, refs))
        shapes.append(shape)
        return len(nodes) - 1

    def view(of: int) -> int:
        match choose.randrange(4):
            case 0:
                return add(Op.FLIP, (1, choose.randint(0, 1)), (of,), (SIDE, SIDE))
            case 1:
                return add(Op.PERMUTE, (1, 0), (of,), (SIDE, SIDE))
            case 2:
                return add(Op.SHRINK, (choose.randrange(3), 2, 0, SIDE), (of,), (2, SIDE))
            case _:
                return of

    def value(shape: tuple[int, ...]) -> int:
        fitting = [node for node, found in enumerate(shapes) if found == shape]
        if not fitting or choose.random() < 0.1:
            constant = add(Op.CONST, (Dtype.FLOAT32, 2.0), (), ())
            return add(Op.EXPAND, shape, (constant,), shape)
        refs = choose.choice(fitting), choose.choice(fitting)
        return add(choose.choice(ALU), (), refs, shape)

    for _ in range(choose.randint(1, 6)):
        slot = choose.choice(slots)
        tensor = last[slot] if choose.random() < 0.9 else choose.randrange(len(nodes))
        target = view(tensor) if choose.random() < 0.95 else choose.randrange(len(nodes))
        shape = shapes[target] if choose.random() < 0.95 else (SIDE, SIDE)
        found = add(Op.ASSIGN, (), (tensor, target, value(shape)), (SIDE, SIDE))
        last[slot] = found
    params = tuple(GraphParam(slot, Dtype.FLOAT32, (SIDE, SIDE)) for slot in slots)
    outputs = [Output(node, slot) for slot, node in last.items() if node != slot]
    return Graph(params, tuple(nodes), tuple(outputs))


@pytest.mark.parametrize(
    "seed", [*SHORT, *(pytest.param(seed, marks=pytest.mark.slow) for seed in LONG)]
)
def test_a_random_graph_is_refused_or_runs_where_it_is_bound(seed: int) -> None:
    choose = random.Random(seed)  # noqa: S311 - no secrets
    graph = random_graph(choose)
    data = encode_graph(graph)
    if not isinstance(validate(graph, assigns=True), Checked):
        with pytest.raises(JobError):
            open_graph(data)
        return
    session = LocalSession(ENGINE, 2**20)
    guard = b"\xa5" * 64
    start = np.random.default_rng(seed).standard_normal((3, SIDE * SIDE)).astype(np.float32)
    commands: list[AnyCommand] = [Allocate(0, 3 * (SIZE_BYTES + 64) + 64), Write(0, 0, guard)]
    places = []
    for number, values in enumerate(start):
        at = 64 + number * (SIZE_BYTES + 64)
        places.append((0, at))
        commands.append(Write(0, at, values.tobytes() + guard))
    commands += [Define(data), Bind(0, graph_hash(data), tuple(places[: len(graph.params)]))]
    try:
        found = list(session.obey([*commands, Run(0), Read(0, 0, 3 * (SIZE_BYTES + 64) + 64)]))
    except JobError as error:
        if "cycle" not in error.message:
            raise
        return
    assert isinstance(found[0], Data)
    memory = found[0].data
    written = {output.slot for output in graph.outputs}
    assert memory[:64] == guard
    for slot, (_, at) in enumerate(places):
        assert memory[at + SIZE_BYTES : at + SIZE_BYTES + 64] == guard
        if slot not in written:
            assert memory[at : at + SIZE_BYTES] == start[slot].tobytes()
