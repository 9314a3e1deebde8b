"""Random training programs, traced and lowered, give the bytes of native tinygrad."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from tinygrad import Tensor, nn
from tinygrad.helpers import Context

from tests.native import Program, assert_equal_to_native, tensors_of

STEPS = 2
SHORT, LONG = range(1), range(1, 60)

Map = Callable[[Tensor], Tensor]

ACTIVATIONS: tuple[Map, ...] = (
    Tensor.relu,
    Tensor.gelu,
    Tensor.quick_gelu,
    Tensor.sigmoid,
    Tensor.tanh,
    Tensor.silu,
    Tensor.mish,
    Tensor.softplus,
    Tensor.sin,
    lambda x: (x * 0.3).exp(),
    lambda x: (x.square() + 1).log(),
    lambda x: (x.abs() + 0.5).sqrt(),
    lambda x: (x.abs() + 0.1).pow(1.3),
    lambda x: (x > 0).where(x, x * 0.1),
    lambda x: x.clamp(-1, 1),
)
LAYERS: tuple[Map, ...] = (
    lambda x: x,
    Tensor.softmax,
    Tensor.layernorm,
    lambda x: x.dropout(0.2),
    lambda x: x.pad(((0, 0), (1, 0)))[:, :-1],
    lambda x: x[:, : x.shape[1] // 2].cat(x[:, x.shape[1] // 2 :].exp() * 0.1, dim=1),
    lambda x: (x @ x.T).sigmoid() @ x,
    lambda x: ((x @ x.T) * 0.1).softmax() @ x,
)
OPTIMIZERS = (nn.optim.SGD, nn.optim.Adam, nn.optim.AdamW)


def program(seed: int) -> Program:
    """Two to four layers of odd widths, an activation and something else after each."""
    choose, data = random.Random(seed), np.random.default_rng(seed)  # noqa: S311 - no secrets
    rows = choose.choice([3, 8, 16, 33])
    widths = [choose.choice([4, 7, 16, 32]) for _ in range(choose.randint(2, 4))]
    x, y = (
        Tensor(data.standard_normal((rows, width)).astype(np.float32))
        for width in (widths[0], widths[-1])
    )
    layers = [nn.Linear(wide, narrow) for wide, narrow in pairwise(widths)]
    maps = [(choose.choice(ACTIVATIONS), choose.choice(LAYERS)) for _ in layers]
    opt = choose.choice(OPTIMIZERS)(nn.state.get_parameters(layers), lr=0.01)

    def train() -> dict[str, Tensor]:
        opt.zero_grad()
        with Context(TRAINING=1):
            out = x
            for layer, (activation, after) in zip(layers, maps, strict=True):
                out = after(activation(layer(out)))
            loss = (out - y).square().mean().backward()
            return {"loss": loss.realize(*opt.schedule_step())}

    return Program(train, tensors_of(layers=layers, opt=opt))


@pytest.mark.parametrize(
    "seed", [*SHORT, *(pytest.param(seed, marks=pytest.mark.slow) for seed in LONG)]
)
def test_a_random_program_gives_the_bytes_of_native_tinygrad(seed: int) -> None:
    assert_equal_to_native(lambda: program(seed), STEPS)
