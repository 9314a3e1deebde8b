"""The line to the local node: HTTP/1.1 to this machine by the standard library.

A request costs a quarter of what it does with a library that also knows proxies, cookies, redirects
and other machines, and importing it a fifth; it is on the way of every job that is submitted.
Connections are kept for the next request, and threads may share a line.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Final, Protocol
from urllib.parse import urlencode, urlsplit

from p2pflop.embedded import NodeNote

CONNECT_TIMEOUT_S: Final = 5.0
REPLY_TIMEOUT_S: Final = 120.0
MAX_IDLE: Final = 8
"""Connections kept for the next request."""
PIECE_BYTES: Final = 64 * 1024

Body = bytes | memoryview | Callable[[], Iterator[bytes]]
Params = Mapping[str, str | list[str]]


class LineError(Exception):
    """The line to the node broke."""


class NobodyThereError(LineError):
    """Nobody listens where the node should: the request was not delivered."""


class SilenceError(LineError):
    """The node has not answered in ``REPLY_TIMEOUT_S``, or not let itself be reached."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the node is asked. ``content`` goes in pieces if it is a function that gives them."""

    method: str
    path: str
    params: Params = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: Body | None = None

    @property
    def target(self) -> str:
        """Path and query."""
        query = urlencode(self.params, doseq=True)
        return f"{self.path}?{query}" if query else self.path

    @property
    def may_be_repeated(self) -> bool:
        """Whether it changes nothing."""
        return self.method in ("GET", "HEAD")


class Answer(Protocol):
    """What the node answers, its body still to be read. To be closed."""

    @property
    def request(self) -> Request:
        """What was asked."""

    @property
    def url(self) -> str:
        """Where, without the query."""

    @property
    def status(self) -> int:
        """HTTP's."""

    def header(self, name: str) -> str:
        """A header's value; empty if there is none."""

    def pieces(self, size_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
        """The body as it comes, in pieces of at most that size. Raises LineError."""

    def close(self) -> None:
        """Read no further."""


class Line(Protocol):
    """What asks a node."""

    def ask(self, request: Request) -> Answer:
        """Send a request; the answer's head has come. Raises LineError."""

    def close(self) -> None:
        """Close the connections that nobody reads."""


class HttpLine:
    """The line to the node of a note."""

    def __init__(self, note: NodeNote) -> None:
        self._url = note.url
        address = urlsplit(note.url)
        self._address = (address.hostname, address.port)
        self._common = {
            "host": address.netloc,
            "authorization": f"Bearer {note.token}",
            "accept-encoding": "identity",
        }
        self._idle: list[socket.socket] = []

    def ask(self, request: Request) -> Answer:
        """See Line."""
        connection = self._take()
        try:
            self._send(connection, request)
            response = HTTPResponse(connection, method=request.method)
            response.begin()
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError | HTTPException):
                raise _fault(error) from error
            raise
        url = f"{self._url}{request.path}"
        return _HttpAnswer(request, url, response, connection, self._keep)

    def close(self) -> None:
        """See Line."""
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> socket.socket:
        while self._idle:
            with suppress(IndexError):  # else another thread was faster
                connection = self._idle.pop()
                if not _has_news(connection):
                    return connection
                connection.close()  # an idle connection says nothing but that it ends
        try:
            connection = socket.create_connection(self._address, CONNECT_TIMEOUT_S)
        except TimeoutError as error:
            raise SilenceError(str(error)) from error
        except OSError as error:
            raise NobodyThereError(str(error)) from error
        connection.settimeout(REPLY_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _keep(self, connection: socket.socket) -> None:
        if len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.close()

    def _send(self, connection: socket.socket, request: Request) -> None:
        content, headers = request.content, {**self._common, **request.headers}
        if callable(content):
            headers["transfer-encoding"] = "chunked"
        elif content is not None:
            headers["content-length"] = str(len(content))
        lines = [f"{request.method} {request.target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        if not callable(content) and len(content or b"") <= PIECE_BYTES:
            connection.sendall(
                b"".join([head, content or b""])
            )  # one packet: the node wakes up once
            return
        connection.sendall(head)
        # A node that refuses what comes says so, and then takes no more of it.
        with suppress(BrokenPipeError, ConnectionResetError):
            if not callable(content):
                connection.sendall(content or b"")
                return
            for piece in content():
                if piece:
                    connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            connection.sendall(b"0\r\n\r\n")


class _HttpAnswer:
    def __init__(
        self,
        request: Request,
        url: str,
        response: HTTPResponse,
        connection: socket.socket,
        keep: Callable[[socket.socket], None],
    ) -> None:
        self.request = request
        self.url = url
        self.status = response.status
        self._response = response
        self._connection: socket.socket | None = connection
        self._keep = keep
        self._left_bytes = response.length
        if response.length == 0 and not response.chunked:
            self._end()

    def header(self, name: str) -> str:
        return self._response.getheader(name, "")

    def pieces(self, size_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
        while self._connection is not None:
            try:
                piece = self._read(size_bytes)
            except (OSError, HTTPException) as error:
                self.close()
                raise _fault(error) from error
            if piece:
                yield piece

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._response.close()
            connection.close()

    def _read(self, size_bytes: int) -> bytes:
        left_bytes = self._left_bytes
        piece = self._response.read1(
            size_bytes if left_bytes is None else min(size_bytes, left_bytes)
        )
        if left_bytes is not None:
            self._left_bytes = left_bytes = left_bytes - len(piece)
            if not piece:
                raise ConnectionError("it ended the connection before the answer's end")
        if not piece or left_bytes == 0:
            self._end()
        return piece

    def _end(self) -> None:
        """The body is whole: the connection is free for the next request."""
        connection, self._connection = self._connection, None
        self._response.close()
        if connection is None:
            return
        if self._response.will_close:
            connection.close()
        else:
            self._keep(connection)


def _has_news(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def _fault(error: OSError | HTTPException) -> LineError:
    kind = SilenceError if isinstance(error, TimeoutError) else LineError
    return kind(str(error) or type(error).__name__)
