"""A character GPT on the Constitution of the United States: AdamW, a cosine schedule, clipping.

The learning rate is a state that each step assigns from ``pf.step``. The text travels once, as a
blob of 45 kB; the job is a few kilobytes, and each further layer adds a few hundred bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tinygrad import Context, Tensor, dtypes, nn

import p2pflop as pf

DATA = Path(__file__).parent / "data" / "us-constitution.txt"
RATE, WARM_UP, MAX_NORM = 0.002, 20, 1.0

Step = Callable[[], dict[str, Tensor]]


class Block:
    """Causal attention and a feed-forward layer, each after a LayerNorm and added."""

    def __init__(self, width: int, heads: int) -> None:
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def __call__(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norm1(x)
        split = (batch, length, self.heads, width // self.heads)
        query, key, value = (
            layer(y).reshape(split).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = query.scaled_dot_product_attention(key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.narrow(self.wide(self.norm2(x)).gelu())


class GPT:
    """Characters by number in, scores of the next character out."""

    def __init__(self, kinds: int, layers: int, width: int, heads: int, context: int) -> None:
        self.characters, self.places = nn.Embedding(kinds, width), nn.Embedding(context, width)
        self.blocks = [Block(width, heads) for _ in range(layers)]
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, kinds, bias=False)

    def __call__(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.places(Tensor.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def program(
    steps: int = 1000,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    context: int = 64,
    batch: int = 8,
) -> tuple[dict[str, object], Step, dict[int, Step]]:
    """The model and its optimizer, and the training step of a run of ``steps``."""
    kinds, numbers = np.unique(np.frombuffer(DATA.read_bytes(), np.uint8), return_inverse=True)
    text = Tensor(numbers.astype(np.uint8))
    net = GPT(len(kinds), layers, width, heads, context)
    opt = nn.optim.AdamW(nn.state.get_parameters(net), lr=RATE, weight_decay=0.1)

    def train() -> dict[str, Tensor]:
        opt.zero_grad()
        starts = Tensor.randint(batch, 1, high=len(numbers) - context - 1)
        picked = text[starts + Tensor.arange(context + 1)].cast(dtypes.int32)
        scores, wanted = net(picked[:, :-1]), picked[:, 1:]
        loss = scores.sparse_categorical_crossentropy(wanted).backward()
        norm = Tensor.usum(*[param.grad.square().sum() for param in opt.params]).sqrt()
        shrink = (MAX_NORM / (norm + 1e-6)).clip(max_=1.0)
        for param in opt.params:
            param.grad = param.grad * shrink
        warm = ((pf.step + 1) / WARM_UP).clip(max_=1.0)
        cosine = (pf.step * (math.pi / steps)).cos() * 0.45 + 0.55
        opt.lr.assign((RATE * warm * cosine).reshape(1).cast(opt.lr.dtype))
        return {"loss": loss.realize(norm, opt.lr, *opt.schedule_step()), "norm": norm}

    return {"net": net, "opt": opt}, train, {}


def make_job(steps: int = 1000, **sizes: int) -> pf.Job:
    """The job of ``steps`` steps; ``sizes`` go to ``program``."""
    with Context(DEV="CPU"):  # nothing is computed here
        Tensor.manual_seed(0)
        _, train, every = program(steps, **sizes)
        return pf.trace(train, steps=steps, every=every, title="gpt")


def main() -> None:
    """Buy the run, print every hundredth loss."""
    job = make_job()
    print(job)
    run = pf.submit(job, max_usd=0.5)
    for row in run:
        if row["step"] % 100 == 0:
            print(row)
    print("result", run.result().hash)


if __name__ == "__main__":
    main()
