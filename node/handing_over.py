"""What becomes of a lease when the provider's operator stops the node: pre-emption.

The worker finishes its running step and stands still. What it has computed since the last
checkpoint becomes one more, billed by one more receipt. Once the buyer has verified it and
countersigned, the lease is given back; the buyer's run goes on elsewhere from exactly that step:
nothing is computed or paid twice. A result that is on its way is waited for in the same way. What
is not handed over after ``HAND_OVER_S`` is given back as it is; a buyer that is away is waited for
only for as long as a broken stream has to come back.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from p2pflop.job.buying import PREEMPTED_PREFIX
from p2pflop.job.events import Withdraw
from p2pflop.node.returning import RETURN_WITHIN_S

if TYPE_CHECKING:
    from p2pflop.node.sale import Sale

HAND_OVER_S: Final = 10.0
LOOK_S: Final = 0.05
SHUTTING_DOWN: Final = "the provider is shutting down"

_log = logging.getLogger(__name__)


async def hand_over(sale: Sale) -> None:
    """Bring the buyer what was computed, give the lease back and end the talk."""
    name, told = sale.rows.head.job[:12], ""
    sale.leave()
    # A buyer whose stream just broke comes back so soon, or not at all.
    with trio.move_on_after(HAND_OVER_S if sale.attended else RETURN_WITHIN_S):
        while waits_for := sale.waits_for:
            if waits_for != told:
                _log.info("lease %s: waiting for %s", name, waits_for)
                told = waits_for
            await trio.sleep(LOOK_S)
    if sale.waits_for:
        _log.info("lease %s: given back without %s", name, told)
    if not sale.over:
        await sale.tell(Withdraw(PREEMPTED_PREFIX + SHUTTING_DOWN))
    await sale.part()
