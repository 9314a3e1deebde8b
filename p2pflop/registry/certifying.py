"""Certificates of the online key: asked for here, signed where the root key is, installed here."""

from __future__ import annotations

from typing import Final

from p2pflop.errors import ConfigError, VerificationError
from p2pflop.franchise.issuer import check_certificate
from p2pflop.franchise.records import Certificate, CertificateRequest, LeafKind
from p2pflop.market.records import ZERO_HASH, Rejected
from p2pflop.registry.draft import Draft
from p2pflop.registry.log import Query, log_root, log_size
from p2pflop.wire import Sealed

CERTIFICATE_DAYS: Final = 90


def newest_certificate(query: Query, issuer: bytes, network: str) -> Sealed[Certificate] | None:
    """The certificate with the highest number; None before the first."""
    found = query("SELECT wire FROM certificates ORDER BY number DESC LIMIT 1")
    if not found:
        return None
    checked = check_certificate(bytes(found[0][0]), issuer, network)
    if isinstance(checked, Rejected):
        raise VerificationError(
            f"the newest certificate of this registry is none: {checked.reason}",
            hint="Restore the registry from a backup.",
        )
    return checked


def request_certificate(
    query: Query, issuer: bytes, network: str, online_key: bytes, *, withdraws: bool
) -> CertificateRequest:
    """What the root key has to sign next."""
    previous = newest_certificate(query, issuer, network)
    size = log_size(query)
    return CertificateRequest(
        version=1,
        issuer=issuer,
        network_id=network,
        number=1 if previous is None else previous.record.number + 1,
        online_key=online_key,
        previous=ZERO_HASH if previous is None else previous.id,
        log_size=size,
        log_root=log_root(query, size) if size else ZERO_HASH,
        withdraws=withdraws,
    )


def install(draft: Draft, wire: bytes) -> Sealed[Certificate]:
    """Take up a certificate of the key that signs this draft. Raises ConfigError.

    One that withdraws the keys before must state the log as it is: what they signed beyond that
    is void for everybody, so nothing may have been added since it was asked for.
    """
    checked = check_certificate(wire, draft.issuer, draft.network)
    if isinstance(checked, Rejected):
        raise ConfigError(checked.reason)
    known = newest_certificate(draft.query, draft.issuer, draft.network)
    if known is not None and known.id == checked.id:
        return known
    certificate = checked.record
    expected = (1, ZERO_HASH) if known is None else (known.record.number + 1, known.id)
    if (certificate.number, certificate.previous) != expected:
        raise ConfigError(
            f"certificate {certificate.number} does not follow the one that is here",
            hint="Ask for it again: p2pflop registry certify --request FILE.",
        )
    size = log_size(draft.query)
    is_current = certificate.log_size == size or not certificate.withdraws
    root = ZERO_HASH if certificate.log_size == 0 else None
    if certificate.log_size > size or not is_current:
        raise ConfigError(
            "the log is not what it was when this certificate was asked for",
            hint="Stop the service, and ask for it again: p2pflop registry certify --request FILE.",
        )
    if certificate.log_root != (root or log_root(draft.query, certificate.log_size)):
        raise ConfigError("the certificate states a log that is not this registry's")
    draft.connection.execute(
        "INSERT INTO certificates VALUES (?, ?, ?)",
        (certificate.number, certificate.online_key, wire),
    )
    draft.append(LeafKind.CERTIFICATE, wire)
    return checked
