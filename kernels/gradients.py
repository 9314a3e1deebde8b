"""Gradients that nobody reads: ``backward`` adds to those of every tensor, inputs too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tinygrad.uop.ops import UOp

from p2pflop.kernels.capture import Held, Recording
from p2pflop.kernels.refusals import read_order


def drop_unread_gradients(recordings: Sequence[Recording], held: Sequence[Held]) -> list[Recording]:
    """``recordings`` without changes of gradients that only such changes read.

    A data set that a program differentiated through before has a gradient, like its weights; only
    those of weights mean anything to it.
    """
    gradients = {id(each.grad) for each in held if each.grad is not None}
    changed = {number for recording in recordings for number in recording.changed}
    unread = {number for number in changed if id(held[number].tensor) in gradients}
    if not unread:
        return list(recordings)
    roots: list[UOp] = []
    for recording in recordings:
        roots += recording.outputs.values()
        roots += [uop for number, uop in recording.changed.items() if number not in unread]
    read = set(read_order(roots))
    unread -= {number for number in unread if held[number].start in read}
    return [
        replace(
            recording,
            changed={n: uop for n, uop in recording.changed.items() if n not in unread},
            old_gradients=[
                number
                for number in recording.old_gradients
                if not any(held[n].tensor is held[number].grad for n in unread)
            ],
        )
        for recording in recordings
    ]
