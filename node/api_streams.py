"""The long responses of the local API: blobs with a read-ahead, and server-sent events.

Both watch for the client's going away, since the server keeps no other word of it, and both end
when the node stops. A response whose length was announced and that cannot be completed, because a
chunk does not verify any more, ends by closing the connection: the client sees fewer bytes than
promised and never a byte that did not verify.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Final

import trio
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from p2pflop.dht.blobs import Store
from p2pflop.dht.manifest import CHUNK_BYTES
from p2pflop.errors import P2PFlopError
from p2pflop.node.api_guard import dump_json, error_body
from p2pflop.node.service import LAST_EVENT_KINDS

READ_AHEAD_CHUNKS: Final = 1
MAX_EVENTS_A_WRITE: Final = 64
EVENT_STREAM: Final = "text/event-stream"
HEARTBEAT: Final = b": still here\n\n"
HEADERS_S: Final = 0.01
"""How long the headers wait for an event to leave with them."""

_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")
_log = logging.getLogger(__name__)


def parse_range(header: str, size_bytes: int) -> tuple[int, int] | None:
    """The bytes ``[start, stop)`` that a ``Range`` header wants; None if it cannot be satisfied.

    All of them where there is none, or one that RFC 9110 lets a server ignore: another unit,
    several ranges, nonsense.
    """
    found = _RANGE.fullmatch(header.replace(" ", ""))
    first, last = found.groups() if found else ("", "")
    if not first and not last:
        return 0, size_bytes
    if not first:
        start, stop = max(0, size_bytes - int(last)), size_bytes
    elif last and int(last) < int(first):
        return 0, size_bytes
    else:
        start, stop = int(first), min(size_bytes, int(last) + 1) if last else size_bytes
    return (start, stop) if start < stop else None


class BlobStream(Response):
    """Bytes of a blob, chunk by verified chunk."""

    def __init__(self, chunks: AsyncGenerator[bytes, None], status: int, headers: dict[str, str]):
        self.status_code = status
        self.background = None
        self.init_headers(headers)
        self._chunks = chunks
        self._first = b""

    @classmethod
    async def open(
        cls,
        store: Store,
        address: bytes,
        start: int,
        stop: int,
        status: int,
        headers: dict[str, str],
    ) -> BlobStream:
        """A response with its first chunk read, so that a bad blob is still told as an error."""
        stream = cls(_read_span(store, address, start, stop), status, headers)
        stream._first = await anext(stream._chunks, b"")
        return stream

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_gone, receive, nursery.cancel_scope)
            put, take = trio.open_memory_channel[bytes](READ_AHEAD_CHUNKS)
            nursery.start_soon(self._read_ahead, put, nursery.cancel_scope)
            async with take:
                async for chunk in take:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body"})
            nursery.cancel_scope.cancel()

    async def _read_ahead(
        self, put: trio.MemorySendChannel[bytes], scope: trio.CancelScope
    ) -> None:
        try:
            async with put:
                await put.send(self._first)
                async for chunk in self._chunks:
                    await put.send(chunk)
        except P2PFlopError as error:
            _log.error("a download breaks off: %s", error.message)
            scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._chunks.aclose()


class EventStream(Response):
    """Server-sent events with a comment line whenever ``heartbeat_s`` pass without one.

    ``events`` gives those that leave together: they go in one write. ``opening`` is an event
    without a number that goes before all others, and makes the response one that created something.
    """

    def __init__(
        self,
        events: AsyncIterator[Sequence[dict[str, Any]]],
        *,
        opening: dict[str, Any] | None = None,
        heartbeat_s: float,
        wait_s: float,
        stopping: trio.Event,
    ) -> None:
        self.status_code = 200 if opening is None else 201
        self.background = None
        self.init_headers({"content-type": EVENT_STREAM, "cache-control": "no-store"})
        self._opening = b"" if opening is None else b"data: " + dump_json(opening) + b"\n\n"
        self._events = events
        self._heartbeat_s = heartbeat_s
        self._wait_s = wait_s
        self._stopping = stopping
        self._silent_since = -math.inf
        self._over = False
        self._send: Send

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + self._wait_s
            nursery.start_soon(_until_gone, receive, nursery.cancel_scope)
            nursery.start_soon(self._beat, nursery.cancel_scope)
            await self._forward()
            nursery.cancel_scope.cancel()
        if not self._over:
            await self._write(b"", over=True)

    async def _forward(self) -> None:
        try:
            async for events in self._events:
                for first in range(0, len(events), MAX_EVENTS_A_WRITE):
                    few = events[first : first + MAX_EVENTS_A_WRITE]
                    over = few[-1]["kind"] in LAST_EVENT_KINDS
                    await self._write(b"".join(_frame(event) for event in few), over=over)
        except P2PFlopError as error:
            data = dump_json({"error": error_body(error)})
            await self._write(b"event: error\ndata: " + data + b"\n\n")
        finally:
            if isinstance(self._events, AsyncGenerator):
                with trio.CancelScope(shield=True):
                    await self._events.aclose()

    async def _beat(self, scope: trio.CancelScope) -> None:
        """Break a silence now and then, until the node stops."""
        beat_at = trio.current_time() + HEADERS_S
        while not self._stopping.is_set():
            with trio.move_on_at(beat_at):
                await self._stopping.wait()
            beat_at = self._silent_since + self._heartbeat_s
            if beat_at <= trio.current_time() and not self._over:
                await self._write(HEARTBEAT)
                beat_at = self._silent_since + self._heartbeat_s
        scope.cancel()

    async def _write(self, data: bytes, *, over: bool = False) -> None:
        self._silent_since, self._over = trio.current_time(), over
        body, self._opening = self._opening + data, b""
        await self._send({"type": "http.response.body", "body": body, "more_body": not over})


def _frame(event: dict[str, Any]) -> bytes:
    head = f"id: {event['seq']}\nevent: {event['kind']}\ndata: ".encode()
    return head + dump_json(event) + b"\n\n"


async def _read_span(
    store: Store, address: bytes, start: int, stop: int
) -> AsyncGenerator[bytes, None]:
    for index in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)):
        chunk = await store.read_chunk(address, index)
        base = index * CHUNK_BYTES
        yield chunk[max(0, start - base) : stop - base]


async def _until_gone(receive: Receive, scope: trio.CancelScope) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()
    scope.cancel()
