"""Records on the wire: fixed-order msgpack arrays, one encoding each, and how they are signed.

Two rules hold for every record:

1. **One encoding.** ``decode`` checks types, ranges and sizes, then encodes the value again and
   compares: another way to write the same value is refused. So equal values have equal hashes.
2. **Signed records grow by ``ext``.** Their last field is ``((id, bytes), ...)`` with ids rising,
   at most ``MAX_EXT_BYTES`` in all. An unknown even id is ignored; an unknown odd id is critical
   and refuses the record.

A signature is Ed25519 (RFC 8032, strictly verified) over
``b"p2pflop/1/" + network_id + b"/" + kind + b"\\0" + public_key + body``; the BLAKE3 hash of the
same bytes is the record's id, so an id names kind, signer and content but not the signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, ClassVar, Final, Generic, TypeVar, cast

import msgspec

from p2pflop.errors import ProtocolError
from p2pflop.ids import HASH_BYTES, content_hash
from p2pflop.keys import SIGNATURE_BYTES, PrivateKey, verify_signature

MAX_EXT_BYTES: Final = 1024
MAX_ENVELOPE_OVERHEAD_BYTES: Final = 256
DEFAULT_NETWORK: Final = "main"
REOPENED: Final = 512

U63 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Hash = Annotated[bytes, msgspec.Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
Ext = tuple[tuple[U32, bytes], ...]
Text = Annotated[str, msgspec.Meta(max_length=200)]


class Record(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Base of everything that is hashed or sent. Subclasses add fields, in wire order."""

    MAX_BYTES: ClassVar[int] = 64 * 1024


class SignedRecord(Record, frozen=True):
    """A record that travels in an envelope. The last field of a subclass is ``ext: Ext = ()``."""

    KIND: ClassVar[str] = ""
    KNOWN_EXT: ClassVar[frozenset[int]] = frozenset()


R = TypeVar("R", bound=Record)
S = TypeVar("S", bound=SignedRecord)
T = TypeVar("T")


class Envelope(Record, frozen=True):
    """A signed record as it travels: its kind, the signer's Ed25519 key, body and signature."""

    kind: Annotated[str, msgspec.Meta(max_length=32)]
    public_key: Key
    body: bytes
    signature: Signature


@dataclass(frozen=True, slots=True)
class Sealed(Generic[T]):
    """A record whose signature was made or verified here. ``wire`` is its one encoding."""

    record: T
    signer: bytes
    id: bytes
    wire: bytes


def encode(record: Record) -> bytes:
    """The one encoding of ``record``."""
    return msgspec.msgpack.encode(record)


def decode(kind: type[R], data: bytes) -> R:
    """``data`` as a ``kind``. Raises ProtocolError if it is not the one encoding of a valid one."""
    if len(data) > kind.MAX_BYTES:
        raise ProtocolError(
            f"{kind.__name__} of {len(data)} bytes is over its limit of {kind.MAX_BYTES}"
        )
    try:
        record = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a valid {kind.__name__}: {str(error)[:200]}") from error
    if msgspec.msgpack.encode(record) != data:
        raise ProtocolError(f"{kind.__name__} is not in its one encoding")
    return record


def envelope_kind(data: bytes) -> str:
    """What an envelope claims to hold; nothing is verified. Raises ProtocolError."""
    try:
        return msgspec.msgpack.decode(data, type=Envelope).kind
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a valid envelope: {str(error)[:200]}") from error


def signed_bytes(network: str, kind: str, public_key: bytes, body: bytes) -> bytes:
    """What a signature covers and what a record's id hashes."""
    return b"p2pflop/1/" + network.encode() + b"/" + kind.encode() + b"\0" + public_key + body


def seal(record: S, key: PrivateKey, network: str = DEFAULT_NETWORK) -> Sealed[S]:
    """Sign ``record``. Raises ValueError if it is not one that ``open_sealed`` accepts."""
    try:
        body = encode(record)
        decode(type(record), body)
    except OverflowError as error:
        raise ValueError(f"{type(record).__name__} has an integer of over 64 bits") from error
    except ProtocolError as error:
        raise ValueError(error.message) from error
    _check_ext(record)
    message = signed_bytes(network, record.KIND, key.public_key, body)
    envelope = Envelope(record.KIND, key.public_key, body, key.sign(message))
    return Sealed(record, key.public_key, content_hash(message), encode(envelope))


def open_sealed(kind: type[S], data: bytes, network: str = DEFAULT_NETWORK) -> Sealed[S]:
    """Verify and decode an envelope. Raises ProtocolError or VerificationError."""
    if len(data) > kind.MAX_BYTES + MAX_ENVELOPE_OVERHEAD_BYTES:
        raise ProtocolError(f"{kind.KIND} of {len(data)} bytes is over its limit")
    try:
        envelope = msgspec.msgpack.decode(data, type=Envelope)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a valid envelope: {str(error)[:200]}") from error
    if msgspec.msgpack.encode(envelope) != data:
        raise ProtocolError("envelope is not in its one encoding")
    if envelope.kind != kind.KIND:
        raise ProtocolError(f"expected a {kind.KIND}, got a {envelope.kind!r}")
    message = signed_bytes(network, envelope.kind, envelope.public_key, envelope.body)
    verify_signature(envelope.public_key, message, envelope.signature)
    record = decode(kind, envelope.body)
    try:
        _check_ext(record)
    except ValueError as error:
        raise ProtocolError(f"{kind.KIND}: {error}") from error
    return Sealed(record, envelope.public_key, content_hash(message), data)


def reopen(kind: type[S], data: bytes, network: str = DEFAULT_NETWORK) -> Sealed[S]:
    """``open_sealed`` for envelopes that one purchase meets again and again: verified once."""
    return cast("Sealed[S]", _reopen(kind, data, network))


@lru_cache(maxsize=REOPENED)
def _reopen(kind: type[SignedRecord], data: bytes, network: str) -> Sealed[SignedRecord]:
    return open_sealed(kind, data, network)


def _check_ext(record: SignedRecord) -> None:
    ext: Ext = getattr(record, "ext", ())
    ids = [number for number, _ in ext]
    if any(later <= earlier for earlier, later in pairwise(ids)):
        raise ValueError("ext ids do not rise")
    if sum(len(value) for _, value in ext) > MAX_EXT_BYTES:
        raise ValueError(f"ext is over {MAX_EXT_BYTES} bytes")
    unknown = [number for number in ids if number % 2 and number not in record.KNOWN_EXT]
    if unknown:
        raise ValueError(f"critical ext {unknown[0]} is unknown to this version")
