"""A traced, lowered and replayed program gives what the program gives natively, byte for byte."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
import pytest
from tinygrad import Tensor, dtypes, nn
from tinygrad.helpers import Context

from p2pflop.errors import JobError, ProtocolError
from p2pflop.job.spec import MODE_TRACE, Stop, Work
from p2pflop.kernels.lower import lower
from p2pflop.kernels.plan import decode_plan, encode_plan
from p2pflop.kernels.run import Session
from tests.native import SEED, Lowered, prepare

RNG = np.random.default_rng(7)
PIXELS = RNG.standard_normal((40, 36)).astype(np.float32)
LABELS = RNG.integers(0, 4, 40).astype(np.uint8)


class Layer:
    """As little as has weights, dropout and a gradient: few kernels to compile."""

    def __init__(self) -> None:
        self.last = nn.Linear(36, 4)

    def __call__(self, x: Tensor) -> Tensor:
        return self.last(x.dropout(0.3))


class Conv:
    def __init__(self) -> None:
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm(6)
        self.last = nn.Linear(96, 4)

    def __call__(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x.reshape(-1, 1, 6, 6))).relu()
        return self.last(x.flatten(1).dropout(0.3))


class Training:
    """A network, its optimizer, a training step on random rows and a test."""

    def __init__(self, net: Layer | Conv) -> None:
        self.net = net
        self.opt = nn.optim.Adam(nn.state.get_parameters(net), lr=0.01)
        self.x, self.y = Tensor(PIXELS), Tensor(LABELS)

    def train(self) -> dict[str, Tensor]:
        self.opt.zero_grad()
        rows = Tensor.randint(16, high=40)
        loss = self.net(self.x[rows]).sparse_categorical_crossentropy(self.y[rows]).backward()
        return {"loss": loss.realize(*self.opt.schedule_step())}

    def test(self) -> dict[str, Tensor]:
        scores = self.net(self.x)
        return {"acc": (scores.argmax(1) == self.y).mean(), "scores": scores}


def start(kind: type[Layer | Conv]) -> Training:
    Tensor.manual_seed(SEED)
    return Training(kind())


def native(kind: type[Layer | Conv], steps: int) -> tuple[Training, list[bytes]]:
    """The same program as tinygrad runs it, its weights realized first."""
    program = start(kind)
    Tensor.realize(*nn.state.get_parameters(program.net), *nn.state.get_parameters(program.opt))
    losses = []
    for _ in range(steps):
        with Context(TRAINING=1):
            losses.append(program.train()["loss"].numpy().tobytes())
    return program, losses


def assert_equal_to_native(lowered: Lowered, kind: type[Layer | Conv], steps: int) -> None:
    session = lowered.session()
    rows: list[list[tuple[int, int, bytes]]] = []
    for number in range(steps):
        session.step(number)
        rows.append(session.scalars())
    program, losses = native(kind, steps)
    assert [row[0] for row in rows] == [(0, 0, loss) for loss in losses]
    states = {
        **nn.state.get_state_dict(program.opt, "self.opt."),
        **nn.state.get_state_dict(program.net, "self.net."),
    }
    compared = 0
    for slot, name in enumerate(lowered.traced.labels.params):
        if name in states:
            assert bytes(session.read(slot)) == states[name].numpy().tobytes(), name
            compared += 1
    assert compared >= 3 * len(program.opt.params) + 3
    tested = program.test()
    last = steps - 1 - steps % 2
    accuracy = tested["acc"].numpy().tobytes()
    assert [row for row in rows[last] if row[0] == 1] == [(1, 0, accuracy)]
    scores = session.read_output(1, 1)
    assert scores is not None
    assert bytes(scores) == tested["scores"].numpy().tobytes()


@pytest.fixture(scope="module")
def layer() -> Lowered:
    program = start(Layer)
    return prepare(program.train, {2: program.test})


def test_dropout_adam_and_random_rows_equal_native_tinygrad(layer: Lowered) -> None:
    assert_equal_to_native(layer, Layer, 4)


@pytest.mark.slow
def test_convolution_and_batch_norm_equal_native_tinygrad() -> None:
    program = start(Conv)
    lowered = prepare(program.train, {2: program.test})
    assert_equal_to_native(lowered, Conv, 4)
    for name, graph in lowered.job.graphs.items():
        if name == lowered.job.work.phases[0].graph:
            metered = next(line for line in lowered.job.cost.lines if line.graph == name)
            assert decode_plan(lowered.plans[name]).flop <= 4 * metered.flop
            assert lower(graph) == lowered.plans[name]


def test_a_phase_gives_nothing_until_it_is_due(layer: Lowered) -> None:
    session = layer.session()
    session.step(0)
    assert [value[:2] for value in session.scalars()] == [(0, 0)]
    assert session.read_output(1, 0) is None
    session.step(1)
    assert [value[:2] for value in session.scalars()] == [(0, 0), (1, 0)]
    assert session.read_output(1, 0) is not None


def test_two_sessions_give_equal_bytes_and_another_seed_others(layer: Lowered) -> None:
    weight = layer.slot("self.net.last.weight")
    other = msgspec.structs.replace(layer.job.work, seed=SEED + 1)
    first, second, third = layer.session(), layer.session(), Session(other, layer.plans)
    third.initialise()
    assert bytes(first.read(weight)) == bytes(second.read(weight)) != bytes(third.read(weight))


def test_a_checkpoint_resumes_to_equal_bytes(layer: Lowered) -> None:
    whole, half, rest = layer.session(), layer.session(), layer.session()
    for number in range(4):
        whole.step(number)
    half.step(0)
    half.step(1)
    for slot in range(len(layer.job.work.params)):
        rest.write(slot, 0, bytes(half.read(slot)))
    rest.step(2)
    rest.step(3)
    assert all(
        bytes(whole.read(slot)) == bytes(rest.read(slot))
        for slot in range(len(layer.job.work.params))
    )


def test_a_session_refuses_what_does_not_fit(layer: Lowered) -> None:
    session = layer.session()
    lr = layer.slot("self.opt.lr")
    session.write(lr, 0, struct.pack("<f", 0.5))
    assert struct.unpack("<f", session.read(lr)) == (0.5,)
    for slot, offset_bytes, size_bytes in ((lr, 1, 4), (lr, -1, 4), (lr, 0, 5), (999, 0, 1)):
        with pytest.raises(ProtocolError):
            session.write(slot, offset_bytes, bytes(size_bytes))
    with pytest.raises(ProtocolError):
        session.read(-1)
    with pytest.raises(ProtocolError):
        session.read_output(2, 0)
    with pytest.raises(ProtocolError):
        session.read_output(0, 1)


def test_plans_that_do_not_belong_to_the_work_are_refused(layer: Lowered) -> None:
    work, plans = layer.job.work, layer.plans
    train, test = work.phases[0].graph, work.phases[1].graph
    with pytest.raises(ProtocolError, match="no plan"):
        Session(work, {train: plans[train]})
    with pytest.raises(ProtocolError, match="outputs"):
        Session(work, {**plans, train: plans[test]})
    small = msgspec.structs.replace(
        work,
        params=tuple(msgspec.structs.replace(param, shape=(1,)) for param in work.params),
    )
    with pytest.raises(ProtocolError, match="takes slot"):
        Session(small, plans)
    few = msgspec.structs.replace(work, params=work.params[:1])
    with pytest.raises(ProtocolError, match="there are 1"):
        Session(few, plans)


@pytest.mark.parametrize("binary", [b"\x7fELF", b"MZ" * 50, bytes(64)])
def test_a_kernel_that_is_no_object_file_is_refused(layer: Lowered, binary: bytes) -> None:
    name = layer.job.work.phases[0].graph
    plan = decode_plan(layer.plans[name])
    broken = msgspec.structs.replace(plan.kernels[0], binary=binary)
    hostile = msgspec.structs.replace(plan, kernels=(broken, *plan.kernels[1:]))
    with pytest.raises(ProtocolError, match="does not link"):
        Session(layer.job.work, {**layer.plans, name: encode_plan(hostile)})


def test_more_memory_than_there_is_is_the_jobs_fault(layer: Lowered) -> None:
    params = (
        *layer.job.work.params,
        msgspec.structs.replace(layer.job.work.params[0], shape=(2**40, 2**20)),
    )
    with pytest.raises(JobError, match="no memory"):
        Session(msgspec.structs.replace(layer.job.work, params=params), layer.plans)


def test_arguments_steps_parts_and_stop() -> None:
    total = Tensor.zeros(1)
    marks = Tensor(np.arange(12, dtype=np.int32).reshape(3, 4)).realize()

    def step(rate: Tensor, step: Tensor) -> dict[str, Tensor]:
        total.assign(total + rate * step)
        marks[1:, 2] = -1
        marks[0] = marks[2]
        return {"total": total.sum(), "large": (total > 2).all(), "marks": marks + 0}

    lowered = prepare(step, args={"rate": 0.5})
    work: Work = msgspec.structs.replace(lowered.job.work, stop=Stop(0, 1, 2))
    assert work.phases[0].modes[:2] == (MODE_TRACE, MODE_TRACE)
    session = Session(work, lowered.plans)
    session.initialise()
    for slot, data in lowered.traced.inputs.items():
        session.write(slot, 0, data)
    seen = []
    for number in range(8):
        session.step(number)
        seen.append(struct.unpack("<f", session.scalars()[0][2])[0])
        if session.should_stop(number):
            break
    assert seen == [0.0, 0.5, 1.5, 3.0]
    expected = np.arange(12, dtype=np.int32).reshape(3, 4)
    expected[1:, 2] = -1
    expected[0] = expected[2]
    marks_now = session.read_output(0, 2)
    assert marks_now is not None
    assert np.array_equal(np.frombuffer(marks_now, np.int32).reshape(3, 4), expected)


def test_two_phases_of_one_graph_keep_outputs_of_their_own() -> None:
    total = Tensor.zeros(2)

    def add() -> dict[str, Tensor]:
        total.assign(total + 1)
        return {"sum": total.sum(), "total": total * 1}

    lowered = prepare(add, {2: add})
    assert len(lowered.traced.body.graphs) == 2
    session = lowered.session()
    session.step(0)
    session.step(1)
    told = [(phase, struct.unpack("<f", value)[0]) for phase, _, value in session.scalars()]
    assert told == [(0, 4.0), (1, 6.0)]
    first, second = session.read_output(0, 1), session.read_output(1, 1)
    assert first is not None
    assert second is not None
    assert (bytes(first), bytes(second)) == (struct.pack("<2f", 2, 2), struct.pack("<2f", 3, 3))


def test_rows_out_of_range_are_zeros_and_negative_ones_count_from_the_end() -> None:
    table = Tensor(np.arange(6, dtype=np.float32).reshape(3, 2) + 1)
    rows = Tensor(np.array([2, -1, 3, 0], np.int32))
    bytes_too = Tensor(np.array([7, 8, 9], np.uint8))
    lowered = prepare(lambda: {"rows": table[rows], "bytes": bytes_too[rows.cast(dtypes.int64)]})
    session = lowered.session()
    session.step(0)
    picked, small = session.read_output(0, 0), session.read_output(0, 1)
    assert picked is not None
    assert small is not None
    assert np.frombuffer(picked, np.float32).tolist() == [5, 6, 5, 6, 0, 0, 1, 2]
    assert list(small) == [9, 9, 0, 7]


def test_a_graph_that_tinygrad_cannot_lower_is_the_jobs_fault(
    layer: Lowered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("p2pflop.kernels.lower.to_program", refuse)
    with pytest.raises(JobError, match="no such kernel"):
        lower(next(iter(layer.job.graphs.values())))


def test_shapes_that_disagree_with_tinygrad_are_refused(layer: Lowered) -> None:
    checked = next(iter(layer.job.graphs.values()))
    wrong = type(checked)(checked.graph, ((3,), *checked.shapes[1:]), checked.dtypes)
    with pytest.raises(JobError, match="by the rules"):
        lower(wrong)


def test_lowering_tells_how_far_it_is(layer: Lowered) -> None:
    told: list[tuple[int, int]] = []
    lower(layer.job.graphs[layer.job.work.phases[1].graph], lambda *counts: told.append(counts))
    total = told[-1][1]
    assert told == [(done, total) for done in range(1, total + 1)]


FLOATS = PIXELS[:4, :6].copy()
WHOLE = np.arange(-12, 12, dtype=np.int32).reshape(4, 6)

MOVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pad": lambda x, n: x.pad(((1, 2), (0, 3)), value=2.0),
    "shrink": lambda x, n: x[1:3, ::2],
    "flip": lambda x, n: x.flip(1),
    "permute": lambda x, n: x.permute(1, 0).contiguous() + 1,
    "repeat": lambda x, n: x.repeat(2, 3),
    "cat": lambda x, n: x.cat(n.cast(x.dtype), dim=1),
    "stack": lambda x, n: x.stack(x * 2, dim=1),
    "roll": lambda x, n: x.roll(2, 0),
    "triu": lambda x, n: x.triu(1),
    "last": lambda x, n: x[-1],
    "rows": lambda x, n: x[n[:, 0].abs() % 4],
    "bits": lambda x, n: x.bitcast(dtypes.uint32) ^ n.bitcast(dtypes.uint32),
}
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda x, n: x.mean(0),
    "product": lambda x, n: (1 + x / 8).prod(1),
    "largest": lambda x, n: n.max(1),
    "softmax": lambda x, n: x.softmax(1),
    "variance": lambda x, n: x.var(1),
    "matmul": lambda x, n: x @ x.T,
    "cumsum": lambda x, n: x.cumsum(1),
    "argmin": lambda x, n: x.argmin(1),
    "sort": lambda x, n: x.sort(1)[0],
    "sine": lambda x, n: x.sin() + x.exp2() + x.sigmoid(),
    "log": lambda x, n: (x.abs() + 1).log2() + x.abs().sqrt() + (x + 9).reciprocal(),
    "half": lambda x, n: x.half() * 3,
    "division": lambda x, n: n // 5 + n % 7 + (n >> 1) + (n << 2),
    "power": lambda x, n: x.abs() ** 1.5,
    "choice": lambda x, n: (n > 0).where(x, -x).clip(-0.5, 0.5).round(),
    "wide": lambda x, n: n.cast(dtypes.int64) * 2**33,
    "conv": lambda x, n: x.reshape(1, 1, 4, 6).conv2d(x[:2, :2].reshape(1, 1, 2, 2)),
    "attention": lambda x, n: x.scaled_dot_product_attention(x, x),
}


def assert_same_as_native(functions: Mapping[str, Callable[[Tensor, Tensor], Tensor]]) -> None:
    x, n = Tensor(FLOATS).realize(), Tensor(WHOLE).realize()
    lowered = prepare(lambda: {name: function(x, n) for name, function in functions.items()})
    session = lowered.session()
    session.step(0)
    for number, (name, function) in enumerate(functions.items()):
        output = session.read_output(0, number)
        assert output is not None
        assert bytes(output) == function(x, n).numpy().tobytes(), name


def test_movements_give_the_bytes_of_native_tinygrad() -> None:
    assert_same_as_native(MOVES)


@pytest.mark.slow
def test_sums_and_functions_give_the_bytes_of_native_tinygrad() -> None:
    assert_same_as_native(SUMS)
