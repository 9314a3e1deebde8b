"""A lowerer: a locked process that turns graphs of one account into plans, one after the other.

It sees no tensor data and runs no kernel. Its output depends on the graph, the class and the
versions alone, and the node keeps it under the hash of exactly those. A graph that fails is its
last.
"""

from __future__ import annotations

import time
from typing import Final

from p2pflop.errors import JobError, P2PFlopError, ProtocolError, ProviderError
from p2pflop.kernels import frames
from p2pflop.kernels.engine import Engine
from p2pflop.kernels.frames import (
    MAX_GRAPH_BYTES,
    BlockingPipe,
    Fault,
    Lower,
    Progress,
    Ready,
    lowerer_command,
    parts,
    text,
)

PROGRESS_INTERVAL_SECONDS: Final = 0.05


def serve(pipe: BlockingPipe, engine: Engine) -> None:
    """Lower each graph that comes over ``pipe``. Raises EOFError or OSError if the node left."""
    pipe.send(Ready())
    while True:
        command = pipe.receive(lowerer_command)
        if not isinstance(command, Lower):
            raise ProtocolError(f"expected a graph, got {type(command).__name__}")
        graph = pipe.receive_parts(lowerer_command, MAX_GRAPH_BYTES)
        answer = _lower(engine, graph, _Reporter(pipe))
        if isinstance(answer, Fault):
            pipe.send(answer)
            return
        for part in parts(answer):
            pipe.send(part)


def _lower(engine: Engine, graph: bytes, reporter: _Reporter) -> bytes | Fault:
    try:
        return engine.lower(graph, reporter)
    except MemoryError:
        return Fault(True, "lowering the graph ran out of memory")
    except (JobError, ProviderError) as error:
        return Fault(isinstance(error, JobError), text(error))
    # tinygrad may raise anything on a graph that it does not like, and would again elsewhere.
    except Exception as error:  # noqa: BLE001
        cause = error.message if isinstance(error, P2PFlopError) else repr(error)
        return Fault(True, text(f"the graph does not lower: {cause}"))


class _Reporter:
    """Progress at most every ``PROGRESS_INTERVAL_SECONDS``, and the last one always."""

    def __init__(self, pipe: BlockingPipe) -> None:
        self._pipe = pipe
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._next and done != total:
            return
        self._next = now + PROGRESS_INTERVAL_SECONDS
        limit = frames.MAX_PROGRESS
        self._pipe.send(Progress(min(done, limit), min(total, limit)))
