"""The examples: small enough to travel, they learn, and give the bytes of native tinygrad."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, dtypes
from tinygrad.helpers import Context

import p2pflop as pf
from tests.native import raw_bytes, tensors_of

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Case:
    """An example in its smallest form: sizes, the output that falls or stays sane, its bytes."""

    sizes: dict[str, int] = field(default_factory=dict)
    output: str = "loss"
    most_bytes: int = 5_000
    steps: int = 4


CASES = {
    "mlp": Case({"hidden": 8, "batch": 16}, most_bytes=2_000),
    "conv": Case({"channels": 2, "batch": 8}),
    "gpt": Case(
        {"layers": 1, "width": 8, "heads": 2, "context": 8, "batch": 4}, most_bytes=6_000, steps=3
    ),
    "lstm": Case({"width": 4, "length": 2, "batch": 4}),
    "vae": Case({"hidden": 8, "codes": 2, "batch": 8}),
    "gan": Case({"hidden": 8, "codes": 2, "batch": 8}, output="judge_loss"),
}


# Each costs 5 to 17 s of compiling, half tinygrad's own. The digits example has convolutions, too.
SLOW = ("conv", "vae")


@cache
def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CASES)
def test_the_job_is_small(name: str) -> None:
    job = example(name).make_job()
    assert job.size_bytes <= CASES[name].most_bytes
    assert job.checked.job.first_step == 0


def test_a_further_layer_of_the_gpt_is_small() -> None:
    two, eight = (example("gpt").make_job(layers=layers).size_bytes for layers in (2, 8))
    assert (eight - two) / 6 <= 1_200


def native(name: str, steps: int, sizes: dict[str, int]) -> tuple[dict[str, bytes], list[bytes]]:
    """Tensors after ``steps`` steps as tinygrad runs them, and each step's first output."""
    module = example(name)
    Tensor.manual_seed(0)
    given = {"steps": steps, **sizes} if name == "gpt" else sizes
    owners, train, every = module.program(**given)
    tensors = tensors_of(**owners)
    Tensor.realize(*tensors.values())
    values = []
    for number in range(steps):
        pf.step.assign(Tensor(number, dtype=dtypes.int32)).realize()
        with Context(TRAINING=1):
            first, *_ = train().values()
        values.append(raw_bytes(first))
        for period, function in every.items():
            if (number + 1) % period == 0:
                function()
    pf.step.assign(Tensor(0, dtype=dtypes.int32)).realize()
    return {name: raw_bytes(tensor) for name, tensor in tensors.items()}, values


def assert_equal_to_native(name: str, steps: int, sizes: dict[str, int]) -> np.ndarray[Any, Any]:
    """Run the job here and natively; the values of its output."""
    result = example(name).make_job(steps, **sizes).run_local()
    tensors, values = native(name, steps, sizes)
    output = result[CASES[name].output]
    assert [np.float32(value).tobytes() for value in output] == values
    compared = set(tensors) & set(result.state)
    assert len(compared) > 5
    for tensor in compared:
        assert result.state[tensor].tobytes() == tensors[tensor], tensor
    return np.array(output)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES],
)
def test_a_few_steps_equal_native_tinygrad(name: str) -> None:
    case = CASES[name]
    output = assert_equal_to_native(name, case.steps, case.sizes)
    assert np.isfinite(output).all()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_equal_native_tinygrad(name: str) -> None:
    output = assert_equal_to_native(name, 20, {})
    assert np.isfinite(output).all()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_the_example_learns(name: str) -> None:
    output = np.array(example(name).make_job(150).run_local()[CASES[name].output])
    assert output[-20:].mean() < 0.9 * output[:5].mean()


def test_the_smallest_example_learns() -> None:
    rows: list[pf.Row] = []
    result = example("mlp").make_job(200).run_local(on_row=rows.append)
    assert [row["step"] for row in rows if "acc" in row] == [99, 199]
    assert result["acc"][-1] > 0.8
    assert result["loss"][-20:].mean() < 0.5 * result["loss"][:5].mean()


@pytest.mark.slow
def test_five_steps_of_digits_equal_native_tinygrad() -> None:
    module = example("digits")
    result = module.make_job(steps=5).run_local()
    net, train, _ = module.program()
    tensors = tensors_of(net=net)
    Tensor.realize(*tensors.values())
    with Context(TRAINING=1):
        values = [raw_bytes(train()["loss"]) for _ in range(5)]
    assert [np.float32(value).tobytes() for value in result["loss"]] == values
    for name, tensor in tensors.items():
        assert result.state[name].tobytes() == raw_bytes(tensor), name
