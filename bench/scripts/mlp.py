"""A plain tinygrad script: an MLP with dropout and Adam on made-up data. Prints times as JSON."""

import json
import os
import time

import numpy as np
from tinygrad import Context, Tensor, TinyJit, nn

began = time.perf_counter()
Tensor.manual_seed(42)
rng = np.random.default_rng(0)
data = rng.standard_normal((4096, 784)).astype(np.float32)
X, Y = Tensor(data), Tensor((data @ rng.standard_normal((784, 10))).argmax(1).astype(np.int32))


class Net:
    def __init__(self):
        self.layers = [nn.Linear(784, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 10)]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu().dropout(0.2)
        return self.layers[-1](x)


net = Net()
opt = nn.optim.Adam(nn.state.get_parameters(net), lr=1e-3)


@TinyJit
@Context(TRAINING=1)
def step():
    opt.zero_grad()
    index = Tensor.randint(256, high=X.shape[0])
    loss = net(X[index]).sparse_categorical_crossentropy(Y[index]).backward()
    opt.step()
    return loss.realize()


blocks, loss = [], 0.0
for number in range(int(os.environ.get("STEPS", "100")) // 10):
    block = time.perf_counter()
    for _ in range(10):
        value = step()
    loss = value.item()
    blocks.append((time.perf_counter() - block) / 10)
    if number == 0:
        first = time.perf_counter() - began
print(json.dumps({"loss": loss, "first_s": first, "step_s": blocks}))
