"""A multi-layer perceptron with Adam on handwritten digits: the smallest real training job."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tinygrad import Context, Tensor, nn

import p2pflop as pf

DATA = Path(__file__).parent / "data" / "digits.csv.gz"
TEST_EVERY = 100

Step = Callable[[], dict[str, Tensor]]


class Net:
    """64 pixels in, ten scores out, one hidden layer between."""

    def __init__(self, hidden: int) -> None:
        self.first = nn.Linear(64, hidden)
        self.last = nn.Linear(hidden, 10)

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.last(self.first(pixels.float() / 16).relu().dropout(0.1))


def program(hidden: int = 32, batch: int = 64) -> tuple[dict[str, object], Step, dict[int, Step]]:
    """The model and its optimizer, the training step, and the test with its period."""
    with gzip.open(DATA, "rt") as file:
        rows = np.array(list(csv.reader(file)), dtype=np.uint8)
    pixels, labels = Tensor(rows[:1500, :-1]), Tensor(rows[:1500, -1])
    held_pixels, held_labels = Tensor(rows[1500:, :-1]), Tensor(rows[1500:, -1])
    net = Net(hidden)
    opt = nn.optim.Adam(nn.state.get_parameters(net), lr=0.003)

    def train() -> dict[str, Tensor]:
        opt.zero_grad()
        i = Tensor.randint(batch, high=pixels.shape[0])
        loss = net(pixels[i]).sparse_categorical_crossentropy(labels[i]).backward()
        return {"loss": loss.realize(*opt.schedule_step())}

    def test() -> dict[str, Tensor]:
        return {"acc": (net(held_pixels).argmax(1) == held_labels).mean()}

    return {"net": net, "opt": opt}, train, {TEST_EVERY: test}


def make_job(steps: int = 500, **sizes: int) -> pf.Job:
    """The job of ``steps`` steps; ``sizes`` go to ``program``."""
    with Context(DEV="CPU"):  # nothing is computed here
        Tensor.manual_seed(0)
        _, train, every = program(**sizes)
        return pf.trace(train, steps=steps, every=every, title="mlp")


def main() -> None:
    """Buy the run, print the tests as they come."""
    job = make_job()
    print(job)
    run = pf.submit(job, max_usd=0.05)
    for row in run:
        if "acc" in row:
            print(row)
    print("result", run.result().hash)


if __name__ == "__main__":
    main()
