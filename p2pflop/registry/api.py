"""The registry over HTTP: public, and nothing that needs a key.

===================================== ============================================================
``GET /v1/registry``                  who this is, the fee, the newest head
``GET /v1/certificates``              of the online keys, all
``GET /v1/schedules``                 of fees, all
``GET /v1/head``, ``/v1/heads?from=`` the newest head; a page of heads from that size on
``GET /v1/leaves?from=``              a page of the log
``GET /v1/proofs/<number>``           that the log has that leaf
``GET /v1/consistency?first=&second=``  that the first tree is the beginning of the second
``GET /v1/attestations/<account>``    the proof of its newest attestation, and how it stands
``GET /v1/attestations?after=``       proofs of attestations that hold, by serial
``GET /v1/revocations?from=``         proofs of revocations, by number of the leaf
``GET /v1/enrolments/<id>``           how an application stands
``POST /v1/enrolments``               apply: the body is an encoded ``EnrolmentForm``
===================================== ============================================================

Records are told as the hex of their bytes. Errors are those of the node's API: ``{"error": {kind,
message, hint, exit_code}}``. Who applies is counted by address, IPv4 by /24 and IPv6 by /48.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Final

import trio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from p2pflop.errors import ConfigError, P2PFlopError, ProtocolError, ProviderError
from p2pflop.franchise.records import MAX_FORM_BYTES
from p2pflop.market.rates import Rates
from p2pflop.market.records import Rejected
from p2pflop.node.api_errors import EXCEPTION_HANDLERS, Refused
from p2pflop.node.api_guard import error_response, json_response
from p2pflop.registry import log, views
from p2pflop.registry.office import Office

MAX_OPEN_REQUESTS: Final = 128
APPLY_BURST: Final = 16
APPLY_PER_S: Final = 1 / 60
BODY_S: Final = 10.0
MAX_NUMBER_DIGITS: Final = 19
_HEX: Final = re.compile(r"[0-9a-f]{64}")
_HEADERS: Final = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; sandbox"),
    (b"access-control-allow-origin", b"*"),
    (b"referrer-policy", b"no-referrer"),
]


class RegistryApi:
    """The routes over one office."""

    def __init__(self, office: Office, *, behind_proxy: bool) -> None:
        self._office = office
        self._behind_proxy = behind_proxy
        self._rates = Rates(APPLY_PER_S, APPLY_BURST)

    def routes(self) -> list[Route]:
        """All routes."""
        get = ["GET"]
        return [
            Route("/v1/registry", self.registry, methods=get),
            Route("/v1/certificates", self.certificates, methods=get),
            Route("/v1/schedules", self.schedules, methods=get),
            Route("/v1/head", self.head, methods=get),
            Route("/v1/heads", self.heads, methods=get),
            Route("/v1/leaves", self.leaves, methods=get),
            Route("/v1/proofs/{number}", self.proof, methods=get),
            Route("/v1/consistency", self.consistency, methods=get),
            Route("/v1/attestations", self.attestations, methods=get),
            Route("/v1/attestations/{account}", self.attestation, methods=get),
            Route("/v1/revocations", self.revocations, methods=get),
            Route("/v1/enrolments/{id}", self.enrolment, methods=get),
            Route("/v1/enrolments", self.apply, methods=["POST"]),
        ]

    async def registry(self, _request: Request) -> Response:
        return json_response(views.summary(self._office))

    async def certificates(self, _request: Request) -> Response:
        found = self._office.query("SELECT wire FROM certificates ORDER BY number")
        return json_response({"certificates": [bytes(wire).hex() for (wire,) in found]})

    async def schedules(self, _request: Request) -> Response:
        found = [wire.hex() for _, wire in self._office.schedules()]
        return json_response({"schedules": found})

    async def head(self, _request: Request) -> Response:
        return json_response({"head": (log.newest_head(self._office.query) or b"").hex()})

    async def heads(self, request: Request) -> Response:
        found = log.heads_from(self._office.query, _number(request, "from"))
        return json_response({"heads": [wire.hex() for wire in found]})

    async def leaves(self, request: Request) -> Response:
        found = log.leaves_from(self._office.query, _number(request, "from"))
        return json_response({"leaves": [leaf.hex() for leaf in found]})

    async def proof(self, request: Request) -> Response:
        number = _parse(request.path_params["number"], "number")
        proof = log.prove(self._office.query, number)
        if proof is None:
            raise _not_found(f"the log has no leaf {number}")
        return json_response({"proof": proof.hex()})

    async def consistency(self, request: Request) -> Response:
        first, second = _number(request, "first"), _number(request, "second")
        query = self._office.query
        if second > log.log_size(query):
            raise _not_found(f"the log has no {second} leaves")
        try:
            path = log.consistency(query, first, second)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return json_response({"path": [digest.hex() for digest in path]})

    async def attestation(self, request: Request) -> Response:
        account = _hash(request.path_params["account"])
        query = self._office.query
        standing = views.member_view(self._office, account)
        if standing is None:
            raise _not_found("the account is not known to this registry")
        found = query(
            "SELECT leaf FROM attestations WHERE account = ? ORDER BY serial DESC LIMIT 1", account
        )
        proof = log.prove(query, found[0][0]) if found else None
        public = {
            name: standing[name]
            for name in ("state", "serial", "until_ns", "days_left", "waits_for")
            if name in standing
        }
        return json_response({**public, "proof": None if proof is None else proof.hex()})

    async def attestations(self, request: Request) -> Response:
        query = self._office.query
        found = query(
            "SELECT serial, leaf FROM attestations"
            " WHERE serial > ? AND NOT is_revoked AND until_ns > ? ORDER BY serial LIMIT ?",
            *(_number(request, "after"), self._office.clock(), log.PAGE_PROOFS),
        )
        return json_response(
            {"proofs": self._prove(leaf for _, leaf in found), "last": found[-1][0] if found else 0}
        )

    async def revocations(self, request: Request) -> Response:
        found = self._office.query(
            "SELECT leaf FROM revocations WHERE leaf >= ? ORDER BY leaf LIMIT ?",
            _number(request, "from"),
            log.PAGE_PROOFS,
        )
        proofs = self._prove(leaf for (leaf,) in found)
        return json_response({"proofs": proofs, "last": found[-1][0] if found else 0})

    async def enrolment(self, request: Request) -> Response:
        view = views.enrolment_view(self._office, _hash(request.path_params["id"]))
        if view is None:
            raise _not_found("no such application is known here")
        return json_response(view)

    async def apply(self, request: Request) -> Response:
        subnet = self._subnet(request)
        now_s = trio.current_time()
        if not self._rates.allow(subnet, now_s):
            busy = ProviderError(
                "too many applications from this network",
                hint=f"Try again in {self._rates.wait_s(subnet, now_s):.0f} s.",
            )
            raise Refused(busy, 429)
        form = await _body(request)
        applied = await self._office.apply(form, subnet)
        if isinstance(applied, Rejected):
            is_busy = applied.reason.startswith("busy:")
            error = ProviderError(applied.reason) if is_busy else ConfigError(applied.reason)
            raise Refused(error, 503 if is_busy else 400)
        view = views.enrolment_view(self._office, applied) or {}
        return json_response({"id": applied.hex(), **view}, 202)

    def _prove(self, leaves: Iterable[int]) -> list[str]:
        prover = log.Prover(self._office.query)
        proofs = map(prover.prove, leaves)
        return [proof.hex() for proof in proofs if proof is not None]

    def _subnet(self, request: Request) -> str:
        host = request.client.host if request.client else ""
        if self._behind_proxy:
            host = request.headers.get("x-forwarded-for", "").rpartition(",")[2].strip() or host
        return subnet_of(host)


def subnet_of(host: str) -> str:
    """What addresses are counted together: an IPv4 /24, an IPv6 /48; all others are one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    bits = 24 if address.version == 4 else 48
    return str(ipaddress.ip_network((address, bits), strict=False))


class Gate:
    """ASGI middleware: HTTP/1.1 alone, a bounded number of requests at once, headers for all."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        app = self._refusal(scope) or self._app
        self._open += 1
        try:
            await app(scope, receive, answer)
        finally:
            self._open -= 1

    def _refusal(self, scope: Scope) -> Response | None:
        if scope["http_version"] not in ("1.0", "1.1"):
            return error_response(ConfigError("this server speaks HTTP/1.1 only"), 505)
        if self._open >= MAX_OPEN_REQUESTS:
            busy = ProviderError("too many open requests", hint="Try again in a moment.")
            return error_response(busy, 503)
        return None


def create_app(office: Office, *, behind_proxy: bool = False) -> Starlette:
    """The ASGI application. ``behind_proxy`` believes the last ``X-Forwarded-For``."""
    return Starlette(
        routes=RegistryApi(office, behind_proxy=behind_proxy).routes(),
        middleware=[Middleware(Gate)],
        exception_handlers=EXCEPTION_HANDLERS,
    )


async def _body(request: Request) -> bytes:
    """The body of a request, bounded in size and time."""
    data = bytearray()
    with trio.move_on_after(BODY_S) as scope:
        async for part in request.stream():
            data += part
            if len(data) > MAX_FORM_BYTES:
                raise Refused(ProtocolError(f"a form has at most {MAX_FORM_BYTES} bytes"), 413)
    if scope.cancelled_caught:
        raise Refused(ProtocolError(f"the form did not come within {BODY_S:.0f} s"), 408)
    return bytes(data)


def _number(request: Request, name: str) -> int:
    return _parse(request.query_params.get(name, "0"), name)


def _parse(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < MAX_NUMBER_DIGITS):
        raise ConfigError(f"{name} must be a whole number, not {text[:40]!r}")
    return int(text)


def _hash(text: str) -> bytes:
    if _HEX.fullmatch(text) is None:
        raise ConfigError(f"{text[:80]!r} is not 64 lower-case hex digits")
    return bytes.fromhex(text)


def _not_found(what: str) -> Refused:
    return Refused(P2PFlopError(what), 404)
