"""How fast one peer may cost this node work."""

from __future__ import annotations


class Pace:
    """How fast one peer may cost this node work: ``burst`` at once, ``per_s`` after that."""

    def __init__(self, per_s: float, burst: float, now_s: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._left = burst
        self._since = now_s

    def spend(self, cost: float, now_s: float) -> float:
        """Note what was done; how many seconds to rest for it."""
        earned = (now_s - self._since) * self._per_s
        self._left = min(self._burst, self._left + earned) - cost
        self._since = now_s
        return max(0.0, -self._left / self._per_s)
