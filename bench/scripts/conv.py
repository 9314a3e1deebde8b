"""A plain tinygrad script in the style of beautiful_mnist, on made-up images. Prints times."""

import json
import os
import time

import numpy as np
from tinygrad import Context, Tensor, TinyJit, nn

began = time.perf_counter()
Tensor.manual_seed(42)
rng = np.random.default_rng(0)
X = Tensor(rng.standard_normal((512, 1, 28, 28)).astype(np.float32))
Y = Tensor(rng.integers(0, 10, 512).astype(np.int32))


class Model:
    def __init__(self):
        self.layers = [
            nn.Conv2d(1, 16, 5),
            Tensor.relu,
            nn.Conv2d(16, 16, 5),
            Tensor.relu,
            nn.BatchNorm(16),
            Tensor.max_pool2d,
            nn.Conv2d(16, 32, 3),
            Tensor.relu,
            nn.BatchNorm(32),
            Tensor.max_pool2d,
            lambda x: x.flatten(1),
            nn.Linear(512, 10),
        ]

    def __call__(self, x):
        return x.sequential(self.layers)


model = Model()
opt = nn.optim.Adam(nn.state.get_parameters(model))


@TinyJit
@Context(TRAINING=1)
def step():
    opt.zero_grad()
    index = Tensor.randint(16, high=X.shape[0])
    loss = model(X[index]).sparse_categorical_crossentropy(Y[index]).backward()
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
