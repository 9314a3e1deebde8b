"""``WORKERS`` threads, each with tensors of its own, all in one session."""

import os
from concurrent.futures import ThreadPoolExecutor

from tinygrad import Tensor


def work(number: int) -> list[float]:
    """Squares a matrix, writes to slices of it, lets buffers go and reads back."""
    x = Tensor.full((16, 16), 1.0 + number).contiguous().realize()
    told = []
    for step in range(12):
        y = (x @ x * 0.001 + number).realize()
        y[step % 16] = float(step)
        x = (y + Tensor([float(number)] * 16)).realize()
        if step % 3 == 2:
            told.append(x.sum().item())
    return told


with ThreadPoolExecutor(int(os.environ["WORKERS"])) as pool:
    for numbers in pool.map(work, range(8)):
        print(numbers)
