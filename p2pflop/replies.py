"""The node's answers, read within bounds; its errors raised as the classes that they were."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from p2pflop import errors
from p2pflop.errors import P2PFlopError, ProtocolError, StoreError

if TYPE_CHECKING:
    from p2pflop.line import Answer

MAX_EVENT_BYTES: Final = 16 * 1024 * 1024
MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
_SUCCESS: Final = range(200, 300)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,19})-\d{1,19}|\*)/(\d{1,19})")


def lines(answer: Answer) -> Iterator[str]:
    """Lines of a stream of bounded events."""
    waiting = bytearray()
    for piece in answer.pieces():
        waiting += piece
        *lines, rest = waiting.split(b"\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise ProtocolError(f"the node sent an event over {MAX_EVENT_BYTES} bytes")
        yield from (line.decode() for line in lines)
        waiting = bytearray(rest)


def read(answer: Answer) -> bytes:
    """The whole body. Raises ProtocolError over ``MAX_REPLY_BYTES``."""
    body = bytearray()
    for piece in answer.pieces():
        body += piece
        if len(body) > MAX_REPLY_BYTES:
            raise ProtocolError(f"the node's reply is over {MAX_REPLY_BYTES} bytes")
    return bytes(body)


def raise_for(answer: Answer) -> None:
    """Raises the error that the node answered with, if it did."""
    if answer.status in _SUCCESS:
        return
    if answer.request.method == "HEAD":
        raise not_a_node(answer)
    try:
        reply = json.loads(read(answer))
    except ValueError as error:
        raise not_a_node(answer) from error
    raise error_of(reply, answer)


def whole_bytes(answer: Answer, start: int) -> int:
    """The size of the blob of whose bytes from ``start`` on this is the answer.

    Raises StoreError if it has none there, and the error that the node answered with.
    """
    told = _CONTENT_RANGE.fullmatch(answer.header("content-range"))
    if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and told is not None:
        raise StoreError(f"the blob has {told.group(2)} bytes, none from {start} on")
    raise_for(answer)
    if told is not None and told.group(1) == str(start):
        return int(told.group(2))
    length = answer.header("content-length")
    if told is not None or start or not length.isdecimal():
        raise not_a_node(answer)
    return int(length)


def error_of(reply: Any, answer: Answer) -> P2PFlopError:
    """The error told in the JSON ``reply``."""
    told = reply.get("error") if isinstance(reply, dict) else None
    if not isinstance(told, dict):
        return not_a_node(answer)
    return error_from(str(told.get("kind")), str(told.get("message")), str(told.get("hint", "")))


def error_from(kind: str, message: str, hint: str) -> P2PFlopError:
    """The error of class ``kind``; the root's where this version does not know that class."""
    found = vars(errors).get(kind)
    if not (isinstance(found, type) and issubclass(found, P2PFlopError)):
        found = P2PFlopError
    return found(message, hint=hint)


def not_a_node(answer: Answer) -> ProtocolError:
    """For an answer that no node gives."""
    return ProtocolError(
        f"{answer.url} did not answer as a node does (HTTP {answer.status})",
        hint="Does another program listen on that port?",
    )
