"""Bytes kept at the local node, by their address: sent to it only if it has not got them.

Over a connection of its own beside the session's, by the standard library: a library that does more
takes longer to import than most scripts' first step.
"""

from __future__ import annotations

import json
import threading
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import Final
from urllib.parse import urlsplit

from p2pflop.dht.manifest import address_of
from p2pflop.embedded import NodeNote
from p2pflop.errors import NodeUnreachableError, P2PFlopError
from p2pflop.replies import error_from

REPLY_TIMEOUT_S: Final = 300.0
MAX_REPLY_BYTES: Final = 64 * 1024


class NodeBlobs:
    """What a script has the node of a note keep. Threads take turns."""

    def __init__(self, note: NodeNote) -> None:
        url = urlsplit(note.url)
        self._note = note
        self._http = HTTPConnection(url.hostname or "", url.port, timeout=REPLY_TIMEOUT_S)
        self._turn = threading.Lock()

    def put(self, data: memoryview) -> bytes:
        """Keep ``data``; its address. Raises P2PFlopError as the node did, NodeUnreachableError."""
        address = address_of(data)
        with self._turn:
            status, reply = self._ask("HEAD", f"/blob/{address.hex()}")
            if status == HTTPStatus.NOT_FOUND:
                status, reply = self._ask("PUT", "/blob", data)
            if status not in (HTTPStatus.OK, HTTPStatus.CREATED):
                raise self._error(status, reply)
        return address

    def leave(self) -> None:
        """Close this process's end alone: another one still speaks."""
        self._turn = threading.Lock()
        self._http.close()

    def _ask(self, method: str, path: str, data: memoryview | None = None) -> tuple[int, bytes]:
        """Both kinds of request may be made twice: a line that was idle may be gone."""
        headers = {"authorization": f"Bearer {self._note.token}"}
        for is_last in (False, True):
            try:
                self._http.request(method, path, data, headers)
                response = self._http.getresponse()
                return response.status, response.read(MAX_REPLY_BYTES)
            except (HTTPException, OSError) as error:
                self._http.close()
                if is_last:
                    raise self._gone(str(error) or type(error).__name__) from error
            except BaseException:
                self._http.close()  # Ctrl-C: nobody reads the answer
                raise
        raise AssertionError("unreachable")

    def _error(self, status: int, reply: bytes) -> P2PFlopError:
        try:
            told = json.loads(reply)["error"]
            return error_from(str(told["kind"]), str(told["message"]), str(told.get("hint", "")))
        except (ValueError, KeyError, TypeError):
            return self._gone(f"it answered with HTTP {status}")

    def _gone(self, reason: str) -> NodeUnreachableError:
        return NodeUnreachableError(
            f"the node at {self._note.url} takes no data: {reason}",
            hint="Is it running, and of this version? See 'p2pflop doctor'.",
        )
