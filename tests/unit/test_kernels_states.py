"""States that are read and written in one step: in what order, and with which bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, nn

from tests.native import Program, assert_equal_to_native, replay, tensors_of

Pair = tuple[Any, Any]
ROWS = np.random.default_rng(1).standard_normal((12, 4)).astype(np.float32)


def test_a_learning_rate_that_a_step_assigns_gives_the_bytes_of_native_tinygrad() -> None:
    def make() -> Program:
        rows, layer = Tensor(ROWS), nn.Linear(4, 2)
        opt = nn.optim.SGD(nn.state.get_parameters(layer), lr=0.1)

        def train() -> dict[str, Tensor]:
            opt.zero_grad()
            loss = layer(rows).square().mean().backward()
            opt.lr.assign(opt.lr * 0.9)
            return {"loss": loss.realize(*opt.schedule_step(), opt.lr)}

        return Program(train, tensors_of(layer=layer, opt=opt))

    assert_equal_to_native(make)


def follow(a: Any, b: Any) -> Pair:
    return b + 1, (b + 1) * 2 + a


def swap(a: Any, b: Any) -> Pair:
    return b * 1, a * 1


def total(a: Any, b: Any) -> Pair:
    return a + b, b * (a + b) + a.sum()


@pytest.mark.parametrize("rule", [follow, swap, total])
def test_states_that_need_each_others_old_values_get_their_new_ones(
    rule: Callable[[Any, Any], Pair],
) -> None:
    """Which native tinygrad refuses to order within one realize."""
    first, second = np.array([1, 2], np.int32), np.array([5, 7], np.int32)
    a, b = Tensor(first).realize(), Tensor(second).realize()

    def step() -> None:
        for state, value in zip((a, b), rule(a, b), strict=True):
            state.assign(value)

    replayed = replay(Program(step, {}), 3)
    session = replayed.session()
    for number in range(3):
        session.step(number)
        first, second = rule(first, second)
    for name, expected in (("a", first), ("b", second)):
        slot = replayed.traced.labels.params.index(name)
        assert np.frombuffer(session.read(slot), np.int32).tolist() == expected.tolist()
