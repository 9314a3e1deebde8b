"""What writes to its own memory, step after step: equal to native tinygrad's bytes at each step.

Optimizers step on their parameters and moments, and a cache of keys and values is assigned a slice
at a time. The twin obeys by the kernels that a provider's worker runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from tinygrad import Tensor, TinyJit, Variable, nn
from tinygrad.helpers import Context

from tests.cloud_twin import shared_twin

NATIVE = os.environ["DEV"]
CLOUD = f"CLOUD;{NATIVE}"
STEPS = 6
AT_EVERY_CHANGE = ("momentum", "adam")

Bytes = list[bytes]
"""Of every tensor that a program keeps."""
Program = Iterator[Bytes]

OPTIMIZERS: dict[str, Callable[[list[Tensor]], nn.optim.Optimizer]] = {
    "sgd": lambda p: nn.optim.SGD(p, lr=0.1),
    "momentum": lambda p: nn.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: nn.optim.Adam(p, lr=0.01),
    "adamw": lambda p: nn.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "lamb": lambda p: nn.optim.LAMB(p, lr=0.01),
    "muon": lambda p: nn.optim.Muon(p, lr=0.01),
}


def bytes_of(tensors: list[Tensor]) -> Bytes:
    return [tensor.numpy().tobytes() for tensor in tensors]


def training(make: Callable[[list[Tensor]], nn.optim.Optimizer], *, jit: bool) -> Program:
    """A layer with BatchNorm, whose statistics are assigned too."""
    Tensor.manual_seed(5)
    weight, norm = Tensor.randn(6, 4).realize(), nn.BatchNorm(4)
    optimizer = make([weight, norm.weight, norm.bias][: 1 if make is OPTIMIZERS["muon"] else 3])
    data = Tensor.randn(8, 6).realize()

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (norm(x @ weight).relu() - 1).square().mean()
        loss.backward()
        return loss.realize(*optimizer.schedule_step())

    run = TinyJit(step) if jit else step
    with Context(TRAINING=1):
        for _ in range(STEPS):
            loss = run(data)
            kept = [loss, *optimizer.params, norm.running_mean, norm.running_var]
            yield bytes_of([*kept, *nn.state.get_parameters(optimizer)])


def caching(*, jit: bool) -> Program:
    """Attention to all keys and values so far; a step writes one row of each."""
    Tensor.manual_seed(6)
    cache = Tensor.zeros(2, STEPS, 2, 4).contiguous().realize()
    weight = Tensor.randn(3, 8, 8).realize()
    inputs = [Tensor.randn(1, 8).realize() for _ in range(STEPS - 1)]

    def step(x: Tensor, at: int | Variable) -> Tensor:
        query, key, value = ((x @ weight[i]).reshape(1, 2, 4) for i in range(3))
        row = cache.shrink((None, (at, at + 1), None, None))
        row.assign(Tensor.stack(key, value)).realize()
        keys, values = (cache[i].shrink(((0, at + 1), None, None)) for i in range(2))
        scores = query.transpose(0, 1) @ keys.permute(1, 2, 0)
        return (scores.exp() @ values.transpose(0, 1)).reshape(1, 8).realize()

    run = TinyJit(step) if jit else step
    for number, x in enumerate(inputs):
        at = Variable("at", 0, STEPS - 1).bind(number) if jit else number
        out = run(x, at)
        yield bytes_of([out, cache])


def same_at_every_step(program: Callable[[], Program]) -> None:
    with Context(DEV=NATIVE):
        native = list(program())
    with Context(DEV=CLOUD):
        flop = shared_twin().table.flop
        cloud = list(program())
        assert shared_twin().table.flop > flop
    assert cloud == native
    assert all(before != after for before, after in pairwise(native)), "a step changed nothing"


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in AT_EVERY_CHANGE else [pytest.mark.slow])
        for name in OPTIMIZERS
    ],
)
def test_an_optimizer_steps_in_place(name: str, *, jit: bool) -> None:
    same_at_every_step(lambda: training(OPTIMIZERS[name], jit=jit))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_cache_is_written_a_slice_at_a_time(*, jit: bool) -> None:
    same_at_every_step(lambda: caching(jit=jit))
