"""Names of outputs: an output's own, as long as no other has it."""

from __future__ import annotations

import pytest
from tinygrad import Tensor

import p2pflop as pf
from p2pflop.job.file import Labels
from p2pflop.job.naming import output_names
from p2pflop.runs import Row


@pytest.mark.parametrize(
    ("phases", "outputs", "names"),
    [
        (("a", "b"), (("x",), ("y",)), (("x",), ("y",))),
        (("a", "b"), (("x",), ("x", "y")), (("a.x",), ("b.x", "y"))),
        (("a", "a"), (("x",), ("x",)), (("a.x",), ("a#2.x",))),
        (("a", "a", "a"), (("x",), ("y",), ("x",)), (("a.x",), ("y",), ("a#3.x",))),
    ],
)
def test_no_two_outputs_have_one_name(
    phases: tuple[str, ...],
    outputs: tuple[tuple[str, ...], ...],
    names: tuple[tuple[str, ...], ...],
) -> None:
    assert output_names(Labels("", (), phases, outputs)) == names


def test_rows_and_results_of_functions_of_one_name_lose_nothing() -> None:
    a, b = Tensor([1.0]).contiguous(), Tensor([2.0]).contiguous()

    def make(tensor: Tensor) -> object:
        def step() -> dict[str, Tensor]:
            tensor.assign(tensor + 1)
            return {"sum": tensor.sum()}

        return step

    first, second = make(a), make(b)
    rows: list[Row] = []
    job = pf.trace(first, steps=2, every={2: second})  # type: ignore[arg-type, dict-item]
    result = job.run_local(rows.append)
    assert [dict(row) for row in rows] == [
        {"step": 0, "step.sum": 2.0},
        {"step": 1, "step.sum": 3.0, "step#2.sum": 3.0},
    ]
    assert list(result["step.sum"]) == [2.0, 3.0]
    assert list(result["step#2.sum"]) == [3.0]
