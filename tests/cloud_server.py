"""A twin of a node that scripts reach by HTTP: ``POST /v1/session``, ``PUT`` and ``HEAD /blob``."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h11

from p2pflop.cloud.link import PATH, Frames, framed
from p2pflop.dht.manifest import address_of
from tests.cloud_twin import Twin

TOKEN = "s3cret"


class TwinServer:
    """Serves one twin after another, each in a thread of its own, until it is closed."""

    def __init__(self, fail_at: int | None = None, *, fails_late: bool = False) -> None:
        self._fail_at, self._fails_late = fail_at, fails_late
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.twins: list[Twin] = []
        self.blobs: dict[bytes, bytes] = {}
        self.puts = 0
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def home(self, folder: Path) -> Path:
        """A home whose node this is."""
        folder.mkdir(exist_ok=True)
        note = {"url": f"http://127.0.0.1:{self.port}", "pid": os.getpid(), "embedded": False}
        (folder / "node.json").write_text(json.dumps(note))
        (folder / "token").write_text(TOKEN)
        return folder

    def close(self) -> None:
        """Take no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            while self._exchange(client, h11.Connection(h11.SERVER)):
                pass

    def _exchange(self, client: socket.socket, http: h11.Connection) -> bool:
        request = self._next(client, http)
        if not isinstance(request, h11.Request):
            return False
        assert dict(request.headers)[b"authorization"] == f"Bearer {TOKEN}".encode()
        if request.target == PATH.encode():
            self._session(client, http)
            return False
        body = b"".join(bytes(event.data) for event in self._body(client, http))
        if request.method == b"HEAD":
            status = 200 if bytes.fromhex(request.target.decode()[-64:]) in self.blobs else 404
            self._answer(client, http, status, b"")
            return True
        address = address_of(body)
        self.blobs[address] = body
        self.puts += 1
        reply = {"address": address.hex(), "size_bytes": len(body), "public": False}
        self._answer(client, http, 201, json.dumps(reply).encode())
        return True

    @staticmethod
    def _answer(client: socket.socket, http: h11.Connection, status: int, data: bytes) -> None:
        head = [("content-type", "application/json"), ("content-length", str(len(data)))]
        response = h11.Response(status_code=status, headers=head)
        for event in (response, h11.Data(data), h11.EndOfMessage()):
            client.sendall(http.send(event) or b"")

    def _session(self, client: socket.socket, http: h11.Connection) -> None:
        head = [("content-type", "application/octet-stream"), ("transfer-encoding", "chunked")]
        client.sendall(http.send(h11.Response(status_code=200, headers=head)) or b"")
        twin = Twin(lambda frame: client.sendall(http.send(h11.Data(framed(frame))) or b""))
        twin.blobs = self.blobs
        twin.fail_at, twin.fails_late = self._fail_at, self._fails_late
        self.twins.append(twin)
        frames = Frames()
        for event in self._body(client, http):
            for frame in frames.feed(bytes(event.data)):
                twin.hear(frame)

    def _body(self, client: socket.socket, http: h11.Connection) -> Iterator[h11.Data]:
        while isinstance(event := self._next(client, http), h11.Data):
            yield event

    @staticmethod
    def _next(client: socket.socket, http: h11.Connection) -> object:
        try:
            while (event := http.next_event()) is h11.NEED_DATA:
                http.receive_data(client.recv(65536))
        except (ConnectionError, h11.RemoteProtocolError):
            return None  # a script that is killed says nothing
        return event


@contextmanager
def twin_server(fail_at: int | None = None, *, fails_late: bool = False) -> Iterator[TwinServer]:
    """A server for the length of a test; ``fail_at`` as of a Twin."""
    server = TwinServer(fail_at, fails_late=fails_late)
    try:
        yield server
    finally:
        server.close()
