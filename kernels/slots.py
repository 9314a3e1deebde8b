"""The param table of a traced job in the making: which buffers a program uses, and as what.

A buffer becomes a **slot** when a graph first uses it, so slots are numbered by first use. What it
is follows from the tensor that owns it: state if any phase assigns to that, a feed if ``feed`` made
it, a blob if it has data, else something that an init graph computes where the job runs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tinygrad.dtype import dtypes
from tinygrad.uop.ops import Ops, UOp

from p2pflop.errors import JobError
from p2pflop.job.counts import shown
from p2pflop.job.graph import GraphParam
from p2pflop.job.spec import (
    MAX_PARAMS,
    ROLE_FEED,
    ROLE_INPUT,
    ROLE_SEED,
    ROLE_STATE,
    ROLE_STEP,
)
from p2pflop.kernels.capture import Held, Recording, Stage, is_host_copy, is_literal, is_realized
from p2pflop.kernels.dialect import OUR_DTYPES
from p2pflop.kernels.feeds import Feed, feed_of
from p2pflop.kernels.places import at
from p2pflop.kernels.refusals import read_order
from p2pflop.kernels.steps import is_step
from p2pflop.kernels.weights import DiskLeaves, Stored, stored_in

STEP_ARGUMENT: Final = "step"
_STEP_HINT: Final = "It is the number of the step; count in a tensor of your own."
_GRADIENT_HINT: Final = (
    "Call zero_grad() first thing in the step, or before trace; to add up gradients over several "
    "steps, give them zeros before trace: p.grad = Tensor.zeros_like(p)."
)
REALIZE_HINT: Final = "Call .realize() on it before trace, so that it starts from a blob."

Number = bool | int | float


@dataclass(frozen=True, slots=True)
class Slot:
    """A row of the table. ``origin`` is what an init graph is to compute; ``data`` is what travels
    as a blob, ``stored`` what does and is not in memory, ``feed`` as many."""

    number: int
    param: GraphParam
    role: int
    name: str
    origin: UOp | None = None
    data: Callable[[], bytes] | None = None
    stored: Stored | None = None
    feed: Feed | None = None


@dataclass(slots=True)
class Slots:
    """The table. ``replacements`` are stand-ins of which nothing has to travel by itself."""

    stage: Stage
    recordings: Sequence[Recording]
    args: Mapping[str, Number]
    names: Mapping[int, str]
    replacements: dict[UOp, UOp] = field(default_factory=dict)
    disk: DiskLeaves = field(default_factory=DiskLeaves)
    _rows: dict[UOp, Slot] = field(default_factory=dict)
    _states: set[UOp] = field(default_factory=set)
    _owner: dict[UOp, Held] = field(default_factory=dict)

    def __post_init__(self) -> None:
        changed = {number for recording in self.recordings for number in recording.changed}
        for number, held in enumerate(self.stage.held):
            if held.buffer is not None:
                self._own(held.buffer, held)
            if is_host_copy(held.uop):
                self._own(host_buffer(held.uop), held)
            leaf = self.disk.leaf(held.uop)
            if leaf is not None:
                self._own(leaf, held)
            if number in changed:
                self._add_state(number, changed)
        for held in self.stage.held:
            if held.stand_in is None or held.buffer in self._states:
                continue
            if held.uop.device is None or is_host_copy(held.uop):
                self.replacements[held.stand_in] = held.uop
            elif (leaf := self.disk.leaf(held.uop)) is not None:
                self.replacements[held.stand_in] = leaf.reshape(held.uop.shape)

    @property
    def rows(self) -> list[Slot]:
        """All slots so far, by number."""
        return list(self._rows.values())

    def written(self, recording: Recording) -> dict[UOp, UOp]:
        """The new value of the buffer of each state that a phase changes."""
        written: dict[UOp, UOp] = {}
        for number, uop in recording.changed.items():
            buffer = self.stage.held[number].buffer
            if buffer in self._states:
                written.setdefault(buffer, uop)
        return written

    def state_slot(self, buffer: UOp) -> int:
        """The number of a state's slot."""
        return self.leaf(buffer, tuple(self._owner[buffer].uop.shape))[0]

    def leaf(self, buffer: UOp, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """The number and shape of a buffer's slot, which is new if it was not used before.

        ``shape`` is the one in which it is used first. Raises JobError if it cannot travel.
        """
        slot = self._rows.get(buffer)
        if slot is None:
            slot = self._rows[buffer] = self._new(buffer, shape)
        return slot.number, slot.param.shape

    def _own(self, buffer: UOp, held: Held) -> None:
        owner = self._owner.setdefault(buffer, held)
        # A model that was loaded from a dict of weights shares their buffers: the name that the
        # functions know it by is the better one.
        if id(held.tensor) in self.names and id(owner.tensor) not in self.names:
            self._owner[buffer] = owner if feed_of(owner.tensor) else held

    def _add_state(self, number: int, changed: set[int]) -> None:
        held = self.stage.held[number]
        if is_step(held.tensor):
            raise JobError(self._at(number, "pf.step is assigned to"), hint=_STEP_HINT)
        if held.buffer is not None:
            self._states.add(held.buffer)
            return
        # Assigning to a part of a tensor also renews every lazy view of it: those are no state.
        bases = set(held.uop.toposort())
        if any(self.stage.held[number].buffer in bases for number in changed):
            return
        name = self.name(held, "a tensor")
        if held.uop.dtype in dtypes.weaks or held.uop.device is None:
            raise JobError(
                self._at(number, f"{name} is assigned to but is a constant of open dtype"),
                hint="Give it a dtype: Tensor([0.0]), or Tensor.zeros(dtype='int').",
            )
        for other in self.stage.held:
            if other.grad is held.tensor:
                message = (
                    f"{self.name(other, 'a tensor')} has a gradient from before, and more is added"
                )
                raise JobError(self._at(number, message), hint=_GRADIENT_HINT)
        raise JobError(
            self._at(
                number,
                f"{name} is assigned to but has no storage of its own: it is computed from data",
            ),
            hint=REALIZE_HINT,
        )

    def _at(self, number: int, message: str) -> str:
        """``message`` with the line where a held tensor is changed."""
        changes = (recording.changed.get(number) for recording in self.recordings)
        change = next(uop for uop in changes if uop is not None)
        return at(self.stage.places.of(change, reversed(read_order([change]))), message)

    def _new(self, buffer: UOp, shape: tuple[int, ...]) -> Slot:
        number = len(self._rows)
        if number == MAX_PARAMS:
            raise JobError(
                f"the job has more than {MAX_PARAMS} tensors", hint="Stack what is of one shape."
            )
        held = self._owner.get(buffer)
        if held is not None and held.uop.numel() == buffer.numel():
            shape = held.uop.shape
        if buffer.dtype not in OUR_DTYPES:
            raise JobError(f"{buffer.dtype} cannot be stored", hint="Cast to float16 or bfloat16.")
        param = GraphParam(number, OUR_DTYPES[buffer.dtype], shape)
        if buffer in self.stage.seeds:
            return Slot(number, param, ROLE_SEED, "seed")
        if buffer in self.stage.steps:
            return Slot(number, GraphParam(number, param.dtype, ()), ROLE_STEP, STEP_ARGUMENT)
        for argument, argument_buffer in self.stage.arguments.items():
            if argument_buffer is buffer:
                return self._argument(param, argument)
        name = self.name(held, f"tensor{number}")
        feed = None if held is None else feed_of(held.tensor)
        if feed is not None:
            if buffer in self._states:
                raise JobError(f"the feed {name} is assigned to", hint="Assign to another tensor.")
            return Slot(number, param, ROLE_FEED, name, feed=feed)
        role = ROLE_STATE if buffer in self._states else ROLE_INPUT
        return self._valued(buffer, held, param, role, name)

    def _valued(
        self, buffer: UOp, held: Held | None, param: GraphParam, role: int, name: str
    ) -> Slot:
        """The slot of what has a value before the first step."""
        if held is not None and held.stand_in is not None and held.buffer is buffer:
            leaf = self.disk.leaf(held.uop)
            if leaf is not None:
                return Slot(param.slot, param, role, name, stored=stored_in(leaf))
            if is_host_copy(held.uop) and not is_literal(host_buffer(held.uop)):
                source = host_buffer(held.uop)
                return Slot(param.slot, param, role, name, data=lambda: read_buffer(source))
            return Slot(param.slot, param, role, name, origin=held.uop)
        if is_literal(buffer):
            return Slot(param.slot, param, role, name, origin=buffer.reshape(param.shape))
        if not is_realized(buffer):
            raise JobError(
                f"{self.name(held, 'a tensor')} {param.shape} is used but was never given a value",
                hint="Tensor.empty has no content: use Tensor.zeros, or assign before trace.",
            )
        stored = stored_in(buffer)
        if stored is not None:
            return Slot(param.slot, param, role, name, stored=stored)
        return Slot(param.slot, param, role, name, data=lambda: read_buffer(buffer))

    def _argument(self, param: GraphParam, name: str) -> Slot:
        value = self.args[name]
        return Slot(param.slot, param, ROLE_INPUT, name, data=lambda: pack_argument(name, value))

    def name(self, held: Held | None, otherwise: str) -> str:
        """What the program calls a held tensor."""
        if held is None:
            return otherwise
        if held.tensor is self.stage.counter:
            return "random.counter"
        return self.names.get(id(held.tensor), otherwise)


def pack_argument(name: str, value: Number) -> bytes:
    """An argument as the bytes of its 0-d tensor. Raises JobError if it does not fit one."""
    layout = {bool: "<?", int: "<i", float: "<f"}.get(type(value))
    try:
        if layout is not None:
            return struct.pack(layout, value)
    except (struct.error, OverflowError):
        pass
    raise JobError(
        f"args[{name!r}] is {shown(value)}, not a number that fits",
        hint="Give a bool, an int of 32 bits or a float.",
    )


def host_buffer(uop: UOp) -> UOp:
    """The buffer of Python's or numpy's data under a host copy."""
    while uop.op is not Ops.BUFFER:
        uop = uop.src[0]
    return uop


def read_buffer(buffer: UOp) -> bytes:
    """The bytes in a buffer that has memory."""
    return bytes(buffer.buffer.as_memoryview())
