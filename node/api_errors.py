"""What the local API answers when a route raises."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from p2pflop.errors import ConfigError, P2PFlopError, ProviderError
from p2pflop.node.api_guard import error_response

Handler = Callable[[Request, Exception], Awaitable[Response]]


class Refused(Exception):
    """An error that has a status of its own."""

    def __init__(self, error: P2PFlopError, status: int) -> None:
        super().__init__(error.message)
        self.error = error
        self.status = status


async def _on_error(_request: Request, error: Exception) -> Response:
    fault = error if isinstance(error, P2PFlopError) else P2PFlopError(str(error))
    return error_response(fault)


async def _on_refused(_request: Request, error: Exception) -> Response:
    if not isinstance(error, Refused):
        raise error
    return error_response(error.error, error.status)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    what = ConfigError(
        f"{request.method} {request.url.path[:200]}: {error.detail}",
        hint="This node and this program may be of different versions.",
    )
    response = error_response(what, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return error_response(ProviderError("the client went away"), 400)


async def _on_fault(_request: Request, error: Exception) -> Response:
    return error_response(
        P2PFlopError(
            f"the node failed at this request ({type(error).__name__})",
            hint="Its log has the details; please report them.",
        )
    )


EXCEPTION_HANDLERS: Final[dict[int | type[Exception], Handler]] = {
    Refused: _on_refused,
    P2PFlopError: _on_error,
    HTTPException: _on_http_error,
    ClientDisconnect: _on_disconnect,
    Exception: _on_fault,
}
