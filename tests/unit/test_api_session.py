"""``POST /v1/session`` through a real server: frames both ways, and what ends it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from p2pflop.job.commands import (
    MAX_FRAME_BYTES,
    NOBODY,
    Batch,
    Close,
    Closed,
    Failed,
    Free,
    NodeFrame,
    Note,
    ScriptFrame,
    decode_frame,
    encode_frame,
)
from p2pflop.node.memory_service import MemoryService
from p2pflop.node.session_script import ScriptLine
from tests.serving import TOKEN, Server, serving
from tests.session_scripts import opening


class Echo(MemoryService):
    """Says what it hears, and notes how a session ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = ""
        self.over = trio.Event()

    async def session(self, line: ScriptLine) -> None:
        try:
            while (frame := await line.receive()) is not None:
                await line.send(Note(type(frame).__name__))
                if isinstance(frame, Close):
                    await line.send(Closed(1, 2, 3, 4))
                    self.ended = "closed"
                    return
            self.ended = "gone"
            self.over.set()
        except trio.Cancelled:
            self.ended = "cancelled"
            raise


class Client:
    """A request whose body goes on while its response comes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._bytes = bytearray()
        self._body = bytearray()

    async def begin(self, port: int, token: str = TOKEN) -> str:
        """The status line."""
        await self.stream.send_all(
            f"POST /v1/session HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Authorization: Bearer {token}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        head = (await self._until(b"\r\n\r\n")).decode()
        return head.split("\r\n")[0]

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(b"%x\r\n" % len(data) + data + b"\r\n")

    async def say(self, frame: ScriptFrame) -> None:
        data = encode_frame(frame)
        await self.send(len(data).to_bytes(4, "big") + data)

    async def hear(self) -> NodeFrame:
        with trio.fail_after(5):
            while len(self._body) < 4 or len(self._body) < 4 + self._length:
                size = int((await self._until(b"\r\n")).decode(), 16)
                assert size, "the response is over"
                self._body += (await self._take(size + 2))[:-2]
        length = self._length
        frame: NodeFrame = decode_frame(NodeFrame, bytes(self._body[4 : 4 + length]))  # type: ignore[arg-type]
        del self._body[: 4 + length]
        return frame

    @property
    def _length(self) -> int:
        return int.from_bytes(self._body[:4], "big")

    async def _until(self, mark: bytes) -> bytes:
        while mark not in self._bytes:
            await self._more()
        return await self._take(self._bytes.index(mark) + len(mark))

    async def _take(self, size: int) -> bytes:
        while len(self._bytes) < size:
            await self._more()
        data = bytes(self._bytes[:size])
        del self._bytes[:size]
        return data

    async def _more(self) -> None:
        data = await self.stream.receive_some()
        assert data, "the connection is over"
        self._bytes += data


@asynccontextmanager
async def talking(server: Server) -> AsyncIterator[Client]:
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        client = Client(stream)
        assert await client.begin(server.port) == "HTTP/1.1 200 "
        yield client


async def test_frames_go_both_ways_at_the_same_time() -> None:
    async with serving(Echo()) as server, talking(server) as client:
        await client.say(opening())
        assert await client.hear() == Note("Open")
        for _ in range(3):
            await client.say(Batch(0, (Free(1),)))
            assert await client.hear() == Note("Batch")
        await client.say(Close())
        assert await client.hear() == Note("Close")
        assert await client.hear() == Closed(1, 2, 3, 4)


async def test_how_frames_are_cut_into_chunks_means_nothing() -> None:
    async with serving(Echo()) as server, talking(server) as client:
        data = encode_frame(opening())
        data = (len(data).to_bytes(4, "big") + data) * 2
        for byte in data[:20]:
            await client.send(bytes([byte]))
        await client.send(data[20:])
        assert await client.hear() == Note("Open")
        assert await client.hear() == Note("Open")


async def test_a_connection_that_breaks_ends_the_session() -> None:
    service = Echo()
    async with serving(service) as server:
        async with talking(server) as client:
            await client.say(opening())
            await client.hear()
        with trio.fail_after(5):
            await service.over.wait()
    assert service.ended == "gone"


@pytest.mark.parametrize(
    "junk",
    [
        b"\0\0\0\1\xc1",
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
        len(encode_frame(Closed(1, 2, 3, 4))).to_bytes(4, "big") + encode_frame(Closed(1, 2, 3, 4)),
    ],
)
async def test_what_is_no_frame_is_told_and_ends_it(junk: bytes) -> None:
    async with serving(Echo()) as server, talking(server) as client:
        await client.send(junk)
        failed = await client.hear()
        assert isinstance(failed, Failed)
        assert failed.number == NOBODY
        assert isinstance(await client.hear(), Closed)


async def test_a_market_without_asks_is_told_in_the_stream() -> None:
    async with serving(MemoryService()) as server, talking(server) as client:
        await client.say(opening())
        failed = await client.hear()
        assert isinstance(failed, Failed)
        assert failed.text == "the order book is empty"


async def test_who_lacks_the_token_gets_no_session() -> None:
    async with (
        serving(Echo()) as server,
        await trio.open_tcp_stream("127.0.0.1", server.port) as stream,
    ):
        assert await Client(stream).begin(server.port, "wrong") == "HTTP/1.1 401 "
