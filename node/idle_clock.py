"""How long nothing was at work."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio


@dataclass(slots=True)
class IdleClock:
    """Counts from when it is made. What ``begin`` begins, ``end`` ends; several may be at work."""

    begun_at: float = field(default_factory=trio.current_time)
    _at_work: int = 0
    _counted_s: float = 0.0
    _since: float = field(default_factory=trio.current_time)

    @property
    def idle_s(self) -> float:
        """Seconds so far in which nothing was at work."""
        if self._at_work:
            return self._counted_s
        return self._counted_s + trio.current_time() - self._since

    @property
    def busy_s(self) -> float:
        """Seconds so far in which something was."""
        return trio.current_time() - self.begun_at - self.idle_s

    def begin(self) -> None:
        """Something is at work from now on."""
        self._counted_s = self.idle_s
        self._at_work += 1

    def end(self) -> None:
        """It is done, or waits for somebody else. Raises ValueError if nothing is at work."""
        if not self._at_work:
            raise ValueError("nothing is at work")
        self._at_work -= 1
        self._since = trio.current_time()
