"""A generative adversarial network: two phases that train in turn, the second every other step."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tinygrad import Context, Tensor, nn

import p2pflop as pf

DATA = Path(__file__).parent / "data" / "digits.csv.gz"

Step = Callable[[], dict[str, Tensor]]


class Perceptron:
    """Two linear layers."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        self.first, self.last = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def __call__(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).leaky_relu(0.2))


def program(
    hidden: int = 32, codes: int = 8, batch: int = 64
) -> tuple[dict[str, object], Step, dict[int, Step]]:
    """Both networks with their optimizers, the judge's step and the maker's with its period."""
    with gzip.open(DATA, "rt") as file:
        rows = np.array(list(csv.reader(file)), dtype=np.uint8)
    images = Tensor(rows[:, :-1])
    maker, judge = Perceptron(codes, hidden, 64), Perceptron(64, hidden, 1)
    maker_opt = nn.optim.Adam(nn.state.get_parameters(maker), lr=0.001, b1=0.5)
    judge_opt = nn.optim.Adam(nn.state.get_parameters(judge), lr=0.001, b1=0.5)

    def make() -> Tensor:
        return maker(Tensor.randn(batch, codes)).sigmoid()

    def judge_step() -> dict[str, Tensor]:
        judge_opt.zero_grad()
        real = judge(images[Tensor.randint(batch, high=len(rows))].float() / 16)
        fooled = judge(make().detach())
        loss = ((-real).softplus().mean() + fooled.softplus().mean()).backward()
        return {"judge_loss": loss.realize(*judge_opt.schedule_step())}

    def maker_step() -> dict[str, Tensor]:
        maker_opt.zero_grad()
        made = make()
        loss = (-judge(made)).softplus().mean().backward()
        with Context(TRAINING=1):  # which trace sets for the first function only
            updates = maker_opt.schedule_step()
        return {"maker_loss": loss.realize(made, *updates), "images": made[:4].reshape(4, 8, 8)}

    owners = {"maker": maker, "judge": judge, "maker_opt": maker_opt, "judge_opt": judge_opt}
    return owners, judge_step, {2: maker_step}


def make_job(steps: int = 1000, **sizes: int) -> pf.Job:
    """The job of ``steps`` steps; ``sizes`` go to ``program``."""
    with Context(DEV="CPU"):  # nothing is computed here
        Tensor.manual_seed(0)
        _, train, every = program(**sizes)
        return pf.trace(train, steps=steps, every=every, title="gan")


def main() -> None:
    """Buy the run, print both losses now and then and the last four images."""
    job = make_job()
    print(job)
    run = pf.submit(job, max_usd=0.05)
    for row in run:
        if row["step"] % 100 == 99:
            print(row)
    for image in run.result()["images"]:
        print("\n".join("".join(" .:*#"[int(value * 4.99)] for value in line) for line in image))


if __name__ == "__main__":
    main()
