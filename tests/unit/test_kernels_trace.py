"""What trace makes of a program: what travels, what stays, what is refused, and that it is pure."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit, UOp, dtypes, nn
from tinygrad.dtype import DType
from tinygrad.helpers import TRAINING
from tinygrad.uop.ops import Ops

from p2pflop.errors import JobError
from p2pflop.ids import content_hash
from p2pflop.job.file import CheckedJob, encode_body, open_job
from p2pflop.job.graph import Dtype, Op
from p2pflop.job.spec import (
    MODE_LAST,
    MODE_TRACE,
    ROLE_INPUT,
    ROLE_SEED,
    ROLE_STATE,
    ROLE_STEP,
    BlobSource,
    InitSource,
    Stop,
    Work,
    WorkParam,
)
from p2pflop.kernels.capture import MAX_LITERAL_BYTES
from p2pflop.kernels.names import MAX_HELPER_DEPTH
from p2pflop.kernels.trace import MAX_NAME, Traced
from p2pflop.kernels.trace import trace as trace_to
from p2pflop.wire import decode

ROOT = Path(__file__).resolve().parents[2]
PIXELS = np.arange(48, dtype=np.float32).reshape(12, 4)
LABELS = (np.arange(12) % 3).astype(np.uint8)


def trace(fn: Callable[..., object], steps: int = 2, **options: Any) -> Traced:
    return trace_to(fn, steps=steps, address_of=content_hash, **options)


def opened(traced: Traced) -> CheckedJob:
    job = open_job(traced.body)
    assert isinstance(job, CheckedJob)
    return job


def params(traced: Traced) -> dict[str, WorkParam]:
    work = decode(Work, traced.body.work)
    return dict(zip(traced.labels.params, work.params, strict=True))


class Net:
    def __init__(self) -> None:
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, 3)

    def __call__(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().dropout(0.5))


class Program:
    """A training step and a test, with everything lazy."""

    def __init__(self) -> None:
        Tensor.manual_seed(1)
        self.net = Net()
        self.opt = nn.optim.Adam(nn.state.get_parameters(self.net))
        self.x, self.y = Tensor(PIXELS), Tensor(LABELS)

    def train(self) -> dict[str, Tensor]:
        assert TRAINING.value == 1
        self.opt.zero_grad()
        rows = Tensor.randint(6, high=12)
        loss = self.net(self.x[rows]).sparse_categorical_crossentropy(self.y[rows]).backward()
        return {"loss": loss.realize(*self.opt.schedule_step())}

    def test(self) -> dict[str, Tensor]:
        assert TRAINING.value == 0
        scores = self.net(self.x)
        return {"acc": (scores.argmax(1) == self.y).mean(), "scores": scores}


def test_lazy_weights_are_born_from_the_seed_and_data_travels_as_blobs() -> None:
    program = Program()
    traced = trace(program.train, every={100: program.test}, seed=5)
    table = params(traced)
    weight = table["self.net.first.weight"]
    assert (weight.role, weight.shape) == (ROLE_STATE, (5, 4))
    assert isinstance(weight.source, InitSource)
    assert isinstance(table["self.opt.m.0"].source, InitSource)
    assert table["seed"].role == ROLE_SEED
    assert table["random.counter"].role == ROLE_STATE
    assert table["self.opt.lr"].role == ROLE_INPUT
    assert isinstance(table["self.opt.lr"].source, InitSource)
    pixels = table["self.x"]
    assert isinstance(pixels.source, BlobSource)
    assert pixels.source == BlobSource(content_hash(PIXELS.tobytes()), PIXELS.nbytes)
    slots = {name: slot for slot, name in enumerate(traced.labels.params)}
    assert traced.inputs == {
        slots["self.x"]: PIXELS.tobytes(),
        slots["self.y"]: LABELS.tobytes(),
    }


def test_phases_modes_and_names() -> None:
    program = Program()
    traced = trace(program.train, every={100: program.test}, title="tiny")
    work = opened(traced).work
    assert [(phase.every, phase.modes) for phase in work.phases] == [
        (1, (MODE_TRACE,)),
        (100, (MODE_TRACE, MODE_LAST)),
    ]
    assert traced.labels.title == "tiny"
    assert traced.labels.phases == ("train", "test")
    assert traced.labels.outputs == (("loss",), ("acc", "scores"))


def test_a_small_training_job_is_small() -> None:
    program = Program()
    assert len(encode_body(trace(program.train, every={100: program.test}).body)) < 2_200


def test_rows_by_index_and_counters_are_metered_as_what_they_cost() -> None:
    table, index = Tensor(np.zeros((1000, 4), np.float32)), Tensor(np.zeros(3, np.int32))
    job = opened(trace(lambda: {"rows": table[index], "numbers": Tensor.arange(500)}))
    (checked,) = job.graphs.values()
    assert {Op.GATHER, Op.IOTA} <= {node.op for node in checked.graph.nodes}
    assert job.cost.flop < 5_000


def test_an_embedding_is_metered_as_a_lookup() -> None:
    embedding, words = nn.Embedding(5000, 8), Tensor(np.zeros((2, 3), np.int32))
    job = opened(trace(lambda: {"vectors": embedding(words)}))
    graph = job.graphs[job.work.phases[0].graph].graph
    assert sum(node.op is Op.GATHER for node in graph.nodes) == 1
    assert job.cost.lines[0].flop < 1_000


class Block:
    def __init__(self, width: int, heads: int) -> None:
        self.heads = heads
        self.norms = [nn.LayerNorm(width), nn.LayerNorm(width)]
        self.mix = [nn.Linear(width, width) for _ in range(4)]
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def __call__(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norms[0](x)
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (layer(y).reshape(shape).transpose(1, 2) for layer in self.mix[:3])
        mixed = q.scaled_dot_product_attention(k, v, is_causal=True).transpose(1, 2)
        x = x + self.mix[3](mixed.reshape(batch, length, width))
        return x + self.narrow(self.wide(self.norms[1](x)).gelu())


def gpt_job_bytes(layers: int) -> int:
    """How much travels for training a transformer of ``layers`` layers with AdamW."""
    Tensor.manual_seed(0)
    text = Tensor(np.arange(600, dtype=np.uint8))
    table, places = nn.Embedding(256, 32), nn.Embedding(16, 32)
    blocks, head = [Block(32, 2) for _ in range(layers)], nn.Linear(32, 256)
    opt = nn.optim.AdamW(nn.state.get_parameters([table, places, blocks, head]))

    def train() -> dict[str, Tensor]:
        opt.zero_grad()
        rows = Tensor.randint(4, 1, high=580) + Tensor.arange(17).reshape(1, 17)
        words = text[rows].cast(dtypes.int32)
        x = table(words[:, :-1]) + places(Tensor.arange(16))
        for block in blocks:
            x = block(x)
        targets = words[:, 1:].reshape(-1)
        loss = head(x).reshape(-1, 256).sparse_categorical_crossentropy(targets).backward()
        return {"loss": loss.realize(*opt.schedule_step())}

    return len(encode_body(trace(train, steps=1000).body))


def test_a_transformers_job_is_small_and_grows_little_with_its_layers() -> None:
    one, two = gpt_job_bytes(1), gpt_job_bytes(2)
    assert two <= 6_000
    assert two - one <= 1_200


def counting() -> tuple[Callable[[], object], Callable[[], object]]:
    total = Tensor.zeros(1).contiguous().realize()

    def step() -> dict[str, Tensor]:
        total.assign(total + 1)
        return {"total": total.sum()}

    def look() -> dict[str, Tensor]:
        return {"total": total.sum(), "done": total.sum() >= 5}

    return step, look


def test_a_text_is_no_list_of_outputs_to_collect() -> None:
    value = Tensor([1.0]).contiguous()
    with pytest.raises(JobError, match="collect='value' is no list") as told:
        trace(lambda: {"value": value * 2}, collect="value")
    assert told.value.hint == "collect=['value']"
    with pytest.raises(JobError, match="collect=3 is no list"):
        trace(lambda: {"value": value * 2}, collect=3)
    with pytest.raises(JobError, match="collect='loss' is not an output; there are value"):
        trace(lambda: {"value": value * 2}, collect=["loss"])


@pytest.mark.parametrize("stop", [("done",), ("done", 1, 2), 3, True, ("done", 0), ("done", 1.5)])
def test_a_stop_that_means_nothing_is_refused(stop: Any) -> None:
    step, look = counting()
    with pytest.raises(JobError, match=r"^stop=") as told:
        trace(step, every={3: look}, stop=stop)
    assert told.value.hint


def test_an_output_without_elements_is_named_with_its_line() -> None:
    pixels = Tensor(PIXELS)

    def step() -> dict[str, Tensor]:
        return {"all": pixels.sum(), "none": pixels[:0]}

    line = step.__code__.co_firstlineno + 1
    with pytest.raises(JobError, match=rf":{line}: the output 'none' of shape \(0, 4\) has no"):
        trace(step)


def test_a_job_may_end_at_an_output_of_any_phase() -> None:
    step, look = counting()
    assert opened(trace(step, every={3: look}, stop="done")).work.stop == Stop(1, 1, 3)
    assert opened(trace(step, every={3: look}, stop=("done", 7))).work.stop == Stop(1, 1, 7)
    assert opened(trace(step, every={3: look})).work.stop is None
    with pytest.raises(JobError, match="'missing' is not an output; there are total, total, done"):
        trace(step, every={3: look}, stop="missing")
    line = step.__code__.co_firstlineno + 2
    with pytest.raises(JobError, match=rf":{line}: .* 'total' is of dtype float and shape") as told:
        trace(step, every={3: look}, stop="total")
    assert ".any()" in told.value.hint


def test_a_parameter_with_a_default_needs_no_argument() -> None:
    pixels = Tensor(PIXELS)

    def look(scale: object = 2.0, *, offset: object = 1) -> dict[str, Tensor]:
        return {"sum": (pixels * scale + offset).sum()}

    assert "scale" not in params(trace(look))
    assert "scale" in params(trace(look, args={"scale": 3.0}))


def test_a_name_that_is_too_long_is_cut() -> None:
    pixels = Tensor(PIXELS)
    traced = trace(lambda: {"x" * 300: pixels.sum()}, title="t" * 300)
    assert len(traced.labels.title) == len(traced.labels.outputs[0][0]) == MAX_NAME


def test_tracing_leaves_the_program_as_it_was() -> None:
    program = Program()
    held = [*nn.state.get_parameters(program.opt), program.x, program.y]
    before = [tensor.uop for tensor in held]
    counter = Tensor._device_rng_counters["CPU"]
    start = counter.uop
    trace(program.train, every={2: program.test})
    assert all(tensor.uop is uop for tensor, uop in zip(held, before, strict=True))
    assert all(tensor.grad is None for tensor in held)
    assert Tensor._device_rng_counters["CPU"].uop is start
    buffers = [node for node in program.net.first.weight.uop.toposort() if node.op is Ops.BUFFER]
    assert all(buffer.device == "PYTHON" for buffer in buffers if buffer.is_realized)
    assert Tensor([1, 2]).tolist() == [1, 2]


def test_a_failing_function_leaves_the_program_as_it_was() -> None:
    weight = Tensor.zeros(3)
    before = weight.uop

    def step() -> None:
        weight.assign(weight + 1)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        trace(step)
    assert weight.uop is before
    assert Tensor([7]).item() == 7


def test_one_program_has_one_work_id_in_one_process() -> None:
    program = Program()
    first = trace(program.train, every={2: program.test})
    assert trace(program.train, every={2: program.test}).body == first.body
    program = Program()
    assert trace(program.train, every={2: program.test}).body == first.body


def test_one_program_has_one_work_id_in_every_process_and_on_every_device() -> None:
    code = (
        "import sys; sys.path.insert(0, 'examples')\n"
        "import digits\n"
        "from p2pflop.kernels.trace import trace\n"
        "from p2pflop.ids import content_hash\n"
        "from p2pflop.job.file import encode_body\n"
        "_, train, test = digits.program()\n"
        "traced = trace(train, steps=800, every={100: test}, address_of=content_hash)\n"
        "print(traced.body.job.work.hex(), len(encode_body(traced.body)))\n"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed, "PATH": "", "DEV": device},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for hash_seed, device in (("1", "CPU"), ("2", "PYTHON"))
    }
    assert len(told) == 1
    assert int(told.pop().split()[1]) <= 5_000


def test_a_realized_tensor_is_a_blob_and_an_assigned_one_is_state_from_it() -> None:
    scale = Tensor([2.0, 3.0]).realize()
    total = Tensor([1.0, 1.0]).realize()

    def step() -> None:
        total.assign(total * scale)

    table = params(trace(step))
    assert table["scale"].role == ROLE_INPUT
    assert table["total"].role == ROLE_STATE
    assert isinstance(table["scale"].source, BlobSource)
    assert isinstance(table["total"].source, BlobSource)


def test_a_lazy_tensor_on_data_travels_as_its_graph() -> None:
    pixels = Tensor(PIXELS)
    scaled = pixels / 16
    traced = trace(lambda: {"sum": scaled.sum()})
    assert list(traced.inputs.values()) == [PIXELS.tobytes()]
    (checked,) = opened(traced).graphs.values()
    assert {Op.MUL, Op.REDUCE} <= {node.op for node in checked.graph.nodes}


def test_two_states_that_start_alike_are_two_states() -> None:
    first, second = Tensor.zeros(3), Tensor.zeros(3)

    def step() -> None:
        first.assign(first + 1)
        second.assign(second + 2)

    table = params(trace(step))
    assert [table[name].role for name in ("first", "second")] == [ROLE_STATE, ROLE_STATE]


def test_arguments_are_inputs_and_the_step_is_a_param() -> None:
    total = Tensor.zeros(1)

    def step(rate: Tensor, step: Tensor) -> dict[str, Tensor]:
        total.assign(total + rate * step)
        return {"total": total.sum()}

    traced = trace(step, args={"rate": 0.5})
    table = params(traced)
    assert (table["rate"].role, table["rate"].shape) == (ROLE_INPUT, ())
    assert (table["step"].role, table["step"].dtype) == (ROLE_STEP, Dtype.INT32)
    assert list(traced.inputs.values()) == [np.float32(0.5).tobytes()]
    other = trace(step, args={"rate": 0.25})
    assert other.body.graphs == traced.body.graphs
    assert other.body.job.work != traced.body.job.work


def test_a_jitted_function_is_traced_as_itself() -> None:
    pixels = Tensor(PIXELS)
    assert trace(TinyJit(lambda: {"sum": pixels.sum()})).labels.outputs == (("sum",),)


@pytest.mark.parametrize("count", [MAX_LITERAL_BYTES // 4, MAX_LITERAL_BYTES // 4 + 1])
def test_a_list_is_part_of_the_program_up_to_a_limit(count: int) -> None:
    numbers = Tensor([1.0] * count)
    traced = trace(lambda: {"sum": numbers.sum()})
    assert bool(traced.inputs) is (count * 4 > MAX_LITERAL_BYTES)


def test_names_are_found_through_helpers_up_to_a_depth() -> None:
    weight = Tensor.zeros(2).contiguous()

    def nested(depth: int) -> Callable[[], dict[str, Tensor]]:
        if depth == 0:
            return lambda: {"sum": weight.sum()}
        inner = nested(depth - 1)
        return lambda: inner()

    assert "weight" in params(trace(nested(MAX_HELPER_DEPTH - 1)))
    assert "weight" not in params(trace(nested(MAX_HELPER_DEPTH)))


def test_a_jitted_helper_is_traced_and_not_run() -> None:
    total = Tensor([1.0]).realize()

    def add_one() -> Tensor:
        return total.assign(total + 1).realize()

    add = TinyJit(add_one)
    for _ in range(4):
        add()
    before = total.item()
    table = params(trace(lambda: {"total": add().sum()}))
    assert table["total"].role == ROLE_STATE
    assert total.item() == before
    add()
    assert total.item() == before + 1


@pytest.mark.parametrize("dtype", [dtypes.float16, dtypes.bfloat16, dtypes.bool, dtypes.int64])
def test_a_short_list_of_any_dtype_is_part_of_the_program(dtype: DType) -> None:
    numbers = Tensor([1, 0], dtype=dtype)
    traced = trace(lambda: {"numbers": numbers + numbers})
    assert traced.inputs == {}
    (param,) = (param for param in params(traced).values() if param.role == ROLE_INPUT)
    assert isinstance(param.source, InitSource)


def test_assigning_to_a_part_is_a_choice() -> None:
    row = Tensor.zeros(4, dtype=dtypes.int32).contiguous().realize()

    def step() -> None:
        row[1:3] = 7

    assert params(trace(step))["row"].role == ROLE_STATE


def read_a_value() -> object:
    return {"loss": Tensor(PIXELS).sum().item()}


def use_what_is_not_there() -> object:
    return {"sum": Tensor.empty(3).sum()}


def return_a_number() -> object:
    return {"loss": 1.0}


def return_a_list() -> object:
    return [Tensor(PIXELS)]


def use_a_variable() -> object:
    return {"row": Tensor(PIXELS)[UOp.variable("i", 0, 11).bind(3)]}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (read_a_value, "needs a tensor.s value"),
        (use_what_is_not_there, "never given a value"),
        (return_a_number, "not a name and a tensor"),
        (return_a_list, "returned a list"),
        (use_a_variable, "Variable"),
    ],
)
def test_what_cannot_travel_is_told_with_what_to_write_instead(
    function: Callable[[], object], message: str
) -> None:
    with pytest.raises(JobError, match=message) as told:
        trace(function)
    assert told.value.hint


def test_a_state_of_open_dtype_is_refused() -> None:
    count = Tensor(0)

    def step() -> None:
        count.assign(count + 1)

    with pytest.raises(JobError, match="count is assigned to"):
        trace(step)


@pytest.mark.parametrize(
    ("fn", "options", "message", "hint"),
    [
        (5, {}, "^5 is not a function", "pf.trace"),
        (dict, {"every": [dict]}, "^every is not a dict", "every={100: evaluate}"),
        (dict, {"every": {2: "show"}}, "^'show' is not a function", "pf.trace"),
        (dict, {"args": 3}, "^args is not a dict", "args={'rate': 0.1}"),
        (dict, {"title": 5}, "^title=5 is not a text", "title='digits'"),
    ],
)
def test_arguments_of_another_type_are_refused(
    fn: Any, options: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(JobError, match=message) as caught:
        trace(fn, **options)
    assert hint in caught.value.hint


@pytest.mark.parametrize("options", [{"steps": 0}, {"seed": -1}, {"seed": 2**32}])
def test_numbers_out_of_range_are_refused(options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(JobError, match=f"^{name}={value} is out of range"):
        trace(lambda: {"sum": Tensor(PIXELS).sum()}, **options)


@pytest.mark.parametrize(
    "args", [{}, {"rate": 1.0, "other": 2}, {"rate": "1"}, {"rate": 2**31}, {"rate": 1e300}]
)
def test_arguments_must_match(args: dict[str, object]) -> None:
    with pytest.raises(JobError):
        trace(lambda rate: {"rate": rate + 1}, args=args)
