"""A script of a session without tinygrad: frames by hand over ``POST /v1/session``."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from p2pflop.job.commands import (
    AnyCommand,
    Batch,
    Close,
    Closed,
    Data,
    Failed,
    Leased,
    NodeFrame,
    Open,
    Ran,
    Read,
    ScriptFrame,
    decode_frame,
    encode_frame,
)

WITHIN_S = 90.0


class FrameClient:
    """One session at the node with that URL and home, over one socket."""

    def __init__(self, url: str, home: Path, wish: Open) -> None:
        place = urlsplit(url)
        self.frames: list[NodeFrame] = []
        self.sent = self.ran_to = 0
        self.bytes_sent = 0
        self._socket = socket.create_connection((place.hostname, place.port), WITHIN_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        token = (home / "token").read_text().strip()
        head = (
            f"POST /v1/session HTTP/1.1\r\nHost: {place.netloc}\r\n"
            f"Authorization: Bearer {token}\r\nTransfer-Encoding: chunked\r\n"
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        self._socket.sendall(head.encode())
        self._file = self._socket.makefile("rb")
        self._body = b""
        self.status = int(self._file.readline().split()[1])
        while self._file.readline() not in (b"\r\n", b""):
            pass
        self.say(wish)

    def say(self, frame: ScriptFrame) -> None:
        """Send one frame, in a chunk of its own."""
        data = encode_frame(frame)
        data = len(data).to_bytes(4, "big") + data
        self.bytes_sent += len(data)
        self._socket.sendall(b"%x\r\n" % len(data) + data + b"\r\n")

    def give(self, commands: Sequence[AnyCommand]) -> int:
        """Send commands; the number of the last one."""
        self.say(Batch(self.sent, tuple(commands)))
        self.sent += len(commands)
        return self.sent - 1

    def hear(self) -> NodeFrame:
        """The next frame of the node."""
        size = int.from_bytes(self._take(4), "big")
        frame: NodeFrame = decode_frame(NodeFrame, self._take(size))  # type: ignore[arg-type]
        self.frames.append(frame)
        if isinstance(frame, Ran):
            assert frame.upto >= self.ran_to
            self.ran_to = frame.upto
        return frame

    def until(self, kind: type[NodeFrame]) -> NodeFrame:
        """The next frame of that kind."""
        while not isinstance(frame := self.hear(), kind):
            assert not isinstance(frame, Failed), frame
        return frame

    def leased(self) -> Leased:
        """Who runs it from now on."""
        frame = self.until(Leased)
        assert isinstance(frame, Leased)
        return frame

    def read(self, buffer: int, size_bytes: int) -> bytes:
        """The bytes of a buffer."""
        number = self.give([Read(buffer, 0, size_bytes)])
        data = b""
        while True:
            frame = self.until(Data)
            assert isinstance(frame, Data)
            assert frame.number == number
            data += frame.data
            if frame.last:
                return data

    def obeyed(self) -> None:
        """Return once all that was sent is obeyed."""
        until = time.monotonic() + WITHIN_S
        while self.ran_to < self.sent:
            assert time.monotonic() < until
            self.until(Ran)

    def close(self) -> Closed:
        """End it in order."""
        self.say(Close())
        closed = self.until(Closed)
        assert isinstance(closed, Closed)
        self._socket.sendall(b"0\r\n\r\n")
        self._socket.close()
        return closed

    def drop(self) -> None:
        """Be gone without a word."""
        self._file.close()
        self._socket.close()

    def _take(self, size: int) -> bytes:
        while len(self._body) < size:
            length = int(self._file.readline(), 16)
            assert length, "the node ended the response"
            self._body += self._file.read(length)
            self._file.readline()
        data, self._body = self._body[:size], self._body[size:]
        return data
