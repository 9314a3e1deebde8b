"""A plain tinygrad script: a small transformer with AdamW on made-up text. Prints times as JSON."""

import json
import os
import time

import numpy as np
from tinygrad import Context, Tensor, TinyJit, nn

began = time.perf_counter()
Tensor.manual_seed(42)
WIDTH, HEADS, LENGTH, KINDS = 128, 4, 64, 64
text = Tensor(np.random.default_rng(0).integers(0, KINDS, 20_000).astype(np.int32))


class Block:
    def __init__(self):
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mixed, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def __call__(self, x):
        batch, length, _ = x.shape
        mixed = self.mixed(self.norm1(x)).reshape(batch, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = (mixed[:, :, part].transpose(1, 2) for part in range(3))
        y = query.scaled_dot_product_attention(key, value, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.narrow(self.wide(self.norm2(x)).gelu())


class GPT:
    def __init__(self):
        self.tokens, self.places = nn.Embedding(KINDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = [Block(), Block()]
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, KINDS, bias=False)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.places(Tensor.arange(tokens.shape[1]))
        return self.head(self.norm(x.sequential(self.blocks)))


net = GPT()
opt = nn.optim.AdamW(nn.state.get_parameters(net), lr=1e-3)


@TinyJit
@Context(TRAINING=1)
def step():
    opt.zero_grad()
    starts = Tensor.randint(8, 1, high=text.shape[0] - LENGTH - 1)
    picked = text[starts + Tensor.arange(LENGTH + 1)]
    loss = net(picked[:, :-1]).sparse_categorical_crossentropy(picked[:, 1:]).backward()
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
