"""The local HTTP API: what the SDK, the command line and curl talk to.

====================================== ===========================================================
``GET /blob/<hash>``                   the bytes, from here or found among peers; ranges; no token
``HEAD /blob/<hash>``                  whether this node itself holds them; no token
``PUT /blob?public=0|1``               keep the request's body
``DELETE /blob/<hash>``                forget a blob of this node's own
``POST /v1/jobs?max_nusd=&deadline_s=&checkpoint_steps=&checkpoint_s=&class=&fresh=&rest=&id=``
                                       a job file, or a ``Submission`` of one and small inputs;
                                       ``Accept: text/event-stream`` has it answer with the run's
                                       events, ``{"id"}`` first, for ``wait_ms`` at most
``POST /v1/packs?...``                 variants of a job, to be bought as one run; takes an ``id``
``POST /v1/packs/<id>/unpack``         the runs of a settled pack's variants
``POST /v1/quote?...``                 what a submission would choose from
``GET /v1/jobs?parts=``, ``/v1/jobs/<id>``    runs of this node
``GET /v1/sales``                      what runs here for others
``GET /v1/jobs/<id>/events?after=&wait_ms=``  server-sent events after ``after`` or
                                       ``Last-Event-ID``, for ``wait_ms`` at most
``GET /v1/jobs/<id>/file``             the job file as submitted
``GET /v1/jobs/<id>/record``           the encoded ``Result``, whose BLAKE3 is the result hash
``GET /v1/jobs/<id>/evidence``         the encoded ``Evidence`` of how its providers were chosen
``POST /v1/jobs/<id>/cancel``
``POST /v1/session``                   frames both ways: see ``api_session``
``GET /v1/blobs``, ``/v1/blobs/<hash>``  what is kept here
``POST /v1/connect``                   ``{"multiaddr": ...}``
``/v1/payments...``, ``/v1/statement/<account>``  see ``api_money``
``GET /v1/market``, ``/v1/trades...``  see ``api_market``
``GET /v1/status|book|wishes|peers|ledger|doctor``
====================================== ===========================================================

Errors are ``{"error": {kind, message, hint, exit_code}}`` with ``kind`` a class of
``p2pflop.errors``. ``api_guard`` stands before every route, ``api_streams`` sends what is long.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from p2pflop.dht.blobs import BlobInfo
from p2pflop.dht.manifest import MAX_BLOB_BYTES
from p2pflop.errors import (
    BlobNotFoundError,
    ConfigError,
    JobError,
    ProtocolError,
    StoreError,
)
from p2pflop.ids import parse_hash
from p2pflop.job.file import FILE_MAGIC, MAX_COMPRESSED_BYTES
from p2pflop.job.submission import MAX_SUBMISSION_BYTES, decode_submission
from p2pflop.node.api_errors import EXCEPTION_HANDLERS, Refused
from p2pflop.node.api_guard import IS_USER, Activity, Guard, json_response
from p2pflop.node.api_market import MarketApi, event_position, wait_seconds
from p2pflop.node.api_money import MoneyApi, parse_number
from p2pflop.node.api_session import SessionApi
from p2pflop.node.api_streams import EVENT_STREAM, BlobStream, EventStream, parse_range
from p2pflop.node.service import (
    DEFAULT_FIND_TIMEOUT_S,
    MAX_CLASSES,
    MAX_DEADLINE_S,
    MAX_FIND_TIMEOUT_S,
    Json,
    NodeService,
    SubmitOptions,
    check_run_id,
)
from p2pflop.units import KIB, MAX_NUSD

MAX_ITEMS: Final = 10_000
MAX_STEPS: Final = 2**40


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """Bounds on what one client may ask for at once."""

    max_blob_bytes: int = MAX_BLOB_BYTES
    max_job_bytes: int = MAX_COMPRESSED_BYTES + len(FILE_MAGIC)
    max_submission_bytes: int = MAX_SUBMISSION_BYTES
    max_command_bytes: int = 4 * KIB
    max_open_requests: int = 256
    heartbeat_s: float = 15.0


class Api:
    """The routes over one service. ``stopping`` ends the long responses."""

    def __init__(self, service: NodeService, limits: ApiLimits, stopping: trio.Event) -> None:
        self._service = service
        self._limits = limits
        self._stopping = stopping

    def routes(self) -> list[Route]:
        """All routes."""
        service = self._service
        get, post = ["GET"], ["POST"]
        return [
            Route("/blob/{address}", self.blob, methods=["GET", "HEAD"]),
            Route("/blob/{address}", self.delete_blob, methods=["DELETE"]),
            Route("/blob", self.put_blob, methods=["PUT"]),
            Route("/v1/jobs", self.submit, methods=post),
            Route("/v1/packs", self.submit_pack, methods=post),
            Route("/v1/packs/{run}/unpack", self.unpack, methods=post),
            Route("/v1/quote", self.quote, methods=post),
            Route("/v1/jobs", self.jobs, methods=get),
            Route("/v1/sales", partial(_listing, "sales", service.sales), methods=get),
            Route("/v1/jobs/{run}", self.job, methods=get),
            Route("/v1/jobs/{run}/events", self.events, methods=get),
            Route("/v1/jobs/{run}/file", partial(_octets, service.job_file), methods=get),
            Route("/v1/jobs/{run}/record", partial(_octets, service.result_record), methods=get),
            Route("/v1/jobs/{run}/evidence", partial(_octets, service.evidence), methods=get),
            Route("/v1/jobs/{run}/cancel", self.cancel, methods=post),
            Route("/v1/blobs", partial(_listing, "blobs", self._blobs), methods=get),
            Route("/v1/blobs/{address}", self.stat, methods=get),
            Route("/v1/connect", self.connect, methods=post),
            Route("/v1/status", partial(_report, service.status), methods=get),
            Route("/v1/book", partial(_listing, "book", service.book), methods=get),
            Route("/v1/wishes", partial(_listing, "wishes", service.wishes), methods=get),
            Route("/v1/peers", partial(_listing, "peers", service.peers), methods=get),
            Route("/v1/ledger", partial(_report, service.ledger), methods=get),
            Route("/v1/doctor", partial(_report, service.doctor), methods=get),
            Route("/v1/payments", partial(_listing, "payments", service.payments), methods=get),
            *MoneyApi(service, self._command).routes(),
            *MarketApi(service, self._stream).routes(),
            *SessionApi(service, self._stopping).routes(),
        ]

    async def blob(self, request: Request) -> Response:
        """With the token GET may search the network and wait; else the local store answers."""
        address = parse_hash(request.path_params["address"])
        store = self._service.store
        if request.method == "HEAD" or not request.scope.get(IS_USER):
            info = await store.stat(address)
            if info is None:
                raise BlobNotFoundError(
                    f"no blob {address.hex()} on this node",
                    hint="To fetch it from peers: p2pflop get HASH, or send the node's token.",
                )
        else:
            timeout_s = _number(request, "timeout_s", int(MAX_FIND_TIMEOUT_S))
            info = await self._service.find_blob(
                address, timeout_s=DEFAULT_FIND_TIMEOUT_S if timeout_s is None else timeout_s
            )
        etag = f'"{address.hex()}"'
        headers = {
            "etag": etag,
            "accept-ranges": "bytes",
            "cache-control": "private, max-age=31536000, immutable",
        }
        known = request.headers.get("if-none-match", "")
        if known.strip() == "*" or etag in known:
            return Response(status_code=304, headers=headers)
        size_bytes = info.size_bytes
        wanted = request.headers.get("range", "")
        if request.headers.get("if-range", etag) != etag or request.method == "HEAD":
            wanted = ""
        span = parse_range(wanted, size_bytes)
        if span is None:
            headers["content-range"] = f"bytes */{size_bytes}"
            return Response(status_code=416, headers=headers)
        start, stop = span
        status = 200
        if wanted and (start, stop) != (0, size_bytes):
            status = 206
            headers["content-range"] = f"bytes {start}-{stop - 1}/{size_bytes}"
        headers["content-length"] = str(stop - start)
        headers["content-type"] = "application/octet-stream"
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers)
        return await BlobStream.open(store, address, start, stop, status, headers)

    async def put_blob(self, request: Request) -> Response:
        """Stream the body into the store; public ones are announced when they are whole."""
        public = request.query_params.get("public", "0")
        if public not in ("0", "1"):
            raise ConfigError("public must be 0 or 1")
        limit = self._limits.max_blob_bytes
        too_large = StoreError(f"the blob is over the limit of {limit} bytes")
        if _declared_bytes(request) > limit:
            raise Refused(too_large, 413)
        size_bytes = 0
        async with self._service.store.writer() as writer:
            async for piece in request.stream():
                size_bytes += len(piece)
                if size_bytes > limit:
                    raise Refused(too_large, 413)
                await writer.write(piece)
            info = await writer.finish()
        if public == "1":
            await self._service.set_public(info.address)
        kept = await self._service.store.stat(info.address)
        return json_response(_describe(kept or info), 201)

    async def delete_blob(self, request: Request) -> Response:
        """Forget a blob of this node's own; what it was."""
        address = parse_hash(request.path_params["address"])
        return json_response(_describe(await self._service.delete_blob(address)))

    async def stat(self, request: Request) -> Response:
        """Size and openness of a blob that is kept here."""
        address = parse_hash(request.path_params["address"])
        info = await self._service.store.stat(address)
        if info is None:
            raise BlobNotFoundError(f"no blob {address.hex()} on this node")
        return json_response(_describe(info))

    async def submit(self, request: Request) -> Response:
        """Start a run; answers as soon as it is journalled, with its events if these are wanted."""
        options, wait_s = _options(request), wait_seconds(request)
        body = await self._body(request, self._limits.max_submission_bytes)
        try:
            submission = decode_submission(body)
            run = await self._service.submit(submission.file, options, submission.inputs)
        except ProtocolError as error:
            raise _bad_job(error) from error
        if EVENT_STREAM in request.headers.get("accept", ""):
            return self._stream(self._service.events(run, 0), wait_s, opening={"id": run})
        return json_response({"id": run}, 201)

    async def submit_pack(self, request: Request) -> Response:
        """Start the run of a pack; answers as soon as it is journalled."""
        options = _options(request)
        body = await self._body(request, self._limits.max_job_bytes)
        try:
            return json_response(await self._service.submit_pack(body, options), 201)
        except ProtocolError as error:
            raise _bad_job(error) from error

    async def unpack(self, request: Request) -> Response:
        """The runs of a settled pack's variants."""
        jobs = await self._service.unpack(_run_id(request))
        return json_response({"jobs": jobs})

    async def quote(self, request: Request) -> Response:
        """Rank without buying."""
        options = _options(request)
        body = await self._body(request, self._limits.max_job_bytes)
        try:
            return json_response(await self._service.quote(body, options))
        except ProtocolError as error:
            raise _bad_job(error) from error

    async def jobs(self, request: Request) -> Response:
        """The runs of this node; with ``parts=1`` those that were bought in packs, too."""
        parts = bool(_number(request, "parts", 1))
        return await _listing("jobs", partial(self._service.jobs, parts=parts), request)

    async def job(self, request: Request) -> Response:
        """One run."""
        return json_response(await self._service.job(_run_id(request)))

    async def cancel(self, request: Request) -> Response:
        """Give a run up, and tell how it stands then."""
        run = _run_id(request)
        await self._service.cancel(run)
        return json_response(await self._service.job(run))

    async def events(self, request: Request) -> Response:
        """Server-sent events; a client that lost the line resumes after the last ``id`` it saw."""
        run = _run_id(request)
        after, wait_s = event_position(request)
        await self._service.job(run)
        return self._stream(self._service.events(run, after), wait_s)

    async def connect(self, request: Request) -> Response:
        """Dial a peer."""
        multiaddr = (await self._command(request)).get("multiaddr")
        if not isinstance(multiaddr, str):
            raise ConfigError('the request must be like {"multiaddr": "/ip4/..."}')
        return json_response(await self._service.connect(multiaddr))

    async def _command(self, request: Request) -> Json:
        """The JSON object in a request's body."""
        body = await self._body(request, self._limits.max_command_bytes)
        try:
            command = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ConfigError("the request's body is not JSON") from error
        if not isinstance(command, dict):
            raise ConfigError("the request's body is not a JSON object")
        return command

    def _stream(
        self, events: AsyncIterator[list[Json]], wait_s: float, opening: Json | None = None
    ) -> EventStream:
        return EventStream(
            events,
            opening=opening,
            heartbeat_s=self._limits.heartbeat_s,
            wait_s=wait_s,
            stopping=self._stopping,
        )

    async def _blobs(self) -> list[Json]:
        return [_describe(info) for info in await self._service.store.list()]

    async def _body(self, request: Request, limit: int) -> bytes:
        too_large = JobError(
            f"the request's body is over the limit of {limit} bytes",
            hint="Data travels as blobs (PUT /blob), not inside the job.",
        )
        if _declared_bytes(request) > limit:
            raise Refused(too_large, 413)
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise Refused(too_large, 413)
        return bytes(body)


def create_app(
    service: NodeService,
    token: str,
    port: int,
    *,
    activity: Activity | None = None,
    limits: ApiLimits | None = None,
    stopping: trio.Event | None = None,
) -> Starlette:
    """The ASGI application for ``service``, answering as ``127.0.0.1:port`` and to ``token``."""
    limits = limits or ApiLimits()
    stopping = trio.Event() if stopping is None else stopping
    guard = Middleware(
        Guard,
        token=token,
        port=port,
        activity=activity or Activity(),
        max_open_requests=limits.max_open_requests,
    )
    return Starlette(
        routes=Api(service, limits, stopping).routes(),
        middleware=[guard],
        exception_handlers=EXCEPTION_HANDLERS,
    )


async def _report(produce: Callable[[], Awaitable[Json]], _request: Request) -> Response:
    return json_response(await produce())


async def _listing(
    name: str, produce: Callable[[], Awaitable[list[Json]]], _request: Request
) -> Response:
    items = await produce()
    return json_response({name: items[:MAX_ITEMS], "total": len(items)})


async def _octets(produce: Callable[[str], Awaitable[bytes]], request: Request) -> Response:
    data = await produce(_run_id(request))
    return Response(data, media_type="application/octet-stream")


def _describe(info: BlobInfo) -> Json:
    return {
        "address": info.address.hex(),
        "size_bytes": info.size_bytes,
        "public": info.public,
    }


def _options(request: Request) -> SubmitOptions:
    return SubmitOptions(
        max_nusd=_number(request, "max_nusd", MAX_NUSD),
        deadline_s=_number(request, "deadline_s", MAX_DEADLINE_S, lowest=1),
        checkpoint_steps=_number(request, "checkpoint_steps", MAX_STEPS),
        checkpoint_s=_number(request, "checkpoint_s", MAX_DEADLINE_S),
        classes=_classes(request),
        fresh=bool(_number(request, "fresh", 1)),
        rest=bool(_number(request, "rest", 1)),
        run_id=request.query_params.get("id"),
    )


def _classes(request: Request) -> tuple[str, ...]:
    names = tuple(request.query_params.getlist("class"))
    if len(names) > MAX_CLASSES:
        raise ConfigError(f"at most {MAX_CLASSES} classes")
    return names


def _number(request: Request, name: str, highest: int, lowest: int = 0) -> int | None:
    text = request.query_params.get(name)
    return None if text is None else parse_number(text, name, highest, lowest)


def _run_id(request: Request) -> str:
    return check_run_id(request.path_params["run"])


def _declared_bytes(request: Request) -> int:
    text = request.headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdecimal() else 0


def _bad_job(error: ProtocolError) -> JobError:
    return JobError(f"not a valid job file: {error.message}", hint=error.hint)
