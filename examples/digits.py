"""Train a small convolutional network on handwritten digits, on whatever machine is cheapest.

Run it with ``python examples/digits.py``. The job that travels is a few kilobytes: the step, the
test, and how the weights are born from the seed. The images travel once, as blobs.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Context, Tensor, dtypes, nn

import p2pflop as pf

DATA = Path(__file__).parent / "data" / "digits.csv.gz"
BATCH = 64
STEPS = 800
TEST_EVERY = 100
WEIGHT = "net.out.weight"

Array = np.ndarray[Any, Any]
Step = Callable[[], dict[str, Tensor]]


class Net:
    """Two convolutions and a linear layer: 8 x 8 pixels of 0 to 16 in, ten scores out."""

    def __init__(self) -> None:
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.out = nn.Linear(128, 10)

    def __call__(self, pixels: Tensor) -> Tensor:
        x = pixels.cast(dtypes.float32).reshape(-1, 1, 8, 8) / 16
        x = self.conv1(x).relu().max_pool2d()
        x = self.conv2(x).relu().max_pool2d()
        return self.out(x.flatten(1).dropout(0.25))


def digits() -> tuple[Array, Array, Array, Array]:
    """Pixels and labels to learn from, pixels and labels held out (every sixth), as bytes."""
    with gzip.open(DATA, "rt") as file:
        rows = np.array(list(csv.reader(file)), dtype=np.uint8)
    held_out = np.arange(len(rows)) % 6 == 5
    train, test = rows[~held_out], rows[held_out]
    return train[:, :-1], train[:, -1], test[:, :-1], test[:, -1]


def program(seed: int = 0) -> tuple[Net, Step, Step]:
    """The network, its training step and its test, as one would write them to run them here."""
    Tensor.manual_seed(seed)
    X, Y, Xt, Yt = (Tensor(array) for array in digits())  # noqa: N806
    net = Net()
    opt = nn.optim.Adam(nn.state.get_parameters(net), lr=0.002)

    def train() -> dict[str, Tensor]:
        opt.zero_grad()
        i = Tensor.randint(BATCH, high=X.shape[0])
        loss = net(X[i]).sparse_categorical_crossentropy(Y[i]).backward()
        return {"loss": loss.realize(*opt.schedule_step())}

    def test() -> dict[str, Tensor]:
        return {"acc": (net(Xt).argmax(1) == Yt).mean()}

    return net, train, test


def make_job(steps: int = STEPS, seed: int = 0) -> pf.Job:
    """The job: ``steps`` steps of training, and the test after every 100."""
    # Nothing is computed here, so tinygrad need not look for a GPU or a compiler.
    with Context(DEV="CPU"):
        _, train, test = program(seed)
        return pf.trace(train, steps=steps, every={TEST_EVERY: test}, seed=seed, title="digits")


def evaluate(weights: Mapping[str, Array]) -> float:
    """The share of held-out digits that the weights get right, in plain numpy."""
    _, _, pixels, labels = digits()
    x = pixels.astype(np.float32).reshape(-1, 1, 8, 8) / 16
    for layer in ("net.conv1", "net.conv2"):
        x = _conv(x, weights[f"{layer}.weight"]) + weights[f"{layer}.bias"][:, None, None]
        n, channels, height, width = x.shape
        x = np.maximum(x, 0).reshape(n, channels, height // 2, 2, width // 2, 2).max((3, 5))
    scores = x.reshape(len(x), -1) @ weights["net.out.weight"].T + weights["net.out.bias"]
    return float((scores.argmax(1) == labels).mean())


def _conv(x: Array, kernel: Array) -> Array:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.tensordot(windows, kernel, axes=([1, 4, 5], [1, 2, 3])).transpose(0, 3, 1, 2)


def main() -> None:
    """Submit the job to the cheapest provider, print its rows, check the weights that come back."""
    job = make_job()
    print(job)
    run = pf.submit(job, max_usd=0.05)
    for row in run:
        if "acc" in row:
            print(row)
    result = run.result()
    print(f"result {result.hash}, at the provider's price ${result.cost_usd:.6f}")
    print(f"held-out accuracy of the fetched weights: {evaluate(result.state):.1%}")
    with pf.Client() as client:
        url = client.status()["url"]
    print("each tensor is a blob; this fetches net.out.weight from your node:")
    print(f"curl --fail {url}/blob/{result.state.address(WEIGHT)} --output weight.bin")


if __name__ == "__main__":
    main()
