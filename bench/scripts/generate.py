"""A generation of STEPS tokens: attention with a cache, by a Variable. Prints times."""

import json
import os
import time

from tinygrad import Tensor, TinyJit, Variable, nn

began = time.perf_counter()
Tensor.manual_seed(3)
DIM, HEADS, CONTEXT, VOCAB, LAYERS, BLOCK = 128, 4, 128, 500, 3, 10
STEPS = int(os.environ.get("STEPS", "60"))


class Attention:
    def __init__(self) -> None:
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.cache_kv = Tensor.zeros(2, 1, CONTEXT, HEADS, DIM // HEADS).contiguous().realize()

    def __call__(self, x: Tensor, start_pos: Variable) -> Tensor:
        bsz, seqlen, _ = x.shape
        q, k, v = (
            w(x).reshape(bsz, seqlen, HEADS, DIM // HEADS) for w in (self.wq, self.wk, self.wv)
        )
        self.cache_kv[:, :, start_pos : start_pos + seqlen, :, :].assign(
            Tensor.stack(k, v)
        ).realize()
        keys = self.cache_kv[0, :, 0 : start_pos + seqlen, :, :]
        values = self.cache_kv[1, :, 0 : start_pos + seqlen, :, :]
        q, keys, values = q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        out = q.scaled_dot_product_attention(keys, values).transpose(1, 2)
        return self.wo(out.reshape(bsz, seqlen, -1))


class Model:
    def __init__(self) -> None:
        self.embed = nn.Embedding(VOCAB, DIM)
        self.position = nn.Embedding(CONTEXT, DIM)
        self.layers = [Attention() for _ in range(LAYERS)]
        self.norm = nn.LayerNorm(DIM)
        self.out = nn.Linear(DIM, VOCAB, bias=False)
        self.positions = Tensor.arange(0, CONTEXT).reshape(1, -1).contiguous().realize()
        self.jit = TinyJit(self.forward)

    def forward(self, token: Tensor, start_pos: Variable) -> Tensor:
        x = self.embed(token) + self.position(
            self.positions.shrink((None, (start_pos, start_pos + 1)))
        )
        for layer in self.layers:
            x = x + layer(self.norm(x), start_pos)
        return self.out(self.norm(x))[:, -1, :].realize()

    def __call__(self, token: Tensor, start_pos: int) -> Tensor:
        return self.jit(token, Variable("start_pos", 0, CONTEXT - 1).bind(start_pos))


model = Model()
token = 7
tokens, blocks, first_s = [], [], 0.0
for first in range(0, STEPS, BLOCK):
    started = time.perf_counter()
    for position in range(first, first + BLOCK):
        token = int(model(Tensor([[token]]).realize(), position).argmax().item())
        tokens.append(token)
    if first == 0:
        first_s = time.perf_counter() - began
    else:
        blocks.append((time.perf_counter() - started) / BLOCK)
print(json.dumps({"loss": tokens, "first_s": first_s, "step_s": blocks}))
