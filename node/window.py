"""How far the work of a lease runs ahead of what its buyer has countersigned.

With half of the window unsigned and no receipt under way, one is made out, and the work goes on.
With all of it unsigned the worker stands still between two steps, its state kept, until a
countersignature makes room; a buyer that sends none for ``COUNTERSIGN_WITHIN_S`` loses the lease.
The node hears of steps every 50 ms or after each, whichever is longer: so much is done beyond it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from p2pflop.job.spec import Work
from p2pflop.market.receipts import amount_nusd
from p2pflop.market.records import Bid

COUNTERSIGN_WITHIN_S: Final = 600.0


@dataclass(slots=True)
class Window:
    """That of one lease. ``amount_nusd`` tells what is due when the next step is the given one;
    ``give_up`` ends the lease, and with it the task that waits."""

    limit_nusd: int
    amount_nusd: Callable[[int], int]
    give_up: Callable[[], Awaitable[None]]
    signed_nusd: int = 0
    is_standing: bool = False
    news: trio.Event = field(default_factory=trio.Event)

    def note_signed(self, amount_nusd: int) -> None:
        """The buyer has countersigned that much in all."""
        self.signed_nusd = amount_nusd
        self.wake()

    def wake(self) -> None:
        """Have whoever waits look again."""
        self.news.set()
        self.news = trio.Event()

    def unsigned_nusd(self, step: int) -> int:
        """What is done before ``step`` and not countersigned, in nano-dollars."""
        return self.amount_nusd(step) - self.signed_nusd

    def wants_receipt(self, step: int) -> bool:
        """Whether a receipt should be made out if none is under way."""
        return 2 * self.unsigned_nusd(step) > self.limit_nusd

    def is_full(self, step: int) -> bool:
        """Whether ``step`` must wait."""
        return self.unsigned_nusd(step) > self.limit_nusd

    async def wait(self, news: trio.Event) -> None:
        """Stand still until ``news``, one that was taken before looking."""
        self.is_standing = True
        try:
            with trio.move_on_after(COUNTERSIGN_WITHIN_S):
                await news.wait()
                return
            await self.give_up()
            await trio.sleep_forever()
        finally:
            self.is_standing = False


def window_of(
    bid: Bid, work: Work, limit_nusd: int | None, give_up: Callable[[], Awaitable[None]]
) -> Window | None:
    """The window of a lease; None where it changes nothing: without a limit, if all of the job
    costs no more."""
    if limit_nusd is None or bid.quote_nusd <= limit_nusd:
        return None

    def due_nusd(step: int) -> int:
        return amount_nusd(bid, work, step - bid.job.first_step)

    return Window(limit_nusd, due_nusd, give_up)
