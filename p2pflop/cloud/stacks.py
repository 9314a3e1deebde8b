"""Which lines of the user's program asked for something: kept cheaply, worded only when needed."""

from __future__ import annotations

import linecache
import sys
import sysconfig
from pathlib import Path
from types import CodeType, FrameType
from typing import Final

MAX_FRAMES: Final = 4
_COMPILED: Final = "compiled_match"
"""What tinygrad makes of its rules; it lies in no file."""

Stack = tuple[tuple[CodeType, int], ...]

_own: dict[str, bool] = {}
_OURS: Final = str(Path(__file__).parents[1])
_LIBRARY: Final = sysconfig.get_paths()["stdlib"]


def user_stack() -> Stack:
    """The innermost lines outside of tinygrad, p2pflop and Python's library, the last one first."""
    found: list[tuple[CodeType, int]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < MAX_FRAMES:
        code = frame.f_code
        if _is_users(code.co_filename) and code.co_name != _COMPILED:
            found.append((code, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def describe(stack: Stack) -> str:
    """As a traceback shows them, the innermost last."""
    lines = []
    for code, number in reversed(stack):
        lines.append(f'  File "{code.co_filename}", line {number}, in {code.co_name}')
        text = linecache.getline(code.co_filename, number).strip()
        if text:
            lines.append(f"    {text}")
    return "\n".join(lines)


def _is_users(path: str) -> bool:
    known = _own.get(path)
    if known is None:
        parts = Path(path).parts
        is_library = path.startswith(_LIBRARY) and "site-packages" not in parts
        known = (
            "tinygrad" not in parts and not path.startswith((_OURS, "<frozen")) and not is_library
        )
        _own[path] = known
    return known
