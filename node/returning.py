"""How often, and for how long, a buyer goes back to a provider whose stream broke.

A provider of which nothing is heard for about five seconds is lost: its stream breaks at once or is
cut after some seconds of silence (``conversation.py``), and whatever of the five is left is for
streams in its place.
"""

from __future__ import annotations

import math
from typing import Final

import trio

OPEN_S: Final = 8.0
RETURN_S: Final = 0.25
MAX_RETURNS: Final = 5
"""Streams opened in the place of broken ones, with growing pauses, until one is ``STEADY_S``."""
STEADY_S: Final = 30.0
RETURN_WITHIN_S: Final = 4.0
"""After a stream broke; after that its provider is lost."""
SILENT_RETURN_S: Final = 1.0
"""The same, if nothing had come on it for some seconds already."""


class Returns:
    """Those to one provider."""

    def __init__(self) -> None:
        self._left = MAX_RETURNS
        self._until = math.inf

    def broke(self, lasted_s: float, *, fell_silent: bool) -> None:
        """A stream has ended that had lasted so long."""
        if lasted_s > STEADY_S:
            self._left = MAX_RETURNS
        patience_s = RETURN_WITHIN_S
        if fell_silent:  # once more, if that was not a return already
            patience_s = SILENT_RETURN_S if self._left == MAX_RETURNS else 0.0
        self._until = trio.current_time() + patience_s

    def next_pause_s(self) -> float | None:
        """How long to wait before the next stream; None if the provider is lost."""
        pause_s = RETURN_S * (1 + MAX_RETURNS - self._left)
        if not self._left or trio.current_time() + pause_s > self._until:
            return None
        self._left -= 1
        return pause_s

    def open_within_s(self) -> float:
        """How long opening the next stream may take."""
        return min(OPEN_S, max(0.0, self._until - trio.current_time()))
