"""Attention with a cache, as in models of tinygrad's own: a token at a time, by a Variable."""

import os

from tinygrad import Tensor, TinyJit, Variable, nn

Tensor.manual_seed(3)
DIM, HEADS, CONTEXT, VOCAB = 32, 4, 24, 50


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
        self.layers = [Attention() for _ in range(2)]
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
for position in range(int(os.environ.get("TOKENS", "12"))):
    logits = model(Tensor([[token]]).realize(), position).numpy()[0]
    token = int(logits.argmax())
    print(token, logits.tobytes().hex())
