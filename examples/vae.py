"""A variational autoencoder of handwritten digits: randomness inside the loss, images as output."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tinygrad import Context, Tensor, nn

import p2pflop as pf

DATA = Path(__file__).parent / "data" / "digits.csv.gz"
SHOW_EVERY = 100

Step = Callable[[], dict[str, Tensor]]


class VAE:
    """64 pixels to a mean and a logarithm of a variance of a few codes, and back."""

    def __init__(self, hidden: int, codes: int) -> None:
        self.inward, self.mean = nn.Linear(64, hidden), nn.Linear(hidden, codes)
        self.spread = nn.Linear(hidden, codes)
        self.outward, self.pixels = nn.Linear(codes, hidden), nn.Linear(hidden, 64)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance."""
        x = self.inward(pixels).relu()
        return self.mean(x), self.spread(x)

    def decode(self, codes: Tensor) -> Tensor:
        """Logits of the pixels."""
        return self.pixels(self.outward(codes).relu())


def program(
    hidden: int = 32, codes: int = 4, batch: int = 64
) -> tuple[dict[str, object], Step, dict[int, Step]]:
    """The model and its optimizer, the training step, and what draws new images."""
    with gzip.open(DATA, "rt") as file:
        rows = np.array(list(csv.reader(file)), dtype=np.uint8)
    images = Tensor(rows[:, :-1])
    net = VAE(hidden, codes)
    opt = nn.optim.Adam(nn.state.get_parameters(net), lr=0.003)

    def train() -> dict[str, Tensor]:
        opt.zero_grad()
        pixels = images[Tensor.randint(batch, high=len(rows))].float() / 16
        mean, spread = net.encode(pixels)
        drawn = mean + (spread * 0.5).exp() * Tensor.randn(batch, codes)
        loss = net.decode(drawn).binary_crossentropy_logits(pixels, reduction="sum") / batch
        far = (mean.square() + spread.exp() - spread - 1).sum() * 0.5 / batch
        total = (loss + far).backward()
        return {"loss": total.realize(far, *opt.schedule_step()), "far": far}

    def show() -> dict[str, Tensor]:
        return {"images": net.decode(Tensor.randn(4, codes)).sigmoid().reshape(4, 8, 8)}

    return {"net": net, "opt": opt}, train, {SHOW_EVERY: show}


def make_job(steps: int = 500, **sizes: int) -> pf.Job:
    """The job of ``steps`` steps; ``sizes`` go to ``program``."""
    with Context(DEV="CPU"):  # nothing is computed here
        Tensor.manual_seed(0)
        _, train, every = program(**sizes)
        return pf.trace(train, steps=steps, every=every, title="vae")


def main() -> None:
    """Buy the run, print every hundredth loss and the last four images."""
    job = make_job()
    print(job)
    run = pf.submit(job, max_usd=0.05)
    for row in run:
        if row["step"] % 100 == 0:
            print(row)
    for image in run.result()["images"]:
        print("\n".join("".join(" .:*#"[int(value * 4.99)] for value in line) for line in image))


if __name__ == "__main__":
    main()
