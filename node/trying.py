"""A job tried out in the sandbox of the node that buys it: whether it faults, as others say.

It runs from where the purchase stands, its newest verified checkpoint, up to where the next one
would be, for ``TRY_S`` at most, and nothing of what it gives is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import trio

from p2pflop.dht.blobs import Store
from p2pflop.errors import JobError, P2PFlopError, first_error
from p2pflop.job.events import Trial
from p2pflop.node.execute import HOUR_NS, Execution, lower_all, worker_limits
from p2pflop.node.feeding import Feeds
from p2pflop.node.orders import Order
from p2pflop.node.outcomes import fault_told
from p2pflop.node.printable import printable
from p2pflop.node.worker_types import Workers

TRY_S: Final = 120.0
THREADS: Final = 1

_log = logging.getLogger(__name__)


async def try_out(order: Order, workers: Workers, store: Store) -> tuple[Trial, str]:
    """How ``order`` fares here, and of a fault what it was. Whatever fails here but the job itself
    leaves it unknown."""
    trial, reason = Trial.UNKNOWN, ""
    try:
        with trio.move_on_after(TRY_S):
            await _run(order, workers, store)
            trial = Trial.PASSES
    except* JobError as group:
        trial, reason = Trial.FAULTS, printable(fault_told(first_error(group)))
    except* P2PFlopError as group:
        _log.warning("a job could not be tried out: %s", printable(first_error(group).message))
    return trial, reason


async def _run(order: Order, workers: Workers, store: Store) -> None:
    """Raises JobError if it faults."""
    checked, every = order.checked, order.terms.checkpoint_steps
    job = checked.job
    steps = min(job.steps, every - job.first_step % every) if every else job.steps
    feeds = Feeds(checked, store, _is_here, _hold_nothing)
    plans = await lower_all(workers, order.file.body.graphs, _tell_nobody)
    await feeds.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feeds.run)
        async with workers.worker(worker_limits(checked, HOUR_NS, THREADS)) as worker:
            execution = Execution(
                checked,
                workers.class_id,
                store,
                worker,
                feeds=feeds,
                owner=b"",
                at_hand={},
                hold=_hold_nothing,
            )
            await execution.load(plans)
            await execution.try_out(steps)
        nursery.cancel_scope.cancel()


async def _is_here(_address: bytes, _max_bytes: int) -> None:
    """A buyer has every input of what it buys."""
    await trio.lowlevel.checkpoint()


async def _hold_nothing(_addresses: Sequence[bytes]) -> None:
    await trio.lowlevel.checkpoint()


async def _tell_nobody(_done: int, _total: int) -> None:
    await trio.lowlevel.checkpoint()
