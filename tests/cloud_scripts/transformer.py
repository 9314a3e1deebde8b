"""A small transformer that learns to copy, and then writes."""

import numpy as np
from tinygrad import Context, Tensor, nn

WIDTH, HEADS, LENGTH, WORDS = 16, 2, 8, 11


class Block:
    def __init__(self) -> None:
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def __call__(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (
            t.reshape(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2) for t in (q, k, v)
        )
        mixed = q.scaled_dot_product_attention(k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(self.up(self.norm2(x)).gelu())


class Transformer:
    def __init__(self) -> None:
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.block, self.norm = Block(), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def __call__(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(Tensor.arange(tokens.shape[1]))
        return self.head(self.norm(self.block(x)))


Tensor.manual_seed(3)
model = Transformer()
opt = nn.optim.AdamW(nn.state.get_parameters(model), lr=0.01)
generator = np.random.default_rng(0)
for i in range(3):
    text = Tensor(generator.integers(0, WORDS, (4, LENGTH)).astype(np.int32))
    with Context(TRAINING=1):
        opt.zero_grad()
        loss = model(text[:, :-1]).sparse_categorical_crossentropy(text[:, 1:]).backward()
        opt.step()
    print(i, loss.item().hex())
written = [1, 2]
for _ in range(2):
    logits = model(Tensor([written]))[0, -1]
    written.append(int(logits.argmax().item()))
print(written, logits.max().item().hex())
