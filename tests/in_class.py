"""``python -m tests.in_class``: a small training program against native tinygrad, in the class that
the environment sets; the id of its state goes to stdout.

Two phases, Adam, dropout, a product, an exponential, a reduction and a fresh output.
"""

from __future__ import annotations

import numpy as np
from tinygrad import Tensor, nn
from tinygrad.helpers import Context

from p2pflop.ids import content_hash
from tests.native import Program, assert_equal_to_native, tensors_of

STEPS = 3
ROWS = np.linspace(-1, 1, 96, dtype=np.float32).reshape(16, 6)


def make() -> Program:
    """The program."""
    rows, layer = Tensor(ROWS), nn.Linear(6, 4)
    opt = nn.optim.Adam(nn.state.get_parameters(layer), lr=0.1)

    def train() -> dict[str, Tensor]:
        opt.zero_grad()
        with Context(TRAINING=1):
            loss = layer(rows).dropout(0.5).softmax().log().square().mean().backward()
            return {"loss": loss.realize(*opt.schedule_step())}

    def test() -> dict[str, Tensor]:
        return {"sum": layer(rows).exp().sum()}

    return Program(train, tensors_of(layer=layer, opt=opt), every={2: test})


def main() -> None:
    """Compare, and print."""
    replayed = assert_equal_to_native(make, STEPS)
    session = replayed.session()
    for step in range(STEPS):
        session.step(step)
    slots = range(len(replayed.job.work.params))
    print(content_hash(b"".join(bytes(session.read(slot)) for slot in slots)).hex())


if __name__ == "__main__":
    main()
