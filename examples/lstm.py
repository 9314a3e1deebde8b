"""A recurrent network: an LSTM that learns the next character of a text, unrolled in the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tinygrad import Context, Tensor, nn

import p2pflop as pf

DATA = Path(__file__).parent / "data" / "us-constitution.txt"

Step = Callable[[], dict[str, Tensor]]


class Cell:
    """An LSTM cell with layers of its own for each gate.

    ``nn.LSTMCell`` has one for all four. Its gradient pads the four into one matrix, and each is
    computed for the places of all: twice the work, and longer to lower.
    """

    def __init__(self, width: int) -> None:
        self.inward = [nn.Linear(width, width) for _ in range(4)]
        self.onward = [nn.Linear(width, width, bias=False) for _ in range(4)]

    def __call__(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, memory = state
        pairs = zip(self.inward, self.onward, strict=True)
        taken, kept, new, shown = [inward(x) + onward(hidden) for inward, onward in pairs]
        memory = kept.sigmoid() * memory + taken.sigmoid() * new.tanh()
        return shown.sigmoid() * memory.tanh(), memory


class Net:
    """An embedding, one LSTM cell used for every character, and scores."""

    def __init__(self, kinds: int, width: int) -> None:
        self.characters = nn.Embedding(kinds, width)
        self.cell = Cell(width)
        self.head = nn.Linear(width, kinds)

    def __call__(self, text: Tensor) -> Tensor:
        x, outputs = self.characters(text), []
        hidden = memory = Tensor.zeros(*x[:, 0].shape, buffer=False)
        for place in range(text.shape[1]):
            hidden, memory = self.cell(x[:, place], (hidden, memory))
            # Kept in memory at each place: fused over all of them it takes minutes to lower.
            hidden, memory = hidden.contiguous(), memory.contiguous()
            outputs.append(hidden)
        return self.head(Tensor.stack(*outputs, dim=1))


def program(
    width: int = 32, length: int = 5, batch: int = 32
) -> tuple[dict[str, object], Step, dict[int, Step]]:
    """The model and its optimizer, and the training step."""
    kinds, numbers = np.unique(np.frombuffer(DATA.read_bytes(), np.uint8), return_inverse=True)
    text = Tensor(numbers.astype(np.int32))
    net = Net(len(kinds), width)
    opt = nn.optim.Adam(nn.state.get_parameters(net), lr=0.01)

    def train() -> dict[str, Tensor]:
        opt.zero_grad()
        starts = Tensor.randint(batch, 1, high=len(numbers) - length - 1)
        picked = text[starts + Tensor.arange(length + 1)]
        loss = net(picked[:, :-1]).sparse_categorical_crossentropy(picked[:, 1:]).backward()
        return {"loss": loss.realize(*opt.schedule_step())}

    return {"net": net, "opt": opt}, train, {}


def make_job(steps: int = 500, **sizes: int) -> pf.Job:
    """The job of ``steps`` steps; ``sizes`` go to ``program``."""
    with Context(DEV="CPU"):  # nothing is computed here
        Tensor.manual_seed(0)
        _, train, every = program(**sizes)
        return pf.trace(train, steps=steps, every=every, title="lstm")


def main() -> None:
    """Buy the run, print every hundredth loss."""
    job = make_job()
    print(job)
    run = pf.submit(job, max_usd=0.5)
    for row in run:
        if row["step"] % 100 == 0:
            print(row)
    print("result", run.result().hash)


if __name__ == "__main__":
    main()
