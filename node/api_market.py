"""Routes about the market as a whole.

===================================== ============================================================
``GET /v1/market``                    see ``NodeService.market``
``GET /v1/trades?since_ns=``          the tape, newest hour first, from the hour of that time on
``GET /v1/trades/events?after=&wait_ms=``  server-sent events: trades that are new here, as those
                                      of a run
===================================== ============================================================
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from p2pflop.node.api_guard import json_response
from p2pflop.node.api_money import MAX_TIME_NS, parse_number
from p2pflop.node.api_streams import EventStream
from p2pflop.node.service import Json, NodeService

MAX_WAIT_MS: Final = 7 * 86400 * 1000

Stream = Callable[[AsyncIterator[list[Json]], float], EventStream]
"""Makes a response of events, which ends after so many seconds."""


class MarketApi:
    """The routes over one service."""

    def __init__(self, service: NodeService, stream: Stream) -> None:
        self._service = service
        self._stream = stream

    def routes(self) -> list[Route]:
        """All routes but the listings of the book and of peers."""
        get = ["GET"]
        return [
            Route("/v1/market", self.market, methods=get),
            Route("/v1/trades", self.trades, methods=get),
            Route("/v1/trades/events", self.events, methods=get),
        ]

    async def market(self, _request: Request) -> Response:
        """Figures of every class, and the take rate."""
        return json_response(await self._service.market())

    async def trades(self, request: Request) -> Response:
        """The tape."""
        given = request.query_params.get("since_ns", "0")
        trades = await self._service.trades(parse_number(given, "since_ns", MAX_TIME_NS))
        return json_response({"trades": trades, "total": len(trades)})

    async def events(self, request: Request) -> Response:
        """See ``event_stream``."""
        after, wait_s = event_position(request)
        return self._stream(self._service.trade_events(after), wait_s)


def event_position(request: Request) -> tuple[int, float]:
    """After which event a client wants to go on, and for how many seconds. Raises ConfigError."""
    given = request.headers.get("last-event-id") or request.query_params.get("after", "0")
    return parse_number(given, "after", 2**63 - 1), wait_seconds(request)


def wait_seconds(request: Request) -> float:
    """For how many seconds a client wants to wait for events. Raises ConfigError."""
    wait_ms = request.query_params.get("wait_ms")
    return math.inf if wait_ms is None else parse_number(wait_ms, "wait_ms", MAX_WAIT_MS) / 1000
