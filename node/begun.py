"""What the work of a lease counts for in its buyer's credit before anything is countersigned.

All that was shown counts, and of the step under way as much as this node computes in the time since
that began, so that a buyer who breaks off at once takes little of the credit, and one who lets a
long step run for long takes much. Where nothing is known of the node's speed the whole step counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pflop.job.spec import Work
from p2pflop.market.receipts import amount_nusd, begun_nusd
from p2pflop.market.records import Bid
from p2pflop.units import FLOP_PER_PFLOP


@dataclass(slots=True)
class Begun:
    """The steps of one lease; those before ``shown_to`` were shown to the buyer. ``price_nusd`` is
    that of the ask, None if it is not known any more. Times are in seconds of one clock."""

    bid: Bid
    work: Work
    shown_to: int
    price_nusd: int | None = None
    _started_s: float = 0.0
    _moved_s: float = 0.0

    def start(self, now_s: float) -> None:
        """The first step begins."""
        self._started_s = self._moved_s = now_s

    def show(self, step: int, now_s: float) -> None:
        """The buyer was told of all steps before ``step``, which begins."""
        self.shown_to, self._moved_s = step, now_s

    def flop_per_s(self) -> int:
        """How fast it went so far, in FLOP as they are paid for; 0 if nothing can be said."""
        seconds = self._moved_s - self._started_s
        if not self.price_nusd or seconds <= 0:
            return 0
        done_nusd = amount_nusd(self.bid, self.work, self._steps)
        return int(done_nusd * FLOP_PER_PFLOP / (self.price_nusd * seconds))

    def nusd(self, now_s: float, *, is_stepping: bool, flop_per_s: int) -> int:
        """What counts if it is broken off now, by a node that computes ``flop_per_s``, 0 if that is
        not known. ``is_stepping``: a step is under way."""
        under_way_nusd: int | None = None
        if not is_stepping:
            under_way_nusd = 0
        elif self.price_nusd and flop_per_s:
            flop = int((now_s - self._moved_s) * flop_per_s)
            under_way_nusd = -(-self.price_nusd * flop // FLOP_PER_PFLOP)
        return begun_nusd(self.bid, self.work, self._steps, under_way_nusd)

    @property
    def _steps(self) -> int:
        return self.shown_to - self.bid.job.first_step
