"""Convolutions, batch norm and pooling, trained as in tinygrad's beautiful_mnist."""

from collections.abc import Callable

import numpy as np
from tinygrad import Context, GlobalCounters, Tensor, TinyJit, nn


class Model:
    def __init__(self) -> None:
        self.layers: list[Callable[[Tensor], Tensor]] = [
            nn.Conv2d(1, 4, 3), Tensor.relu,
            nn.BatchNorm(4), Tensor.max_pool2d,
            nn.Conv2d(4, 8, 3), Tensor.relu,
            lambda x: x.flatten(1), nn.Linear(8 * 3 * 3, 4),
        ]  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        return x.sequential(self.layers)


Tensor.manual_seed(1)
generator = np.random.default_rng(0)
images = generator.random((64, 1, 12, 12), dtype=np.float32)
labels = (images[:, 0, :6].mean((1, 2)) > 0.5).astype(np.int32)
X_train, Y_train = Tensor(images), Tensor(labels)
model = Model()
opt = nn.optim.AdamW(nn.state.get_parameters(model), lr=0.01)


@TinyJit
@Context(TRAINING=1)
def train_step() -> Tensor:
    opt.zero_grad()
    samples = Tensor.randint(16, high=X_train.shape[0])
    loss = model(X_train[samples]).sparse_categorical_crossentropy(Y_train[samples]).backward()
    return loss.realize(*opt.schedule_step())


@TinyJit
def get_test_acc() -> Tensor:
    return (model(X_train).argmax(axis=1) == Y_train).mean() * 100


for i in range(8):
    GlobalCounters.reset()
    loss = train_step()
    accuracy = get_test_acc().item() if i % 2 else float("nan")
    print(i, loss.item().hex(), accuracy.hex())
for name, weight in nn.state.get_state_dict(model).items():
    print(name, weight.float().sum().item().hex())
