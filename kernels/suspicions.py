"""What a traced function does that may not mean what its author thinks: warnings, with the line.

The realize-order trap. A traced function has one moment of reading. Natively, a value that is still
lazy when a state that it was computed from is updated and realized is computed from the *new*
state; here from the old one, as if it had been realized together with the update. So the order of
``realize`` calls is noted while the function runs, and a value that reads a state which an earlier
call updates is told.

Variables and gradients. Only what is assigned carries over from step to step. A variable, entry or
attribute that names another tensor after the step, or that the step makes, and a gradient that is
still there after it (natively the next step adds to it), do not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from tinygrad.uop.ops import Ops, UOp

from p2pflop.kernels.capture import Held, Recording
from p2pflop.kernels.places import Places, warn
from p2pflop.kernels.refusals import read_by, read_order

Names = Mapping[int, str]

_NEVER: Final = 1 << 30
_LATE_READ: Final = (
    "{} is computed from {} as it was before its update; tinygrad, where it is still lazy then, "
    "computes it from the new one. Realize both at once to have the same everywhere: "
    "loss.realize(*opt.schedule_step())"
)
_NEW_TENSOR: Final = (
    "{0} is another tensor after the step than before, and a job's next step has the old one "
    "again: write {0}.assign(...) to change it"
)
_MADE_TENSOR: Final = (
    "{0} is made in the step, and a job's next step begins without it again: give it a value "
    "before trace, such as Tensor.zeros({1}), and write {0}.assign(...) in the step; what you only "
    "look at belongs into the function's dict"
)
_OLD_GRADIENT: Final = (
    "{} had a gradient before trace, which every step of the job adds to anew: call zero_grad() "
    "first thing in the step"
)
_KEPT_GRADIENT: Final = (
    "{} keeps its gradient after the step: tinygrad's next step adds to it, a job's starts without "
    "one. Call zero_grad() first thing in the step, or sum up in a tensor of your own"
)


def warn_of(
    recordings: Sequence[Recording], held: Sequence[Held], names: Names, places: Places
) -> None:
    """Give all warnings that the phases deserve. ``names`` are those of their tensors by ``id``."""
    states = {number for recording in recordings for number in recording.changed}
    for recording in recordings:
        _warn_of_late_reads(recording, held, names, places)
        # Data has gradients as well, which nobody reads.
        kept = [number for number in recording.gradients if number in states]
        for numbers, message in (
            (recording.old_gradients, _OLD_GRADIENT),
            (kept, _KEPT_GRADIENT),
        ):
            for number in numbers[:1]:
                name = names.get(id(held[number].tensor), "a tensor")
                warn(recording.place, message.format(name))


def _warn_of_late_reads(
    recording: Recording, held: Sequence[Held], names: Names, places: Places
) -> None:
    updated, done = _order(recording.realized)
    if not updated:
        return
    states = {held[number].start.base: number for number in recording.changed}
    values = {f"the output {name!r}": uop for name, uop in recording.outputs.items()}
    for number, uop in recording.changed.items():
        if id(held[number].tensor) in names:
            values[names[id(held[number].tensor)]] = uop
    seen: dict[UOp, int] = {}
    for label, value in values.items():
        late = _late_read(value, updated, done, states, seen)
        if late is not None:
            state = names.get(id(held[states[late]].tensor), "a tensor")
            place = places.of(value, reversed(read_order([value])))
            warn(place or recording.place, _LATE_READ.format(label, state))


def _order(realized: Sequence[Sequence[UOp]]) -> tuple[dict[UOp, int], dict[UOp, int]]:
    """In which call of ``realize`` each buffer is first updated, and each value computed."""
    updated: dict[UOp, int] = {}
    done: dict[UOp, int] = {}
    for number, roots in enumerate(realized):
        for node in UOp.sink(*roots).toposort():
            if node.op in (Ops.AFTER, Ops.CONTIGUOUS):
                done.setdefault(node, number)
            if node.op is Ops.STORE:
                updated.setdefault(node.src[0].base, number)
        for root in roots:
            done.setdefault(root, number)
    return updated, done


def _late_read(
    value: UOp,
    updated: Mapping[UOp, int],
    done: Mapping[UOp, int],
    states: Collection[UOp],
    seen: dict[UOp, int],
) -> UOp | None:
    """One of ``states``, buffers, that ``value`` reads later than its update.

    ``seen`` has what was looked at for other values and until which call: a cause that they share
    is told for the first.
    """
    late = None
    stack = [(value, _NEVER)]
    while stack:
        node, when = stack.pop()
        when = min(when, done.get(node, _NEVER))
        if seen.get(node, -1) >= when:
            continue
        seen[node] = when
        if node in states and updated.get(node, _NEVER) < when:
            late = node if late is None else late
        stack.extend((source, when) for source in read_by(node))
    return late


def warn_of_new_tensors(
    before: Mapping[str, Any], after: Mapping[str, Any], places: Places
) -> None:
    """Warn of what does not carry over though it looks so, when the functions have run.

    That is every variable that holds another tensor than before, and every one that holds a tensor
    which nothing held before.
    """
    known = {id(tensor) for tensor in before.values()}
    for name, tensor in after.items():
        if name in before and before[name] is not tensor:
            warn(places.of(tensor.uop), _NEW_TENSOR.format(name))
        elif id(tensor) not in known:
            known.add(id(tensor))
            shape = ", ".join(map(str, tensor.shape))
            warn(places.of(tensor.uop), _MADE_TENSOR.format(name, shape))
