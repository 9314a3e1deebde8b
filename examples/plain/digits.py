"""Handwritten digits in plain tinygrad. It knows nothing of p2pflop: CLOUD=1 runs it elsewhere."""

import csv
import gzip
from pathlib import Path

import numpy as np
from tinygrad import Context, Tensor, TinyJit, nn

DATA = Path(__file__).parents[1] / "data" / "digits.csv.gz"
with gzip.open(DATA, "rt") as file:
    table = np.array(list(csv.reader(file)), dtype=np.uint8)
pixels, labels = Tensor(table[:1500, :-1]), Tensor(table[:1500, -1])
held_pixels, held_labels = Tensor(table[1500:, :-1]), Tensor(table[1500:, -1])

Tensor.manual_seed(1)
first, last = nn.Linear(64, 64), nn.Linear(64, 10)
opt = nn.optim.Adam(nn.state.get_parameters([first, last]), lr=0.002)


def scores(picked: Tensor) -> Tensor:
    return last(first(picked.float() / 16).relu().dropout(0.2))


@TinyJit
@Context(TRAINING=1)
def step() -> Tensor:
    opt.zero_grad()
    i = Tensor.randint(64, high=pixels.shape[0])
    loss = scores(pixels[i]).sparse_categorical_crossentropy(labels[i]).backward()
    return loss.realize(*opt.schedule_step())


for number in range(1, 2001):
    loss = step()
    if number % 200 == 0:  # reading is what takes a round trip
        print(f"step {number:4}  loss {loss.item():.9g}", flush=True)
accuracy = (scores(held_pixels).argmax(1) == held_labels).mean().item()
print(f"accuracy on held-out digits: {accuracy:.1%}")
