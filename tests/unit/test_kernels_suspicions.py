"""What is allowed and looks like a mistake is told with its line; what is fine is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, nn

from p2pflop.errors import JobError, TraceWarning
from p2pflop.ids import content_hash
from p2pflop.kernels.trace import trace

X = Tensor(np.arange(48, dtype=np.float32).reshape(12, 4))


class Model:
    """A weight, a layer and an optimizer."""

    def __init__(self) -> None:
        self.weight = Tensor.ones(4).contiguous()
        self.layer = nn.Linear(4, 2)
        self.norm = nn.BatchNorm(2)
        self.opt = nn.optim.SGD(nn.state.get_parameters([self.layer, self.norm]))

    def loss(self) -> Tensor:
        return self.norm(self.layer(X)).square().mean()


def warned(
    step: Callable[..., Any], every: Mapping[int, Callable[..., Any]] | None = None
) -> list[str]:
    """The warnings that tracing gives, each with the number of its line within ``step``."""
    with warnings.catch_warnings(record=True) as all_told:
        warnings.simplefilter("always")
        trace(step, steps=2, every=every, address_of=content_hash)
    # Others are of what the collector happens to find at that moment.
    told = [warning for warning in all_told if warning.category is TraceWarning]
    assert all(warning.filename == __file__ for warning in told)
    first = step.__code__.co_firstlineno
    return [f"{warning.lineno - first} {warning.message}" for warning in told]


def test_a_usual_training_step_is_not_warned_of() -> None:
    model = Model()
    mean = model.weight.clone()

    def train() -> dict[str, Tensor]:
        model.opt.zero_grad()
        loss = model.loss().backward()
        updates = model.opt.schedule_step()
        mean.assign(mean * 0.9 + model.layer.weight.mean() * 0.1)
        return {"loss": loss.realize(mean, *updates)}

    assert warned(train, {2: lambda: {"loss": model.loss()}}) == []


def test_an_output_that_is_lazy_at_the_update_is_told() -> None:
    model = Model()

    def train() -> dict[str, Tensor]:
        model.opt.zero_grad()
        loss = model.loss() * 2
        loss.backward()
        model.opt.step()
        return {"loss": loss}

    (told,) = warned(train)
    assert told.startswith("2 the output 'loss' is computed from model.")
    assert "loss.realize(*opt.schedule_step())" in told


def test_an_output_that_was_realized_before_the_update_is_fine() -> None:
    model = Model()

    def train() -> dict[str, Tensor]:
        loss = (model.weight * 2).sum().realize()
        model.weight.assign(model.weight + 1).realize()
        return {"loss": loss * 2, "after": model.weight.sum()}

    assert warned(train) == []


def test_a_state_that_is_lazy_at_anothers_update_is_told() -> None:
    first, second = Tensor.ones(4).contiguous(), Tensor.ones(4).contiguous()

    def step() -> None:
        total = first.sum()
        first.assign(first * 2).realize()
        second.assign(second + total).realize()

    (told,) = warned(step)
    assert told.startswith("3 second is computed from first as it was before")


def test_a_variable_that_gets_another_tensor_is_told() -> None:
    model = Model()

    def step() -> dict[str, Tensor]:
        model.weight = model.weight * 2
        return {"sum": model.weight.sum()}

    (told,) = warned(step)
    assert told.startswith("1 model.weight is another tensor")
    assert "model.weight.assign(...)" in told


def test_an_entry_or_attribute_that_the_step_makes_is_told() -> None:
    model, state = Model(), {"total": Tensor.zeros(4).contiguous()}

    def step() -> dict[str, Tensor]:
        state["ema"] = state.get("ema", X) * 0.9 + X * 0.1
        model.last = model.weight * 2  # type: ignore[attr-defined]
        state["same"] = state["total"]
        state["total"].assign(state["total"] + 1)
        return {"ema": state["ema"]}

    told = sorted(warned(step))
    assert len(told) == 2
    assert told[0].startswith("1 state.ema is made in the step, and a job's next step begins")
    assert "such as Tensor.zeros(12, 4), and write state.ema.assign(...)" in told[0]
    assert told[1].startswith("2 model.last is made in the step")


def test_a_tensor_that_is_printed_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def step() -> dict[str, Tensor]:
        loss = X.sum()
        print("loss", loss)
        return {"loss": loss}

    (told,) = warned(step)
    assert told.startswith("2 a tensor is printed")
    assert "loss <Tensor" in capsys.readouterr().out


def test_gradients_that_nobody_zeroes_are_told() -> None:
    model = Model()

    def train() -> dict[str, Tensor]:
        loss = model.loss().backward()
        return {"loss": loss.realize(*model.opt.schedule_step())}

    (told,) = warned(train)
    assert "keeps its gradient after the step" in told
    assert "model.layer" in told or "model.norm" in told


def test_gradients_from_before_that_are_dropped_after_use_are_told() -> None:
    model = Model()
    for param in model.opt.params:
        param.grad = Tensor.zeros_like(param).contiguous().realize()

    def train() -> dict[str, Tensor]:
        loss = model.loss().backward()
        loss.realize(*model.opt.schedule_step())
        model.opt.zero_grad()
        return {"loss": loss}

    (told,) = warned(train)
    assert "had a gradient before trace" in told


def test_lazy_gradients_from_before_are_refused_where_they_are_read() -> None:
    model = Model()
    model.loss().backward()

    def train() -> dict[str, Tensor]:
        loss = model.loss().backward()
        return {"loss": loss.realize(*model.opt.schedule_step())}

    with pytest.raises(JobError, match="has a gradient from before") as told:
        warned(train)
    assert "zero_grad()" in told.value.hint
    assert X.grad is not None


def test_gradients_from_before_that_nobody_reads_do_not_matter() -> None:
    model = Model()
    model.loss().backward()
    assert X.grad is not None

    def train() -> dict[str, Tensor]:
        model.opt.zero_grad()
        loss = model.loss().backward()
        return {"loss": loss.realize(*model.opt.schedule_step())}

    assert warned(train) == []
