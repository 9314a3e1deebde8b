"""How long a buyer waits for a provider that is alive and gets no further with a job or session.

As long as the slowest honest one may take for what shows no progress on the way: lowering a graph,
bringing a shard, one step with every phase due. All of it is estimated from the job alone, far on
the safe side, so that one who only claims to work holds a small job for minutes, and none for
longer than ``MAX_STALL_NS``.

A session is waited for likewise, by the commands that are sent and not obeyed. Most of them take no
time at all, and moving it costs little: so one who obeys nothing is left within half a minute.
"""

from __future__ import annotations

from typing import Final

from p2pflop.job.file import CheckedJob
from p2pflop.job.lifecycle import STALL
from p2pflop.job.session import Mark
from p2pflop.units import KIB, NS_PER_S

MIN_STALL_NS: Final = 120 * NS_PER_S
"""For what does not grow with the job: a worker, and a busy provider's other jobs."""
MAX_STALL_NS: Final = STALL.after_ns
LEAST_WORK_PER_S: Final = 10**8
"""FLOP, or touched bytes: a fiftieth of what one core of a small machine does."""
LEAST_NODES_PER_S: Final = 10
"""Of graphs that are lowered: a tenth of that, likewise."""
LEAST_BYTES_PER_S: Final = 256 * KIB
"""Of a shard on its way, or of a session's data: what is slower ends the lease anyhow."""

MIN_SESSION_STALL_NS: Final = 30 * NS_PER_S
"""For a worker to start, and a busy machine."""
MAX_SESSION_STALL_NS: Final = 660 * NS_PER_S
"""One run may take 600 s."""


def stall_ns(checked: CheckedJob) -> int:
    """How long a provider of that job may be alive without any progress."""
    nodes = sum(len(graph.graph.nodes) for graph in checked.graphs.values())
    work = sum(max(line.flop, line.touched_bytes) for line in checked.cost.lines)
    shards_bytes = sum(checked.slot_bytes(slot) for slot, _ in checked.feeds)
    return min(MIN_STALL_NS + _slowest_ns(nodes, work, shards_bytes), MAX_STALL_NS)


def session_stall_ns(obeyed: Mark, asked: Mark, sent_bytes: int) -> int:
    """How long a provider may be silent that has obeyed so much of a session and is asked for so
    much, in commands that take ``sent_bytes`` on their way."""
    nodes = asked.lowered_nodes - obeyed.lowered_nodes
    work = max(asked.flop - obeyed.flop, asked.touched_bytes - obeyed.touched_bytes)
    moved_bytes = asked.moved_bytes - obeyed.moved_bytes + sent_bytes
    return min(MIN_SESSION_STALL_NS + _slowest_ns(nodes, work, moved_bytes), MAX_SESSION_STALL_NS)


def _slowest_ns(nodes: int, work: int, moved_bytes: int) -> int:
    return (
        NS_PER_S * nodes // LEAST_NODES_PER_S
        + NS_PER_S * work // LEAST_WORK_PER_S
        + NS_PER_S * moved_bytes // LEAST_BYTES_PER_S
    )
