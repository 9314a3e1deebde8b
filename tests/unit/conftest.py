"""A node in memory behind a real HTTP port, for tests of what talks to one."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pflop.node.api import create_app
from p2pflop.node.api_server import bind_api, serve_api
from p2pflop.node.memory_service import MemoryService

TOKEN = "t0ken"


class LiveNode:
    """``service`` served from a thread of its own, noted in ``home`` as a real node would."""

    def __init__(self, home: Path, service: MemoryService) -> None:
        self.home = home
        self.service = service
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        trio.run(self._main)

    async def _main(self) -> None:
        self._trio = trio.lowlevel.current_trio_token()
        self._stopping = trio.Event()
        listener = bind_api(0)
        app = create_app(self.service, TOKEN, listener.port, stopping=self._stopping)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_api, app, listener, self._stopping)
            self.url = listener.url
            self._ready.set()

    def start(self, *, embedded: bool = False) -> LiveNode:
        """Serve, and leave the note."""
        self._thread.start()
        assert self._ready.wait(10)
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "token").write_text(TOKEN)
        note = {"url": self.url, "pid": os.getpid(), "peer": "12D3KooW", "embedded": embedded}
        (self.home / "node.json").write_text(json.dumps(note))
        return self

    def stop(self) -> None:
        """End, leaving the note behind as a killed node does."""
        if self._thread.is_alive():
            trio.from_thread.run_sync(self._stopping.set, trio_token=self._trio)
            self._thread.join(10)
        assert not self._thread.is_alive()

    def tell(self, run_id: str, kind: str, **fields: Any) -> None:
        """An event of a run."""

        async def tell() -> None:
            await self.service.runs[run_id].tell(kind, **fields)

        trio.from_thread.run(tell, trio_token=self._trio)


StartNode = Callable[..., LiveNode]


@pytest.fixture
def home(_private_home: None) -> Path:
    """A home whose note names this very process."""
    path = Path(os.environ["P2PFLOP_HOME"])
    path.mkdir(parents=True)
    (path / "token").write_text("t0ken")
    (path / "node.json").write_text(f'{{"url": "http://127.0.0.1:9", "pid": {os.getpid()}}}')
    return path


@pytest.fixture
def start_node(_private_home: None) -> Iterator[StartNode]:
    """Starts a node for the test's home; keywords go to ``MemoryService``."""
    nodes: list[LiveNode] = []

    def start(
        *,
        script: Sequence[tuple[str, Mapping[str, object]]] = (),
        record: bytes = b"",
        elsewhere: Mapping[bytes, bytes] | None = None,
        service: MemoryService | None = None,
        embedded: bool = False,
    ) -> LiveNode:
        service = service or MemoryService(script=script, record=record, elsewhere=elsewhere)
        node = LiveNode(Path(os.environ["P2PFLOP_HOME"]), service)
        nodes.append(node)
        return node.start(embedded=embedded)

    yield start
    for node in nodes:
        node.stop()
