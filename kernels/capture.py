"""Running a user's step on stand-ins, to see what it computes without computing it.

Theory of operation. tinygrad is lazy: a step function only builds graph nodes until something is
realized. So while it runs here, ``realize`` does nothing and reading a value is an error, and what
the function returns, and every tensor it leaves changed, still holds its whole graph.

Before the function runs, every live tensor that is not yet realized gets a stand-in: a buffer
without memory. Otherwise an unrealized weight would be part of each graph that uses it, and an
assignment to it could not be told from a new tensor (Adam's zeros of one shape are all one node).
After the function has run, a stand-in is one of three things:

- *state*, if any phase assigned to its tensor;
- a plain use of its original graph, if nobody did: the graph is put back in its place;
- a value to be computed once, if nobody did but it needs the seed or data of its own, such as a
  learning rate: it stays a buffer, as in a native run.

Whatever happens, the user's tensors and the random state are as before when it is over.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

import tinygrad.tensor
from tinygrad import Device, Tensor
from tinygrad.dtype import dtypes
from tinygrad.engine.jit import _TinyJit
from tinygrad.helpers import Context
from tinygrad.nn.optim import Optimizer
from tinygrad.tensor import all_tensors
from tinygrad.uop.ops import Ops, UOp

from p2pflop.errors import JobError
from p2pflop.kernels.parts import renew_views, set_item
from p2pflop.kernels.places import Place, Places, at, find_place, place_of
from p2pflop.kernels.refusals import HOST_DEVICES, replacements
from p2pflop.kernels.steps import is_step, step_buffers, step_tensor
from p2pflop.kernels.weights import is_disk, is_disk_view

MAX_LITERAL_BYTES: Final = 256
_NO_GRADIENT: Final = "an optimizer steps, and one of its tensors has no gradient"
_NO_GRADIENT_HINT: Final = (
    "Call loss.backward() in the same function: gradients do not carry over from another one, "
    "unless they were given zeros before trace: p.grad = Tensor.zeros_like(p)."
)
_ABSENT: Final = object()


@dataclass(frozen=True, slots=True)
class Held:
    """A live tensor as it was. ``buffer`` is its stand-in's or, if realized, its own buffer."""

    tensor: Tensor
    uop: UOp
    grad: Tensor | None
    stand_in: UOp | None
    buffer: UOp | None

    @property
    def start(self) -> UOp:
        """The node that the tensor holds when a phase begins."""
        return self.uop if self.stand_in is None else self.stand_in


@dataclass(frozen=True, slots=True)
class Recording:
    """What one phase did: fresh outputs by name, and new values of held tensors by their number.

    ``realized`` is what each of its calls of ``realize`` was given; ``gradients`` the numbers of
    the held tensors whose gradients it leaves behind, ``old_gradients`` of those it adds to.
    """

    name: str
    place: Place | None
    outputs: dict[str, UOp]
    changed: dict[int, UOp]
    realized: list[tuple[UOp, ...]]
    gradients: list[int]
    old_gradients: list[int]


@dataclass(slots=True)
class Stage:
    """Every live tensor on stand-ins, between ``with`` and its end.

    ``seeds`` and ``counts`` are the buffers under the random seed and the counter of random draws,
    ``counter`` the counter itself; ``steps`` those under the step's number, ``arguments`` those of
    the function's arguments by name. ``places`` knows where nodes were made.
    """

    held: list[Held] = field(default_factory=list)
    seeds: set[UOp] = field(default_factory=set)
    counts: set[UOp] = field(default_factory=set)
    steps: set[UOp] = field(default_factory=set)
    counter: Tensor | None = None
    places: Places = field(default_factory=Places)
    arguments: dict[str, UOp] = field(default_factory=dict)
    _saved: list[tuple[Any, str, Any]] = field(default_factory=list)
    _realized: list[tuple[UOp, ...]] = field(default_factory=list)
    _zeroed: bool = False
    _collecting: bool = False
    _stand_ins: set[UOp] = field(default_factory=set)

    def __enter__(self) -> Stage:
        # Nodes live to the end of the trace: looking for garbage among them is a tenth of it.
        self._collecting = gc.isenabled()
        gc.disable()
        self._save(Tensor, "_device_seeds", dict(Tensor._device_seeds))
        self._save(Tensor, "_device_rng_counters", dict(Tensor._device_rng_counters))
        if Device.DEFAULT not in Tensor._device_seeds:
            Tensor._next_counter(Device.DEFAULT, 0)
        step_tensor()
        for name, replacement in replacements(Tensor).items():
            self._save(Tensor, name, replacement)
        self._save(Tensor, "__setitem__", set_item)
        self._save(tinygrad.tensor, "_apply_map_to_tensors", renew_views)
        self._watch()
        # A TinyJit that was called before would replay its kernels on the program's own buffers.
        self._save(_TinyJit, "__call__", lambda jit, *args, **names: jit.fxn(*args, **names))
        try:
            self._hold()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for held in self.held:
            held.tensor.uop, held.tensor.grad = held.uop, held.grad
        for owner, name, value in reversed(self._saved):
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        if self._collecting:
            gc.enable()

    def record(
        self, function: Callable[..., object], arguments: Mapping[str, Tensor], *, training: bool
    ) -> Recording:
        """Run ``function`` once on the stand-ins. Raises JobError."""
        for held in self.held:
            held.tensor.uop, held.tensor.grad = held.start, held.grad
        self._realized, self._zeroed = [], False
        with Context(TRAINING=int(training)):
            known = parameter_names(function)[0] & arguments.keys()
            returned = function(**{name: arguments[name] for name in sorted(known)})
        name = getattr(function, "__name__", "phase")
        outputs = _outputs(name, returned, place_of(function))
        changed = {
            number: held.tensor.uop
            for number, held in enumerate(self.held)
            if held.tensor.uop is not held.start
        }
        gradients = self._gradients(changed)
        return Recording(name, place_of(function), outputs, changed, self._realized, *gradients)

    def is_known(self, buffer: UOp) -> bool:
        """Whether a BUFFER without memory gets its value otherwise."""
        several = (self.seeds, self.counts, self.steps, self._stand_ins, self.arguments.values())
        return any(buffer in known for known in several)

    def _gradients(self, changed: Mapping[int, UOp]) -> tuple[list[int], list[int]]:
        """Numbers of held tensors that keep a new gradient, and that had one which was added to."""
        numbers = {id(held.tensor): number for number, held in enumerate(self.held)}
        kept, added = [], []
        for number, held in enumerate(self.held):
            if held.grad is None and held.tensor.grad is not None and not self._zeroed:
                kept.append(number)
            replaced = held.grad is not None and held.tensor.grad is not held.grad
            if replaced and numbers.get(id(held.grad)) in changed:
                added.append(number)
        return kept, added

    def _save(self, owner: Any, name: str, value: object) -> None:
        self._saved.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def _watch(self) -> None:
        """Note where nodes are made, what is realized, and whether gradients are zeroed."""
        make, apply = Tensor.__init__, Tensor._apply_uop
        zero, step = Optimizer.zero_grad, Optimizer.schedule_step

        def note_made(tensor: Tensor, *args: Any, **names: Any) -> None:
            make(tensor, *args, **names)
            self.places.note(tensor.uop)

        def note_applied(tensor: Tensor, *args: Any, **names: Any) -> Tensor:
            made = apply(tensor, *args, **names)
            self.places.note(made.uop)
            return made

        def note_realized(tensor: Tensor, *others: Tensor, **_: Any) -> Tensor:
            self._realized.append(tuple(each.uop for each in (tensor, *others)))
            return tensor

        def note_zeroed(optimizer: Optimizer) -> None:
            self._zeroed = True
            zero(optimizer)

        def check_gradients(optimizer: Optimizer) -> list[Tensor]:
            if any(param.grad is None for param in optimizer.params):
                raise JobError(at(find_place(), _NO_GRADIENT), hint=_NO_GRADIENT_HINT)
            tensors: list[Tensor] = step(optimizer)
            return tensors

        self._save(Tensor, "__init__", note_made)
        self._save(Tensor, "_apply_uop", note_applied)
        self._save(Tensor, "realize", note_realized)
        self._save(Optimizer, "zero_grad", note_zeroed)
        self._save(Optimizer, "schedule_step", check_gradients)

    def _hold(self) -> None:
        seed = Tensor._device_seeds[Device.DEFAULT]
        self.counter = counter = Tensor._device_rng_counters[Device.DEFAULT]
        self.seeds = {node for node in seed.uop.toposort() if node.op is Ops.BUFFER}
        self.counts = {node for node in counter.uop.toposort() if node.op is Ops.BUFFER}
        self.steps = step_buffers()
        on_data: dict[UOp, bool] = {}

        def visit(node: UOp) -> bool:
            if node.op is Ops.BUFFER:
                if node in self.seeds or node in self.counts:
                    return False
                if node in self.steps:
                    return True
                return is_realized(node) and not is_literal(node)
            return any(on_data.get(source, False) for source in node.src)

        for reference in list(all_tensors):
            tensor = reference()
            if tensor is None:
                continue
            # A realized counter stands for two numbers, not for data that would have to travel.
            can_wait = tensor is counter or (
                tensor is not seed
                and not is_step(tensor)
                and _needs_stand_in(tensor.uop, visit, on_data)
            )
            stand_in = make_stand_in(tensor.uop) if can_wait else None
            base = (stand_in if stand_in is not None else tensor.uop).base
            buffer = base if base.op is Ops.BUFFER else None
            if stand_in is not None:
                self._stand_ins.add(base)
            self.held.append(Held(tensor, tensor.uop, tensor.grad, stand_in, buffer))


def unwrap(function: Callable[..., object]) -> Callable[..., object]:
    """The function that a TinyJit wraps, or ``function`` itself."""
    plain: Callable[..., object] = function.fxn if isinstance(function, _TinyJit) else function
    return plain


def parameter_names(function: Callable[..., object]) -> tuple[frozenset[str], frozenset[str]]:
    """The names of all parameters of ``function``, and of those without a default."""
    named = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    required = (parameter.name for parameter in named if parameter.default is parameter.empty)
    return frozenset(parameter.name for parameter in named), frozenset(required)


def make_stand_in(uop: UOp) -> UOp:
    """A buffer without memory, in the place, shape and dtype of ``uop``."""
    on_device = isinstance(uop.device, str) and not is_disk_view(uop)
    device = uop.device if on_device else Device.DEFAULT
    return UOp.new_buffer(device, uop.numel(), uop.dtype).reshape(uop.shape)


def is_realized(buffer: UOp) -> bool:
    """Whether the BUFFER node has data in it, in memory or where it can be read."""
    return buffer.realized is not None or is_disk(buffer)


def is_literal(buffer: UOp) -> bool:
    """Whether the BUFFER holds a few numbers written in the program, as ``Tensor([0.1])`` does."""
    return (
        buffer.device == "PYTHON"
        and is_realized(buffer)
        and buffer.numel() * buffer.dtype.itemsize <= MAX_LITERAL_BYTES
    )


def _needs_stand_in(uop: UOp, visit: Callable[[UOp], bool], cache: dict[UOp, bool]) -> bool:
    """Whether a tensor that holds ``uop`` is unrealized, and could be state that starts there."""
    dims = uop.shape
    if uop.dtype in dtypes.weaks or isinstance(uop.device, tuple) or uop.has_buffer_identity():
        return False
    if not all(isinstance(dim, int) for dim in dims) or 0 in dims:
        return False
    return is_host_copy(uop) or is_disk_view(uop) or not uop.topovisit(visit, cache)


def is_host_copy(uop: UOp) -> bool:
    """Whether ``uop`` is data of Python or numpy on its way to a device, and nothing else."""
    copied = False
    while uop.op in (Ops.COPY, Ops.RESHAPE):
        copied = copied or uop.op is Ops.COPY
        uop = uop.src[0]
    return copied and uop.op is Ops.BUFFER and uop.device in HOST_DEVICES


def _outputs(name: str, returned: object, place: Place | None) -> dict[str, UOp]:
    if returned is None:
        return {}
    if isinstance(returned, Tensor):
        returned = {"output": returned}
    if not isinstance(returned, dict):
        raise JobError(
            at(place, f"{name} returned a {type(returned).__name__}"),
            hint="Return a dict of names to tensors, such as {'loss': loss}, or nothing.",
        )
    for key, value in returned.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise JobError(
                at(
                    place,
                    f"{name} returned {key!r}: {type(value).__name__}, not a name and a tensor",
                ),
                hint="Return a dict of names to tensors, such as {'loss': loss}.",
            )
    return {key: value.uop for key, value in returned.items()}
