"""A worker that is told to open a session passes on what is said to it from then on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Generic, TypeVar

from p2pflop.job.commands import Data, Ran, WorkedCommand
from p2pflop.node.worker_types import SessionWorker

S = TypeVar("S", bound=SessionWorker)


class SessionHolder(Generic[S]):
    """A ``SessionWorker`` by one that ``begin`` is given. Raises RuntimeError before that."""

    _begun: S | None = None

    async def begin(self, session: S) -> None:
        """Open ``session``; everything goes to it now."""
        self._begun = session
        await session.open_session()

    @property
    def reached(self) -> int:
        """See ``SessionWorker``."""
        return self._open.reached

    async def define(self, graph_hash: bytes, plan: bytes) -> None:
        """See ``SessionWorker``."""
        await self._open.define(graph_hash, plan)

    async def put(self, buffer: int, offset_bytes: int, data: bytes) -> None:
        """See ``SessionWorker``."""
        await self._open.put(buffer, offset_bytes, data)

    async def obey(self, commands: Sequence[WorkedCommand]) -> None:
        """See ``SessionWorker``."""
        await self._open.obey(commands)

    def reports(self) -> AsyncIterator[Ran | Data]:
        """See ``SessionWorker``."""
        return self._open.reports()

    @property
    def _open(self) -> S:
        if self._begun is None:
            raise RuntimeError("no session is open")
        return self._begun
