"""A recurrent network over a sequence, one cell at a time."""

import numpy as np
from tinygrad import Context, Tensor, nn

Tensor.manual_seed(5)
cell, head = nn.LSTMCell(3, 6), nn.Linear(6, 1)
opt = nn.optim.SGD(nn.state.get_parameters([cell, head]), lr=0.1, momentum=0.9)
waves = np.sin(np.arange(4 * 3 * 3, dtype=np.float32)).reshape(3, 4, 3)
goal = Tensor(waves.sum((0, 2)).reshape(4, 1))
for i in range(3):
    with Context(TRAINING=1):
        opt.zero_grad()
        state: tuple[Tensor, Tensor] | None = None
        for wave in waves:
            state = cell(Tensor(wave), state)
        assert state is not None
        loss = (head(state[0]) - goal).square().mean().backward()
        opt.step()
    print(i, loss.item().hex())
for weight in nn.state.get_parameters([cell, head]):
    print(weight.shape, [x.hex() for x in weight.flatten().tolist()[:3]])
