"""Which line of a user's program something came from, for messages that name it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Final

from tinygrad.uop.ops import UOp

from p2pflop.errors import TraceWarning

_LIBRARIES: Final = frozenset({"p2pflop", "tinygrad"})
_WRAPPER: Final = "_wrapper"
"""What tinygrad calls the function that it wraps around each of Tensor's, unless TRACEMETA=0."""


@dataclass(frozen=True, slots=True)
class Place:
    """A line, and the library's function that is called there (empty if none is)."""

    file: str
    line: int
    called: str

    def __str__(self) -> str:
        path = Path(self.file)
        here = Path.cwd()
        return f"{path.relative_to(here) if path.is_relative_to(here) else path}:{self.line}"


@dataclass(slots=True)
class Places:
    """Where the nodes of a traced function were made."""

    _of: dict[UOp, Place] = field(default_factory=dict)

    def note(self, uop: UOp) -> None:
        """Remember the user's line that is being run as the origin of ``uop``, if it is new."""
        if uop not in self._of:
            place = find_place()
            if place is not None:
                self._of[uop] = place

    def of(self, uop: UOp, users: Iterable[UOp] = ()) -> Place | None:
        """Where ``uop`` was made, or else the first of ``users``."""
        return next((self._of[node] for node in (uop, *users) if node in self._of), None)


def find_place() -> Place | None:
    """The line of the innermost frame outside tinygrad and p2pflop."""
    frame: FrameType | None = sys._getframe(1)
    called = ""
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            return Place(frame.f_code.co_filename, frame.f_lineno, called)
        if frame.f_code.co_name != _WRAPPER:
            called = frame.f_code.co_name
        frame = frame.f_back
    return None


def place_of(function: object) -> Place | None:
    """The first line of a function of Python's."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return Place(code.co_filename, code.co_firstlineno, "") if isinstance(code, CodeType) else None


def at(place: Place | None, message: str) -> str:
    """``message`` with its place before it."""
    return message if place is None else f"{place}: {message}"


def warn(place: Place | None, message: str) -> None:
    """Give a TraceWarning at ``place``, or at the line that is being run."""
    place = place or find_place()
    if place is None:
        warnings.warn(message, TraceWarning, stacklevel=2)
    else:
        warnings.warn_explicit(message, TraceWarning, place.file, place.line)
