"""What a traced function cannot do is told with its line, and with what to write instead."""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, UOp, dtypes, function, nn

import p2pflop as pf
from p2pflop.errors import JobError
from p2pflop.ids import content_hash
from p2pflop.kernels.trace import trace

X = Tensor(np.arange(48, dtype=np.float32).reshape(12, 4))
W = Tensor.ones(4).contiguous()
LAYER = nn.Linear(4, 2)
OPT = nn.optim.SGD(nn.state.get_parameters(LAYER))


def use_item() -> Any:
    return {"a": X.sum() * X.mean().item()}


def use_numpy() -> Any:
    return {"a": Tensor(X.numpy() * 2)}


def use_tolist() -> Any:
    return {"a": Tensor(X.tolist())}


def use_float() -> Any:
    return {"a": X * float(X.sum())}


def use_int() -> Any:
    return {"a": X * int(X.sum())}


def use_math() -> Any:
    return {"a": math.sqrt(X.sum())}


def use_if() -> Any:
    if X.sum() > 0:
        return {"a": X}
    return None


def use_max() -> Any:
    return {"a": max(X.sum(), X.mean())}


def use_in() -> Any:
    return {"a": W if 3 in W else X}


def use_as_index() -> Any:
    return {"a": X * [1, 2, 3][X.argmax()]}


def use_as_count() -> Any:
    return {"a": X + sum(range(X.sum()))}


def use_array() -> Any:
    return {"a": Tensor(np.asarray(X))}


def use_format() -> Any:
    return {f"{X.sum():.3f}": X}


def use_percent() -> Any:
    return {"%f" % X.sum(): X}  # noqa: UP031


def use_nonzero() -> Any:
    return {"a": X.nonzero()}


def use_selection() -> Any:
    return {"a": X.masked_select(X > 0)}


def use_mask() -> Any:
    return {"a": X[X > 0].sum()}


def write_by_mask() -> Any:
    W[W > 0] = 1.0
    return {"a": W}


def use_nothing() -> Any:
    return {"a": Tensor.empty(3) + 1}


def use_variable() -> Any:
    return {"a": X[UOp.variable("i", 0, 11).bind(3)]}


def use_size() -> Any:
    return {"a": X[: UOp.variable("n", 1, 11).bind(3)].sum()}


def use_devices() -> Any:
    return {"a": X.shard(("CPU:0", "CPU:1"), axis=0).sum()}


def use_kernel() -> Any:
    return {"a": Tensor.custom_kernel(Tensor.empty(4), W, fxn=lambda out, _: out.sink())[0]}


def use_function() -> Any:
    return {"a": function(lambda x: x + 1)(W)}


def use_eight_bits() -> Any:
    return {"a": X.cast(dtypes.fp8e4m3)}


def use_no_gradient() -> Any:
    return {"a": X.sum().realize(*OPT.schedule_step())}


def write_the_step() -> Any:
    pf.step.assign(pf.step + 1)


def write_a_constant() -> Any:
    COUNT.assign(COUNT + 1)


COUNT = Tensor(0)
CASES = [
    (use_item, r"\.item\(\) needs a tensor's value", "Return the tensor"),
    (use_numpy, r"\.numpy\(\) needs", "Return the tensor"),
    (use_tolist, r"\.tolist\(\) needs", "Return the tensor"),
    (use_float, r"float\(tensor\) needs", "Return the tensor"),
    (use_int, r"int\(tensor\) needs", "Return the tensor"),
    (use_math, r"float\(tensor\) needs", "Return the tensor"),
    (use_if, "if, while", r"where\(a, b\)"),
    (use_max, "min, max", r"where\(a, b\)"),
    (use_in, "or in", r"where\(a, b\)"),
    (use_as_index, "index or count", r"X\[i\]"),
    (use_as_count, "index or count", "loop"),
    (use_array, "numpy array", "Return the tensor"),
    (use_format, r"formatting with '\.3f'", "Return the tensor"),
    (use_percent, r"float\(tensor\) needs", "Return the tensor"),
    (use_nonzero, r"\.nonzero\(\) needs", r"mask\.where"),
    (use_selection, r"\.masked_select\(\) needs", r"mask\.where"),
    (use_mask, "bool tensor cannot be an index", r"mask\.where\(x, 0\)"),
    (write_by_mask, "bool tensor cannot be an index", r"assign\(mask\.where"),
    (use_nothing, "never given a value", r"Tensor\.zeros"),
    (use_variable, "bound Variable", r"pf\.step"),
    (use_size, "bound Variable", r"pf\.step"),
    (use_devices, "several devices", "shard"),
    (use_kernel, "custom kernel", "ordinary tensor operations"),
    (use_function, "precompiled function", "ordinary tensor operations"),
    (use_eight_bits, "fp8e4m3 cannot travel", "bfloat16"),
    (use_no_gradient, "has no gradient", "backward"),
    (write_the_step, r"pf\.step is assigned to", "tensor of your own"),
    (write_a_constant, "constant of open dtype", "dtype"),
]


@pytest.mark.parametrize(("step", "message", "hint"), CASES, ids=lambda case: str(case)[:20])
def test_a_refusal_names_the_line_and_what_to_write(
    step: Callable[[], Any], message: str, hint: str
) -> None:
    with pytest.raises(JobError, match=message) as told:
        trace(step, steps=2, address_of=content_hash)
    lines, first = inspect.getsourcelines(step)
    name, line, _ = told.value.message.split(":", 2)
    assert name.endswith("test_kernels_refusals.py")
    assert first < int(line) < first + len(lines)
    assert re.search(hint, told.value.hint)
    assert X.sum().item() == 1128


def test_a_refusal_names_the_function_also_where_tinygrad_wraps_it(tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(
        "import p2pflop as pf\n"
        "from tinygrad import Tensor\n"
        "for use in (lambda x: x.masked_select(x > 0), lambda x: Tensor(x.item())):\n"
        "    try:\n"
        "        pf.trace(lambda: {'a': use(Tensor.ones(1))}, steps=2)\n"
        "    except pf.JobError as error:\n"
        "        print(error.message, error.hint)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRACEMETA": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    selected, read = done.stdout.splitlines()
    assert "plain.py:3: .masked_select() needs" in selected
    assert "mask.where" in selected
    assert "plain.py:3: .item() needs" in read
    assert "Return the tensor" in read


def test_a_refusal_in_a_helper_names_the_helpers_line() -> None:
    def helper(x: Tensor) -> float:
        return float(x)

    def step() -> Any:
        return {"a": X * helper(X.sum())}

    with pytest.raises(JobError) as told:
        trace(step, steps=2, address_of=content_hash)
    line = int(told.value.message.split(":")[1])
    assert line == helper.__code__.co_firstlineno + 1


def test_a_function_that_does_nothing_is_refused() -> None:
    def idle() -> None:
        X.sum()

    with pytest.raises(JobError, match="idle returns nothing"):
        trace(idle, steps=2, address_of=content_hash)


def test_rows_of_a_tensor_can_be_gone_through() -> None:
    assert trace(lambda: {"a": sum(row.sum() for row in X)}, steps=1, address_of=content_hash)


def test_tensors_work_as_before_after_a_trace() -> None:
    trace(lambda: {"a": X.sum()}, steps=1, address_of=content_hash)
    for name in ("__float__", "__int__", "__index__", "__array__", "__complex__"):
        assert name not in vars(Tensor)
    values = Tensor.zeros(4).contiguous().realize()
    values[1] = 3
    assert values.tolist() == [0, 3, 0, 0]
    assert "UOp" in f"{values}"
    with pytest.raises(TypeError):
        bool(values)
