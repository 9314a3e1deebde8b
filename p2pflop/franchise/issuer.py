"""Whom a registry's signatures are by: its certificates, and what they make of a head.

An ``Issuer`` begins as a root key that somebody trusts, and learns certificates by ``learn``; any
of them may be missing, since each stands by the root's signature. Times are judged by what is in
the records: a head counts if its key was certified when it was made, however long ago that was, so
that a registry which is down harms nobody. Clocks may differ by ``CLOCK_TOLERANCE_NS``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, TypeVar

from p2pflop.errors import ProtocolError, VerificationError
from p2pflop.franchise.records import (
    MAX_CERTIFICATE_NS,
    Certificate,
    CertificateRequest,
    Head,
    Leaf,
    LeafKind,
)
from p2pflop.keys import PrivateKey
from p2pflop.market.records import ZERO_HASH, Rejected
from p2pflop.market.sheets import CLOCK_TOLERANCE_NS
from p2pflop.wire import (
    DEFAULT_NETWORK,
    Sealed,
    SignedRecord,
    decode,
    encode,
    open_sealed,
    reopen,
    seal,
)

MAX_CERTIFICATES: Final = 1024
FUTURE: Final = "head is from the future"
WITHDRAWN: Final = "head is signed with a key that was withdrawn"

S = TypeVar("S", bound=SignedRecord)


@dataclass(frozen=True, slots=True)
class Issuer:
    """A registry as it is known: ``key`` is its root key, ``certificates`` go by number."""

    key: bytes
    network: str = DEFAULT_NETWORK
    certificates: dict[int, Sealed[Certificate]] = field(default_factory=dict)

    def learn(self, data: bytes) -> Issuer | Rejected:
        """This issuer with a certificate more; itself if that is known."""
        checked = check_certificate(data, self.key, self.network)
        if isinstance(checked, Rejected):
            return checked
        known = self.certificates.get(checked.record.number)
        if known is not None:
            number = checked.record.number
            return self if known == checked else Rejected(f"two certificates numbered {number}")
        if len(self.certificates) >= MAX_CERTIFICATES:
            return Rejected(f"over {MAX_CERTIFICATES} certificates")
        return Issuer(self.key, self.network, {**self.certificates, checked.record.number: checked})

    def learn_all(self, certificates: tuple[bytes, ...]) -> Issuer | Rejected:
        """``learn``, for several."""
        issuer = self
        for data in certificates:
            learned = issuer.learn(data)
            if isinstance(learned, Rejected):
                return learned
            issuer = learned
        return issuer

    def certificate_of(self, online_key: bytes) -> Certificate | None:
        """The newest certificate of that key."""
        for number in sorted(self.certificates, reverse=True):
            certificate = self.certificates[number].record
            if certificate.online_key == online_key:
                return certificate
        return None

    def is_withdrawn(self, certificate: Certificate) -> bool:
        """Whether a later certificate gives up this one's key."""
        return any(
            number > certificate.number and later.record.withdraws
            for number, later in self.certificates.items()
        )

    def withdrawals(self) -> int:
        """How often all online keys before were given up."""
        return sum(1 for each in self.certificates.values() if each.record.withdraws)

    def check_head(self, data: bytes, now_ns: int) -> Sealed[Head] | Rejected:
        """A head by a key that was certified for when it was made, and is not withdrawn."""
        try:
            head = reopen(Head, data, self.network)
        except (ProtocolError, VerificationError) as error:
            return Rejected(f"head: {error.message}")
        certificate = self.certificate_of(head.signer)
        if head.record.issuer != self.key or certificate is None:
            return Rejected("head is not by this registry")
        if self.is_withdrawn(certificate):
            return Rejected(WITHDRAWN)
        if not certificate.valid_from_ns <= head.record.at_ns < certificate.valid_until_ns:
            return Rejected("head is signed with a key that was not certified at that time")
        if head.record.at_ns > now_ns + CLOCK_TOLERANCE_NS:
            return Rejected(FUTURE)
        return head

    def open_signed(self, kind: type[S], data: bytes) -> Sealed[S] | Rejected:
        """An envelope by one of the certified keys, withdrawn or not: the log says what counts."""
        try:
            sealed = open_sealed(kind, data, self.network)
        except (ProtocolError, VerificationError) as error:
            return Rejected(f"{kind.KIND}: {error.message}")
        if self.certificate_of(sealed.signer) is None:
            return Rejected(f"{kind.KIND} is not by this registry")
        return sealed


def sign_certificate(
    root: PrivateKey, request: CertificateRequest, valid_from_ns: int, valid_until_ns: int
) -> Sealed[Certificate]:
    """What the root key says to ``request``. Raises ValueError if it is for another registry, or
    would make what ``check_certificate`` does not take."""
    if request.issuer != root.public_key:
        raise ValueError("the request is for the root key of another registry")
    certificate = Certificate(
        version=1,
        number=request.number,
        online_key=request.online_key,
        valid_from_ns=valid_from_ns,
        valid_until_ns=valid_until_ns,
        previous=request.previous,
        log_size=request.log_size,
        log_root=request.log_root,
        withdraws=request.withdraws,
    )
    sealed = seal(certificate, root, request.network_id)
    checked = check_certificate(sealed.wire, root.public_key, request.network_id)
    if isinstance(checked, Rejected):
        raise ValueError(checked.reason)
    return sealed


def check_certificate(
    data: bytes, root_key: bytes, network: str = DEFAULT_NETWORK
) -> Sealed[Certificate] | Rejected:
    """All that can be said of a certificate alone."""
    try:
        sealed = reopen(Certificate, data, network)
    except (ProtocolError, VerificationError) as error:
        return Rejected(f"certificate: {error.message}")
    certificate = sealed.record
    if sealed.signer != root_key:
        return Rejected("certificate is not by the root key of this registry")
    if not 0 < certificate.valid_until_ns - certificate.valid_from_ns <= MAX_CERTIFICATE_NS:
        return Rejected("certificate must be for up to 90 days")
    if certificate.online_key == root_key:
        return Rejected("certificate makes the root key the online key")
    if (certificate.number == 1) != (certificate.previous == ZERO_HASH):
        return Rejected("certificate names no previous one, or one too many")
    return sealed


def encode_leaf(kind: LeafKind, at_ns: int, body: bytes) -> bytes:
    """A leaf of the log, as it is hashed."""
    return encode(Leaf(1, kind, at_ns, body))


def open_leaf(data: bytes) -> Leaf | Rejected:
    """A leaf; what its body says is not looked at."""
    try:
        return decode(Leaf, data)
    except ProtocolError as error:
        return Rejected(f"leaf: {error.message}")
