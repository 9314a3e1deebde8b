"""The local HTTP API served over a service in memory, for tests that speak to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import trio

from p2pflop.dht.manifest import CHUNK_BYTES
from p2pflop.node.api import ApiLimits, create_app
from p2pflop.node.api_guard import Activity
from p2pflop.node.api_server import bind_api, serve_api
from p2pflop.node.memory_service import MemoryService

TOKEN = "s3cret-token"
LIMITS = ApiLimits(
    max_blob_bytes=3 * CHUNK_BYTES,
    max_job_bytes=1000,
    max_submission_bytes=1200,
    max_command_bytes=200,
    max_open_requests=4,
    heartbeat_s=0.05,
)


class Server:
    """A served API and a client for it that knows the token."""

    def __init__(self, service: MemoryService, port: int, client: httpx.AsyncClient) -> None:
        self.service = service
        self.port = port
        self.client = client
        self.activity = Activity()
        self.stopping = trio.Event()
        self.ended = trio.Event()

    async def get(self, path: str, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.get(path, headers=named)


@asynccontextmanager
async def serving(service: MemoryService | None = None) -> AsyncIterator[Server]:
    service = service or MemoryService()
    listener = bind_api(0)
    async with (
        trio.open_nursery() as nursery,
        httpx.AsyncClient(
            base_url=listener.url,
            headers={"authorization": f"Bearer {TOKEN}"},
            trust_env=False,
            timeout=10,
        ) as client,
    ):
        server = Server(service, listener.port, client)
        app = create_app(
            service,
            TOKEN,
            listener.port,
            activity=server.activity,
            limits=LIMITS,
            stopping=server.stopping,
        )

        async def serve(*, task_status: Any) -> None:
            await serve_api(app, listener, server.stopping, task_status=task_status)
            server.ended.set()

        await nursery.start(serve)
        yield server
        nursery.cancel_scope.cancel()


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


async def submit(server: Server) -> str:
    run: str = (await server.client.post("/v1/jobs", content=b"job")).json()["id"]
    return run
