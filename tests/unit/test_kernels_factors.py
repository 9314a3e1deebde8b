"""Costly factors of products are computed once, and the bytes stay those of native tinygrad."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tinygrad import Tensor

from p2pflop.kernels.plan import Plan, decode_plan
from tests.native import Lowered, prepare, raw_bytes

RANDOM = np.random.default_rng(5)
ROWS, INNER, COLUMNS = 48, 40, 32
LEFT, OTHER = (RANDOM.normal(0, 1, (ROWS, INNER)).astype(np.float32) for _ in range(2))
RIGHT = RANDOM.normal(0, 1, (INNER, COLUMNS)).astype(np.float32)

Function = Callable[[Tensor, Tensor, Tensor], Tensor]

FACTORS: dict[str, Function] = {
    "exponential": lambda a, b, c: a.exp2() @ c,
    "sine of the right one": lambda a, b, c: a @ c.sin(),
    "both": lambda a, b, c: a.exp() @ c.cos(),
    "a sum of two arguments": lambda a, b, c: (b.sigmoid() + a.sigmoid()) @ c,
    "a product of two": lambda a, b, c: (b.sigmoid() * a.tanh()) @ c,
    "a choice": lambda a, b, c: (b > 0).where(a.exp(), b.sin()) @ c,
    "the derivative of a softplus": lambda a, b, c: (
        (a @ c).softplus().sum().gradient(c, gradient=None)[0]
    ),
    "a GELU, and it again": lambda a, b, c: (a + b).gelu() @ c + ((a + b).gelu().sum() * 0.01),
}


def lowered(function: Function) -> Lowered:
    a, b, c = (Tensor(array).realize() for array in (LEFT, OTHER, RIGHT))
    return prepare(lambda: {"output": function(a, b, c)})


def plan_of(job: Lowered) -> tuple[Plan, int]:
    """The plan of the step, and what the meter counts for it."""
    name = job.job.work.phases[0].graph
    metered = next(line.flop for line in job.job.cost.lines if line.graph == name)
    return decode_plan(job.plans[name]), metered


@pytest.mark.parametrize("name", FACTORS)
def test_a_product_gives_the_bytes_of_native_tinygrad_for_what_the_meter_counts(name: str) -> None:
    plan, metered = plan_of(assert_native_bytes(FACTORS[name]))
    assert plan.flop <= 2 * metered


def assert_native_bytes(function: Function) -> Lowered:
    job = lowered(function)
    session = job.session()
    session.step(0)
    output = session.read_output(0, 0)
    assert output is not None
    a, b, c = (Tensor(array).realize() for array in (LEFT, OTHER, RIGHT))
    assert bytes(output) == raw_bytes(function(a, b, c))
    return job


def test_padded_places_of_an_unrolled_sum_stay_where_they_vanish() -> None:
    """Without the zeros, ``c * (0 + a * b)`` is ``c * a * b`` to tinygrad, in another order."""

    def padded(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        left = a[:8, :4] * b[:8, :4].exp2() * a[:8, 4:8].exp2()
        right = b[:8, :4] * a[:8, :4].sin() * b[:8, 4:8]
        return c[:8].T @ (left.pad(((0, 0), (0, 4))) + right.pad(((0, 0), (4, 0)))).T

    assert_native_bytes(padded)


def test_what_a_factor_shares_with_its_product_keeps_its_order() -> None:
    """A square that is used twice is a variable; used once it would be part of ``0.3 * a * a * a``,
    in another order."""

    def cubed(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        square = a * a
        return ((0.3 * (square * a) + b).exp2() * square) @ c

    assert_native_bytes(cubed)


def test_a_costly_factor_is_a_kernel_of_its_own() -> None:
    plan, _ = plan_of(lowered(lambda a, b, c: a.exp2() @ c))
    assert len(plan.calls) == 2


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda a, b, c: (a + b).relu() @ c, id="cheap"),
        pytest.param(lambda a, b, c: a[:4, :4].exp2() @ c[:4, :8], id="small"),
        pytest.param(lambda a, b, c: (a.sin() * b).sum(1), id="not repeated"),
        pytest.param(lambda a, b, c: (a[:, :1].sin() * b).sum(1), id="repeated inside its loop"),
    ],
)
def test_what_costs_no_more_in_its_reader_stays_there(function: Function) -> None:
    plan, _ = plan_of(lowered(function))
    assert len(plan.calls) == 1


def test_equal_kernels_share_one_for_their_factors() -> None:
    plan, _ = plan_of(lowered(lambda a, b, c: (a.exp2() @ c).contiguous() + b.exp2() @ c))
    assert len(plan.kernels) < len(plan.calls)
    assert len({buffer.slot for buffer in plan.buffers if buffer.slot >= 0}) == 3


def test_lowering_twice_gives_the_same_plan() -> None:
    first, second = (lowered(FACTORS["a product of two"]).plans for _ in range(2))
    assert first == second
