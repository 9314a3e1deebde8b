"""Looking into the jobs that strangers offer, for a bounded share of this node's time.

A body of 100 kB may hold a hundred thousand nodes, and validating and metering those takes a second
of Python. So there is one thread for all bodies that are not small, a short queue before it, at
most one body a peer in it, and a peer whose body was looked at in vain is not listened to for a
while. What can be told without looking (the bid names other graphs) is told first.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import trio

from p2pflop.errors import ProtocolError
from p2pflop.job.buying import BUSY_PREFIX
from p2pflop.job.file import CheckedJob, JobBody, decode_body, open_job
from p2pflop.job.graph import graph_hash
from p2pflop.job.validate import Refusal
from p2pflop.market.records import Bid, Rejected
from p2pflop.units import NS_PER_S

SMALL_BODY_BYTES: Final = 1024
"""Up to here a body is opened on the event loop: the hop to a thread would cost more."""

MAX_WAITING_BODIES: Final = 8
PENALTY_NS: Final = 30 * NS_PER_S
MAX_PENALTIES: Final = 4096

_log = logging.getLogger(__name__)

Opened = tuple[JobBody, CheckedJob]


class Opener:
    """Opens the bodies of offers."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._thread = trio.CapacityLimiter(1)
        self._under_way: set[str] = set()
        self._penalties: OrderedDict[str, int] = OrderedDict()

    async def open(self, bid: Bid, data: bytes, peer: str) -> Opened | Rejected:
        """The job in ``data``, which ``bid`` is for. Raises ProtocolError if it is no body."""
        if self._penalties.get(peer, 0) > self._now_ns():
            return Rejected("your last job was not what its bid said; come back later")
        if len(data) <= SMALL_BODY_BYTES:
            return _open(bid, data)
        if peer in self._under_way:
            return Rejected(BUSY_PREFIX + "another job of yours is being looked at")
        if len(self._under_way) >= MAX_WAITING_BODIES:
            return Rejected(BUSY_PREFIX + "too many jobs wait to be looked at")
        self._under_way.add(peer)
        try:
            found = await trio.to_thread.run_sync(_open, bid, data, limiter=self._thread)
        finally:
            self._under_way.discard(peer)
        if isinstance(found, Rejected):
            self.penalise(peer)
        return found

    async def reopen(self, data: bytes) -> Opened:
        """A body that was opened before. Raises ProtocolError if it is damaged."""
        if len(data) <= SMALL_BODY_BYTES:
            return open_known(data)
        return await trio.to_thread.run_sync(open_known, data, limiter=self._thread)

    def penalise(self, peer: str) -> None:
        """Nothing of this peer's is looked at for a while."""
        self._penalties[peer] = self._now_ns() + PENALTY_NS
        self._penalties.move_to_end(peer)
        if len(self._penalties) > MAX_PENALTIES:
            self._penalties.popitem(last=False)


def _open(bid: Bid, data: bytes) -> Opened | Rejected:
    body = decode_body(data)
    graphs = [graph_hash(graph) for graph in body.graphs]
    lines = [line.graph for line in bid.costs]
    if body.job != bid.job or graphs[: len(lines)] != lines:
        return Rejected("the bid is for another job than the one sent")
    checked = open_job(body)
    if isinstance(checked, Refusal):
        return Rejected(f"the job is not valid: {checked.reason}")
    return body, checked


def open_known(data: bytes) -> Opened:
    """A body that was opened before. Raises ProtocolError if it is damaged."""
    body = decode_body(data)
    checked = open_job(body)
    if isinstance(checked, Refusal):
        raise ProtocolError(f"the job is not valid: {checked.reason}")
    return body, checked
