"""The way to the local node: one HTTP exchange whose two bodies flow at the same time.

``POST /v1/session``: frames, each with its length before it, go up in the request's body and down
in the response's, both chunked, until the session ends. No thread: the socket never blocks, what
cannot be sent yet is kept, and whoever waits for an answer sends and receives meanwhile.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import struct
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Final, Protocol, Self
from urllib.parse import urlsplit

import h11

from p2pflop.embedded import NodeNote, read_note, start_embedded
from p2pflop.errors import NodeUnreachableError, P2PFlopError, ProtocolError
from p2pflop.job.commands import MAX_FRAME_BYTES
from p2pflop.replies import error_from

PATH: Final = "/v1/session"
CONNECT_TIMEOUT_S: Final = 5.0
RECEIVE_BYTES: Final = 256 * 1024
MAX_ERROR_BYTES: Final = 64 * 1024
LENGTH: Final = struct.Struct(">I")
"""Before each frame."""


class Link(Protocol):
    """Frames to a node and back, without blocking."""

    def send(self, frame: bytes) -> None:
        """Take a frame to be sent."""

    def receive(self, wait_s: float | None = 0) -> list[bytes]:
        """Frames that have come; waits for the first at most so long, or without end.

        Sends meanwhile. May return none early. Raises P2PFlopError if the node has gone and all it
        said has been read.
        """

    @property
    def pending_bytes(self) -> int:
        """Taken, and not sent yet."""

    def close(self) -> None:
        """Nothing more will be sent."""

    def leave(self) -> None:
        """Close this process's end alone: another one still speaks."""


class Frames:
    """Puts frames together from the pieces in which they come."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that are whole now. Raises ProtocolError."""
        self._data += data
        frames = []
        at = 0
        while len(self._data) - at >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._data, at)
            if size > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {size} bytes is over {MAX_FRAME_BYTES}")
            stop = at + LENGTH.size + size
            if stop > len(self._data):
                break
            frames.append(bytes(self._data[at + LENGTH.size : stop]))
            at = stop
        del self._data[:at]
        return frames


def framed(frame: bytes) -> bytes:
    """``frame`` with its length before it."""
    return LENGTH.pack(len(frame)) + frame


class Uninterrupted:
    """Keeps Ctrl-C until the end of the block, so that no byte is lost between two lines."""

    def __init__(self) -> None:
        self._came: FrameType | None = None
        self._pressed = False
        self._handler: object = None

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        # A handler that is not Python's could not be put back.
        if is_main and signal.getsignal(signal.SIGINT) is not None:
            self._handler = signal.signal(signal.SIGINT, self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        handler = self._handler
        if handler is None:
            return
        signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]
        if self._pressed and callable(handler):
            handler(signal.SIGINT, self._came)

    def _keep(self, _signal: int, frame: FrameType | None) -> None:
        self._pressed, self._came = True, frame


class HttpLink:
    """``Link`` to the node that a note tells of."""

    def __init__(self, note: NodeNote) -> None:
        self._note = note
        address = urlsplit(note.url)
        host, port = address.hostname or "127.0.0.1", address.port or 80
        try:
            self._socket = socket.create_connection((host, port), CONNECT_TIMEOUT_S)
        except OSError as error:
            raise self._gone(error.strerror or str(error)) from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._http = h11.Connection(h11.CLIENT)
        self._frames = Frames()
        self._came: deque[bytes] = deque()
        self._out = bytearray()
        self._lost: P2PFlopError | None = None
        self._status = 0
        self._refusal = bytearray()
        head = [
            ("host", f"{host}:{port}"),
            ("authorization", f"Bearer {note.token}"),
            ("content-type", "application/octet-stream"),
            ("transfer-encoding", "chunked"),
        ]
        request = h11.Request(method="POST", target=PATH, headers=head)
        self._out += self._http.send(request) or b""

    @property
    def pending_bytes(self) -> int:
        """See Link."""
        return len(self._out)

    def send(self, frame: bytes) -> None:
        """See Link."""
        if self._lost is None:
            self._out += self._http.send(h11.Data(framed(frame))) or b""
        self._pump()

    def receive(self, wait_s: float | None = 0) -> list[bytes]:
        """See Link."""
        self._pump()
        if not self._came and self._lost is None and wait_s != 0:
            writing = [self._socket] if self._out else []
            select.select([self._socket], writing, [], wait_s)
            self._pump()
        with Uninterrupted():
            frames = list(self._came)
            self._came.clear()
        if not frames and self._lost is not None:
            raise self._lost
        return frames

    def close(self) -> None:
        """See Link. Ends the request's body, so that the node knows that all of it came."""
        with suppress(OSError, h11.LocalProtocolError):
            if self._lost is None:
                self._out += self._http.send(h11.EndOfMessage()) or b""
                self._send_some()
        self._socket.close()

    def leave(self) -> None:
        """See Link."""
        self._socket.close()

    def _pump(self) -> None:
        """Send and receive what can be at once. That the node has gone is told by ``receive``, once
        what it has said before is read."""
        if self._lost is not None:
            return
        with Uninterrupted():
            try:
                self._receive_some()
                self._send_some()
            except OSError as error:
                self._lost = self._lost or self._gone(error.strerror or str(error))
            except h11.ProtocolError as error:
                self._lost = self._lost or self._gone(str(error))

    def _send_some(self) -> None:
        try:
            while self._out:
                del self._out[: self._socket.send(self._out)]
        except BlockingIOError:
            return

    def _receive_some(self) -> None:
        full = True
        while full and self._lost is None:
            try:
                data = self._socket.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return
            full = len(data) == RECEIVE_BYTES
            self._http.receive_data(data)
            self._take_events()

    def _take_events(self) -> None:
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return
            if isinstance(event, h11.Response):
                self._status = event.status_code
            elif isinstance(event, h11.Data):
                self._take_data(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                self._lost = self._ended()
                return

    def _take_data(self, data: bytes) -> None:
        if self._status == 200:
            self._came.extend(self._frames.feed(data))
        elif len(self._refusal) < MAX_ERROR_BYTES:
            self._refusal += data

    def _ended(self) -> P2PFlopError:
        if self._status in (0, 200):
            return self._gone("it ended the connection")
        try:
            told = json.loads(self._refusal)["error"]
            return error_from(str(told["kind"]), str(told["message"]), str(told.get("hint", "")))
        except (ValueError, KeyError, TypeError):
            return self._gone(f"it answered with HTTP {self._status}")

    def _gone(self, reason: str) -> NodeUnreachableError:
        return NodeUnreachableError(
            f"lost the node at {self._note.url}: {reason}",
            hint="Is it running, and of this version? See 'p2pflop doctor'.",
        )


def find_node(home: Path) -> NodeNote:
    """The node of ``home``, started if none runs. Raises ConfigError."""
    note = read_note(home)
    return note if note is not None and note.is_alive else start_embedded(home)
