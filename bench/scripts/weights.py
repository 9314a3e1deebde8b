"""A plain tinygrad script that loads 100 MB of weights and runs a step. Prints times as JSON."""

import json
import sys
import time

from tinygrad import Tensor, TinyJit, nn

began = time.perf_counter()
state = nn.state.safe_load(sys.argv[1])
weights = [tensor.to(None).realize() for tensor in state.values()]
Tensor.manual_seed(1)


@TinyJit
def step(x):
    for weight in weights:
        x = (x @ weight).tanh()
    return x.sum().realize()


total = step(Tensor.ones(1, weights[0].shape[0]).contiguous().realize()).item()
first = time.perf_counter() - began
# What a lease holds is moved when its provider ends: this reads on until told to stop.
beats = []
for _ in range(int(sys.argv[2])):
    beat = time.perf_counter()
    step(Tensor.ones(1, weights[0].shape[0]).contiguous().realize()).item()
    beats.append(time.perf_counter() - beat)
    time.sleep(0.1)
print(json.dumps({"total": total, "first_s": first, "beats_s": beats}))
