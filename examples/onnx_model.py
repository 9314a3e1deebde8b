"""Read handwritten digits with a model that came as an ONNX file, as PyTorch writes them.

Run it with ``python examples/onnx_model.py``. The weights travel once, as blobs; the images are fed
in batches, and the chances of all ten digits come back for each image.
"""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Context

import p2pflop as pf

FOLDER = Path(__file__).parent / "data"
MODEL = FOLDER / "digits.onnx"
BATCH = 23

Array = np.ndarray[Any, Any]


def held_out() -> tuple[Array, Array]:
    """Pixels and labels of every sixth digit, as bytes; the model has not seen them."""
    with gzip.open(FOLDER / "digits.csv.gz", "rt") as file:
        rows = np.array(list(csv.reader(file)), dtype=np.uint8)[5::6]
    return rows[:, :-1], rows[:, -1]


def make_job(batch: int = BATCH) -> pf.Job:
    """The job: one step for each batch of the images that were held out."""
    pixels, _ = held_out()
    with Context(DEV="CPU"):
        return pf.trace_onnx(MODEL, inputs={"pixels": pf.feed(pixels, batch=batch)})


def accuracy(chances: Array) -> float:
    """The share of images whose likeliest digit is the right one."""
    _, labels = held_out()
    return float((chances.reshape(-1, 10).argmax(1) == labels).mean())


def main() -> None:
    """Submit the job to the cheapest provider and see how many digits it read."""
    job = make_job()
    print(job)
    result = pf.submit(job, max_usd=0.01).result()
    print(f"result {result.hash}, ${result.cost_usd:.9f}")
    print(f"digits read: {accuracy(result['chances']):.1%}")


if __name__ == "__main__":
    main()
