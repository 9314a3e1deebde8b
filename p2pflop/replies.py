"""The node's answers, read within bounds; its errors raised as the classes that they were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import httpx

from p2pflop import errors
from p2pflop.errors import P2PFlopError, ProtocolError

MAX_EVENT_BYTES: Final = 16 * 1024 * 1024
MAX_REPLY_BYTES: Final = 64 * 1024 * 1024


def lines(response: httpx.Response) -> Iterator[str]:
    """Lines of a stream of bounded events."""
    waiting = bytearray()
    for piece in response.iter_raw():
        waiting += piece
        *lines, rest = waiting.split(b"\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise ProtocolError(f"the node sent an event over {MAX_EVENT_BYTES} bytes")
        yield from (line.decode() for line in lines)
        waiting = bytearray(rest)


def read(response: httpx.Response) -> bytes:
    """The whole body. Raises ProtocolError over ``MAX_REPLY_BYTES``."""
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        if len(body) > MAX_REPLY_BYTES:
            raise ProtocolError(f"the node's reply is over {MAX_REPLY_BYTES} bytes")
    return bytes(body)


def raise_for(response: httpx.Response) -> None:
    """Raises the error that the node answered with, if it did."""
    if response.is_success:
        return
    if response.request.method == "HEAD":
        raise not_a_node(response)
    try:
        reply = json.loads(read(response))
    except ValueError as error:
        raise not_a_node(response) from error
    raise error_of(reply, response)


def error_of(reply: Any, response: httpx.Response) -> P2PFlopError:
    """The error told in the JSON ``reply``."""
    told = reply.get("error") if isinstance(reply, dict) else None
    if not isinstance(told, dict):
        return not_a_node(response)
    return error_from(str(told.get("kind")), str(told.get("message")), str(told.get("hint", "")))


def error_from(kind: str, message: str, hint: str) -> P2PFlopError:
    """The error of class ``kind``; the root's where this version does not know that class."""
    found = vars(errors).get(kind)
    if not (isinstance(found, type) and issubclass(found, P2PFlopError)):
        found = P2PFlopError
    return found(message, hint=hint)


def not_a_node(response: httpx.Response) -> ProtocolError:
    """For an answer that no node gives."""
    return ProtocolError(
        f"{response.request.url.copy_with(query=None)} did not answer as a node does "
        f"(HTTP {response.status_code})",
        hint="Does another program listen on that port?",
    )
