"""Bytes kept at the local node, by their address: sent to it only if it has not got them.

Over a line of its own beside the session's.
"""

from __future__ import annotations

import threading
from http import HTTPStatus

from p2pflop.dht.manifest import address_of
from p2pflop.embedded import NodeNote
from p2pflop.errors import NodeUnreachableError
from p2pflop.line import Answer, HttpLine, LineError, Request
from p2pflop.replies import raise_for


class NodeBlobs:
    """What a script has the node of a note keep. Threads take turns."""

    def __init__(self, note: NodeNote) -> None:
        self._note = note
        self._line = HttpLine(note)
        self._turn = threading.Lock()

    def put(self, data: memoryview) -> bytes:
        """Keep ``data``; its address. Raises P2PFlopError as the node did, NodeUnreachableError."""
        address = address_of(data)
        with self._turn:
            status = self._ask(Request("HEAD", f"/blob/{address.hex()}"))
            if status == HTTPStatus.NOT_FOUND:
                self._ask(Request("PUT", "/blob", content=data))
        return address

    def leave(self) -> None:
        """Close this process's end alone: another one still speaks."""
        self._turn = threading.Lock()
        self._line.close()

    def _ask(self, request: Request) -> int:
        try:
            answer = self._answer(request)
            try:
                if answer.status != HTTPStatus.NOT_FOUND or request.method != "HEAD":
                    raise_for(answer)
                for _ in answer.pieces():
                    pass
            finally:
                answer.close()
        except LineError as error:
            raise NodeUnreachableError(
                f"the node at {self._note.url} takes no data: {error}",
                hint="Is it running, and of this version? See 'p2pflop doctor'.",
            ) from error
        return answer.status

    def _answer(self, request: Request) -> Answer:
        """Both kinds of request may be made twice: a line that was idle may be gone."""
        try:
            return self._line.ask(request)
        except LineError:
            return self._line.ask(request)
