"""How much of something each of many peers may do: token buckets, a bounded number of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, TypeVar

MAX_BUCKETS: Final = 4096

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Rates:
    """Lets each key do something ``burst`` times at once and ``per_s`` times a second after that.

    At most ``MAX_BUCKETS`` keys are remembered; the one unseen for longest starts afresh.
    """

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def allow(self, key: str, now_s: float) -> bool:
        """Whether ``key`` may do it now; if so, it is counted."""
        return self.take(key, 1, now_s) == 1

    def take(self, key: str, most: int, now_s: float) -> int:
        """How many times, up to ``most``, ``key`` may do it now; all of them are counted."""
        tokens, since = self._buckets.pop(key, (float(self._burst), now_s))
        tokens = min(float(self._burst), tokens + (now_s - since) * self._per_s)
        taken = min(most, max(0, int(tokens)))
        remember(self._buckets, key, (tokens - taken, now_s), MAX_BUCKETS)
        return taken

    def left(self, key: str, now_s: float) -> float:
        """How many times ``key`` may do it now."""
        tokens, since = self._buckets.get(key, (float(self._burst), now_s))
        return min(float(self._burst), tokens + (now_s - since) * self._per_s)

    def wait_s(self, key: str, now_s: float) -> float:
        """How long until ``allow`` would say yes."""
        return max(0.0, (1 - self.left(key, now_s)) / self._per_s)


class SharedRates:
    """Bounds what many keys do together: each has an ``own`` share, and what is ``common`` goes to
    whoever comes first. So who has many keys takes all that is common, and nobody's own share."""

    def __init__(self, own: Rates, common: Rates) -> None:
        self._own = own
        self._common = common

    def allow(self, key: str, common: str, now_s: float) -> bool:
        """Whether ``key`` may do it now, out of its share or what it has in ``common``; if so, it
        is counted."""
        return self._own.allow(key, now_s) or self._common.allow(common, now_s)


def remember(kept: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    """Keep ``value``; of more than ``most`` the oldest is forgotten."""
    kept[key] = value
    if len(kept) > most:
        kept.popitem(last=False)
