"""``pf.step``: the number of the step, anywhere in a program."""

from __future__ import annotations

import numpy as np
import pytest
from tinygrad import Tensor, dtypes, nn

import p2pflop as pf
from p2pflop.ids import content_hash
from p2pflop.job.spec import ROLE_STEP
from p2pflop.kernels.trace import trace
from tests.native import Program, assert_equal_to_native, replay, tensors_of

ROWS = np.random.default_rng(1).standard_normal((12, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def _new_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pflop.kernels.steps._steps", {})


def test_outside_a_job_it_is_zero() -> None:
    assert (pf.step.item(), pf.step.dtype, pf.step.shape) == (0, dtypes.int32, ())
    assert pf.step is pf.step


def test_it_and_a_parameter_named_step_are_one_slot() -> None:
    total = Tensor.zeros(1)

    def step(step: Tensor) -> None:
        total.assign(total + step * pf.step)

    traced = trace(step, steps=2, address_of=content_hash)
    assert traced.labels.params.count("step") == 1
    assert traced.inputs == {}


def test_rows_and_a_cosine_schedule_by_step_equal_native_tinygrad() -> None:
    def make() -> Program:
        rows, layer = Tensor(ROWS), nn.Linear(4, 2)
        opt = nn.optim.AdamW(nn.state.get_parameters(layer), lr=0.1)
        last = Tensor.zeros(4).contiguous()

        def train() -> dict[str, Tensor]:
            opt.zero_grad()
            opt.lr.assign((pf.step.float() / 5).cos().reshape(1) * 0.05 + 0.05)
            picked = rows[pf.step % 12]
            loss = layer(picked).square().mean().backward()
            last.assign(picked)
            return {"loss": loss.realize(last, opt.lr, *opt.schedule_step())}

        return Program(train, tensors_of(layer=layer, opt=opt, last=last))

    assert_equal_to_native(make, 4, pf.step)


def test_what_was_computed_from_it_before_the_trace_follows_it() -> None:
    rate = (pf.step + 1) * 0.5
    total = Tensor.zeros(1)

    def step() -> None:
        total.assign(total + rate)

    replayed = replay(Program(step, {}), 3)
    roles = [param.role for param in replayed.job.work.params]
    assert roles.count(ROLE_STEP) == 1
    session = replayed.session()
    for number in range(3):
        session.step(number)
    slot = replayed.traced.labels.params.index("total")
    assert np.frombuffer(session.read(slot), np.float32).tolist() == [0.5 + 1 + 1.5]


def test_a_realized_step_is_the_step_as_well() -> None:
    pf.step.realize()
    traced = trace(lambda: {"twice": pf.step * 2}, steps=2, address_of=content_hash)
    assert traced.labels.params == ("step",)
