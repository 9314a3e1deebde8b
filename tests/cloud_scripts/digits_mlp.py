"""Train a small network on handwritten digits."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
from tinygrad import Context, Tensor, TinyJit, nn

DATA = Path(__file__).parents[2] / "examples" / "data" / "digits.csv.gz"


class Net:
    def __init__(self) -> None:
        self.hidden = nn.Linear(64, 32)
        self.last = nn.Linear(32, 10)

    def __call__(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x).relu().dropout(0.2))


with gzip.open(DATA, "rt") as file:
    rows = np.loadtxt(file, delimiter=",", dtype=np.float32)
Tensor.manual_seed(42)
X, Y = Tensor(rows[:, :64] / 16), Tensor(rows[:, 64].astype(np.int32))
net = Net()
opt = nn.optim.Adam(nn.state.get_parameters(net), lr=0.005)


@TinyJit
@Context(TRAINING=1)
def step() -> Tensor:
    index = Tensor.randint(64, high=X.shape[0])
    opt.zero_grad()
    loss = net(X[index]).sparse_categorical_crossentropy(Y[index]).backward()
    return loss.realize(*opt.schedule_step())


for number in range(60):
    loss = step()
    if number % 10 == 9:
        print(number, loss.item().hex())
accuracy = (net(X).argmax(1) == Y).mean().item()
print("accuracy", accuracy.hex())
weights = nn.state.get_state_dict(net)
print(hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest())
assert accuracy > 0.5
