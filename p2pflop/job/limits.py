"""What a graph from a stranger may be at most. Every number has a test at its edge.

The defaults are far above real training steps (an 8-layer transformer with AdamW has 6,021 nodes
and a depth of 1,927, 225 more a layer, but no fused chain over 58) and below what made tinygrad
hang, run out of memory or crash when it was tried: fused chains of 1,500 NEG, STACKs of thousands,
EXPAND to 2**40. They do not make lowering fast: 200 alternating MUL and MAX took it 6 s, 700 over
a minute. A lowerer needs a limit on its CPU time as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_GRAPH_BYTES: Final = 4 * 1024 * 1024
MAX_GRAPH_NODES: Final = 200_000
MAX_GRAPH_REFS: Final = 800_000
MAX_GRAPH_ATTRS: Final = 2_000_000
MAX_GRAPH_PARAMS: Final = 4096
MAX_GRAPH_OUTPUTS: Final = 4096
MAX_TENSOR_RANK: Final = 16
MAX_DIM: Final = 2**40
MAX_VARIABLES: Final = 2
"""Of a symbolic graph, which is validated for 2**n + 1 choices of their values."""
MAX_TRACE_BYTES: Final = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on one graph, and on the works and jobs made of graphs.

    ``depth`` is the longest path of nodes, ``chain`` the longest that nothing but elementwise and
    movement operations are on, which a compiler may fuse into one expression; ``numel`` bounds the
    elements of every tensor, even one that is fused away; ``stored_bytes`` every param and output;
    ``flop`` one run of the graph; ``interval_bits`` the size that an integer's bounds may reach
    while a compiler folds them; ``graphs`` how many a work may have and ``job_nodes`` the nodes of
    all of them; ``trace_bytes`` how much a job's traced scalars may take.
    """

    graph_bytes: int = 2 * 1024 * 1024
    nodes: int = 50_000
    params: int = MAX_GRAPH_PARAMS
    outputs: int = MAX_GRAPH_OUTPUTS
    depth: int = 20_000
    chain: int = 512
    rank: int = MAX_TENSOR_RANK
    dim: int = MAX_DIM
    numel: int = 2**40
    stored_bytes: int = 2**40
    stack: int = 256
    flop: int = 2**62
    interval_bits: int = 4096
    graphs: int = 64
    job_nodes: int = 100_000
    trace_bytes: int = MAX_TRACE_BYTES // 2


DEFAULT_LIMITS: Final = Limits()
