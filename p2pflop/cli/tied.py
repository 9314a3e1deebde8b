"""Programs that a demo or a test starts, and that are to end with it whatever ends it."""

from __future__ import annotations

import signal
from typing import Final

PR_SET_PDEATHSIG: Final = 1


def end_with_parent() -> None:
    """Be sent SIGTERM when the program that started this one dies, where the kernel can do that."""
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
