"""Who is served blobs at once, when more ask than there is room for.

Readers of **private** blobs, who are parties of a lease, come before readers of public ones: these
may take ``MAX_PUBLIC_STREAMS`` of the ``MAX_STREAMS`` slots, and lose theirs where a private reader
finds none. Among equals a slot is taken over

- from the peer that has most of them, while it has at least two more than the peer that comes: so a
  few peers cannot keep the others out, however many streams they open;
- else from a stream that has been given ``GRACE_S`` and took less than ``MIN_BYTES_PER_S`` since.

The slowest stream of those in question goes. A slow reader whose slot nobody wants stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from p2pflop.units import KIB

MAX_STREAMS: Final = 64
MAX_PUBLIC_STREAMS: Final = 48
GRACE_S: Final = 10.0
MIN_BYTES_PER_S: Final = 64 * KIB


@dataclass(slots=True, eq=False)
class Slot:
    """One stream that is served. Its ``scope`` is cancelled when another takes its place."""

    peer: str
    private: bool
    since_s: float
    sent_bytes: int = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def bytes_per_s(self, now_s: float) -> float:
        """How fast the peer has taken what it was sent."""
        return self.sent_bytes / max(now_s - self.since_s, 1.0)


class Slots:
    """The slots of one server."""

    def __init__(self) -> None:
        self._taken: list[Slot] = []

    def __len__(self) -> int:
        return len(self._taken)

    def take(self, peer: str, *, private: bool, now_s: float) -> Slot | None:
        """A slot, perhaps of another whose scope is cancelled; None if all are better used."""
        public = [slot for slot in self._taken if not slot.private]
        is_room = len(self._taken) < MAX_STREAMS
        if not private:
            is_room = is_room and len(public) < MAX_PUBLIC_STREAMS
        if not is_room:
            victim = self._victim(peer, private, public, now_s)
            if victim is None:
                return None
            self.give_back(victim)
            victim.scope.cancel()
        slot = Slot(peer, private, now_s)
        self._taken.append(slot)
        return slot

    def give_back(self, slot: Slot) -> None:
        """The stream has ended."""
        if slot in self._taken:
            self._taken.remove(slot)

    def _victim(
        self, peer: str, private: bool, public: Sequence[Slot], now_s: float
    ) -> Slot | None:
        candidates = public or (self._taken if private else [])
        if not candidates:
            return None
        held = Counter(slot.peer for slot in candidates)
        most = max(held.values())
        if most >= held[peer] + 2:
            found = [slot for slot in candidates if held[slot.peer] == most]
        elif private and public:
            found = list(public)
        else:
            found = [
                slot
                for slot in candidates
                if now_s - slot.since_s > GRACE_S and slot.bytes_per_s(now_s) < MIN_BYTES_PER_S
            ]
        return min(found, key=lambda slot: slot.bytes_per_s(now_s), default=None)
