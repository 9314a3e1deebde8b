"""A hundred small operations without a jit, each another one, read one after the other.

STEPS makes all of them others."""

import json
import os
import time

from tinygrad import Tensor

OPERATIONS = ("exp", "sin", "sqrt", "tanh", "sigmoid", "relu", "square", "abs", "log", "softmax")
FIRST_SIZE = 3 + int(os.environ.get("STEPS", "0"))
SIZES = range(FIRST_SIZE, FIRST_SIZE + 10)

began = time.perf_counter()
total = 0.0
for size in SIZES:
    x = Tensor([1.0 + row / 8 for row in range(2 * size)]).reshape(size, 2).realize()
    for operation in OPERATIONS:
        total += getattr(x, operation)().sum(axis=0).tolist()[0]
print(json.dumps({"loss": total, "first_s": time.perf_counter() - began, "step_s": []}))
