"""A first job: a linear classifier of handwritten digits. docs/tutorial.md goes through it."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
from tinygrad import Tensor, nn

import p2pflop as pf

DATA = Path(__file__).parent / "data" / "digits.csv.gz"
with gzip.open(DATA, "rt") as file:
    table = np.array(list(csv.reader(file)), dtype=np.uint8)

pixels, labels = Tensor(table[:, :-1]), Tensor(table[:, -1])
layer = nn.Linear(64, 10)
optimizer = nn.optim.SGD(nn.state.get_parameters(layer), lr=0.1)


def train() -> dict[str, Tensor]:
    optimizer.zero_grad()
    picked = Tensor.randint(64, high=pixels.shape[0])
    scores = layer(pixels[picked].float() / 16)
    loss = scores.sparse_categorical_crossentropy(labels[picked]).backward()
    return {"loss": loss.realize(*optimizer.schedule_step())}


def test() -> dict[str, Tensor]:
    return {"acc": (layer(pixels.float() / 16).argmax(1) == labels).mean()}


job = pf.trace(train, steps=300, every={100: test}, seed=0, title="first")

if __name__ == "__main__":
    print(job)
    run = pf.submit(job, max_usd=0.01)
    for row in run:
        if "acc" in row:
            print(row)
    result = run.result()
    result.verify()
    print("result", result.hash)
    print("cost", result.cost_usd)
    print("weight", result.state.address("layer.weight"))
