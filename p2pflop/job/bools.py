"""Which bytes of a session's buffers are bools for certain.

A graph reads a bool as the compiler likes if it is neither 0 nor 1, and no bytes stand for what it
then computes; a range that was proved of it does not hold. A buffer has no dtype, so what is bound
as bools is looked at before it runs, once after whatever else could have changed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from p2pflop.errors import JobError
from p2pflop.job.commands import Check

if TYPE_CHECKING:
    from p2pflop.job.session import Binding

MAX_KNOWN_PLACES: Final = 1024
"""In one buffer; beyond it they are looked at again."""


def check_bools(data: bytes | memoryview) -> None:
    """Raises JobError for a byte that is neither 0 nor 1."""
    if bytes(data).translate(None, b"\0\1"):
        raise JobError(
            "a tensor of bools has bytes other than 0 and 1",
            hint="Write the data anew: numpy.asarray(data) != 0.",
        )


class BoolPlaces:
    """The places that were looked at, and where only bools were written since."""

    def __init__(self) -> None:
        self._known: dict[int, set[tuple[int, int]]] = {}

    def __bool__(self) -> bool:
        """Whether any place is known."""
        return bool(self._known)

    def due(self, binding: Binding) -> tuple[Check, ...]:
        """What is to be looked at before a run of ``binding``."""
        graph = binding.graph
        if not graph.has_bools:
            return ()
        return tuple(
            Check(buffer, at, size_bytes)
            for (buffer, at), size_bytes, is_bool, is_read in zip(
                binding.places, graph.sizes_bytes, graph.bools, graph.reads, strict=True
            )
            if is_bool
            and is_read
            and size_bytes
            and (at, size_bytes) not in self._known.get(buffer, ())
        )

    def ran(self, binding: Binding, due: Sequence[Check]) -> None:
        """``binding`` ran, after what was ``due``."""
        graph = binding.graph
        for check in due:
            self._know(check.buffer, (check.offset_bytes, check.size_bytes))
        if not (self._known or graph.has_bools):
            return
        params = list(
            zip(binding.places, graph.sizes_bytes, graph.bools, graph.written, strict=True)
        )
        for (buffer, at), size_bytes, is_bool, is_written in params:
            if is_written and is_bool:
                self._know(buffer, (at, size_bytes))
        # Last, as places may overlap.
        for (buffer, _), _, is_bool, is_written in params:
            if is_written and not is_bool:
                self.changed(buffer)

    def _know(self, buffer: int, place: tuple[int, int]) -> None:
        known = self._known.setdefault(buffer, set())
        if len(known) >= MAX_KNOWN_PLACES:
            known.clear()
        known.add(place)

    def changed(self, buffer: int) -> None:
        """Any bytes may be in ``buffer``."""
        self._known.pop(buffer, None)
