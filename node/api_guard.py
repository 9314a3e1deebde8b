"""The gate before every route of the local API.

The API listens on loopback, which keeps strangers' machines out but not the web pages and the
other users of this one. So, before a route is looked at:

- ``Host`` must be a loopback name with our port. A page whose own name was rebound to 127.0.0.1
  (DNS rebinding) sends its own name.
- ``Origin``, where a browser sends one, must be ours, and a fetch that a browser marks as
  cross-site is refused unless it is a person who follows a link.
- Everything but ``GET``/``HEAD /blob/<hash>`` needs the bearer token from the node's home, compared
  in constant time. There are no cookies, so nothing is sent that a page did not know. Without the
  token a blob comes only from what is here: a link that a person follows must not make this node
  fetch and keep what strangers choose. Routes see it in ``scope[IS_USER]``.

The gate also counts what is open (an embedded node ends when nobody is left), refuses more than
``max_open_requests``, and, when a route answers before it has read its request's body, reads on
for a moment: a client that still sends would otherwise see a reset and never our answer.
"""

from __future__ import annotations

import hmac
import json
import math
from typing import Any, Final

import trio
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from p2pflop.errors import ConfigError, P2PFlopError, ProviderError

BLOB_PREFIX: Final = "/blob/"
IS_USER: Final = "p2pflop.is_user"
LINGER_S: Final = 2.0
MAX_MESSAGE_CHARS: Final = 4000

_STATUS: Final = {
    "ConfigError": 400,
    "HomeLockedError": 409,
    "NodeUnreachableError": 502,
    "JobError": 422,
    "ProviderError": 502,
    "MarketError": 409,
    "StoreError": 507,
    "StoreFullError": 507,
    "BlobNotFoundError": 404,
    "VerificationError": 502,
    "ProtocolError": 502,
}
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_HEADERS: Final = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; sandbox"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
]


class Activity:
    """Who uses the API: requests open now, and for how long there has been none."""

    def __init__(self) -> None:
        self.open_requests = 0
        self._since: float | None = None

    def enter(self) -> None:
        """A request begins."""
        self.open_requests += 1

    def leave(self) -> None:
        """A request ends."""
        self.open_requests -= 1
        self._since = trio.current_time()

    def idle_s(self) -> float:
        """Seconds since the last request ended; 0 while one is open. Counts from the first call."""
        now = trio.current_time()
        if self._since is None or self.open_requests:
            self._since = now
        return now - self._since


class Guard:
    """ASGI middleware; see the head of this module."""

    def __init__(
        self, app: ASGIApp, *, token: str, port: int, activity: Activity, max_open_requests: int
    ) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = frozenset(f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]"))
        self._activity = activity
        self._max_open_requests = max_open_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, has_body=_has_body(scope))
        self._activity.enter()
        try:
            app = self._refusal(scope) or self._app
            await app(scope, exchange.receive, exchange.send)
        finally:
            self._activity.leave()

    def _refusal(self, scope: Scope) -> Response | None:
        if scope["http_version"] not in ("1.0", "1.1"):
            return error_response(ConfigError("this server speaks HTTP/1.1 only"), 505)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        is_user = self._has_token(headers.get(b"authorization", ""))
        scope[IS_USER] = is_user
        # Who lacks the token may not keep the node's user out.
        room = self._max_open_requests if is_user else self._max_open_requests // 2
        if self._activity.open_requests > room:
            busy = ProviderError("too many open requests", hint="Try again in a moment.")
            return error_response(busy, 503)
        host = headers.get(b"host", "").lower()
        if host not in self._hosts:
            message = f"this node does not answer as {host[:80]!r}"
            hint = f"Use http://{min(self._hosts)}."
            return error_response(ConfigError(message, hint=hint), 421)
        if b"origin" in headers and headers[b"origin"] != f"http://{host}":
            return error_response(ConfigError("other origins may not use this node"), 403)
        crossing = headers.get(b"sec-fetch-site", "none") not in ("none", "same-origin")
        if crossing and headers.get(b"sec-fetch-dest") != "document":
            return error_response(ConfigError("other sites may not use this node"), 403)
        if is_user or _is_open(scope):
            return None
        response = error_response(
            ConfigError(
                "the request lacks this node's token",
                hint="Send 'Authorization: Bearer <token>'; it is in the file 'token' of its home.",
            ),
            401,
        )
        response.headers["www-authenticate"] = "Bearer"
        return response

    def _has_token(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        is_equal = hmac.compare_digest(given.strip().encode(), self._token)
        return scheme.lower() == "bearer" and is_equal


class _Exchange:
    """One request's two channels, wrapped: headers added, an unread body drained."""

    def __init__(self, receive: Receive, send: Send, *, has_body: bool) -> None:
        self._receive = receive
        self._send = send
        self._all_read = trio.Event()
        if not has_body:
            self._all_read.set()

    async def receive(self) -> Message:
        message = await self._receive()
        if not message.get("more_body", False):
            self._all_read.set()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *_HEADERS]
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if not is_last or self._all_read.is_set():
            await self._send(message)
            return
        await self._send(dict(message, more_body=True))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drain)
            with trio.move_on_after(LINGER_S):
                await self._all_read.wait()
            # The drain goes on: the server's last word to us must find room in its queue.
            await self._send({"type": "http.response.body"})
            nursery.cancel_scope.cancel()

    async def _drain(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass


def error_response(error: P2PFlopError, status: int | None = None) -> Response:
    """``error`` as the API tells it; the status follows from its class unless given."""
    kind = type(error).__name__
    return json_response({"error": error_body(error)}, status or _STATUS.get(kind, 500))


def error_body(error: P2PFlopError) -> dict[str, Any]:
    """``kind``, ``message``, ``hint`` and ``exit_code`` of an error, bounded."""
    return {
        "kind": type(error).__name__,
        "message": error.message[:MAX_MESSAGE_CHARS],
        "hint": error.hint[:MAX_MESSAGE_CHARS],
        "exit_code": error.exit_code,
    }


def json_response(value: Any, status: int = 200) -> Response:
    """``value`` as a JSON response."""
    return Response(dump_json(value), status, media_type="application/json")


def dump_json(value: Any) -> bytes:
    """JSON; the floats that it lacks become the strings ``NaN``, ``Infinity``, ``-Infinity``."""
    try:
        text = _ENCODER.encode(value)
    except ValueError:
        text = _ENCODER.encode(_finite(value))
    return text.encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _has_body(scope: Scope) -> bool:
    names = {name for name, _ in scope["headers"]}
    return b"content-length" in names or b"transfer-encoding" in names


def _is_open(scope: Scope) -> bool:
    return scope["method"] in ("GET", "HEAD") and scope["path"].startswith(BLOB_PREFIX)
