"""Twelve learning rates at once: one graph, one plan, one budget.

Run it with ``python examples/sweep.py``. The learning rate is an argument of the job, so that all
twelve runs share what travels and what is compiled. A run whose loss explodes is ended by itself.
"""

from __future__ import annotations

import csv
import gzip
import math
from pathlib import Path

import numpy as np
from tinygrad import Context, Tensor, nn

import p2pflop as pf

DATA = Path(__file__).parent / "data" / "digits.csv.gz"
STEPS = 200
RATES = [round(0.002 * 2**power, 3) for power in range(12)]
EXPLODED = 50.0


def make_job(steps: int = STEPS, seed: int = 0) -> pf.Job:
    """A network with one hidden layer that learns digits by SGD at the rate ``lr``."""
    Tensor.manual_seed(seed)
    with gzip.open(DATA, "rt") as file:
        table = np.array(list(csv.reader(file)), dtype=np.uint8)
    pixels, labels = Tensor(table[:, :-1]), Tensor(table[:, -1])
    hidden, out = nn.Linear(64, 32), nn.Linear(32, 10)
    optimizer = nn.optim.SGD(nn.state.get_parameters([hidden, out]), lr=0.1)

    def scores(images: Tensor) -> Tensor:
        return out(hidden(images.float() / 16).relu())

    def train(lr: Tensor) -> dict[str, Tensor]:
        optimizer.lr.assign(lr.reshape(1))
        optimizer.zero_grad()
        picked = Tensor.randint(64, high=pixels.shape[0])
        loss = scores(pixels[picked]).sparse_categorical_crossentropy(labels[picked]).backward()
        return {"loss": loss.realize(*optimizer.schedule_step())}

    def test() -> dict[str, Tensor]:
        return {"acc": (scores(pixels).argmax(1) == labels).mean()}

    with Context(DEV="CPU"):
        return pf.trace(
            train, steps=steps, every={100: test}, seed=seed, args={"lr": 0.1}, title="sweep"
        )


def exploded(row: pf.Row) -> bool:
    """Whether a run is not worth going on with."""
    return not math.isfinite(row.get("loss", 0.0)) or row.get("loss", 0.0) > EXPLODED


def main(client: pf.Client | None = None) -> pf.Sweep:
    """Buy the sweep, and tell how each run ends and which was best."""
    args = [{"lr": rate} for rate in RATES]
    sweep = pf.map(make_job(), args, max_usd=0.01, under_way=2, prune_if=exploded, client=client)
    for outcome in sweep:
        print(f"lr={outcome.args['lr']:<6} {outcome.state:<9} {outcome.row}")
    best, result = sweep.best("acc", max)
    print(f"best: lr={best.args['lr']} with accuracy {result['acc'][-1]:.4f}")
    print(f"cost: {sweep.progress().spent_nusd} nano-dollars")
    return sweep


if __name__ == "__main__":
    main()
