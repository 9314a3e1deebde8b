"""A program traced, lowered and replayed beside the same program as tinygrad runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from tinygrad import Tensor, dtypes, nn
from tinygrad.helpers import Context

from p2pflop.ids import content_hash
from p2pflop.job.file import CheckedJob, open_job
from p2pflop.job.graph import graph_hash
from p2pflop.job.spec import ROLE_STATE
from p2pflop.kernels.run import Session
from p2pflop.kernels.tinygrad_engine import TinygradEngine
from p2pflop.kernels.trace import Traced, trace

Step = Callable[..., Mapping[str, Tensor] | None]
SEED = 11
ENGINE = TinygradEngine()
"""Of the class that this process is in."""


@dataclass
class Program:
    """A step, functions due every so many steps, and the tensors to compare, by traced name."""

    step: Step
    tensors: dict[str, Tensor]
    every: dict[int, Step] = field(default_factory=dict)


@dataclass
class Lowered:
    """A job with its plans: what a provider has before it starts a worker."""

    traced: Traced
    job: CheckedJob
    plans: dict[bytes, bytes]

    def session(self) -> Session:
        """A session before step 0."""
        session = ENGINE.session(self.job.work, self.plans)
        session.initialise()
        for slot, data in self.traced.inputs.items():
            session.write(slot, 0, data)
        for slot, source in self.job.feeds:
            raise AssertionError(f"slot {slot} is a feed of {source.shards} shards")
        return session

    def slot(self, name: str) -> int:
        """The slot of a traced name."""
        return self.traced.labels.params.index(name)


def tensors_of(**owners: object) -> dict[str, Tensor]:
    """Tensors of models, optimizers and variables, by the names that a trace gives them."""
    found: dict[str, Tensor] = {}
    for name, owner in owners.items():
        if isinstance(owner, Tensor):
            found[name] = owner
        else:
            found.update(nn.state.get_state_dict(owner, f"{name}."))
    return {name: tensor for name, tensor in found.items() if ".params." not in name}


def prepare(
    fn: Step,
    every: Mapping[int, Step] | None = None,
    args: Mapping[str, float] | None = None,
    steps: int = 8,
) -> Lowered:
    """Trace and lower."""
    traced = trace(fn, steps=steps, every=every, args=args, seed=SEED, address_of=content_hash)
    job = open_job(traced.body)
    assert isinstance(job, CheckedJob), job
    plans = {graph_hash(g): ENGINE.lower(g, lambda _done, _total: None) for g in traced.body.graphs}
    return Lowered(traced, job, plans)


def replay(program: Program, steps: int) -> Lowered:
    """``prepare`` for a program."""
    return prepare(program.step, program.every, steps=steps)


def assert_equal_to_native(
    make: Callable[[], Program], steps: int = 3, step_tensor: Tensor | None = None
) -> Lowered:
    """``steps`` steps of ``make()`` give, bit for bit, the scalars and tensors of a native run.

    ``step_tensor`` is given the number of the step in the native run.
    """
    Tensor.manual_seed(SEED)
    replayed = replay(make(), steps)
    session = replayed.session()
    rows = []
    for number in range(steps):
        session.step(number)
        rows.append(session.scalars())
    Tensor.manual_seed(SEED)
    program = make()
    Tensor.realize(*program.tensors.values())
    for number in range(steps):
        if step_tensor is not None:
            step_tensor.assign(Tensor(number, dtype=dtypes.int32)).realize()
        assert rows[number] == _native_step(program, number), f"step {number}"
    compared = 0
    for name, tensor in program.tensors.items():
        slot = replayed.slot(name)
        assert bytes(session.read(slot)) == raw_bytes(tensor), name
        compared += replayed.job.work.params[slot].role == ROLE_STATE
    assert compared
    return replayed


def _native_step(program: Program, number: int) -> list[tuple[int, int, bytes]]:
    row = []
    for phase, (period, function) in enumerate({1: program.step, **program.every}.items()):
        if (number + 1) % period:
            continue
        names = inspect.signature(function).parameters
        given = {"step": Tensor(np.array(number, np.int32)).reshape(())} if "step" in names else {}
        with Context(TRAINING=int(phase == 0)):
            outputs = function(**given) or {}
        # In one go: tinygrad draws other numbers if a later draw is realized before an earlier one.
        Tensor.realize(*outputs.values(), *program.tensors.values())
        row += [
            (phase, place, raw_bytes(tensor))
            for place, tensor in enumerate(outputs.values())
            if tensor.shape == ()
        ]
    return row


def raw_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor of any dtype."""
    plain = tensor.bitcast(dtypes.uint16) if tensor.dtype == dtypes.bfloat16 else tensor
    data: bytes = plain.numpy().tobytes()
    return data
