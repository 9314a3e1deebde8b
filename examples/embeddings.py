"""Turn handwritten digits into vectors with the weights of a safetensors file, batch by batch.

Run it with ``python examples/embeddings.py``, or name a file of weights of your own. Here they are
drawn from a seed: even untrained, such a network puts like images side by side. The weights travel
once, each tensor as a blob; the images are fed and the vectors come out, so that neither has to fit
in memory.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Context, Tensor, dtypes, nn

import p2pflop as pf

DATA = Path(__file__).parent / "data" / "digits.csv.gz"
BATCH = 64
WIDTH = 256

Array = np.ndarray[Any, Any]

_folder = tempfile.TemporaryDirectory(prefix="p2pflop-")


class Encoder:
    """Two convolutions and a projection: 8 x 8 pixels of 0 to 16 in, a vector of length 1 out."""

    def __init__(self) -> None:
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.project = nn.Linear(1024, WIDTH)

    def __call__(self, pixels: Tensor) -> Tensor:
        x = pixels.cast(dtypes.float32).reshape(-1, 1, 8, 8) / 16
        x = self.conv2(self.conv1(x).relu().max_pool2d()).relu()
        x = self.project(x.flatten(1))
        return x / x.square().sum(1, keepdim=True).sqrt()


def digits() -> tuple[Array, Array]:
    """Pixels and labels, as bytes."""
    with gzip.open(DATA, "rt") as file:
        rows = np.array(list(csv.reader(file)), dtype=np.uint8)
    return rows[:, :-1], rows[:, -1]


def write_weights(path: Path, seed: int = 0) -> Path:
    """Weights from a seed in a safetensors file: a header that says where each tensor is, and they.

    ``nn.state.safe_save`` writes the same, but wants a compiler for that.
    """
    draw = np.random.default_rng(seed)
    header, data = {}, b""
    with Context(DEV="CPU"):
        parameters = nn.state.get_state_dict(Encoder())
    for name, tensor in parameters.items():
        values = draw.normal(0, 0.2, tensor.shape).astype("<f4").tobytes()
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": offsets}
        data += values
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def make_job(weights: Path | str | None = None, batch: int = BATCH) -> pf.Job:
    """The job: one step for each batch of images. ``weights`` may be a path or a blob's address."""
    if weights is None:
        weights = write_weights(Path(_folder.name) / "encoder.safetensors")
    pixels, _ = digits()
    padded = np.pad(pixels, ((0, -len(pixels) % batch), (0, 0)))
    with Context(DEV="CPU"):
        encoder = Encoder()
        nn.state.load_state_dict(encoder, pf.load_safetensors(weights), verbose=False)
        images = pf.feed(padded, batch=batch)
        return pf.trace(
            lambda: {"vectors": encoder(images)},
            steps=len(padded) // batch,
            collect=["vectors"],
            title="embeddings",
        )


def neighbours(vectors: Array) -> float:
    """The share of images whose nearest other image is the same digit."""
    _, labels = digits()
    vectors = vectors.reshape(-1, WIDTH)[: len(labels)]
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -1)
    return float((labels[likeness.argmax(1)] == labels).mean())


def main() -> None:
    """Submit the job to the cheapest provider and look at the vectors that come back."""
    job = make_job(sys.argv[1] if len(sys.argv) > 1 else None)
    print(job)
    result = pf.submit(job, max_usd=0.05).result()
    print(f"result {result.hash}, ${result.cost_usd:.9f}")
    print(f"nearest neighbour is the same digit: {neighbours(result['vectors']):.1%}")


if __name__ == "__main__":
    main()
