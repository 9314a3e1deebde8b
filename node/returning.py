"""How often, and for how long, a buyer goes back to a provider whose stream broke.

A provider of which nothing is heard for five seconds is lost. A stream that breaks is followed by
others for some of them; one that is cut for its silence (``conversation.py``) is not: they are
over.
"""

from __future__ import annotations

import math
from typing import Final

import trio

from p2pflop.job.events import State

UNCONFIRMED: Final = frozenset({State.RANKING, State.WAITING, State.CHECKING, State.BIDDING})
BOUND: Final = frozenset({State.CONFIRMING, State.RUNNING, State.VERIFYING})
"""When a provider is bound by a confirm."""

OPEN_S: Final = 8.0
RETURN_S: Final = 0.25
MAX_RETURNS: Final = 5
"""Streams opened in the place of broken ones, with growing pauses, until one is ``STEADY_S``."""
STEADY_S: Final = 30.0
RETURN_WITHIN_S: Final = 4.0
"""After a stream broke; after that its provider is lost."""
LAST_VERIFY_S: Final = 5.0
"""For what was billed before the provider gave the lease back; shorter than its silence may be."""


class Returns:
    """Those to one provider."""

    def __init__(self) -> None:
        self._left = MAX_RETURNS
        self._until = math.inf

    def broke(self, lasted_s: float, *, fell_silent: bool) -> None:
        """A stream has ended that had lasted so long."""
        if lasted_s > STEADY_S:
            self._left = MAX_RETURNS
        self._until = trio.current_time() + (0.0 if fell_silent else RETURN_WITHIN_S)

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
