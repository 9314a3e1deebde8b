"""Looking into the graphs of sessions, for a bounded share of this node's time.

As with the jobs that strangers offer (``opening.py``): there is one thread for all graphs that are
not small, and each session has one graph at a time before it. What was opened lately is kept, so
that a node which buys from itself, or a session that moves, does it once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import trio

from p2pflop.job.graph import graph_hash
from p2pflop.job.session import OpenGraph, open_graph
from p2pflop.units import KIB, MIB

SMALL_GRAPH_BYTES: Final = KIB
"""Up to here a graph is opened on the event loop: the hop to a thread would cost more."""
MAX_KEPT_BYTES: Final = 32 * MIB


class Graphs:
    """Opened graphs by hash. ``user`` is the thread for this node's own user, who waits for no
    stranger."""

    def __init__(self) -> None:
        self.user = trio.CapacityLimiter(1)
        self.strangers = trio.CapacityLimiter(1)
        self._kept: OrderedDict[bytes, OpenGraph] = OrderedDict()
        self._kept_bytes = 0

    async def open(self, data: bytes, limiter: trio.CapacityLimiter) -> OpenGraph:
        """See ``open_graph``. Raises ProtocolError, JobError."""
        name = graph_hash(data)
        graph = self._kept.get(name)
        if graph is not None:
            self._kept.move_to_end(name)
            return graph
        if len(data) <= SMALL_GRAPH_BYTES:
            graph = open_graph(data)
        else:
            graph = await trio.to_thread.run_sync(open_graph, data, limiter=limiter)
        if name not in self._kept:
            self._kept[name] = graph
            self._kept_bytes += len(data)
        while self._kept_bytes > MAX_KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= len(oldest.encoded)
        return graph
