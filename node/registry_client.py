"""What a node asks of a registry over HTTP: every answer bounded in bytes, time and number.

The registry is trusted for nothing that its signatures do not prove. An answer that is too long,
too slow or no JSON of the right shape is a ProtocolError, and nobody to answer a ProviderError;
whoever asked tries again later.
"""

from __future__ import annotations

import ssl
from typing import Annotated, Final, Protocol, TypeVar

import msgspec
import trio

from p2pflop.errors import ConfigError, ProtocolError, ProviderError
from p2pflop.franchise.issuer import MAX_CERTIFICATES
from p2pflop.franchise.merkle import MAX_LEVELS
from p2pflop.franchise.records import MAX_PROOF_BYTES, MAX_RECORD_BYTES
from p2pflop.node.printable import printable
from p2pflop.wire import MAX_ENVELOPE_OVERHEAD_BYTES, U63

REPLY_S: Final = 15.0
MAX_REPLY_BYTES: Final = 4 * 1024 * 1024
MAX_PAGE: Final = 128
MAX_HEADS: Final = 512
READ_BYTES: Final = 65_536

_HEX: Final = r"^([0-9a-f]{2})*\Z"
_Record = Annotated[
    str,
    msgspec.Meta(max_length=2 * (MAX_RECORD_BYTES + MAX_ENVELOPE_OVERHEAD_BYTES), pattern=_HEX),
]
_Proof = Annotated[str, msgspec.Meta(max_length=2 * MAX_PROOF_BYTES, pattern=_HEX)]
_Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Words = Annotated[str, msgspec.Meta(max_length=200)]


class Fetch(Protocol):
    """How a registry is reached."""

    async def __call__(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body of the answer to GET, or, with ``body``, to POST ``path``.

        Raises ProviderError, ProtocolError.
        """


class HttpFetch:
    """A registry at a URL. No connection outlives its answer."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._context: ssl.SSLContext | None = None

    async def __call__(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """See Fetch."""
        with trio.move_on_after(REPLY_S):
            return await self._ask(path, body)
        raise ProviderError(f"the registry at {self._url} did not answer in {REPLY_S:.0f} s")

    async def _ask(self, path: str, body: bytes | None) -> tuple[int, bytes]:
        if self._context is None:
            # Importing httpx and reading all authorities takes 0.2 s, which nobody need wait for.
            self._context = await trio.to_thread.run_sync(_make_context)
        import httpx

        data = bytearray()
        method = "GET" if body is None else "POST"
        try:
            async with (
                httpx.AsyncClient(
                    timeout=REPLY_S, follow_redirects=False, verify=self._context
                ) as client,
                client.stream(method, self._url + path, content=body) as response,
            ):
                async for part in response.aiter_bytes(READ_BYTES):
                    data += part
                    if len(data) > MAX_REPLY_BYTES:
                        raise ProtocolError(
                            f"the registry's answer is over {MAX_REPLY_BYTES} bytes"
                        )
                return response.status_code, bytes(data)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise ProviderError(
                f"the registry at {self._url} does not answer: {printable(error)}"
            ) from error


def _make_context() -> ssl.SSLContext:
    import httpx

    return httpx.create_ssl_context()


class HeadReply(msgspec.Struct, frozen=True):
    """``GET /v1/head``."""

    head: _Record


class HeadsReply(msgspec.Struct, frozen=True):
    """``GET /v1/heads``."""

    heads: Annotated[tuple[_Record, ...], msgspec.Meta(max_length=MAX_HEADS)]


class CertificatesReply(msgspec.Struct, frozen=True):
    """``GET /v1/certificates``."""

    certificates: Annotated[tuple[_Record, ...], msgspec.Meta(max_length=MAX_CERTIFICATES)]


class ConsistencyReply(msgspec.Struct, frozen=True):
    """``GET /v1/consistency``."""

    path: Annotated[tuple[_Digest, ...], msgspec.Meta(max_length=MAX_LEVELS + 1)]


class ProofsReply(msgspec.Struct, frozen=True):
    """``GET /v1/attestations?after=`` and ``/v1/revocations?from=``."""

    proofs: Annotated[tuple[_Proof, ...], msgspec.Meta(max_length=MAX_PAGE)]
    last: U63


class StandingReply(msgspec.Struct, frozen=True):
    """``GET /v1/attestations/<account>``: how an account stands."""

    state: _Words
    waits_for: _Words = ""
    proof: _Proof | None = None


class EnrolmentReply(msgspec.Struct, frozen=True):
    """``GET /v1/enrolments/<id>``, and what ``POST /v1/enrolments`` answers."""

    state: _Words
    waits_for: _Words = ""
    reason: _Words = ""
    missing_nusd: U63 = 0
    id: _Digest | None = None


class ScheduleReply(msgspec.Struct, frozen=True):
    """The fee, as ``GET /v1/registry`` tells it."""

    fee_nusd: U63
    guidelines: _Words


class SummaryReply(msgspec.Struct, frozen=True):
    """``GET /v1/registry``."""

    issuer: _Digest
    network: _Words
    schedule: ScheduleReply | None = None


class _ErrorBody(msgspec.Struct, frozen=True):
    message: str


class _ErrorReply(msgspec.Struct, frozen=True):
    error: _ErrorBody


ReplyT = TypeVar("ReplyT", bound=msgspec.Struct)


async def ask(fetch: Fetch, kind: type[ReplyT], path: str, body: bytes | None = None) -> ReplyT:
    """What the registry answers.

    Raises ConfigError if it refuses what was asked, LookupError if it knows nothing of it,
    ProviderError if it cannot answer now, ProtocolError if its answer is none.
    """
    status, data = await fetch(path, body)
    if status == 404:
        raise LookupError(path)
    if status >= 400:
        said = f"the registry says: {printable(_error(data) or status, 300)}"
        raise ConfigError(said) if status < 500 and status != 429 else ProviderError(said)
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"the registry's answer to {path} is none: {printable(error, 200)}"
        ) from error


def _error(data: bytes) -> str:
    try:
        return msgspec.json.decode(data, type=_ErrorReply).error.message
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return ""
