"""Routes about money: payments both ways, and statements.

=========================================== ======================================================
``GET /v1/payments``                        see ``NodeService.payments``
``POST /v1/payments``                       ``{payment, account, amount_nusd, reference}``: paid
``POST /v1/payments/received``              the same: received, though nobody claimed it
``POST /v1/payments/<id>/received``         acknowledge a claim
``POST /v1/payments/<id>/refused``          ``{reason}``: refuse it
``GET /v1/statement/<account>?since_ns=``   every entry with an account
=========================================== ======================================================

``payment`` is an id of 32 random bytes that the client chooses, so that a request whose answer was
lost can be made again and counts once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from p2pflop.errors import ConfigError
from p2pflop.ids import HASH_BYTES
from p2pflop.node.api_guard import json_response
from p2pflop.node.service import Json, NodeService

MAX_TIME_NS: Final = 2**62

Pay = Callable[[bytes, bytes, int, str], Awaitable[Json]]


class MoneyApi:
    """The routes over one service; ``command`` reads the JSON object of a request."""

    def __init__(self, service: NodeService, command: Callable[[Request], Awaitable[Json]]) -> None:
        self._service = service
        self._command = command

    def routes(self) -> list[Route]:
        """All routes but the listing of payments."""
        post = ["POST"]
        return [
            Route("/v1/payments", self.pay, methods=post),
            Route("/v1/payments/received", self.receive, methods=post),
            Route("/v1/payments/{payment}/received", self.acknowledge, methods=post),
            Route("/v1/payments/{payment}/refused", self.refuse, methods=post),
            Route("/v1/statement/{account}", self.statement, methods=["GET"]),
        ]

    async def pay(self, request: Request) -> Response:
        """Book and claim a payment."""
        return await self._pay(request, self._service.pay)

    async def receive(self, request: Request) -> Response:
        """Book and acknowledge a payment that nobody claimed."""
        return await self._pay(request, self._service.receive)

    async def acknowledge(self, request: Request) -> Response:
        """Book and acknowledge a claim."""
        payment = parse_id(request.path_params["payment"], "a payment's id")
        return json_response(await self._service.acknowledge(payment))

    async def refuse(self, request: Request) -> Response:
        """Refuse a claim."""
        payment = parse_id(request.path_params["payment"], "a payment's id")
        reason = _text(await self._command(request), "reason")
        return json_response(await self._service.refuse(payment, reason))

    async def statement(self, request: Request) -> Response:
        """Entries and balances of one account."""
        account = parse_id(request.path_params["account"], "an account")
        given = request.query_params.get("since_ns", "0")
        since_ns = parse_number(given, "since_ns", MAX_TIME_NS)
        return json_response(await self._service.statement(account, since_ns))

    async def _pay(self, request: Request, pay: Pay) -> Response:
        command = await self._command(request)
        payment = parse_id(command.get("payment"), "a payment's id")
        account = parse_id(command.get("account"), "an account")
        amount_nusd = command.get("amount_nusd")
        if not isinstance(amount_nusd, int) or isinstance(amount_nusd, bool):
            raise ConfigError("amount_nusd must be a whole number of nano-dollars")
        reference = _text(command, "reference")
        return json_response(await pay(payment, account, amount_nusd, reference), 201)


def parse_number(text: str, name: str, highest: int, lowest: int = 0) -> int:
    """A parameter of a request. Raises ConfigError."""
    is_number = text.isascii() and text.isdecimal() and len(text) <= 19
    if not (is_number and lowest <= int(text) <= highest):
        raise ConfigError(f"{name} must be a whole number from {lowest} to {highest}")
    return int(text)


def parse_id(text: object, what: str) -> bytes:
    """32 bytes in lower-case hex. Raises ConfigError."""
    try:
        found = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        found = b""
    if len(found) != HASH_BYTES or found.hex() != text:
        raise ConfigError(f"{str(text)[:80]!r} is not {what}: {2 * HASH_BYTES} hex digits")
    return found


def _text(command: Json, name: str) -> str:
    text = command.get(name, "")
    if not isinstance(text, str):
        raise ConfigError(f"{name} must be a text")
    return text
