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


def write_slices(a: Any, b: Any) -> None:
    a[1:3] = a[0:2] + 1
    a[:, 2] = 7
    a[0] += b[1, 0]
    b[::2, 1:3] = b[1::2, 0:2] * -1
    b[2:, 3] = a[0:2, 0] + b[0, 0]


def write_after_reading(a: Any, b: Any) -> None:
    total, double = a.sum(0), b * 2
    a[1] = total
    b[0] = total + double[1]
    a[2:4, 1:3] = double[0:2, 0:2]
    b[1] = a[1] - double[0]


def write_through_views(a: Any, b: Any) -> None:
    row, corner = a[1], b[2:, 2:]
    row[1:3] = 5
    corner[0] = row[0:2] + corner[1]
    b[0] = row
    row += b[0]


def write_once_and_again(a: Any, b: Any) -> None:
    for number in range(3):
        a[number] = a[number + 1] + b[number]
        b[3 - number, number] = number


@pytest.mark.parametrize(
    "write", [write_slices, write_after_reading, write_through_views, write_once_and_again]
)
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_writing_to_parts_means_what_it_means_to_numpy(
    write: Callable[[Any, Any], None], dtype: type[np.generic]
) -> None:
    first = np.arange(16).reshape(4, 4).astype(dtype)
    second = first[::-1].copy()
    a, b = Tensor(first).realize(), Tensor(second).realize()
    replayed = replay(Program(lambda: write(a, b), {"a": a, "b": b}), 2)
    session = replayed.session()
    slots = [number for number, data in replayed.traced.inputs.items()]
    values = {data: slot for slot, data in replayed.traced.inputs.items()}
    assert len(values) == len(slots) == 2
    first_slot, second_slot = values[first.tobytes()], values[second.tobytes()]
    for number in range(2):
        session.step(number)
        write(first, second)
    assert bytes(session.read(first_slot)) == first.tobytes()
    assert bytes(session.read(second_slot)) == second.tobytes()


def test_a_lazy_state_is_written_through_its_views_as_well() -> None:
    state = Tensor.zeros(4)

    def step() -> dict[str, Tensor]:
        part = state[1:3]
        part[0] = 5
        return {"sum": state.sum()}

    replayed = replay(Program(step, {}), 1)
    session = replayed.session()
    session.step(0)
    assert np.frombuffer(session.scalars()[0][2], np.float32) == 5
