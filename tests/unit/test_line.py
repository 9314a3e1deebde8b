"""The line to the node, against a server that says what a test has it say."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from p2pflop import line as line_module
from p2pflop.embedded import NodeNote
from p2pflop.line import HttpLine, LineError, NobodyThereError, Params, Request, SilenceError

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nx-told: yes\r\n\r\nhello"
WAIT_S = 10.0


class Server:
    """Takes connections and gives each whole request the next of ``answers``, or ends for None."""

    def __init__(self, answers: list[bytes | None]) -> None:
        self.answers = answers
        self.heard: list[bytes] = []
        self.connections = 0
        self.is_patient = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        while self._open:
            connection = self._open.pop()
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                self.connections += 1
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        data = b""
        with suppress(OSError):
            while part := connection.recv(1 << 16):
                data += part
                if self.is_patient and not _is_whole(data):
                    continue
                self.heard.append(data)
                data = b""
                answer = self.answers.pop(0) if self.answers else None
                if answer is None:
                    connection.shutdown(socket.SHUT_RDWR)
                    return
                connection.sendall(answer)


def _is_whole(data: bytes) -> bool:
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        return False
    if b"chunked" in head:
        return body.endswith(b"0\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return len(body) >= int(length or 0)


@pytest.fixture
def connect() -> Iterator[Callable[..., tuple[HttpLine, Server]]]:
    servers: list[Server] = []

    def start(*answers: bytes | None) -> tuple[HttpLine, Server]:
        servers.append(Server(list(answers)))
        url = f"http://127.0.0.1:{servers[-1].port}"
        return HttpLine(NodeNote(url, 1, embedded=False, token="t0ken")), servers[-1]

    yield start
    for server in servers:
        server.stop()


Connect = Callable[..., tuple[HttpLine, Server]]


def body(line: HttpLine, request: Request) -> bytes:
    return b"".join(line.ask(request).pieces())


class TestAsking:
    def test_what_is_sent(self, connect: Connect) -> None:
        line, server = connect(WHOLE)
        params: Params = {"class": ["a", "b&"], "fresh": "1"}
        request = Request("POST", "/v1/jobs", params, {"accept": "text/event-stream"}, b"job")
        answer = line.ask(request)
        assert (answer.status, answer.header("x-told"), answer.header("x-not")) == (200, "yes", "")
        assert answer.request is request
        assert answer.url == f"http://127.0.0.1:{server.port}/v1/jobs"
        assert b"".join(answer.pieces(2)) == b"hello"
        head, _, content = server.heard[0].partition(b"\r\n\r\n")
        first, *rest = head.decode().split("\r\n")
        assert first == "POST /v1/jobs?class=a&class=b%26&fresh=1 HTTP/1.1"
        assert dict(header.split(": ") for header in rest) == {
            "host": f"127.0.0.1:{server.port}",
            "authorization": "Bearer t0ken",
            "accept-encoding": "identity",
            "accept": "text/event-stream",
            "content-length": "3",
        }
        assert content == b"job"

    @pytest.mark.parametrize("size_bytes", [0, 1, line_module.PIECE_BYTES, 3_000_000])
    def test_content_of_any_size(self, connect: Connect, size_bytes: int) -> None:
        line, server = connect(WHOLE)
        content = bytes(size_bytes)
        assert body(line, Request("PUT", "/blob", content=content)) == b"hello"
        assert server.heard[0].partition(b"\r\n\r\n")[2] == content

    def test_content_in_pieces(self, connect: Connect) -> None:
        line, server = connect(WHOLE)
        request = Request("PUT", "/blob", content=lambda: iter([b"abc", b"", b"d" * 20]))
        assert body(line, request) == b"hello"
        head, _, content = server.heard[0].partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head
        assert b"content-length" not in head
        assert content == b"3\r\nabc\r\n14\r\n" + b"d" * 20 + b"\r\n0\r\n\r\n"

    def test_an_answer_to_what_is_not_taken_is_heard(self, connect: Connect) -> None:
        refusal = b"HTTP/1.1 413 \r\ncontent-length: 4\r\nconnection: close\r\n\r\nfull"
        line, server = connect(refusal)
        server.is_patient = False

        def pieces() -> Iterator[bytes]:
            yield bytes(1000)
            raise BrokenPipeError("as from the socket, where the server takes no more")

        answer = line.ask(Request("PUT", "/blob", content=pieces))
        assert (answer.status, b"".join(answer.pieces())) == (413, b"full")

    def test_answers_of_each_kind(self, connect: Connect) -> None:
        chunked = b"HTTP/1.1 200 \r\ntransfer-encoding: chunked\r\n\r\n"
        line, server = connect(
            chunked + b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n",
            b"HTTP/1.1 204 \r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            b"HTTP/1.0 200 OK\r\n\r\nto the end",
            None,
        )
        assert list(line.ask(Request("GET", "/")).pieces()) == [b"hello", b"!"]
        assert body(line, Request("HEAD", "/")) == b""
        assert body(line, Request("GET", "/")) == b""
        assert body(line, Request("GET", "/")) == b""
        answer = line.ask(Request("GET", "/"))
        server.stop()
        assert b"".join(answer.pieces()) == b"to the end"
        assert server.connections == 1


class TestConnections:
    def test_one_serves_request_after_request(self, connect: Connect) -> None:
        line, server = connect(*[WHOLE] * 5)
        for _ in range(5):
            assert body(line, Request("GET", "/")) == b"hello"
        assert server.connections == 1

    def test_one_that_has_ended_meanwhile_is_not_used(self, connect: Connect) -> None:
        line, server = connect(WHOLE, WHOLE)
        assert body(line, Request("POST", "/")) == b"hello"
        server.hang_up()
        assert body(line, Request("POST", "/")) == b"hello"
        assert server.connections == 2

    def test_one_whose_answer_is_not_read_is_not_used(self, connect: Connect) -> None:
        line, server = connect(
            WHOLE, WHOLE, WHOLE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"), WHOLE
        )
        line.ask(Request("GET", "/")).close()
        pieces = line.ask(Request("GET", "/")).pieces(2)
        assert next(pieces) == b"he"
        assert body(line, Request("GET", "/")) == b"hello"
        assert body(line, Request("GET", "/")) == b"hello"
        assert server.connections == 4

    def test_so_many_are_kept(self, connect: Connect) -> None:
        count = line_module.MAX_IDLE + 2
        line, server = connect(*[WHOLE] * (2 * count + 1))
        for opened in (count, count + 2):
            answers = [line.ask(Request("GET", "/")) for _ in range(count)]
            assert server.connections == opened
            for answer in answers:
                assert b"".join(answer.pieces()) == b"hello"
        line.close()
        assert body(line, Request("GET", "/")) == b"hello"
        assert server.connections == count + 3

    def test_threads_share_a_line(self, connect: Connect) -> None:
        line, server = connect(*[WHOLE] * 200)
        told: list[bytes] = []

        def ask() -> None:
            told.extend(body(line, Request("GET", "/")) for _ in range(50))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert told == [b"hello"] * 200
        assert server.connections <= 4


class TestFaults:
    def test_nobody_listens(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        line = HttpLine(NodeNote(f"http://127.0.0.1:{port}", 1, embedded=False, token=""))
        with pytest.raises(NobodyThereError, match="refused"):
            line.ask(Request("GET", "/"))

    def test_silence(self, connect: Connect, monkeypatch: Any) -> None:
        monkeypatch.setattr(line_module, "REPLY_TIMEOUT_S", 0.05)
        line, _ = connect(b"", b"HTTP/1.1 200 \r\ncontent-length: 5\r\n\r\nhel")
        with pytest.raises(SilenceError, match="timed out"):
            line.ask(Request("GET", "/"))
        answer = line.ask(Request("GET", "/"))
        with pytest.raises(SilenceError, match="timed out"):
            list(answer.pieces())

    @pytest.mark.parametrize(
        "answer",
        [
            None,
            b"SSH-2.0-nonsense\r\n",
            b"HTTP/1.1 \r\n\r\n",
            b"HTTP/1.1 200 \r\n" + b"x: y\r\n" * 1000 + b"\r\n",
            b"HTTP/1.1 200 \r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
        ],
    )
    def test_what_is_no_answer(self, connect: Connect, answer: bytes | None) -> None:
        line, _ = connect(answer)
        with pytest.raises(LineError):
            line.ask(Request("GET", "/"))

    @pytest.mark.parametrize(
        "rest",
        [
            b"content-length: 6\r\n\r\nhello",
            b"transfer-encoding: chunked\r\n\r\n6\r\nhello",
            b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
            b"transfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n",
        ],
    )
    def test_an_answer_that_breaks_off(self, connect: Connect, rest: bytes) -> None:
        line, server = connect(b"HTTP/1.1 200 \r\n" + rest, None)
        answer = line.ask(Request("GET", "/"))
        server.stop()
        with pytest.raises(LineError):
            list(answer.pieces())
        assert list(answer.pieces()) == []
