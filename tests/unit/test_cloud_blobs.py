"""A script's uploads: once each, over a line that may break, with the node's own errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import pytest

from p2pflop.cloud.blobs import NodeBlobs
from p2pflop.dht.manifest import address_of
from p2pflop.embedded import NodeNote
from p2pflop.errors import NodeUnreachableError, ProtocolError, StoreFullError

DATA = memoryview(bytes(range(256)) * 1000)
TOKEN = "secret"


class Node(BaseHTTPRequestHandler):
    """Keeps what is put; answers ``refusal`` instead, if there is one."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []
    kept: ClassVar[dict[str, bytes]] = {}
    refusal: ClassVar[tuple[int, Any] | None] = None
    hangs_up: ClassVar[bool] = False

    def do_HEAD(self) -> None:
        self._answer(200 if self.path in self.kept else 404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.refusal is not None:
            self._answer(*self.refusal)
            return
        self.kept[f"/blob/{address_of(body).hex()}"] = body
        self._answer(201, {"address": address_of(body).hex()})

    def _answer(self, status: int, told: Any = None) -> None:
        assert self.headers["authorization"] == f"Bearer {TOKEN}"
        self.asked.append(self.command)
        body = b"" if told is None else json.dumps(told).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.hangs_up

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def note() -> Iterator[NodeNote]:
    Node.asked.clear()
    Node.kept.clear()
    Node.refusal, Node.hangs_up = None, False
    server = HTTPServer(("127.0.0.1", 0), Node)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield NodeNote(f"http://127.0.0.1:{server.server_port}", 0, False, TOKEN)
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_same_bytes_are_sent_once(note: NodeNote) -> None:
    first, second = NodeBlobs(note), NodeBlobs(note)
    assert first.put(DATA) == first.put(DATA) == address_of(DATA)
    first.leave()
    assert second.put(DATA) == address_of(DATA)
    second.leave()
    assert Node.asked == ["HEAD", "PUT", "HEAD", "HEAD"]
    assert list(Node.kept.values()) == [DATA]


def test_a_line_that_the_node_has_closed_is_opened_again(note: NodeNote) -> None:
    blobs = NodeBlobs(note)
    Node.hangs_up = True
    assert blobs.put(DATA) == address_of(DATA)
    assert blobs.put(memoryview(b"more")) == address_of(b"more")
    blobs.leave()
    assert Node.asked == ["HEAD", "PUT"] * 2


def test_a_refusal_is_the_nodes_own_error(note: NodeNote) -> None:
    error = {"kind": "StoreFullError", "message": "the disk is full", "hint": "Free some."}
    Node.refusal = (507, {"error": error})
    blobs = NodeBlobs(note)
    with pytest.raises(StoreFullError, match="the disk is full"):
        blobs.put(DATA)
    Node.refusal = (502, ["nonsense"])
    with pytest.raises(ProtocolError, match="HTTP 502"):
        blobs.put(DATA)
    blobs.leave()


def test_a_node_that_is_gone_is_told(note: NodeNote) -> None:
    gone = NodeNote("http://127.0.0.1:1", 0, False, TOKEN)
    with pytest.raises(NodeUnreachableError, match="takes no data"):
        NodeBlobs(gone).put(DATA)
