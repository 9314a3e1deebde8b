"""``POST /v1/session``: a script's session, in frames both ways at the same time.

Request and response are streams of frames (``job.commands``), each after its length as u32, big
endian; how they are cut into chunks means nothing. The response begins at once. A connection that
breaks ends the session.
"""

from __future__ import annotations

import logging
from typing import Final

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from p2pflop.errors import P2PFlopError, ProtocolError, ProviderError, first_error
from p2pflop.job.commands import (
    MAX_FRAME_BYTES,
    MAX_SCRIPT_TEXT,
    NOBODY,
    Closed,
    Failed,
    NodeFrame,
    ScriptFrame,
    decode_frame,
    encode_frame,
)
from p2pflop.node.service import NodeService

LENGTH_BYTES: Final = 4
OCTETS: Final = [(b"content-type", b"application/octet-stream")]

_log = logging.getLogger(__name__)


class SessionApi:
    """The route. ``stopping`` ends the sessions."""

    def __init__(self, service: NodeService, stopping: trio.Event) -> None:
        self._service = service
        self._stopping = stopping

    def routes(self) -> list[Route]:
        """All routes."""
        return [Route("/v1/session", self.session, methods=["POST"])]

    async def session(self, _request: Request) -> Response:
        """See the head of this module."""
        return _SessionStream(self._service, self._stopping)


class _SessionStream(Response):
    def __init__(self, service: NodeService, stopping: trio.Event) -> None:
        self.background = None
        self._service = service
        self._stopping = stopping

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": OCTETS})
        line = _HttpLine(receive, send)
        failure: P2PFlopError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop, nursery.cancel_scope)
                await self._service.session(line)
                nursery.cancel_scope.cancel()
        except* P2PFlopError as group:
            failure = first_error(group)
        if self._stopping.is_set():
            failure = ProviderError("the node is shutting down", hint="Start it again.")
        if failure is not None:
            await line.fail(failure)
        await send({"type": "http.response.body"})

    async def _stop(self, scope: trio.CancelScope) -> None:
        await self._stopping.wait()
        scope.cancel()


class _HttpLine:
    """``session_script.ScriptLine`` over one request."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._buffer = bytearray()
        self._ended = False

    async def receive(self) -> ScriptFrame | None:
        """See ScriptLine."""
        if not await self._fill(LENGTH_BYTES):
            return None
        length = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
        if length > MAX_FRAME_BYTES:
            raise ProtocolError(f"a frame of {length} bytes is over {MAX_FRAME_BYTES}")
        end = LENGTH_BYTES + length
        if not await self._fill(end):
            return None
        with memoryview(self._buffer) as view:
            frame: ScriptFrame = decode_frame(ScriptFrame, view[LENGTH_BYTES:end])  # type: ignore[arg-type]
        del self._buffer[:end]
        return frame

    async def send(self, frame: NodeFrame) -> None:
        """See ScriptLine."""
        data = encode_frame(frame)
        body = len(data).to_bytes(LENGTH_BYTES, "big") + data
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def fail(self, failure: P2PFlopError) -> None:
        """Tell why the session is over, or did not begin."""
        _log.info("a session is over: %s", failure)
        text, hint = failure.message[:MAX_SCRIPT_TEXT], failure.hint[:MAX_SCRIPT_TEXT]
        await self.send(Failed(NOBODY, False, text, hint))
        await self.send(Closed(0, 0, 0, 0))

    async def _fill(self, size: int) -> bool:
        """Whether ``size`` bytes have come, or the script is gone before."""
        while len(self._buffer) < size and not self._ended:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._ended = True
            else:
                self._buffer += message.get("body", b"")
                self._ended = not message.get("more_body", False)
        return len(self._buffer) >= size
