"""Sizes and places that depend on Variables, on CLOUD beside native tinygrad in the class."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit, Variable
from tinygrad.helpers import Context
from tinygrad.uop.ops import UOp

from p2pflop.cloud.device import cloud
from p2pflop.job.commands import Run
from tests.cloud_twin import Twin, shared_twin

CLOUD = f"CLOUD;{os.environ['DEV']}"
ROWS, COLUMNS = 12, 7
DATA = np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(np.float32)
Function = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def twin() -> Iterator[Twin]:
    """The twin, with CLOUD as the default device."""
    with Context(DEV=CLOUD):
        yield shared_twin()


def softmax_of_rows(x: Tensor, v: UOp) -> Tensor:
    scores = (x[: v + 1] @ x[0].reshape(COLUMNS, 1)).reshape(1, v + 1)
    return scores.softmax(-1) @ x[: v + 1]


def written(x: Tensor, v: UOp) -> Tensor:
    cache = (x * 1).contiguous()
    cache[v : v + 2].assign(x[0:2] + 1)
    return cache


ONE_GRAPH: dict[str, Function] = {
    "sum of the first": lambda x, v: x[: v + 1].sum(0),
    "sum of the first, perhaps none": lambda x, v: x[:v].sum(0),
    "largest": lambda x, v: x[: v + 3].max(1).max(),
    "a row": lambda x, v: x.shrink(((v, v + 1), None)) * 2,
    "a product": lambda x, v: x[: v + 1].T @ x[: v + 1],
    "softmax": softmax_of_rows,
    "padded": lambda x, v: x.shrink(((v, v + 1), None)).pad(((v, ROWS - 1 - v), None)),
    "twice as many": lambda x, v: x.flatten()[: 2 * v + 2].reshape(v + 1, 2).sum(0),
    "compared": lambda x, v: (Tensor.arange(ROWS).reshape(ROWS, 1) <= v).where(x, -1.0),
    "a number": lambda x, v: x[: v + 1].sum(0) / Tensor(v + 1),
    "masked": lambda x, v: x[:, :5].triu(v - 3).sum(1),
}
A_GRAPH_A_VALUE: dict[str, Function] = {
    "half": lambda x, v: x[: v // 2 + 1].sum(0),
    "the last": lambda x, v: x[v:].sum(0),
}


def values_of(function: Function) -> list[np.ndarray]:
    x = Tensor(DATA).realize()
    bound = (Variable("v", 0, ROWS - 4).bind(value) for value in (3, 0, 8, 5, 1))
    return [function(x, each).contiguous().realize().numpy() for each in bound]


def native_of(function: Function) -> list[np.ndarray]:
    with Context(DEV=os.environ["DEV"]):
        return values_of(function)


def graphs_of(twin: Twin) -> int:
    cloud().session.synchronize()
    return len(twin.table.graphs)


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_one_graph_serves_all_values_with_native_bytes(name: str, twin: Twin) -> None:
    Tensor(DATA).realize()
    before = graphs_of(twin)
    found = values_of(ONE_GRAPH[name])
    assert [each.tobytes() for each in found] == [
        each.tobytes() for each in native_of(ONE_GRAPH[name])
    ]
    assert graphs_of(twin) == before + 1


@pytest.mark.parametrize("name", A_GRAPH_A_VALUE)
def test_what_is_not_linear_or_shrinks_is_a_graph_a_value(name: str, twin: Twin) -> None:
    Tensor(DATA).realize()
    before = graphs_of(twin)
    found = values_of(A_GRAPH_A_VALUE[name])
    for ours, theirs in zip(found, native_of(A_GRAPH_A_VALUE[name]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert graphs_of(twin) > before + 1


def test_two_variables(twin: Twin) -> None:
    x = Tensor(DATA).realize()

    def part(x: Tensor, row: int, column: int) -> list[float]:
        rows = Variable("rows", 1, ROWS).bind(row)
        columns = Variable("columns", 1, COLUMNS).bind(column)
        found: list[float] = x[:rows, :columns].sum(1).sum().reshape(1).tolist()
        return found

    pairs = [(3, 2), (1, 1), (ROWS, 1), (5, COLUMNS)]
    before = graphs_of(twin)
    found = [part(x, *pair) for pair in pairs]
    assert graphs_of(twin) == before + 1
    with Context(DEV=os.environ["DEV"]):
        y = Tensor(DATA).realize()
        assert found == [part(y, *pair) for pair in pairs]


def test_a_jit_replays_one_graph_by_values(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Tensor.zeros(ROWS, COLUMNS).contiguous().realize()
    x = Tensor(DATA).realize()
    sent: list[Run] = []
    run = cloud().session.run

    def listen(command: Run, *, wait: bool) -> None:
        sent.append(command)
        run(command, wait=wait)

    @TinyJit
    def step(place: Variable) -> Tensor:
        cache[place : place + 1].assign(x.shrink(((place, place + 1), None)) + 1).realize()
        return cache[: place + 1].sum(0).realize()

    monkeypatch.setattr(cloud().session, "run", listen)
    for value in range(ROWS):
        told = step(Variable("place", 0, ROWS - 1).bind(value)).numpy()
        np.testing.assert_allclose(told, (DATA[: value + 1] + 1).sum(0), rtol=1e-5)
        if value == 1:
            graphs = graphs_of(twin)
    assert graphs_of(twin) == graphs
    assert sent[-1].values == (ROWS - 1,)
    assert sent[-1].binding == sent[-3].binding
    assert step.captured is not None


def test_no_class_of_another_device_gets_a_graph_with_variables(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    leased = cloud().session.leased
    assert leased is not None
    monkeypatch.setattr(cloud().session, "leased", type(leased)("", "", "CUDA", 0, 0, 1, 1))
    found = values_of(lambda x, v: (x[: v + 1] * 3).sum(0))
    assert all(not graph.ranges for graph in list(twin.table.graphs.values())[-5:])
    np.testing.assert_allclose(found[1], DATA[0] * 3, rtol=1e-6)
