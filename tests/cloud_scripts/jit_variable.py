"""A jitted step with a Variable: a cache that is written at a place and read up to it."""

import tempfile
from pathlib import Path

import numpy as np
from tinygrad import Tensor, TinyJit, Variable
from tinygrad.nn.state import safe_load, safe_save

cache = Tensor.zeros(8, 4).contiguous().realize()
weight = Tensor(np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)).realize()


@TinyJit
def write(x: Tensor, place: Variable) -> Tensor:
    cache[place : place + 1].assign((x @ weight).reshape(1, 4)).realize()
    return cache[: place + 1].max(0).realize()


@TinyJit
def twice(x: Tensor) -> Tensor:
    return (x * 2).realize()


for number in range(6):
    place = Variable("place", 0, 7).bind(number)
    x = Tensor(np.full((1, 4), number, np.float32)).realize()
    print(number, [v.hex() for v in write(x, place).tolist()])
print(cache.tolist())
y = Tensor([1.0, 2.0]).realize()
for _ in range(5):
    y = twice(y)  # its own output comes in again
    print(y.tolist())
rows = Tensor.arange(12).reshape(3, 4).contiguous().realize()
for row in range(3):
    print((rows[row] * 2).tolist())
with tempfile.TemporaryDirectory() as folder:
    path = str(Path(folder) / "cache.safetensors")
    safe_save({"cache": cache, "weight": weight}, path)
    loaded = safe_load(path)
    print((loaded["cache"].to(None) + 1).tolist())
    print(Tensor(Path(path))[:8].tolist())
print(cache.to("CPU").numpy().sum())
