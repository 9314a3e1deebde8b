"""A convolutional network with BatchNorm and AdamW: running statistics are state like weights.

The best weights of all tests are kept in the graph, so that the job's result has them at its end.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tinygrad import Context, Tensor, nn

import p2pflop as pf

DATA = Path(__file__).parent / "data" / "digits.csv.gz"
TEST_EVERY = 50

Step = Callable[[], dict[str, Tensor]]


class Net:
    """Two convolutions of 3 x 3 with BatchNorm, and a linear layer."""

    def __init__(self, channels: int) -> None:
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm(channels)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm(2 * channels)
        self.out = nn.Linear(8 * channels, 10)

    def __call__(self, pixels: Tensor) -> Tensor:
        x = pixels.float().reshape(-1, 1, 8, 8) / 16
        x = self.norm1(self.conv1(x)).relu().max_pool2d()
        x = self.norm2(self.conv2(x)).relu().max_pool2d()
        return self.out(x.flatten(1))


def program(channels: int = 8, batch: int = 64) -> tuple[dict[str, object], Step, dict[int, Step]]:
    """The model and its optimizer, the training step, and the test with its period."""
    with gzip.open(DATA, "rt") as file:
        rows = np.array(list(csv.reader(file)), dtype=np.uint8)
    pixels, labels = Tensor(rows[:1500, :-1]), Tensor(rows[:1500, -1])
    held_pixels, held_labels = Tensor(rows[1500:, :-1]), Tensor(rows[1500:, -1])
    net = Net(channels)
    # All of them, the running statistics too: those it does not train are realized with the rest.
    opt = nn.optim.AdamW(nn.state.get_parameters(net), lr=0.003, weight_decay=0.05)
    best, best_weight = Tensor.zeros(1).contiguous(), Tensor.zeros(10, 8 * channels).contiguous()

    def train() -> dict[str, Tensor]:
        opt.zero_grad()
        i = Tensor.randint(batch, high=pixels.shape[0])
        loss = net(pixels[i]).sparse_categorical_crossentropy(labels[i]).backward()
        return {"loss": loss.realize(*opt.schedule_step())}

    def test() -> dict[str, Tensor]:
        acc = (net(held_pixels).argmax(1) == held_labels).mean()
        better = acc > best
        best_weight.assign(better.where(net.out.weight, best_weight))
        best.assign(better.where(acc, best))
        return {"acc": acc.realize(best, best_weight)}

    owners = {"net": net, "opt": opt, "best": best, "best_weight": best_weight}
    return owners, train, {TEST_EVERY: test}


def make_job(steps: int = 300, **sizes: int) -> pf.Job:
    """The job of ``steps`` steps; ``sizes`` go to ``program``."""
    with Context(DEV="CPU"):  # nothing is computed here
        Tensor.manual_seed(0)
        _, train, every = program(**sizes)
        return pf.trace(train, steps=steps, every=every, title="conv")


def main() -> None:
    """Buy the run, print the tests as they come."""
    job = make_job()
    print(job)
    run = pf.submit(job, max_usd=0.05)
    for row in run:
        if "acc" in row:
            print(row)
    result = run.result()
    print("best", result.state["best"], "result", result.hash)


if __name__ == "__main__":
    main()
